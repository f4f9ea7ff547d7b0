"""Retention on real servers: who keeps what, how much goes in a step, and what a stream leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest
from msgspec.structs import replace

from millstream.brokers.base import Dead, Policy, StreamSpec, Subscription, Tended
from millstream.brokers.redis import sources, tending
from millstream.brokers.redis.broker import RedisBroker
from millstream.brokers.redis.link import Link
from millstream.errors import BrokerFull
from tests.redis import brokers
from tests.redis.brokers import everything, opened, records, run_in
from tests.redis.consuming import LEASE_S, ORDERS, claimed, joined, settled
from tests.redis.raw import DEAD, DUE, GROUP, LEASE, LOG, META, NOTE, STATS, Raw
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

FEW = Policy(events=10)
MANY = 500
NODE = 100
STREAM_META = b"{orders}:meta"


@pytest.fixture
def redis(server: RedisServer) -> Iterator[Raw]:
    with Raw(server.port) as redis:
        yield redis


@asynccontextmanager
async def kept(server: RedisServer, policy: Policy = FEW, spec: StreamSpec = ORDERS) -> AsyncIterator[RedisBroker]:
    async with opened(server.url) as broker:
        assert await broker.declare(spec, policy) == policy
        yield broker


async def create(broker: RedisBroker, group: str = GROUP, *, order: bool = False) -> None:
    await broker.create(Subscription(ORDERS, group, "app", lease_s=LEASE_S, order=order))


async def trimmed(broker: RedisBroker) -> int:
    return (await broker.tend("orders")).trimmed


def least(count: int = MANY, stay: int = FEW.events) -> int:
    return count - stay - NODE


def length(server: RedisServer) -> int:
    found: int = run_in(server, "XLEN", LOG)
    return found


# Who keeps events


@pytest.mark.parametrize("order", [False, True])
async def test_a_group_that_vanished_keeps_what_it_had_not_settled(server: RedisServer, order: bool) -> None:
    async with kept(server) as broker:
        await create(broker, order=order)
        await broker.append("orders", records(MANY))
        run_in(server, "XGROUP", "DESTROY", LOG, GROUP)
        tended = await broker.tend("orders")
        assert (tended.trimmed, tended.pinned_by) == (0, GROUP)
        await broker.admin.discard("orders")
        assert run_in(server, "KEYS", "*") == []


async def test_a_group_of_another_client_keeps_events_while_its_consumers_do_something(server: RedisServer) -> None:
    forget_ms = 1_500
    async with kept(server, Policy(events=10, forget_ms=forget_ms)) as broker, asyncio.timeout(20):
        run_in(server, "XGROUP", "CREATE", LOG, "theirs", "0", "MKSTREAM")
        await broker.append("orders", records(MANY))
        tended = await broker.tend("orders")
        assert (tended.trimmed, tended.pinned_by, tended.forgotten) == (0, "theirs", frozenset())
        begun_ms = broker.clock.now_ms()
        while broker.clock.now_ms() < begun_ms + forget_ms + 100:
            run_in(server, "XREADGROUP", "GROUP", "theirs", "me", "COUNT", 1, "STREAMS", LOG, ">")
            tended = await broker.tend("orders")
            assert (tended.trimmed, tended.forgotten) == (0, frozenset())
        faded = False
        while not tended.forgotten:
            faded |= "theirs" in tended.fading
            tended = await broker.tend("orders")
        assert faded and tended.forgotten == {"theirs"} and tended.trimmed >= least()


async def test_what_is_noted_of_a_silent_group_goes_when_it_is_seen_again_or_no_more(server: RedisServer) -> None:
    hour_ms = 3_600_000
    async with kept(server, Policy(events=10, forget_ms=hour_ms)) as broker:
        await create(broker)
        await broker.append("orders", records(MANY))
        for field in ("seen", "entered"):
            if run_in(server, "HEXISTS", META, f"{field}:{GROUP}"):
                run_in(server, "HINCRBY", META, f"{field}:{GROUP}", -30 * hour_ms)
        before_ms = broker.clock.now_ms()
        tended = await broker.tend("orders")
        announced_ms = int(run_in(server, "HGET", META, f"announced:{GROUP}"))
        assert abs(announced_ms - before_ms) < 10_000
        assert (tended.trimmed, tended.fading) == (0, {GROUP: announced_ms + hour_ms // 2})
        run_in(server, "HINCRBY", META, f"announced:{GROUP}", 60_000 - hour_ms // 2)
        tended = await broker.tend("orders")
        assert (tended.trimmed, tended.fading) == (0, {GROUP: announced_ms + 60_000})
        run_in(server, "HINCRBY", META, f"announced:{GROUP}", -120_000)
        tended = await broker.tend("orders")
        assert tended.fading == {} and tended.forgotten == {GROUP} and tended.trimmed >= least()
        run_in(server, "HSET", META, f"seen:{GROUP}", before_ms)
        tended = await broker.tend("orders")
        assert (tended.fading, tended.forgotten) == ({}, frozenset())
        assert run_in(server, "HEXISTS", META, f"announced:{GROUP}") == 0
        run_in(server, "HSET", META, f"announced:{GROUP}", before_ms)
        await broker.admin.forget("orders", GROUP)
        await broker.tend("orders")
        assert run_in(server, "HEXISTS", META, f"announced:{GROUP}") == 0


@pytest.mark.parametrize("known_before", [False, True])
async def test_a_group_that_was_adopted_a_moment_ago_keeps_events(server: RedisServer, known_before: bool) -> None:
    async with kept(server, Policy(events=10, forget_ms=60_000)) as broker:
        run_in(server, "XGROUP", "CREATE", LOG, "theirs", "0", "MKSTREAM")
        await broker.append("orders", records(MANY))
        if known_before:  # and in use until now
            assert (await broker.tend("orders")).pinned_by == "theirs"
            run_in(server, "HINCRBY", META, "entered:theirs", -3_600_000)
            run_in(server, "XREADGROUP", "GROUP", "theirs", "me", "COUNT", 1, "STREAMS", LOG, ">")
        await broker.admin.adopt("orders", "theirs", "app")
        tended = await broker.tend("orders")
        assert (tended.trimmed, tended.pinned_by, tended.forgotten) == (0, "theirs", frozenset())


async def test_where_a_person_has_moved_a_group_back_its_events_are_kept(server: RedisServer) -> None:
    async with kept(server) as broker:
        consumer: Any = await broker.subscribe(Subscription(ORDERS, GROUP, "app", lease_s=LEASE_S, order=True))
        await broker.append("orders", records(MANY))
        assert all(await settled(consumer, await claimed(consumer, MANY)))
        await consumer.close()
        run_in(server, "XGROUP", "SETID", LOG, GROUP, "0")
        assert (await broker.tend("orders")).trimmed == 0
        consumer = await broker.subscribe(Subscription(ORDERS, GROUP, "app", lease_s=LEASE_S, order=True))
        assert len(await claimed(consumer, MANY)) == MANY
        await consumer.close()


@pytest.mark.parametrize("order", [False, True])
async def test_what_a_foreign_reader_of_our_group_took_is_kept_only_without_order(
    server: RedisServer, order: bool
) -> None:
    async with kept(server) as broker:
        await create(broker, order=order)
        await broker.append("orders", records(MANY))
        run_in(server, "XREADGROUP", "GROUP", GROUP, "theirs", "STREAMS", LOG, ">")
        if order:  # the mark of the owner is what counts
            consumer = await broker.subscribe(Subscription(ORDERS, GROUP, "app", lease_s=LEASE_S, order=True))
            run_in(server, "HSET", LEASE, "w", run_in(server, "XINFO", "STREAM", LOG)[7])
            await consumer.close()
        assert (await trimmed(broker) > 0) == order


# Dead letters


async def test_letters_keep_their_events_in_whatever_order_they_died(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FIRST_COUNT", 2)
    async with kept(server) as broker:
        consumer = await joined(broker)
        await broker.append("orders", records(MANY))
        claims = await claimed(consumer, MANY)
        dying = [400, 300, 200, 350, 250]
        for n in dying:
            assert await settled(consumer, [claims[n]], Dead("failed", "broken")) == [True]
        assert all(await settled(consumer, [claim for n, claim in enumerate(claims) if n not in dying]))
        for n in sorted(dying):
            tended = await broker.tend("orders")
            assert tended.pinned_by == f"dead letters of {GROUP}" and n - NODE <= MANY - length(server) <= n
            [letter] = [
                it for it in await broker.admin.dead("orders", GROUP) if it.stored.position.offset == offset(claims, n)
            ]
            if n == 300:
                assert await broker.admin.drop([letter]) == [True]
            else:
                assert await broker.admin.replay([letter]) == [True]
                assert all(await settled(consumer, await claimed(consumer, 1)))
        assert (await broker.tend("orders")).pinned_by == "" and length(server) <= FEW.events + NODE
        await consumer.close()


def offset(claims: list[Any], n: int) -> str:
    found: str = claims[n].position.offset
    return found


async def test_a_letter_whose_event_is_gone_keeps_nothing(server: RedisServer) -> None:
    async with kept(server) as broker:
        consumer = await joined(broker)
        await broker.append("orders", records(MANY))
        claims = await claimed(consumer, MANY)
        assert await settled(consumer, claims[:1], Dead("failed", "broken")) == [True]
        assert all(await settled(consumer, claims[1:]))
        assert (await broker.tend("orders")).pinned_by == f"dead letters of {GROUP}"
        run_in(server, "XTRIM", LOG, "MAXLEN", MANY - 1)
        assert await trimmed(broker) >= least()
        [letter] = await broker.admin.dead("orders", GROUP)
        assert await broker.admin.replay([letter]) == [False]
        await consumer.close()


async def test_until_all_letters_were_looked_at_everything_stays(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_PAGES", 1)
    async with kept(server) as broker:
        consumer = await joined(broker)
        await broker.append("orders", records(MANY))
        claims = await claimed(consumer, MANY)
        assert all(await settled(consumer, claims[:400]))
        assert all(await settled(consumer, claims[400:], Dead("failed", "broken")))
        first = await broker.tend("orders")
        assert (first.trimmed, first.pinned_by) == (0, f"dead letters of {GROUP}")
        assert await trimmed(broker) >= 300 and length(server) >= NODE
        await consumer.close()


# Steps


def trim(
    redis: Raw, *groups: str, stay: int | str = 10, letters: tuple[Any, Any] = ("", ""), most: int = 10_000
) -> Any:
    keys = [LOG, META, *[key for _ in groups for key in (DUE, NOTE, DEAD, STATS, LEASE)]]
    words = [word for group in groups for word in (group, 0, *letters)]
    return redis.run("trim", keys, [0, stay, 1, 0, most, 100, "", *words])


def test_a_group_that_came_since_the_look_is_not_passed_over(redis: Raw) -> None:
    assert trim(redis) == [b"NONE"]
    redis.add(MANY)
    redis.join()
    assert trim(redis) == [b"AGAIN"] and redis.do("XLEN", LOG) == MANY
    answer = trim(redis, GROUP)
    assert answer[:5] == [b"OK", 0, MANY, b"0-0", GROUP.encode()]


def test_letters_that_came_since_the_look_are_looked_at(redis: Raw) -> None:
    redis.join()
    redis.enter("c")
    found = redis.add(MANY)
    redis.read("c", MANY)
    redis.settle("c", ("dead", found[200], 1, "failed", "why"))
    redis.do("XACK", LOG, GROUP, *found)
    assert trim(redis, GROUP)[4] == b"dead letters of g" and redis.do("XRANGE", LOG, found[200], found[200])
    for _ in range(99):
        redis.do("XADD", DEAD, "*", "position", "nowhere")
    assert trim(redis, GROUP) == [b"AGAIN"]
    last = redis.do("XREVRANGE", DEAD, "+", "-", "COUNT", 1)[0][0]
    answer = trim(redis, GROUP, letters=(last, found[300]))
    assert answer[4] == b"dead letters of g" and 0 < answer[1] <= 100


def test_a_step_removes_no_more_than_it_may(redis: Raw) -> None:
    redis.add(MANY)
    removed = [trim(redis, most=NODE)[1] for _ in range(6)]
    assert max(removed) <= NODE and removed[0] > 0 and NODE + 10 >= MANY - sum(removed) >= 10
    assert redis.do("HGET", META, "trimmed") == b"%d" % sum(removed)


def test_events_go_where_there_is_no_room(redis: Raw) -> None:
    redis.join()
    redis.enter("c")
    found = redis.add(MANY)
    redis.read("c", MANY)
    redis.do("XACK", LOG, GROUP, *found[:300])
    redis.settle("c", *(("retry", id_, 1, 9_000_000_000_000) for id_ in found[300:]))
    redis.do("CONFIG", "SET", "maxmemory", 1)
    try:
        removed = trim(redis, GROUP)[1]
        redis.do("XTRIM", LOG, "MAXLEN", 5)
        assert 200 <= removed <= 300 and trim(redis, GROUP)[5] == [GROUP.encode(), 195]
    finally:
        redis.do("CONFIG", "SET", "maxmemory", 0)
    assert redis.do("ZCARD", DUE) == 5 == len(redis.pending())


async def test_many_events_go_in_steps_and_several_processes_remove_each_once(server: RedisServer) -> None:
    async with kept(server) as broker, opened(server.url, ORDERS) as other:
        count = 25_000
        await broker.append("orders", records(count))
        rounds = await asyncio.gather(*(one.tend("orders") for one in (broker, other) * 2))
        assert sum(tended.trimmed for tended in rounds) == count - length(server) >= least(count)
        [about] = await broker.admin.streams()
        assert about.trimmed == count - about.events and about.added == count
        assert list(await everything(broker, "orders"))[-1] == f"id-{count - 1}"


async def test_who_comes_right_after_another_tells_what_that_one_has_found(server: RedisServer) -> None:
    async with kept(server, Policy(events=10, ceiling_events=2 * MANY)) as broker:
        await broker.append("orders", records(MANY))
        left = '{"by":"me","until_ms":%d,"fading":{"old":7},"fullness":0.5,"pinned_by":"slow","forgotten":["dead"]}'
        run_in(server, "HSET", STREAM_META, "tended", left % 9_000_000_000_000)
        found = Tended(fading={"old": 7}, forgotten=frozenset({"dead"}), fullness=0.5, pinned_by="slow")
        assert await broker.tend("orders") == found and length(server) == MANY
        for text in left % 1, "not of this version":
            run_in(server, "HSET", STREAM_META, "tended", text)
            await broker.append("orders", records(MANY))
            assert (await broker.tend("orders")).trimmed >= least()


def writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is sent from now on."""
    sent: list[bytes] = []
    write = Link._write

    def counted(link: Link, packed: bytes, replies: int, deadline_s: float) -> Any:
        sent.append(packed)
        return write(link, packed, replies, deadline_s)

    monkeypatch.setattr(Link, "_write", counted)
    return sent


@pytest.mark.parametrize("policy", [Policy(), Policy(dedupe_ms=60_000, dedupe_ids=1_000)], ids=["plain", "dedupe"])
async def test_where_nothing_is_to_do_one_write_tells(
    server: RedisServer, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = StreamSpec("orders", partitions=16, key="order_id")
    async with kept(server, policy, spec) as broker:
        await broker.create(Subscription(spec, GROUP, "app", lease_s=LEASE_S, order=True))
        await broker.append("orders", records(160, partitions=16))
        await broker.tend("orders")
        sent = writes(monkeypatch)
        for _ in range(5):
            assert await broker.tend("orders") == Tended()
        assert len(sent) == 5 and not any(b"EVAL" in packed for packed in sent)


async def test_one_process_looks_at_the_partitions_and_the_others_at_what_it_left(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = StreamSpec("orders", partitions=16, key="order_id")
    async with kept(server, Policy(), spec) as one, opened(server.url, spec) as other:
        monkeypatch.setattr(tending, "FRESH_MS", 3_600_000)
        await one.tend("orders")
        sent = writes(monkeypatch)
        for _ in range(3):
            assert await other.tend("orders") == Tended()
        assert len(sent) == 3 and not any(b"XLEN" in packed or b"EVAL" in packed for packed in sent)
        monkeypatch.setattr(tending, "FRESH_MS", 0)
        await other.tend("orders")
        assert any(b"XLEN" in packed for packed in sent)
        monkeypatch.setattr(tending, "FRESH_MS", 3_600_000)
        for looks in (True, False):  # who finds out in the same moment that it need not, has looked once more
            sent.clear()
            assert await one.tend("orders") == Tended()
            assert any(b"XLEN" in packed for packed in sent) == looks


async def test_what_is_known_to_be_due_is_published_although_the_one_that_looked_is_gone(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tending, "FRESH_MS", 3_600_000)
    async with kept(server, Policy()) as one, opened(server.url, ORDERS) as other:
        due_ms = one.clock.now_ms() + 300
        await one.append("orders", [replace(records(1)[0], due_ms=due_ms)])
        assert (await one.tend("orders")).due_ms == due_ms
        assert (await other.tend("orders")).due_ms == due_ms + tending.YIELD_MS
        async with asyncio.timeout(10):
            while not (await other.tend("orders")).published:
                assert not length(server)
        assert one.clock.now_ms() >= due_ms + tending.YIELD_MS and length(server) == 1


async def test_a_round_of_many_partitions_is_few_writes(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = StreamSpec("orders", partitions=16, key="order_id")
    async with kept(server, Policy(events=160), spec) as broker:
        await broker.append("orders", records(160, partitions=16))
        await broker.tend("orders")
        sent = writes(monkeypatch)
        assert await broker.tend("orders") == Tended()
        assert len(sent) <= 1 + 1 + 2 * 16 // tending.AT_ONCE + 1, (
            "a look, what is due, two for each batch, what was found"
        )


async def test_a_stream_that_asks_for_nothing_is_looked_at_more_closely_when_somebody_has_trimmed_it(
    server: RedisServer,
) -> None:
    async with kept(server, Policy()) as broker:
        await create(broker)
        await broker.append("orders", records(MANY))
        for stay in (MANY - 20, MANY - 40):
            assert await broker.tend("orders") == Tended()
            run_in(server, "XTRIM", LOG, "MAXLEN", stay)
            assert (await broker.tend("orders")).lost == {GROUP: 20}


async def test_a_policy_that_was_applied_holds_at_once_although_nothing_was_asked_for_before(
    server: RedisServer,
) -> None:
    async with kept(server, Policy()) as broker, opened(server.url, ORDERS) as other:
        await broker.append("orders", records(MANY))
        for one in (broker, other):
            assert await one.tend("orders") == Tended()
        await broker.admin.apply("orders", FEW)
        assert await trimmed(other) >= least()


async def test_after_a_clock_went_back_nobody_waits_for_who_is_gone(server: RedisServer) -> None:
    async with kept(server) as broker:
        await broker.append("orders", records(MANY))
        left = '{"by":"gone","at_ms":8000000000000,"until_ms":9000000000000}'
        run_in(server, "HSET", STREAM_META, "tended", left)
        assert await trimmed(broker) >= least()


async def test_housekeeping_of_a_stream_that_was_discarded_brings_nothing_back(server: RedisServer) -> None:
    async with kept(server) as broker, opened(server.url, ORDERS) as other:
        await other.append("orders", records(3))
        await broker.admin.discard("orders")
        await other.tend("orders")
        assert run_in(server, "KEYS", "*") == []


async def test_housekeeping_needs_no_room(server: RedisServer) -> None:
    async with kept(server) as broker:
        await create(broker)
        await create(broker, "late", order=True)
        await broker.append("orders", records(MANY))
        run_in(server, "XGROUP", "SETID", LOG, GROUP, "$")
        run_in(server, "XGROUP", "SETID", LOG, "late", "$")
        run_in(server, "CONFIG", "SET", "maxmemory", 1)
        try:
            assert (await broker.tend("orders")).trimmed >= least()
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", 0)


async def test_housekeeping_of_a_stream_without_events_does_nothing(server: RedisServer) -> None:
    async with kept(server, Policy(age_ms=1_000, bytes=1_000, ceiling_bytes=2_000)) as broker:
        assert await broker.tend("orders") == Tended()
        await create(broker)
        assert await broker.tend("orders") == Tended()


# What is full, and what is left


async def test_each_partition_learns_with_how_many_events_the_stream_is_full(server: RedisServer) -> None:
    spec = StreamSpec("orders", partitions=2, key="order_id")
    async with kept(server, Policy(ceiling_bytes=1_000_000), spec) as broker:
        await broker.append("orders", records(200, partitions=2, size_bytes=1_000))
        tended = await broker.tend("orders")
        size = sum(run_in(server, "MEMORY", "USAGE", f"orders:{partition}") for partition in range(2))
        for partition in range(2):
            full_at = int(run_in(server, "HGET", f"{{orders:{partition}}}:meta", "full_at"))
            assert full_at == pytest.approx(200 * 1_000_000 / size, rel=0.1)
        assert tended.fullness == pytest.approx(size / 1_000_000, rel=0.1)
        await broker.admin.apply("orders", Policy())
        assert (await broker.tend("orders")).fullness == 0
        assert run_in(server, "HGET", "{orders:0}:meta", "full_at") is None


async def test_a_busy_partition_may_fill_the_stream_and_none_goes_beyond(server: RedisServer) -> None:
    spec = StreamSpec("orders", partitions=8, key="order_id")
    async with kept(server, Policy(ceiling_events=100), spec) as broker:
        await broker.append("orders", records(2, partitions=2))
        await broker.append("orders", records(98))
        for partition in range(8):
            with pytest.raises(BrokerFull, match="ceiling of 100 events"):
                await broker.append("orders", records(partition + 1, partitions=partition + 1)[-1:])
        run_in(server, "XTRIM", "orders:0", "MAXLEN", 50)
        assert len(await broker.append("orders", records(40))) == 40


@pytest.mark.parametrize("count", [0, 1, 10, 30])
async def test_how_many_events_are_too_large_together_is_told_by_few_of_them(server: RedisServer, count: int) -> None:
    async with kept(server, Policy(ceiling_bytes=1_000_000)) as broker:
        await broker.append("orders", records(max(1, count), size_bytes=400))
        run_in(server, "XTRIM", LOG, "MAXLEN", count)
        await broker.tend("orders")
        with pytest.raises(BrokerFull) if count else nullcontext():
            for first in range(count, 4_000):
                await broker.append("orders", records(1, first=first, size_bytes=400))
        assert 0.8e6 < run_in(server, "MEMORY", "USAGE", LOG) < (1.3e6 if count else 3e6)


async def test_what_keeps_events_stands_with_the_stream(server: RedisServer) -> None:
    async with kept(server) as broker:
        await create(broker)
        await broker.append("orders", records(MANY))
        await broker.tend("orders")
        assert run_in(server, "HGET", STREAM_META, "pinned_by") == GROUP.encode()
        await broker.admin.forget("orders", GROUP)
        assert await trimmed(broker) >= least()
        assert run_in(server, "HGET", STREAM_META, "pinned_by") == b""
        fields = run_in(server, "HKEYS", STREAM_META)
        assert not [field for field in fields if field.endswith(b":" + GROUP.encode())]


async def test_a_policy_of_a_newer_version_is_understood(server: RedisServer) -> None:
    async with kept(server) as broker:
        run_in(server, "HSET", STREAM_META, "policy", '{"events": 10, "moon": "full"}')
        await broker.append("orders", records(MANY))
        assert await trimmed(broker) >= least()


@pytest.mark.parametrize("order", [False, True])
async def test_a_stream_that_is_discarded_leaves_no_key(server: RedisServer, order: bool) -> None:
    async with kept(server) as broker:
        subscription = Subscription(ORDERS, GROUP, "app", lease_s=LEASE_S, order=order)
        consumer = await broker.subscribe(subscription)
        await broker.append("orders", records(20))
        await consumer.keep()
        await consumer.fetch(5, 1)
        await broker.tend("orders")
        await consumer.close()
        run_in(server, "XGROUP", "CREATE", LOG, "theirs", "0")
        await broker.tend("orders")
        await broker.admin.discard("orders")
        assert run_in(server, "KEYS", "*") == []
