"""What somebody else removes from a log while a group needs it is counted, to the event and once, with order and without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from millstream.brokers.base import Claim, Consumer, Done, GroupInfo, Settlement, StreamSpec, Subscription
from millstream.brokers.ordered import OrderedConsumer
from millstream.brokers.redis import tending
from millstream.brokers.redis.broker import RedisBroker
from millstream.brokers.redis.consumer import RedisConsumer
from millstream.brokers.redis.ledger import RedisLedger
from tests.redis import brokers
from tests.redis.brokers import opened, records, run_in, until
from tests.redis.consuming import LEASE_S, ORDERS, WAIT_S, claimed, ids, joined, life_of, settled, soon
from tests.redis.raw import DUE, GROUP, LEASE, LIVE, LOG, META, NOTE, STATS, Raw, fence
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

KEYED = StreamSpec("orders", key="order_id")
FAR_S = 3_600.0


@pytest.fixture(autouse=True)
def every_call_is_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what others have counted, or a group that is gone, is found with the next round of a stream without policy."""
    monkeypatch.setattr(tending, "PLAIN_S", 0.0)


@pytest.fixture
def redis(server: RedisServer) -> Iterator[Raw]:
    with Raw(server.port) as redis:
        yield redis


@asynccontextmanager
async def alone(server: RedisServer, spec: StreamSpec = ORDERS) -> AsyncIterator[RedisBroker]:
    async with opened(server.url, spec) as broker:
        await broker.create(Subscription(spec, GROUP, "app", lease_s=LEASE_S, order=bool(spec.key)))
        yield broker


async def info(broker: RedisBroker) -> GroupInfo:
    (found,) = await broker.admin.groups("orders")
    return found


async def lost(broker: RedisBroker) -> dict[str, int]:
    """What a round tells, and what the next one tells: nothing new."""
    tended = await broker.tend("orders")
    assert (await broker.tend("orders")).lost == {}
    return dict(tended.lost)


async def member(broker: RedisBroker) -> OrderedConsumer:
    consumer = await broker.subscribe(Subscription(KEYED, GROUP, "app", lease_s=LEASE_S, order=True))
    assert isinstance(consumer, OrderedConsumer)
    return consumer


async def beaten(consumer: Consumer, met: Callable[[], Awaitable[bool]]) -> list[Claim]:
    """Let a member do what a worker does, until that is so; what it has claimed."""
    claims: list[Claim] = []
    async with asyncio.timeout(WAIT_S):
        while not await met():
            claims += await consumer.fetch(100, 0.05)
            await consumer.keep()
    return claims


async def finished(consumer: Consumer, claims: Sequence[Claim]) -> None:
    assert all(await consumer.settle([Settlement(claim.position, Done()) for claim in claims]))


async def worked_off(broker: RedisBroker, consumer: Consumer, done: int) -> None:
    """Handle what comes, until so much is done."""
    async with asyncio.timeout(WAIT_S):
        while (await info(broker)).done != done:
            await finished(consumer, await consumer.fetch(100, 0.1))
            await consumer.keep()


def trim(server: RedisServer, left: int) -> None:
    run_in(server, "XTRIM", LOG, "MAXLEN", left)


# Without order


@pytest.mark.parametrize("left", [4, 0])
async def test_what_nobody_had_read_is_counted_and_the_lag_is_right(server: RedisServer, left: int) -> None:
    async with alone(server) as broker:
        await broker.append("orders", records(10))
        trim(server, left)
        assert await lost(broker) == {GROUP: 10 - left}
        found = await info(broker)
        assert (found.lost, found.lag, found.done) == (10 - left, left, 0)
        consumer = await joined(broker)
        await broker.append("orders", records(2, first=10))
        assert all(await settled(consumer, await claimed(consumer, left + 2)))
        assert await lost(broker) == {}
        found = await info(broker)
        assert (found.lost, found.lag, found.pending, found.done) == (10 - left, 0, 0, left + 2)
        await consumer.close()


async def test_what_is_removed_again_and_again_is_counted_each_time(server: RedisServer) -> None:
    async with alone(server) as broker:
        consumer = await joined(broker)
        await broker.append("orders", records(20))
        assert all(await settled(consumer, await claimed(consumer, 3)))
        for left, more in (15, 2), (10, 5), (10, 0):
            trim(server, left)
            assert await lost(broker) == ({GROUP: more} if more else {})
        assert all(await settled(consumer, await claimed(consumer, 4)))
        trim(server, 1)
        assert await lost(broker) == {GROUP: 5}
        found = await info(broker)
        assert (found.lost, found.lag, found.done) == (12, 1, 7)
        await consumer.close()


async def test_who_sweeps_counts_before_anybody_tends(server: RedisServer) -> None:
    async with alone(server) as broker:
        await broker.append("orders", records(10))
        consumer = await joined(broker)
        trim(server, 4)
        consumer._sweep_at = 0.0
        await consumer.keep()
        assert (await info(broker)).lost == 6 and await lost(broker) == {GROUP: 6}
        await consumer.close()


async def test_what_waits_is_counted_long_before_it_is_due(server: RedisServer) -> None:
    async with alone(server) as broker:
        consumer = await joined(broker)
        await broker.append("orders", records(5))
        assert all(await settled(consumer, await claimed(consumer, 5), soon(FAR_S)))
        trim(server, 2)
        assert await lost(broker) == {GROUP: 3}
        found = await info(broker)
        assert (found.lost, found.pending, found.scheduled, found.done) == (3, 2, 2, 0)
        assert run_in(server, "ZCARD", DUE) == 2
        await consumer.close()


async def test_what_a_living_consumer_holds_is_handled_and_not_lost(server: RedisServer) -> None:
    async with alone(server) as broker:
        consumer = await joined(broker)
        await broker.append("orders", records(5))
        claims = await claimed(consumer, 5)
        trim(server, 0)
        assert await lost(broker) == {}
        assert await settled(consumer, claims[:3]) == [True] * 3
        assert await settled(consumer, claims[3:4], soon()) == [True]  # cannot be tried again
        assert await lost(broker) == {GROUP: 1}
        assert await settled(consumer, claims[4:], replace(soon(), counted=False)) == [True]
        assert await lost(broker) == {GROUP: 1}
        found = await info(broker)
        assert (found.lost, found.pending, found.done) == (2, 0, 3)
        assert not run_in(server, "EXISTS", DUE) and not run_in(server, "EXISTS", NOTE)
        await consumer.close()


async def test_what_a_dead_consumer_held_is_lost_when_others_take_over(server: RedisServer) -> None:
    async with alone(server) as broker:
        consumer, other = await joined(broker), await joined(broker)
        await broker.append("orders", records(5))
        await claimed(consumer, 5)
        trim(server, 2)
        assert await lost(broker) == {}
        for link in life_of(consumer).reader, life_of(consumer).writer:
            link.close()
        assert len(await claimed(other, 2, beats=True)) == 2
        assert await lost(broker) == {GROUP: 3}
        await other.close()


def test_what_another_client_left_lying_is_lost_when_it_is_gone(redis: Raw) -> None:
    redis.join()
    ids_ = redis.add(3)
    redis.read("theirs")
    redis.do("XTRIM", LOG, "MAXLEN", 1)
    assert redis.adopt("theirs", 0) == 1 and redis.do("HGET", STATS, "lost") == b"2"
    assert [(id_, owner) for id_, owner, _ in redis.pending()] == [(ids_[2], b"~due")]


def test_a_group_that_begins_at_a_time_to_come_loses_nothing(redis: Raw) -> None:
    redis.add(2)
    redis.join(f"{9_000_000_000_000}-18446744073709551615")
    redis.add(3)
    redis.do("XTRIM", LOG, "MAXLEN", 0)
    assert redis.sweep()[3] == 0 and redis.do("EXISTS", STATS) == 0


def test_a_group_that_begins_in_the_middle_loses_what_came_after_its_beginning(redis: Raw) -> None:
    redis.add(5)
    redis.join("$")
    redis.add(4)
    redis.do("XTRIM", LOG, "MAXLEN", 1)
    assert redis.sweep()[3] == 3 and redis.group()[b"lag"] == 1


def test_at_the_end_a_server_that_counts_on_shows_what_was_passed(redis: Raw) -> None:
    redis.join()
    redis.add(10)
    redis.read("c", 2)
    redis.do("XTRIM", LOG, "MAXLEN", 5)
    redis.read("c", 100)
    forgets = redis.group()[b"entries-read"] == 10  # and its clients have to look, see the next tests
    assert redis.sweep()[3] == (0 if forgets else 3)
    assert redis.group()[b"lag"] == 0 and redis.sweep()[3] == 0


async def test_who_reads_on_behind_a_gap_counts_it(server: RedisServer) -> None:
    async with alone(server) as broker:
        consumer, other = await joined(broker), await joined(broker)
        await broker.append("orders", records(100))
        assert all(await settled(consumer, await claimed(consumer, 10)))
        gone = 0
        for reader, left, count in (consumer, 70, 10), (other, 50, 10), (consumer, 30, 30):
            trim(server, left)
            gone += 20 if count == 10 else 10
            assert all(await settled(reader, await claimed(reader, count)))
        assert sum((await lost(broker)).values()) == (await info(broker)).lost == 40
        found = await info(broker)
        assert (found.lag, found.done) == (0, 60)
        await consumer.close()
        await other.close()


async def test_whoever_looks_and_reads_while_events_are_removed_all_are_handled_or_lost(server: RedisServer) -> None:
    async with alone(server) as broker:
        consumers = [await joined(broker) for _ in range(3)]
        handled: list[str] = []
        total, full = 6_000, asyncio.Event()

        async def work(consumer: RedisConsumer) -> None:
            while not full.is_set() or (await info(broker)).lag or (await info(broker)).pending:
                claims = await consumer.fetch(16, 0.02)
                assert all(await settled(consumer, claims))
                handled.extend(ids(claims))
                await consumer.keep()

        async def disturb() -> None:
            for first in range(0, total, 200):
                await broker.append("orders", records(200, first=first))
                run_in(server, "XTRIM", LOG, "MAXLEN", 37)
                await broker.tend("orders")
            full.set()

        async with asyncio.TaskGroup() as tasks:
            for consumer in consumers:
                tasks.create_task(work(consumer))
            tasks.create_task(disturb())
        await broker.tend("orders")
        found = await info(broker)
        assert len(handled) == len(set(handled)) == found.done
        assert (found.done or 0) + found.lost == total and found.lost > 0
        for consumer in consumers:
            await consumer.close()


# In the order of keys


async def test_what_an_owner_holds_is_handled_and_the_rest_is_lost(server: RedisServer) -> None:
    async with alone(server, KEYED) as broker:
        consumer = await member(broker)
        await broker.append("orders", records(5))
        claims = await consumer.fetch(5, WAIT_S)
        await broker.append("orders", records(10, first=5))
        trim(server, 4)

        async def told() -> bool:
            return (await info(broker)).lost > 0

        claims += await beaten(consumer, told)
        assert await lost(broker) == {GROUP: 6}
        await finished(consumer, claims)
        await worked_off(broker, consumer, 9)
        found = await info(broker)
        assert (found.lost, found.lag, found.done) == (6, 0, 9)
        await consumer.close()
        again = await member(broker)
        assert await lost(broker) == {} and (await info(broker)).lost == 6
        await again.close()


@pytest.mark.parametrize("crash", [False, True])
async def test_whoever_owns_while_events_are_removed_all_are_handled_or_lost(server: RedisServer, crash: bool) -> None:
    async with alone(server, KEYED) as broker:
        total = 0
        for _ in range(3):
            consumer = await member(broker)
            handled = 0
            async with asyncio.timeout(WAIT_S):
                while handled < 300:
                    await broker.append("orders", records(100, first=total))
                    total += 100
                    claims = await consumer.fetch(40, 0.1)
                    trim(server, 23)
                    await finished(consumer, claims)
                    handled += len(claims)
                    await consumer.keep()
                    await broker.tend("orders")
            await consumer.fetch(10, 0.1)  # in its hands at its end
            if crash:
                ledger = consumer._ledger
                assert isinstance(ledger, RedisLedger)
                ledger._pair.close()
            else:
                await consumer.close()
        trim(server, 5)
        consumer = await member(broker)

        async def even() -> bool:
            found = await info(broker)
            return (found.done or 0) + found.lost == total and found.lag == 0

        async with asyncio.timeout(WAIT_S):
            while not await even():
                await finished(consumer, await consumer.fetch(100, 0.05))
                await consumer.keep()
                found = await info(broker)
                assert (found.done or 0) + found.lost <= total
        await consumer.close()
        assert await even() and (await info(broker)).lost > 0


async def test_what_an_owner_passed_unread_is_found_at_the_end_by_it_or_its_successor(server: RedisServer) -> None:
    async with alone(server, KEYED) as broker:
        consumer = await member(broker)
        await broker.append("orders", records(3))
        await worked_off(broker, consumer, 3)
        ledger = consumer._ledger
        assert isinstance(ledger, RedisLedger)
        ledger._gaps._look_at = float("inf")
        await broker.append("orders", records(10, first=3))
        trim(server, 4)
        await worked_off(broker, consumer, 7)
        assert (await info(broker)).lost == 0
        await consumer.close()
        assert await lost(broker) == {GROUP: 6}
        found = await info(broker)
        assert (found.lag, found.done, found.lost) == (0, 7, 6)


async def test_a_group_in_order_without_members_loses_too(server: RedisServer) -> None:
    async with alone(server, KEYED) as broker:
        await broker.append("orders", records(10))
        trim(server, 7)
        assert await lost(broker) == {GROUP: 3}
        trim(server, 5)
        consumer = await member(broker)
        await worked_off(broker, consumer, 5)
        assert await lost(broker) == {GROUP: 2}
        await consumer.close()
        await broker.append("orders", records(4))
        trim(server, 1)
        assert await lost(broker) == {GROUP: 3}
        consumer = await member(broker)
        await worked_off(broker, consumer, 6)
        found = await info(broker)
        assert (found.lost, found.lag) == (8, 0) and await lost(broker) == {}
        await consumer.close()


@pytest.fixture
def owned(redis: Raw) -> tuple[Raw, bytes, list[bytes]]:
    """An owner that has settled the first of ten events, and read the first four."""
    redis.found()
    redis.enter("a")
    redis.enter("b")
    found = redis.add(10)
    epoch = redis.acquire("a")[1]
    redis.commit("a", epoch, 1, found[0], 1)
    return redis, epoch, found


def lose(redis: Raw, epoch: bytes, offset: bytes, begin: int, end: int, who: str = "a") -> Any:
    return redis.run("lose", [LOG, LEASE, STATS], [GROUP, who, epoch, offset, begin, end])


def acquired(redis: Raw) -> tuple[Any, ...]:
    """What the next owner finds after a crash: mark, ordinal, newly lost, gaps."""
    answer = redis.acquire("b", redis.score("a"))
    assert answer[0] == b"OK"
    return answer[2], answer[3], answer[8], answer[13]


def test_a_gap_is_counted_once_however_often_it_is_told(owned: tuple[Raw, bytes, list[bytes]]) -> None:
    redis, epoch, found = owned
    redis.do("XTRIM", LOG, "MAXLEN", 3)
    for _ in range(2):
        assert lose(redis, epoch, found[3], 4, 7) == b"OK"
    assert redis.do("HGET", STATS, "lost") == b"3" and lose(redis, b"1", found[3], 7, 9) == b"LOST"
    assert acquired(redis) == (found[0], b"7", 3, b"")  # what the owner had read, and not settled, is gone with it
    assert redis.do("HGET", STATS, "lost") == b"6" and redis.group()[b"lag"] == 3


def test_a_gap_at_the_mark_is_passed_at_once(owned: tuple[Raw, bytes, list[bytes]]) -> None:
    redis, epoch, found = owned
    redis.do("XTRIM", LOG, "MAXLEN", 3)
    for _ in range(2):
        assert lose(redis, epoch, found[0], 1, 7) == b"OK"
    assert redis.lease("wn") == b"7" and redis.group()[b"lag"] == 3
    assert acquired(redis)[:3] == (found[0], b"7", 0) and redis.do("HGET", STATS, "lost") == b"6"


def test_a_gap_that_progress_has_not_passed_goes_to_the_next_owner(owned: tuple[Raw, bytes, list[bytes]]) -> None:
    redis, epoch, found = owned
    redis.do("XTRIM", LOG, "MAXLEN", 5)  # unseen by the owner, who reads on and finds it at the end
    redis.commit("a", epoch, 2, found[7], 4)
    assert lose(redis, epoch, found[9], 6, 10) == b"OK"
    gap = found[9] + b":6:10"
    assert acquired(redis) == (found[7], b"4", 0, gap)
    redis.commit("b", redis.lease("epoch") or b"", 1, found[9], 10)
    redis.give("b", redis.lease("epoch") or b"")
    answer = redis.acquire("a")
    assert answer[2:4] == [found[9], b"10"] and redis.do("HGET", STATS, "lost") == b"4" and redis.group()[b"lag"] == 0


def test_who_ends_behind_a_gap_that_nobody_saw_is_told_by_the_next(owned: tuple[Raw, bytes, list[bytes]]) -> None:
    redis, epoch, found = owned
    redis.do("XTRIM", LOG, "MAXLEN", 5)
    redis.commit("a", epoch, 2, found[9], 6)
    redis.give("a", epoch)
    answer = redis.acquire("b")
    assert answer[2:4] == [found[9], b"10"] and answer[8] == 4 and redis.do("HGET", STATS, "lost") == b"4"


def test_a_group_that_was_moved_knows_of_no_gap(owned: tuple[Raw, bytes, list[bytes]]) -> None:
    redis, epoch, found = owned
    lose(redis, epoch, found[9], 6, 10)
    assert redis.run("seek", [LOG, LEASE, b"{orders}:parked:g", b"{orders}:parkinfo:g", NOTE], [GROUP, "0-0"]) == b"OK"
    assert redis.lease("gaps") == b""
    assert redis.run("sweep", [LOG, META, DUE, NOTE, STATS, LEASE], [GROUP, "-", 0, 10])[3] == 0
    assert redis.do("ZCARD", LIVE) == 2 and redis.do("EXISTS", fence("a")) == 1


# Groups of other clients


async def test_a_group_of_another_client_loses_what_it_did_not_read(server: RedisServer) -> None:
    async with opened(server.url, ORDERS) as broker:
        await broker.append("orders", records(6))
        run_in(server, "XGROUP", "CREATE", LOG, "theirs", "0", "ENTRIESREAD", 0)
        trim(server, 2)
        assert await lost(broker) == {"theirs": 4}
        assert run_in(server, "XREADGROUP", "GROUP", "theirs", "me", "STREAMS", LOG, ">")
        (found,) = await broker.admin.groups("orders")
        assert (found.lost, found.lag, found.owner) == (4, 0, "") and found.seen_ms is not None


async def test_a_group_of_another_client_that_was_made_anew_is_another_one(server: RedisServer) -> None:
    async with opened(server.url, ORDERS) as broker:
        await broker.append("orders", records(6))
        run_in(server, "XGROUP", "CREATE", LOG, "theirs", "0", "ENTRIESREAD", 0)
        trim(server, 2)
        assert await lost(broker) == {"theirs": 4}
        run_in(server, "XGROUP", "DESTROY", LOG, "theirs")
        assert await lost(broker) == {}
        assert not [field for field in run_in(server, "HKEYS", META) if b":" in field]
        assert not run_in(server, "KEYS", "*stats*")


async def test_two_processes_tell_a_loss_once(server: RedisServer) -> None:
    async with alone(server) as broker, opened(server.url, ORDERS) as other:
        await broker.append("orders", records(1_000))
        trim(server, 1)
        rounds = await asyncio.gather(*(one.tend("orders") for one in (broker, other) * 5))
        assert sum(tended.lost.get(GROUP, 0) for tended in rounds) == 999 == (await info(broker)).lost
        consumer = await joined(broker)
        assert ids(await claimed(consumer, 1)) == ["id-999"]
        await consumer.close()
        await until(lambda: run_in(server, "ZCARD", LIVE) == 0)
