"""Members that keep the order of keys, on real servers: what goes away under them costs no event, no order and no blame."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from millstream.brokers.base import (
    Claim,
    Dead,
    Done,
    Later,
    Outcome,
    Output,
    Settlement,
    StreamSpec,
    Subscription,
)
from millstream.brokers.ledger import Cursor
from millstream.brokers.ordered import OrderedConsumer
from millstream.brokers.redis import progress
from millstream.brokers.redis.broker import RedisBroker
from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.ledger import Lives, RedisLedger
from millstream.brokers.redis.sizes import MAX_REPLY_BYTES
from millstream.brokers.redis.turns import MAX_BUSY, MAX_EVENTS
from millstream.errors import BrokerDown, BrokerFull, GroupOwned, NotSupported
from tests.redis import brokers
from tests.redis.brokers import opened, records, run_in
from tests.redis.consuming import LEASE_S, WAIT_S, clients, clock, ids, joined, persistent
from tests.redis.raw import DEAD, GROUP, LEASE, LOG, META, Raw
from tests.servers import VERSIONS, RedisServer

started = brokers.started
server = brokers.server

ORDERS = StreamSpec("orders", key="order_id")
MANY = StreamSpec("many", partitions=4, key="order_id")


async def member(broker: RedisBroker, spec: StreamSpec = ORDERS, owner: str = "app") -> OrderedConsumer:
    consumer = await broker.subscribe(Subscription(spec, GROUP, owner, lease_s=LEASE_S, order=True))
    assert isinstance(consumer, OrderedConsumer)
    return consumer


@asynccontextmanager
async def alone(server: RedisServer, spec: StreamSpec = ORDERS) -> AsyncIterator[tuple[RedisBroker, OrderedConsumer]]:
    async with opened(server.url, spec) as broker:
        consumer = await member(broker, spec)
        yield broker, consumer
        await consumer.close()


def life_of(consumer: OrderedConsumer) -> RedisLedger:
    assert isinstance(consumer._ledger, RedisLedger)
    return consumer._ledger


def lives(consumer: OrderedConsumer) -> str:
    """The number of its present life."""
    return life_of(consumer).name.rpartition(".")[2]


async def claimed(consumer: OrderedConsumer, count: int) -> list[Claim]:
    """So many claims, in as many calls as it takes, beating between them."""
    claims: list[Claim] = []
    async with asyncio.timeout(WAIT_S):
        while len(claims) < count:
            claims += await persistent(consumer.fetch, count - len(claims), 0.1)
            await persistent(consumer.keep)
    return claims


async def settled(consumer: OrderedConsumer, claims: Sequence[Claim], outcome: Outcome | None = None) -> list[bool]:
    return await consumer.settle([Settlement(claim.position, outcome or Done()) for claim in claims])


def group(server: RedisServer, log: bytes = LOG) -> dict[bytes, object]:
    (info,) = run_in(server, "XINFO", "GROUPS", log)
    return dict(zip(info[::2], info[1::2], strict=True))


# Connections and servers that go away


@pytest.mark.parametrize("side", ["reader", "writer"])
async def test_a_lost_connection_costs_no_event_and_repeats_none(server: RedisServer, side: str) -> None:
    async with alone(server) as (broker, consumer):
        seen: list[str] = []
        for number in range(20):
            await broker.append("orders", records(10, first=10 * number))
            async with asyncio.TaskGroup() as tasks:
                fetching = tasks.create_task(persistent(consumer.fetch, 10, 0.1))
                for id_ in clients(server, side):
                    run_in(server, "CLIENT", "KILL", "ID", id_)
            claims = fetching.result()
            async with asyncio.TaskGroup() as tasks:
                settling = tasks.create_task(persistent(settled, consumer, claims))
                for id_ in clients(server, side):
                    run_in(server, "CLIENT", "KILL", "ID", id_)
            assert all(settling.result())
            seen += ids(claims)
        while claims := await persistent(consumer.fetch, 100, 0.1):
            assert all(await settled(consumer, claims))
            seen += ids(claims)
        assert seen == [f"id-{number}" for number in range(200)]
        assert lives(consumer) == "1" and group(server)[b"lag"] == 0
        assert run_in(server, "HGET", LEASE, "done") == b"200"


async def test_a_commit_whose_answer_was_lost_is_stored_once_with_all_that_follows(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(3))
        first, second, third = await claimed(consumer, 3)
        writer = await life_of(consumer)._pair.writer()
        run_each, answered = writer.run_each, asyncio.Event()

        async def cut(*args: object) -> list[object]:
            await run_each(*args)  # type: ignore[arg-type]
            answered.set()
            raise BrokerDown("the answer was lost")

        writer.run_each = cut  # type: ignore[method-assign, assignment]
        output = Output("orders", records(1, first=9)[0])
        ends = [
            Settlement(first.stored.position, Done(), [output]),
            Settlement(second.stored.position, Dead("failed", "broken")),
            Settlement(third.stored.position, Later(0, "busy")),
        ]
        with pytest.raises(BrokerDown):
            await consumer.settle(ends)
        assert answered.is_set()
        writer.run_each = run_each  # type: ignore[method-assign]
        assert await consumer.settle(ends) == [True, True, True]
        assert run_in(server, "XLEN", DEAD) == 1 and run_in(server, "XLEN", LOG) == 4
        (info,) = await broker.admin.groups("orders")
        assert (info.done, info.dead, info.retried, info.pending, info.lag) == (1, 1, 1, 1, 1)


async def test_a_server_that_has_forgotten_the_scripts_learns_them_again(server: RedisServer) -> None:
    async with alone(server, MANY) as (broker, consumer):
        for number in range(2):
            await broker.append("many", records(8, partitions=4, first=8 * number))
            claims = await claimed(consumer, 8)
            run_in(server, "SCRIPT", "FLUSH")
            assert await settled(consumer, claims) == [True] * 8
        (info,) = await broker.admin.groups("many")
        assert (info.done, info.lag) == (16, 0)


async def test_an_acquisition_whose_answer_was_lost_is_no_crash(server: RedisServer) -> None:
    async with opened(server.url, ORDERS) as broker:
        await broker.append("orders", records(2))
        consumer = await member(broker)
        with Raw(server.port) as redis:
            epoch = int(redis.lease("epoch") or 0) + 1
            redis.do("HSET", LEASE, "epoch", epoch)  # as if it had acquired once more
        async with asyncio.timeout(WAIT_S):
            while 0 not in consumer._windows or consumer._windows[0].epoch < epoch:
                await consumer.keep()
                await asyncio.sleep(0.01)
        claims = await claimed(consumer, 2)
        assert {(claim.suspect, claim.attempt) for claim in claims} == {(0, 1)} and claims[0].token > epoch
        assert await settled(consumer, claims) == [True, True]
        await consumer.close()


async def test_a_member_that_was_thrown_out_goes_on_at_once_and_blames_nobody(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(5))
        claims = await claimed(consumer, 5)
        assert await settled(consumer, claims[:2]) == [True, True]
        former = life_of(consumer)
        run_in(server, "DEL", former._fence)
        assert await settled(consumer, claims[2:3]) == [True], "the lease is still its own"
        lost = (await consumer.keep()).lost | (await consumer.keep()).lost
        assert lost == {claim.position for claim in claims[3:]}
        again = await claimed(consumer, 2)
        assert ids(again) == ["id-3", "id-4"] and {claim.suspect for claim in again} == {0}
        assert again[0].token > claims[0].token and lives(consumer) == "2"
        assert await settled(consumer, again) == [True, True]
        assert not run_in(server, "EXISTS", former._fence) and not clients(server, "1-writer")


async def test_a_flushed_server_is_another_beginning(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(5))
        claims = await claimed(consumer, 5)
        assert all(await settled(consumer, claims[:4]))
        run_in(server, "FLUSHALL")
        await broker.declare(ORDERS)
        await broker.append("orders", records(3, first=5))
        assert await persistent(settled, consumer, claims[4:]) == [False]
        again = await claimed(consumer, 3)
        assert ids(again) == ["id-5", "id-6", "id-7"] and all(await settled(consumer, again))
        assert group(server)[b"lag"] == 0 and run_in(server, "HGET", META, "mode:g") == b"log"


async def test_a_log_that_is_deleted_under_its_owner_is_read_from_its_new_beginning(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(5))
        assert all(await settled(consumer, await claimed(consumer, 5)))
        run_in(server, "DEL", LOG)
        await broker.append("orders", records(3, first=5))
        done: list[str] = []
        async with asyncio.timeout(WAIT_S):
            while len(done) < 3:  # what was read before the loss was noticed is refused, and comes again
                claims = await claimed(consumer, 1)
                done += ids(claims) if await settled(consumer, claims) == [True] else []
        assert done == ["id-5", "id-6", "id-7"] and group(server)[b"lag"] == 0


async def test_a_log_that_begins_anew_behind_its_readers_is_noticed_without_an_event(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        last = (await broker.append("orders", records(5)))[-1].offset
        assert all(await settled(consumer, await claimed(consumer, 5)))
        run_in(server, "DEL", LOG)
        run_in(server, "XADD", LOG, f"{last.partition('-')[0]}-0", "type", "t", "data", "{}")
        (claim,) = await claimed(consumer, 1)
        assert claim.position.offset.endswith("-0") and await settled(consumer, [claim]) == [True]


async def test_a_group_that_is_destroyed_under_its_owner_goes_on_where_it_was(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(5))
        claims = await claimed(consumer, 5)
        assert all(await settled(consumer, claims[:3]))
        run_in(server, "XGROUP", "DESTROY", LOG, GROUP)
        assert await settled(consumer, claims[3:]) == [False, False]
        again = await claimed(consumer, 2)
        assert ids(again) == ["id-3", "id-4"] and {claim.suspect for claim in again} == {0}
        assert all(await settled(consumer, again)) and group(server)[b"lag"] == 0


@pytest.mark.parametrize("version", VERSIONS)
async def test_another_life_of_the_server_is_another_beginning(version: str) -> None:
    with RedisServer.start(version) as server:  # type: ignore[arg-type]
        async with alone(server) as (broker, consumer):
            await broker.append("orders", records(3))
            claims = await claimed(consumer, 3)
            server.restart()
            assert await persistent(consumer.fetch, 1, 0) == []
            await persistent(broker.append, "orders", records(2, first=3))
            assert await persistent(settled, consumer, claims) == [False] * 3
            again = await claimed(consumer, 2)
            assert ids(again) == ["id-3", "id-4"] and all(await settled(consumer, again))
            assert lives(consumer) != "1"


async def test_what_is_trimmed_before_its_owner_reads_it_is_told_and_the_lag_stays_exact(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(10))
        claims = await claimed(consumer, 10)
        await broker.append("orders", records(30, first=10))
        run_in(server, "XTRIM", LOG, "MAXLEN", 5)
        life_of(consumer)._gaps._look_at = 0.0
        assert all(await settled(consumer, claims[:5]))
        assert group(server)[b"entries-read"] == 5
        late = await claimed(consumer, 5)
        assert ids(late) == [f"id-{number}" for number in range(35, 40)]
        assert "25 events of partition 0 were trimmed away" in caplog.text
        assert all(await settled(consumer, [*claims[5:], *late[:3]]))
        assert group(server)[b"lag"] == 2 and group(server)[b"entries-read"] == 38
        assert all(await settled(consumer, late[3:]))
        assert group(server)[b"lag"] == 0


async def test_a_cancelled_read_loses_nothing_and_holds_up_nobody(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await consumer.keep()
        for number in range(5):
            task = asyncio.get_running_loop().create_task(consumer.fetch(10, WAIT_S))
            await brokers.until(lambda: life_of(consumer)._pair._reading is not None)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await broker.append("orders", records(2, first=2 * number))
            begun = clock.monotonic()
            assert len(await claimed(consumer, 2)) == 2 and clock.monotonic() - begun < 0.9


# Room


async def test_at_maxmemory_a_member_works_on_and_only_dead_letters_wait(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(7))
        claims = await claimed(consumer, 7)
        run_in(server, "CONFIG", "SET", "maxmemory", 1)
        try:
            ends = [Settlement(claims[0].position, Dead("failed", "broken"))]
            ends += [Settlement(claim.position, Done()) for claim in claims[1:6]]
            ends += [Settlement(claims[6].position, Later(0, "busy"))]
            with pytest.raises(BrokerFull):
                await consumer.settle(ends)
            await consumer.keep()
            (again,) = await claimed(consumer, 1)
            assert again.attempt == 2 and again.stored == claims[6].stored
            with pytest.raises(BrokerFull):
                await settled(consumer, [again])  # itself stored; the dead letter still waits
            assert run_in(server, "HGET", LEASE, "done") == b"6" and not run_in(server, "EXISTS", DEAD)
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", 0)
        await consumer.keep()
        assert run_in(server, "XLEN", DEAD) == 1 and group(server)[b"lag"] == 0


async def test_outputs_that_find_no_room_keep_their_event_open(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(2))
        first, second = await claimed(consumer, 2)
        output = Output("orders", records(1, first=9)[0])
        ends = Settlement(first.stored.position, Done(), [output]), Settlement(second.stored.position, Done())
        run_in(server, "CONFIG", "SET", "maxmemory", 1)
        try:
            with pytest.raises(BrokerFull):
                await consumer.settle(ends)
            assert run_in(server, "XLEN", LOG) == 2
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", 0)
        assert await consumer.settle(ends[:1]) == [True]
        assert run_in(server, "XLEN", LOG) == 3 and group(server)[b"lag"] == 1


async def test_the_bound_of_dead_letters_makes_their_keys_wait(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "MAX_DEAD", 1)
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(2))
        claims = await claimed(consumer, 2)
        assert await settled(consumer, claims[:1], Dead("failed")) == [True]
        assert await settled(consumer, claims[1:], Dead("failed")) == [True]
        assert run_in(server, "XLEN", DEAD) == 1
        (key,) = await broker.admin.keys("orders", GROUP)
        assert key.first == claims[1].position and key.due_ms is not None and key.attempts == 0


# Ways of consuming


async def test_a_group_at_rest_may_change_its_way_and_one_at_work_may_not(server: RedisServer) -> None:
    async with opened(server.url, MANY) as broker:
        await broker.append("many", records(8, partitions=4))
        queue = await joined(broker, MANY)
        with pytest.raises(NotSupported, match="order='none'"):
            await Lives(broker, Subscription(MANY, GROUP, "app", lease_s=LEASE_S, order=True))().enter()
        async with asyncio.timeout(WAIT_S):
            claims: list[Claim] = []
            while len(claims) < 8:
                claims += await queue.fetch(8 - len(claims), 0.1)
        assert all(await queue.settle([Settlement(claim.position, Done()) for claim in claims[:7]]))
        late = Later(clock.now_ms() + 60_000, "busy")
        assert await queue.settle([Settlement(claims[7].position, late)]) == [True]
        await queue.close()
        with pytest.raises(NotSupported, match="order='none'"):
            await Lives(broker, Subscription(MANY, GROUP, "app", lease_s=LEASE_S, order=True))().enter()
        at = claims[7].position
        log = Keys("", "many", 4).log(at.partition)
        run_in(server, "XACK", log, GROUP, at.offset)
        run_in(server, "DEL", Keys("", "many", 4).due(at.partition, GROUP))
        consumer = await member(broker, MANY)
        assert await consumer.fetch(10, 0) == []
        with pytest.raises(NotSupported, match="order='key'"):
            await joined(broker, MANY)
        await broker.append("many", records(4, partitions=4, first=8))
        assert all(await settled(consumer, await claimed(consumer, 4)))
        await consumer.close()
        queue = await joined(broker, MANY)
        assert await queue.fetch(10, 0) == []
        await queue.close()


async def test_a_group_of_another_app_is_refused(server: RedisServer) -> None:
    async with alone(server) as (broker, _):
        with pytest.raises(GroupOwned, match="app"):
            await member(broker, owner="other")
        await brokers.until(lambda: len(clients(server, "writer")) == 1)


async def test_an_entry_that_is_no_event_comes_as_a_fault_and_dies_whole(server: RedisServer) -> None:
    async with alone(server) as (_, consumer):
        run_in(server, "XADD", LOG, "*", "colour", "red")
        (claim,) = await claimed(consumer, 1)
        assert "colour" in claim.fault and claim.token > 0
        assert await settled(consumer, [claim], Later(0, "put off")) == [True]
        (again,) = await claimed(consumer, 1)
        assert again.fault and again.attempt == 2
        assert await settled(consumer, [again], Dead("undecodable", again.fault)) == [True]
        ((_, letter),) = run_in(server, "XRANGE", DEAD, "-", "+")
        assert letter[12:] == [b"colour", b"red"]


async def test_one_connection_reads_all_partitions_and_a_full_one_is_left_out(server: RedisServer) -> None:
    async with alone(server, MANY) as (broker, consumer):
        await broker.append("many", records(400, partitions=4))
        claims = await claimed(consumer, 400)
        assert len(clients(server, "reader")) == 1
        for partition in range(4):
            mine = [claim.record.id for claim in claims if claim.position.partition == partition]
            assert mine == [f"id-{number}" for number in range(partition, 400, 4)]
        assert all(await settled(consumer, claims))
        (info,) = await broker.admin.groups("many")
        assert (info.lag, info.done, info.consumers) == (0, 400, 1)


def brought_by(life: RedisLedger, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many events each read brings."""
    brought: list[int] = []
    read = life.read

    async def counted(cursors: Mapping[int, Cursor], limit: int, wait_s: float) -> list[Claim]:
        claims = await read(cursors, limit, wait_s)
        brought.append(len(claims))
        return claims

    monkeypatch.setattr(life, "read", counted)
    return brought


async def test_a_backlog_in_many_partitions_is_read_in_pages_of_some_of_them(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = StreamSpec("wide", partitions=32, key="order_id")
    async with alone(server, spec) as (broker, consumer):
        await broker.append("wide", records(32 * 400, partitions=32))
        brought = brought_by(life_of(consumer), monkeypatch)
        claims = await claimed(consumer, 32 * 400)
        assert max(brought) <= MAX_EVENTS
        assert {claim.position.partition for claim in claims[: (32 // MAX_BUSY + 1) * MAX_EVENTS]} == set(range(32))
        for partition in range(32):
            mine = [claim.record.id for claim in claims if claim.position.partition == partition]
            assert mine == [f"id-{number}" for number in range(partition, 32 * 400, 32)]


async def test_large_events_come_few_at_a_time_and_small_ones_after_them_many_again(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with alone(server) as (broker, consumer):
        large = [replace(record, data=b"x" * 524_288) for record in records(20)]
        await broker.append("orders", large)
        assert all(await settled(consumer, await claimed(consumer, 20)))
        await broker.append("orders", large)
        brought = brought_by(life_of(consumer), monkeypatch)
        assert all(await settled(consumer, await claimed(consumer, 20)))
        assert max(brought) <= MAX_REPLY_BYTES // 524_288
        await broker.append("orders", records(10_000))
        left = 10_000
        async with asyncio.timeout(WAIT_S):
            while left:
                claims = await consumer.fetch(1_000, 1)
                assert all(await settled(consumer, claims))
                left -= len(claims)
        assert max(brought) >= 500


async def test_what_a_log_holds_is_looked_up_without_its_events(server: RedisServer) -> None:
    async with alone(server) as (broker, _):
        with Raw(server.port) as redis:
            await broker.append("orders", [replace(record, data=b"x" * 500_000) for record in records(3)])
            length, added, first, last = redis.run("ends", [LOG], [])
            assert (length, added) == (3, 3)
            assert [first, last] == [
                redis.do("XRANGE", LOG, "-", "+", "COUNT", 1)[0][0],
                redis.do("XREVRANGE", LOG, "+", "-", "COUNT", 1)[0][0],
            ]
            redis.do("XTRIM", LOG, "MAXLEN", 0)
            assert redis.run("ends", [LOG], []) == [0, 3, b"", last]
            assert redis.run("ends", [b"nothing"], []) == []


async def test_the_first_read_of_large_events_brings_few(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with alone(server, MANY) as (broker, consumer):
        large = [replace(record, data=b"x" * 1_000_000) for record in records(12, partitions=4)]
        await broker.append("many", large)
        brought = brought_by(life_of(consumer), monkeypatch)
        assert all(await settled(consumer, await claimed(consumer, 12)))
        assert max(brought) <= MAX_REPLY_BYTES // 1_000_000


async def test_the_first_read_brings_small_events_in_full(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(500))
        brought = brought_by(life_of(consumer), monkeypatch)
        assert len(await consumer.fetch(500, 1)) == brought[0] == 500
