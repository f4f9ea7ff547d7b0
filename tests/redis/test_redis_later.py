"""Events that lie beside their log on Redis until they are due, and slots of schedules, where room or answers lack."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from millstream.brokers.base import LATER, Policy, Position, Record, Slot, StreamSpec
from millstream.brokers.redis.appending import MAX_SCRIPT_RECORDS
from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.later import ripen
from millstream.brokers.redis.scripts import scripts
from millstream.errors import BrokerFull, BrokerRefused, Unconfirmed
from tests.redis import brokers
from tests.redis.brokers import ORDERS, everything, opened, records, run_in
from tests.redis.raw import Raw
from tests.redis.test_redis_dedupe import cut_before_answers
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

HOUR_MS = 3_600_000
KEPT = StreamSpec("kept")
KEYS = Keys("", "kept", 1)


@pytest.fixture
def redis(server: RedisServer) -> Iterator[Raw]:
    with Raw(server.port) as redis:
        yield redis


def later(some: list[Record], *, after_ms: int = HOUR_MS) -> list[Record]:
    due_ms = time.time_ns() // 1_000_000 + after_ms
    return [replace(record, due_ms=due_ms) for record in some]


def fall_due(server: RedisServer, *logs: str) -> None:
    """What is kept aside is due now, in the order in which it would have been."""
    for log in logs:
        key = f"{{{log}}}:later"
        for number, member in enumerate(run_in(server, "ZRANGE", key, 0, -1), 1):
            run_in(server, "ZADD", key, number, member)


async def test_what_fell_due_while_nobody_looked_is_published_in_one_round_and_in_order(server: RedisServer) -> None:
    count = 5 * MAX_SCRIPT_RECORDS + 7
    async with opened(server.url, ORDERS) as broker:
        some = later(records(count, partitions=2))
        answers = await broker.append("orders", some)
        assert answers == [Position(record.partition, LATER) for record in some]
        assert (await broker.tend("orders")).due_ms == some[0].due_ms
        fall_due(server, "orders:0", "orders:1")
        tended = await broker.tend("orders")
        assert (tended.published, tended.due_ms) == (count, None)
        for partition in range(2):
            found = await everything(broker, "orders", partition)
            assert list(found) == [record.id for record in some if record.partition == partition]


async def test_events_that_are_due_at_the_same_time_come_in_the_order_of_publishing(server: RedisServer) -> None:
    async with opened(server.url, KEPT) as broker:
        some = later(records(30))
        for record in some:
            await broker.append("kept", [record])
        for member in run_in(server, "ZRANGE", "{kept}:later", 0, -1):
            run_in(server, "ZADD", "{kept}:later", 7, member)
        assert await ripen(broker, await broker.known("kept", await broker.control())) == (30, None)
        assert list(await everything(broker, "kept")) == [record.id for record in some]


async def test_what_is_large_is_published_in_calls_of_a_bounded_size(server: RedisServer) -> None:
    async with opened(server.url, KEPT) as broker:
        some = later(records(12, size_bytes=900_000))
        await broker.append("kept", some)
        fall_due(server, "kept")
        published, _, refused = run_in(
            server, "EVAL", scripts["ripen"].source, 6, *KEYS.store(0), 200, 1_048_576, 0, 0, 0, 0, 0, 0
        )
        assert (published, refused) == (2, b"")
        assert (await broker.tend("kept")).published == 10
        assert list(await everything(broker, "kept")) == [record.id for record in some]


async def test_an_event_without_dedupe_that_is_published_for_later_twice_comes_twice(server: RedisServer) -> None:
    async with opened(server.url, KEPT) as broker:
        (record,) = later(records(1))
        await broker.append("kept", [record, record])
        fall_due(server, "kept")
        assert (await broker.tend("kept")).published == 2 and run_in(server, "XLEN", "kept") == 2


async def test_who_repeats_an_event_that_has_come_learns_where_it_lies(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, Policy(dedupe_ms=HOUR_MS, dedupe_ids=100))
        some = later(records(3))
        for _ in range(2):
            assert await broker.append("kept", some) == [Position(0, LATER)] * 3
        fall_due(server, "kept")
        assert (await broker.tend("kept")).published == 3
        stored = await everything(broker, "kept")
        assert await broker.append("kept", some) == [stored[record.id] for record in some]


@pytest.mark.parametrize("policy", [Policy(), Policy(ceiling_events=5)], ids=["maxmemory", "ceiling"])
async def test_what_finds_no_room_when_it_is_due_waits(server: RedisServer, policy: Policy) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, policy)
        some = records(5) + later(records(3, first=5))
        await broker.append("kept", some)
        fall_due(server, "kept")
        if not policy.ceiling_events:
            run_in(server, "CONFIG", "SET", "maxmemory", 1)
            with pytest.raises(BrokerFull, match="maxmemory"):
                await broker.append("kept", later(records(1, first=8)))
        try:
            for _ in range(2):
                tended = await broker.tend("kept")
                assert (tended.published, tended.due_ms) == (0, 1)
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", 0)
        run_in(server, "XTRIM", "kept", "MAXLEN", 2)
        tended = await broker.tend("kept")
        assert (tended.published, tended.due_ms) == (3, None)
        assert list(await everything(broker, "kept")) == [f"id-{n}" for n in range(3, 8)]


async def test_a_full_stream_says_what_keeps_its_events_and_what_to_do(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, Policy(ceiling_bytes=1_000_000))
        await broker.append("kept", records(3))
        run_in(server, "HSET", "{kept}:meta", "full_at", 3, "pinned_by", "billing")
        async with opened(server.url) as other:
            known = await other.known("kept", await other.control())
            known._learnt_at -= 5
            with pytest.raises(
                BrokerFull, match=r"'kept'.*ceiling of 1,000,000 bytes, and is kept by billing: run the"
            ):
                await other.append("kept", records(1, first=3))


async def test_what_waits_where_another_kind_of_key_lies_is_told(server: RedisServer) -> None:
    async with opened(server.url, KEPT) as broker:
        await broker.append("kept", later(records(1)))
        fall_due(server, "kept")
        run_in(server, "SET", "kept", "text")
        with pytest.raises(BrokerRefused, match="holds a string"):
            await broker.tend("kept")
        run_in(server, "DEL", "kept")
        assert (await broker.tend("kept")).published == 1


def test_hashes_of_ids_that_nobody_needs_any_more_are_removed(redis: Raw) -> None:
    def tend(window_ms: int) -> list[bytes]:
        redis.run("ripen", list(KEYS.store(0)), [10, 1_000, window_ms, 100, 0, 0, 0, 0])
        return [key for key in KEYS.ids(0) if redis.do("EXISTS", key)]

    one, two, _ = KEYS.ids(0)
    for key, age_ms in ((one, 150_000), (two, 140_000)):
        redis.do("HSET", key, "", time.time_ns() // 1_000_000 - age_ms, "a", "1-0")
    assert tend(100_000) == [two] and tend(100_000) == [two] and tend(0) == []


# Slots


async def test_a_slot_whose_answer_was_lost_is_not_published_again(server: RedisServer) -> None:
    slot, other = Slot("tick", 1_000), Slot("tock", 1_000)
    async with opened(server.url, ORDERS) as broker:
        (record,) = records(1)
        await broker.append_slot("orders", other, record)
        async with cut_before_answers(server, scripts["slot"].sha.encode()) as url, opened(url) as cut:
            with pytest.raises(Unconfirmed, match="store it again") as caught:
                await cut.append_slot("orders", slot, record)
        assert caught.value.results == [None]
        assert await broker.append_slot("orders", slot, record) is False
        assert run_in(server, "XLEN", "orders:0") == 2


async def test_a_slot_that_finds_no_room_is_not_passed_over(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, Policy(ceiling_events=3))
        (record,) = records(1)
        run_in(server, "CONFIG", "SET", "maxmemory", 1)
        try:
            for given in (record, None):
                with pytest.raises(BrokerFull, match="maxmemory"):
                    await broker.append_slot("kept", Slot("tick", 1), given)
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", 0)
        done: list[Any] = [await broker.append_slot("kept", Slot("tick", n), record) for n in (1, 2, 3)]
        with pytest.raises(BrokerFull, match="ceiling of 3 events"):
            await broker.append_slot("kept", Slot("tick", 4), record)
        run_in(server, "XTRIM", "kept", "MAXLEN", 0)
        assert [*done, await broker.append_slot("kept", Slot("tick", 4), record)] == [True] * 4


async def test_the_id_of_a_slot_is_remembered_like_any_other(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, Policy(dedupe_ms=HOUR_MS, dedupe_ids=10))
        (record,) = records(1)
        await broker.append("kept", [record])
        assert await broker.append_slot("kept", Slot("tick", 1), record)
        assert run_in(server, "XLEN", "kept") == 1 and run_in(server, "HGET", KEYS.slots, "tick") == b"1"
