"""Appending on Redis: what is sent, and what is known of each record after a fault."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from hiredis import pack_command
from hypothesis import given
from hypothesis import strategies as st

from millstream.brokers.base import Policy
from millstream.brokers.redis import appending
from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.scripts import scripts
from millstream.errors import (
    BrokerDown,
    BrokerError,
    BrokerFull,
    BrokerRefused,
    NotSupported,
    StreamMismatch,
    Unconfirmed,
)
from millstream.stream import Position
from millstream.units import MAX_APPEND_BYTES, MAX_APPEND_RECORDS
from millstream.wire import entry
from millstream.wire.entry import Record
from tests.redis import brokers
from tests.redis.brokers import ALERTS, ORDERS, everything, made, opened, records, run_in, until
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

texts = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    st.builds(
        Record,
        partition=st.integers(0, 3),
        id=texts,
        type=texts | st.just("50%d%%"),
        data=st.binary(max_size=40),
        key=texts | st.none(),
        time_ms=st.integers(0, 2**48),
        headers=st.binary(max_size=9),
        source=texts | st.just("%b"),
    )
)
def test_what_is_sent_is_exactly_the_entry(record: Record) -> None:
    keys = Keys("", "orders", 4)
    _, (command,) = appending.Known(ORDERS, keys, Policy(), 0.0, mine=True).chunk([record], 0)
    wanted = (b"XADD", keys.log(record.partition), b"*", *entry.write(record))
    assert command == pack_command(wanted)  # type: ignore[arg-type]  # its stub knows commands of one word only


def test_a_chunk_ends_at_its_limits() -> None:
    known = appending.Known(ALERTS, Keys("", "alerts", 1), Policy(), 0.0, mine=True)
    for some in (records(2_500), records(9, size_bytes=1_000_000), records(2, size_bytes=2 * MAX_APPEND_BYTES)):
        sent: list[Record] = []
        while len(sent) < len(some):
            chunk, commands = known.chunk(some, len(sent))
            assert 0 < len(chunk) == len(commands) <= MAX_APPEND_RECORDS
            assert len(chunk) == 1 or sum(map(len, commands)) <= MAX_APPEND_BYTES
            sent += chunk
        assert sent == some


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1_000, 1_001, 3_500])
async def test_appended_records_are_read_again_in_order(server: RedisServer, count: int) -> None:
    async with opened(server.url, ORDERS) as broker:
        some = records(count, partitions=4)
        positions = await broker.append("orders", some)
        assert [position.partition for position in positions] == [record.partition for record in some]
        for partition in range(4):
            stored = await everything(broker, "orders", partition)
            assert list(stored.items()) == [
                (record.id, position)
                for record, position in zip(some, positions, strict=True)
                if record.partition == partition
            ]


async def test_a_record_comes_back_as_it_was(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        full = Record(0, "ü1", "alert", b'{"a":"\x00"}', "clé", 1_700_000_000_123, b'{"x":"y"}', None, "shop")
        bare = Record(0, "2", "alert", b"{}")
        positions = await broker.append("alerts", [full, bare])
        first, second = await broker.read("alerts", 0, None, 10)
        assert (first.record, first.position) == (full, positions[0])
        assert second.record.time_ms == int(positions[1].offset.partition("-")[0]) and second.record.key is None


async def test_calls_beside_each_other_keep_their_order_and_share_a_connection(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        calls = [broker.append("alerts", records(30, first=100 * n)) for n in range(40)]
        await asyncio.gather(*calls)
        stored = list(await everything(broker, "alerts"))
        assert stored == [f"id-{100 * n + i}" for n in range(40) for i in range(30)]
        assert run_in(server, "CLIENT", "LIST").count(b"name=millstream-publish") == 1


async def test_a_cancelled_append_leaves_the_others_their_answers(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        await broker.append("alerts", records(1))
        calls = [asyncio.ensure_future(broker.append("alerts", records(10, first=100 * (n + 1)))) for n in range(20)]
        await asyncio.sleep(0)
        for call in calls[::3]:
            call.cancel()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        stored = await everything(broker, "alerts")
        for n, end in enumerate(ends):
            if isinstance(end, BaseException):
                assert isinstance(end, asyncio.CancelledError) and n % 3 == 0
            else:
                assert [stored[f"id-{100 * (n + 1) + i}"] for i in range(10)] == end


def test_what_a_script_uses_is_sent_before_it() -> None:
    ripen, append = scripts["ripen"].source, scripts["append"].source
    shared, _, _ = append.partition(b"-- append.lua")
    assert shared.startswith(b"-- store.lua") and ripen.startswith(shared + b"-- ripen.lua")
    assert "store" not in scripts


async def test_what_this_server_cannot_do_is_refused_before_anything_is_stored(server: RedisServer) -> None:
    async with opened(server.url, ORDERS) as broker:
        later = Record(4, "2", "order.placed", b"{}", due_ms=1)
        for some, confirm, error in (
            ([*records(2), later], "memory", BrokerRefused),
            (records(2), "fsync", NotSupported),
            (records(2), "replicated", NotSupported),
            (records(10, partitions=5), "memory", BrokerRefused),
        ):
            with pytest.raises(error):
                await broker.append("orders", some, confirm)  # type: ignore[arg-type]  # mypy joins the tuples
        assert not await everything(broker, "orders")
        with pytest.raises(BrokerRefused, match="none with number 4"):
            await broker.read("orders", 4, None, 1)


def check_results(stored: dict[str, Position], some: Sequence[Record], results: Sequence[object]) -> None:
    """What is said of each record is so: stored there, not stored, or unknown."""
    assert len(results) == len(some)
    for record, result in zip(some, results, strict=True):
        if isinstance(result, Position):
            assert stored[record.id] == result
        elif isinstance(result, BrokerError):
            assert record.id not in stored
        else:
            assert result is None


async def test_a_full_server_stores_chunks_whole_or_not_at_all(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        used = dict(line.split(b":", 1) for line in run_in(server, "INFO", "memory").splitlines() if b":" in line)
        run_in(server, "CONFIG", "SET", "maxmemory", int(used[b"used_memory"]) + 3_000_000)
        try:
            some = records(8_000, size_bytes=1_000)
            with pytest.raises(Unconfirmed, match=r"of 8000 events for 'alerts'.*maxmemory") as caught:
                await broker.append("alerts", some)
            results = caught.value.results
            run_in(server, "CONFIG", "SET", "maxmemory", 1)  # the refused chunk itself took room, and has left
            with pytest.raises(BrokerFull, match="maxmemory"):
                await broker.append("alerts", records(1, first=9_000))
            with pytest.raises(BrokerFull, match="maxmemory"):
                await broker.append("alerts", records(5, first=9_000))
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", 0)
        stored = await everything(broker, "alerts")
        check_results(stored, some, results)
        whole = len(stored)
        assert 0 < whole < 8_000 and whole % MAX_APPEND_RECORDS == 0
        assert all(isinstance(result, BrokerFull) for result in results[whole:])
        assert await broker.append("alerts", some[whole:])


async def test_a_partition_that_is_something_else_refuses_its_own_records_only(server: RedisServer) -> None:
    async with opened(server.url, ORDERS) as broker:
        run_in(server, "SET", "orders:1", "text")
        some = records(40, partitions=4)
        with pytest.raises(Unconfirmed, match="30 are stored, 10 are not") as caught:
            await broker.append("orders", some)
        for record, result in zip(some, caught.value.results, strict=True):
            assert isinstance(result, BrokerRefused) if record.partition == 1 else isinstance(result, Position)
        more = records(1_500, partitions=4, first=1_000)
        with pytest.raises(Unconfirmed, match="750 are stored, 750 are not") as caught:
            await broker.append("orders", more)  # the second chunk is not sent
        assert all(isinstance(result, BrokerRefused) for result in caught.value.results[1_000:])
        check_results(await everything(broker, "orders", 0), more[::4], caught.value.results[::4])
        for count in (1, 2):
            with pytest.raises(BrokerRefused, match="WRONGTYPE"):
                await broker.append("orders", [Record(1, str(n), "order.placed", b"{}") for n in range(count)])


async def test_a_user_without_transactions_can_publish_record_by_record(server: RedisServer) -> None:
    run_in(server, "ACL", "SETUSER", "poor", "on", ">x", "~*", "+@all", "-multi")
    async with opened(server.url, ALERTS), opened(f"redis://poor:x@127.0.0.1:{server.port}/0") as broker:
        assert len(await broker.append("alerts", records(20))) == 20
        run_in(server, "ACL", "SETUSER", "poor", "-xadd")
        with pytest.raises(BrokerRefused, match="lacks a permission"):
            await broker.append("alerts", records(20))
        assert len(await everything(broker, "alerts")) == 20


@asynccontextmanager
async def cut_after(server: RedisServer, answer_bytes: int) -> AsyncIterator[str]:
    """The URL of a proxy that cuts each connection once it has passed on so many bytes of answers to appends."""

    async def forward(source: asyncio.StreamReader, to: asyncio.StreamWriter, limit_bytes: float) -> None:
        while limit_bytes > 0 and (data := await source.read(int(min(limit_bytes, 65_536)))):
            to.write(data)
            limit_bytes -= len(data)
        to.close()

    async def serve(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        answers, to_server = await asyncio.open_connection("127.0.0.1", server.port)
        greeting = await client.read(4_096)
        to_server.write(greeting)
        to_client.write(await answers.read(65_536))
        limit_bytes = answer_bytes if b"millstream-publish" in greeting else float("inf")
        there = forward(client, to_server, float("inf"))
        await asyncio.gather(there, forward(answers, to_client, limit_bytes), return_exceptions=True)
        served.append(to_client)

    connected: list[asyncio.StreamReader] = []
    served: list[asyncio.StreamWriter] = []

    async def count_and_serve(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        connected.append(client)
        await serve(client, to_client)

    proxy = await asyncio.start_server(count_and_serve, "127.0.0.1", 0)
    async with proxy:
        yield f"redis://127.0.0.1:{proxy.sockets[0].getsockname()[1]}/0"
        await until(lambda: len(served) == len(connected))


@pytest.mark.parametrize(  # each chunk of 1,000 is answered by 31,000 to 33,000 bytes
    ("answer_bytes", "known"), [(3, 0), (20_000, 0), (40_000, 1_000), (70_000, 2_000), (102_000, 3_000)]
)
async def test_a_connection_lost_in_the_middle_says_what_is_known_of_each_record(
    server: RedisServer, answer_bytes: int, known: int
) -> None:
    some = records(3_500, partitions=4)
    async with cut_after(server, answer_bytes) as url, opened(url, ORDERS) as broker:
        with pytest.raises(Unconfirmed, match="was lost") as caught:
            await broker.append("orders", some)
        results = caught.value.results
        stored: dict[str, Position] = {}
        for partition in range(4):
            stored |= await everything(broker, "orders", partition)
        check_results(stored, some, results)
        assert all(isinstance(result, Position) for result in results[:known])
        assert list(results[known : known + 1_000]) == [None] * len(results[known : known + 1_000])
        assert all(isinstance(result, BrokerDown) for result in results[known + 1_000 :])


async def test_after_a_loss_nothing_is_stored_and_the_next_call_connects_again(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        await broker.append("alerts", records(1))
        for name in ("millstream-publish", "millstream-control", "millstream-read"):
            clients = run_in(server, "CLIENT", "LIST").decode().splitlines()
            for line in clients:
                if f"name={name}" in line:
                    run_in(server, "CLIENT", "KILL", "ID", line.split()[0].removeprefix("id="))
        await until(lambda: broker._publish._link is not None and broker._publish._link.closed)
        await broker.append("alerts", records(1, first=1))
        assert list(await everything(broker, "alerts")) == ["id-0", "id-1"]


async def test_a_server_that_comes_back_empty_is_told_of_the_streams_again() -> None:
    with RedisServer.start("7") as server:
        async with opened(server.url, ORDERS) as broker:
            await broker.append("orders", records(4, partitions=4))
            server.restart()
            await until(lambda: broker._publish._link is not None and broker._publish._link.closed)
            await broker.append("orders", records(4, partitions=4, first=4))
            assert run_in(server, "HGET", "{orders}:meta", "partitions") == b"4"
            async with opened(server.url, ALERTS) as other:
                await other.append("alerts", records(1))
                server.restart()
                await until(lambda: other._publish._link is not None and other._publish._link.closed)
                run_in(server, "HSET", "{alerts}:meta", "v", 1, "partitions", 2)
                with pytest.raises(StreamMismatch):  # and never stores where another declaration would not look
                    await other.append("alerts", records(1))


async def test_a_server_that_comes_back_empty_is_told_of_the_policy_too() -> None:
    policy = Policy(dedupe_ms=60_000, dedupe_ids=100)
    with RedisServer.start("7") as server:
        async with opened(server.url) as broker:
            await broker.declare(ALERTS, policy)
            first = await broker.append("alerts", records(1))
            server.restart()
            await until(lambda: broker._publish._link is not None and broker._publish._link.closed)
            second = [await broker.append("alerts", records(1)) for _ in range(2)]
            assert first != second[0] == second[1] and len(await everything(broker, "alerts")) == 1
            assert await broker.declare(ALERTS) == policy


async def test_who_waits_for_a_dead_server_waits_for_one_attempt(server: RedisServer) -> None:
    attempts = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        await reader.read()
        writer.close()

    dead = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with dead:
        port = dead.sockets[0].getsockname()[1]
        broker = made(f"redis://127.0.0.1:{port}?connect_timeout=200ms")
        broker._open = True
        calls = [broker.append("alerts", records(1)) for _ in range(50)]
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(end, BrokerDown) for end in ends) and attempts == 1
        await broker.close()
