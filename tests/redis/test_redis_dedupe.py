"""Ids that a stream on Redis remembers: whatever is cut off or runs full, an event that is published again is there once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from hiredis import ReplyError

from millstream.brokers.base import Policy, StreamSpec
from millstream.brokers.redis import appending
from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.scripts import scripts
from millstream.errors import BrokerDown, BrokerFull, BrokerRefused, Unconfirmed
from millstream.stream import Position
from tests.redis import brokers
from tests.redis.brokers import ORDERS, everything, opened, records, run_in, until
from tests.redis.raw import Raw
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

HOUR_MS = 3_600_000
KEPT = StreamSpec("kept")
KEYS = Keys("", "kept", 1)
HOUR = Policy(dedupe_ms=HOUR_MS, dedupe_ids=10_000)


@pytest.fixture
def redis(server: RedisServer) -> Iterator[Raw]:
    with Raw(server.port) as redis:
        yield redis


def put(redis: Raw, *ids: str, window_ms: int = HOUR_MS, max_ids: int = 100, ceiling: int = 0) -> list[Any]:
    words = [word for id_ in ids for word in ("", id_, "t", "app", "", "", "", "{}")]
    found: list[Any] = redis.run("append", list(KEYS.store(0)), [window_ms, max_ids, ceiling, 0, 1, 1, *words])
    return found


@asynccontextmanager
async def cut_before_answers(server: RedisServer, mark: bytes) -> AsyncIterator[str]:
    """The URL of a proxy that ends a connection when the answer to a command with this mark has come, and keeps it."""
    served: set[asyncio.Task[None]] = set()

    async def serve(client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        server_in, server_out = await asyncio.open_connection("127.0.0.1", server.port)
        marked = False

        async def ask() -> None:
            nonlocal marked
            while data := await client_in.read(1 << 16):
                marked = marked or mark in data
                server_out.write(data)
            server_out.close()

        asking = asyncio.ensure_future(ask())
        while (data := await server_in.read(1 << 16)) and not marked:
            client_out.write(data)
        asking.cancel()
        client_out.close()
        server_out.close()

    def begin(client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(serve(client_in, client_out))
        served.add(task)
        task.add_done_callback(served.discard)

    proxy = await asyncio.start_server(begin, "127.0.0.1", 0)
    async with proxy:
        yield f"redis://127.0.0.1:{proxy.sockets[0].getsockname()[1]}/0"
        proxy.close()
        await until(lambda: not served)


async def test_what_was_cut_off_before_its_answer_and_is_published_again_is_there_once(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, HOUR)
        await broker.append("kept", records(1))  # the server knows the script
        some = records(1_000, first=1)
        async with cut_before_answers(server, scripts["append"].sha.encode()) as url, opened(url) as cut:
            for record in some:
                with pytest.raises(Unconfirmed) as caught:
                    await cut.append("kept", [record])
                assert caught.value.results == [None]
        before = await everything(broker, "kept")
        positions = await broker.append("kept", some)
        stored = await everything(broker, "kept")
        assert stored == before and len(stored) == 1_001
        assert positions == [stored[record.id] for record in some]
        assert run_in(server, "HGET", "{kept}:meta", "repeats") == b"1000"


async def test_many_records_of_several_partitions_keep_their_order_and_their_places(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(ORDERS, HOUR)
        some = records(1_050, partitions=4)
        positions = await broker.append("orders", some)
        assert await broker.append("orders", some) == positions
        stored = [await everything(broker, "orders", partition) for partition in range(4)]
        for record, position in zip(some, positions, strict=True):
            assert stored[record.partition][record.id] == position
        for partition, found in enumerate(stored):
            assert list(found) == [record.id for record in some if record.partition == partition]


async def test_a_server_that_has_forgotten_its_scripts_is_told_them_again(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(ORDERS, HOUR)
        for first in (0, 40):
            run_in(server, "SCRIPT", "FLUSH")
            positions = await broker.append("orders", records(40, partitions=4, first=first))
            assert all(low.partition != high.partition for low, high in pairwise(positions))
        assert sum([len(await everything(broker, "orders", partition)) for partition in range(4)]) == 80


async def test_large_records_go_in_calls_of_a_bounded_size(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, HOUR)
        some = records(7, size_bytes=400_000)
        run_in(server, "CONFIG", "RESETSTAT")
        await broker.append("kept", some)
        stats = run_in(server, "INFO", "commandstats").decode()
        calls = [line for line in stats.splitlines() if line.startswith(("cmdstat_evalsha:", "cmdstat_eval:"))]
        assert sum(int(line.partition("calls=")[2].partition(",")[0]) for line in calls) in (4, 5)
        assert list(await everything(broker, "kept")) == [record.id for record in some]


async def test_a_stream_that_asks_for_nothing_runs_no_script(server: RedisServer) -> None:
    async with opened(server.url, KEPT) as broker:
        run_in(server, "CONFIG", "RESETSTAT")
        await broker.append("kept", records(300))
        assert b"cmdstat_eval" not in run_in(server, "INFO", "commandstats")


async def test_a_window_that_was_set_while_nothing_was_published_holds_for_the_next_event(server: RedisServer) -> None:
    async with opened(server.url, KEPT) as broker:
        known = await broker.known("kept", await broker.control())
        run_in(server, "HSET", "{kept}:meta", "policy", appending.write_policy(HOUR))
        known._learnt_at -= appending.LEARN_S
        first, second = await broker.append("kept", records(1)), await broker.append("kept", records(1))
        assert first == second and known.policy == HOUR


async def test_a_change_is_learnt_beside_an_append_which_does_not_wait_for_it(server: RedisServer) -> None:
    async with opened(server.url, KEPT) as broker:
        known = await broker.known("kept", await broker.control())
        run_in(server, "HSET", "{kept}:meta", "policy", appending.write_policy(HOUR))
        await broker.append("kept", records(1))
        assert known.plain
        known._learnt_at -= appending.RENEW_S
        await broker.append("kept", records(1, first=1))
        assert not known.plain
        first, second = [await broker.append("kept", records(1, first=2)) for _ in range(2)]
        assert first == second


async def test_a_policy_that_nobody_can_read_is_told(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, HOUR)
        run_in(server, "HSET", "{kept}:meta", "policy", '{"dedupe_ms":"never"}')
        async with opened(server.url) as other:
            with pytest.raises(BrokerRefused, match="policy is unreadable"):
                await other.append("kept", records(1))


async def test_a_policy_of_a_newer_version_is_read_as_far_as_it_is_known(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, HOUR)
        run_in(server, "HSET", "{kept}:meta", "policy", '{"dedupe_ms":60000,"dedupe_ids":7,"colour":"red"}')
        async with opened(server.url) as other:
            assert await other.declare(KEPT, HOUR) == Policy(dedupe_ms=60_000, dedupe_ids=7)


async def test_at_maxmemory_nothing_new_is_stored_and_what_is_known_is_answered(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, HOUR)
        some = records(10)
        positions = await broker.append("kept", some)
        run_in(server, "CONFIG", "SET", "maxmemory", 1)
        try:
            assert await broker.append("kept", some) == positions
            with pytest.raises(BrokerFull, match="maxmemory"):
                await broker.append("kept", records(300, first=10))
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", 0)
        assert len(await everything(broker, "kept")) == 10
        assert run_in(server, "HGET", "{kept}:meta", "repeats") == b"10"
        assert len(set(await broker.append("kept", records(300, first=10)))) == 300


async def test_behind_a_refused_record_nothing_of_its_partition_is_stored(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(ORDERS, Policy(dedupe_ms=HOUR_MS, dedupe_ids=5))
        some = records(16, partitions=2)
        with pytest.raises(
            Unconfirmed, match=r"10 are stored, 6 are not, 0 are in doubt.* 5 ids.*stream apply"
        ) as caught:
            await broker.append("orders", some)
        results = caught.value.results
        assert [isinstance(result, Position) for result in results] == [True] * 10 + [False] * 6
        assert all(isinstance(result, BrokerFull) for result in results[10:])
        with pytest.raises(BrokerFull, match="partition 1 remembers 5 ids"):
            await broker.append("orders", some[11::2])
        assert [result.partition for result in await broker.append("orders", some[:10])] == [0, 1] * 5


async def test_a_key_that_holds_something_else_refuses_with_nothing_written(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, HOUR)
        for key in ("{kept}:later", "{kept}:ids:2"):
            run_in(server, "SET", key, "text")
            with pytest.raises(BrokerRefused, match="holds a string"):
                await broker.append("kept", records(2))
            run_in(server, "DEL", key)
        assert run_in(server, "EXISTS", "kept") == 0


async def test_a_connection_lost_while_the_script_is_told_leaves_those_records_in_doubt(server: RedisServer) -> None:
    run_in(server, "SCRIPT", "FLUSH")
    async with cut_before_answers(server, scripts["append"].source[:40]) as url, opened(url) as cut:
        await cut.declare(KEPT, HOUR)
        with pytest.raises(Unconfirmed, match="in doubt") as caught:
            await cut.append("kept", records(3))
        assert caught.value.results == [None] * 3
    async with opened(server.url) as broker:
        await broker.append("kept", records(3))
        assert len(await everything(broker, "kept")) == 3


async def test_before_anything_is_sent_a_closed_connection_is_no_doubt(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(KEPT, HOUR)
        link = await broker.control()
        known = await broker.known("kept", link)
        link.close()
        with pytest.raises(BrokerDown):
            await appending.append(link, known, records(3))


# The hashes


def test_ids_lie_in_hashes_that_are_used_in_turn_and_end_by_themselves(redis: Raw) -> None:
    put(redis, "a", window_ms=100_000)
    one, two, three = KEYS.ids(0)
    assert 150_000 < redis.do("PTTL", one) <= 200_000
    for older, newer, id_ in ((one, two, "b"), (two, three, "c")):
        age(redis, older, 50_000)
        put(redis, id_, window_ms=100_000)
        assert redis.do("HEXISTS", newer, id_)
    known = [put(redis, id_, window_ms=100_000)[0] for id_ in "abc"]
    assert known == redis.do("HMGET", one, "a") + redis.do("HMGET", two, "b") + redis.do("HMGET", three, "c")
    for key, by_ms in ((one, 100_000), (two, 50_000), (three, 50_000)):
        age(redis, key, by_ms)
    (again,) = put(redis, "a", window_ms=100_000)
    assert again != known[0] and redis.do("HKEYS", one) == [b"", b"a"], "the oldest began anew"
    assert [put(redis, id_, window_ms=100_000)[0] for id_ in "bc"] == known[1:]


def age(redis: Raw, key: bytes, by_ms: int) -> None:
    redis.do("HINCRBY", key, "", -by_ms)


@pytest.mark.parametrize("window_ms", [2_000, 2 * HOUR_MS])
def test_a_window_that_changes_forgets_no_id_too_early(redis: Raw, window_ms: int) -> None:
    known = [put(redis, id_, window_ms=HOUR_MS)[0] for id_ in "abc"]
    assert [put(redis, id_, window_ms=window_ms)[0] for id_ in "abc"] == known


def test_an_id_that_comes_after_the_window_has_grown_is_remembered_for_all_of_it(redis: Raw) -> None:
    put(redis, "a", window_ms=60_000)
    put(redis, "b", window_ms=2 * HOUR_MS)
    (hash_of_b,) = [key for key in KEYS.ids(0) if redis.do("HEXISTS", key, "b")]
    assert redis.do("PTTL", hash_of_b) > 3 * HOUR_MS, "it takes ids for an hour, and knows the last one for two"


def test_a_clock_that_goes_back_forgets_no_id(redis: Raw) -> None:
    (known,) = put(redis, "a")
    age(redis, KEYS.ids(0)[0], -10 * HOUR_MS)
    assert put(redis, "a", "b")[0] == known and put(redis, "b") == put(redis, "b")


def test_an_event_without_id_is_always_stored(redis: Raw) -> None:
    assert len({*put(redis, "", ""), *put(redis, "")}) == 3


def test_a_full_stream_takes_nothing_but_answers_where_a_known_event_lies(redis: Raw) -> None:
    stored = put(redis, "a", "b", ceiling=2)
    assert put(redis, "b", "a", ceiling=2) == stored[::-1]
    (refused,) = put(redis, "c", "d", ceiling=2)
    assert isinstance(refused, ReplyError) and str(refused) == "FULL events" and redis.do("XLEN", KEYS.log(0)) == 2
