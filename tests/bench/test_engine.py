"""The engine's own limit, and what a result is said to mean."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from millstream.bench.advice import explain
from millstream.bench.engine import Limit, NoEngine, Waits
from millstream.bench.meter import Cost
from millstream.bench.redis_engine import OWN, PROGRAM, RedisEngine
from millstream.bench.scenarios import Load, Result
from millstream.bench.sqlite_engine import SQLiteEngine
from millstream.bench.wire import Address, Wire
from millstream.errors import BrokerDown, BrokerRefused
from tests.servers import RedisServer, free_port

DATA = b'{"who":"c000"}'


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer.start("7", unix=True) as server:
        yield server


# Redis


@pytest.mark.parametrize("events", [1, 500, 1_700])
@pytest.mark.parametrize("load", ["publish", "handle", "both"])
async def test_redis_does_the_whole_work_and_is_empty_afterwards(
    server: RedisServer, load: Load, events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    async with RedisEngine.opened(server.url, "limit") as engine:
        before = calls(server)
        limit = await engine.limit(load, events, DATA)
        after = calls(server)
    assert limit is not None and limit.by == OWN and limit.rate is not None and limit.rate > 0
    assert after.get("xadd", 0) - before.get("xadd", 0) == events
    assert (after.get("xack", 0) > before.get("xack", 0)) == (load != "publish")
    with Redis(port=server.port) as client:
        assert client.keys() == []


def calls(server: RedisServer) -> dict[str, int]:
    with Redis(port=server.port) as client:
        found: dict[str, dict[str, int]] = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): stats["calls"] for name, stats in found.items()}


async def test_latency_of_redis_is_from_the_write_to_the_wake_up(server: RedisServer) -> None:
    async with RedisEngine.opened(server.url, "limit") as engine:
        limit = await engine.limit("latency", 40, DATA)
    assert limit is not None and limit.p50_ms is not None and limit.p99_ms is not None
    assert limit.rate is None and 0 < limit.p50_ms <= limit.p99_ms


@pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="redis-benchmark is not installed")
@pytest.mark.parametrize("unix", [False, True])
async def test_publishing_is_measured_with_redis_benchmark_where_it_is_installed(
    server: RedisServer, unix: bool
) -> None:
    async with RedisEngine.opened(server.unix_url if unix else server.url, "limit") as engine:
        limit = await engine.limit("publish", 2_000, DATA)
    assert limit is not None and limit.by.startswith(PROGRAM) and limit.rate is not None and limit.rate > 1_000


async def test_a_password_is_never_on_a_command_line() -> None:
    with RedisServer.start("7", requirepass="se/cret") as server:
        url = f"redis://:se%2Fcret@127.0.0.1:{server.port}/2"
        async with RedisEngine.opened(url, "limit") as engine:
            limit = await engine.limit("publish", 100, DATA)
        with pytest.raises(BrokerRefused, match="NOAUTH"):
            async with Wire.opened(server.url):
                pass
    assert limit is not None and limit.by == OWN


async def test_a_server_that_answers_no_questions_is_objected_to(server: RedisServer) -> None:
    with Redis(port=server.port) as client:
        client.execute_command("ACL", "SETUSER", "shop", "on", ">pass", "~*", "+@all", "-info", "-config")
    async with RedisEngine.opened(f"redis://shop:pass@127.0.0.1:{server.port}", "limit") as engine:
        (words,) = await engine.objections(100, 200)
        assert "(INFO)" in words
        assert await engine.cpu_s() is None and (await engine.waits()).syncs == ""


async def test_redis_says_what_waiting_costs() -> None:
    with RedisServer.start("7", appendonly="yes", appendfsync="always") as server:
        async with RedisEngine.opened(server.url, "limit") as engine:
            waits, cpu_s = await engine.waits(), await engine.cpu_s()
    assert waits.trip_ms is not None and waits.store_ms is not None and waits.trip_ms > 0 and waits.store_ms > 0
    assert waits.syncs == "appendfsync always" and cpu_s is not None and cpu_s > 0


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://localhost", Address("localhost", 6379, "", 0, [])),
        ("redis://shop:p%40ss@10.0.0.1:7000/3", Address("10.0.0.1", 7000, "", 3, ["shop", "p@ss"])),
        ("redis://host?db=2&password=pass", Address("host", 6379, "", 2, ["pass"])),
        ("redis+unix:///run/redis.sock?db=1", Address("localhost", 6379, "/run/redis.sock", 1, [])),
    ],
)
def test_a_url_names_a_server(url: str, address: Address) -> None:
    assert Address.parse(url) == address


async def test_a_connection_that_ends_is_said() -> None:
    with pytest.raises(BrokerDown, match=r"no server at 127\.0\.0\.1"):
        async with Wire.opened(f"redis://127.0.0.1:{free_port()}"):
            pass
    with RedisServer.start("7") as server:
        async with Wire.opened(server.url) as wire:
            waiting = wire.write(b"*3\r\n$5\r\nBLPOP\r\n$1\r\nx\r\n$1\r\n0\r\n", 1)
            server.kill()
            with pytest.raises(BrokerDown, match="the connection was lost"):
                await waiting
            with pytest.raises(BrokerDown, match="the connection was lost"):
                await wire.call("PING")


# SQLite, and what is no engine


@pytest.mark.parametrize("synchronous", ["full", "normal"])
@pytest.mark.parametrize("load", ["publish", "handle", "both"])
async def test_sqlite_does_the_whole_work(tmp_path: Path, load: Load, synchronous: str) -> None:
    engine = SQLiteEngine(f"sqlite:///shop.db?synchronous={synchronous}", tmp_path / "engine.db")
    limit = await engine.limit(load, 2_700, DATA)
    assert limit is not None and limit.rate is not None and limit.rate > 0
    assert limit.by.endswith(f"synchronous={synchronous}")
    waits = await engine.waits()
    assert (waits.commits_s is not None and waits.commits_s > 0) == (synchronous == "full")


async def test_a_library_wakes_nobody_up(tmp_path: Path) -> None:
    assert await SQLiteEngine("sqlite:///shop.db", tmp_path / "engine.db").limit("latency", 100, DATA) is None


async def test_of_other_brokers_no_limit_is_known() -> None:
    engine = NoEngine(in_memory=False)
    assert await engine.objections(10**12, 200) == []
    assert await engine.limit("publish", 100, DATA) is None and await engine.cpu_s() is None
    assert await engine.waits() == Waits()


# What bounds a run


@pytest.mark.parametrize(
    ("cost", "waits", "words"),
    [
        (Cost(1.0, 0.95, 0.0, 0.5), Waits(0.1, 0.1), "Bound by this process's CPU."),
        (Cost(1.0, 0.3, 0.0, 0.9), Waits(0.1, 0.1), "Bound by the server's CPU."),
        (Cost(1.0, 0.5, 0.4, 0.2), Waits(0.1, 0.1), "Bound by this machine's CPU: for 40% of the time"),
        (Cost(1.0, 0.5, None, 0.4), Waits(0.1, 0.1), "Bound by the CPU of this process and of the server in turn"),
        (Cost(1.0, 0.2, 0.0, 0.1), Waits(2.0, 2.1), "Bound by the round trip: 2.00 ms"),
        (
            Cost(1.0, 0.2, 0.0, 0.1),
            Waits(0.1, 1.2, syncs="appendfsync always"),
            "Bound by fsync: appendfsync always, and storing one event takes 1.20 ms, an empty command 0.10 ms.",
        ),
        (Cost(1.0, 0.2, 0.0, 0.1), Waits(0.3, 0.31, syncs="appendfsync always"), "Bound by the round trip: 0.30 ms"),
        (
            Cost(1.0, 0.2, 0.1, 0.1),
            Waits(0.03, 0.05),
            "Not bound by one thing: for 60% of the time neither side worked; an empty command takes 0.03 ms.",
        ),
        (
            Cost(1.0, 0.3, 0.0),
            Waits(commits_s=0.6, syncs="synchronous=full"),
            "Bound by fsync: synchronous=full, and the commits of a bare loop take 0.60 s, all of this 1.00 s.",
        ),
        (Cost(1.0, 0.3, 0.0), Waits(commits_s=0.1, syncs="synchronous=full"), "Not bound by one thing: the commits of"),
        (Cost(1.0, 0.3, 0.0), Waits(), "Not bound by one thing."),
    ],
)
def test_what_bounds_a_run_is_said_from_what_was_measured(cost: Cost, waits: Waits, words: str) -> None:
    explained = explain(Result("handle", 100_000, 100_000.0, cost, None), None, waits)
    assert explained.startswith(words)
    assert f"This process used {cost.cpu_s:.0%} of a core, {cost.cpu_s * 10:.1f} µs an event" in explained
    assert ("the server" in explained.rpartition(";")[2]) == (cost.server_cpu_s is not None)


def test_latency_is_compared_with_the_engine() -> None:
    result = Result("latency", 2_500, 500.0, Cost(5.0), None, 0.2, 0.9)
    assert "p50 0.10 ms, p99 0.30 ms" in explain(result, Limit(OWN, None, 0.1, 0.3), Waits())
    assert explain(result, None, Waits()) == "From the call of publish() to the handler."


def test_a_latency_that_is_one_of_a_queue_is_none() -> None:
    result = Result("latency", 2_500, 290.0, Cost(8.6), None, 85.0, 170.0)
    assert "could not keep up with 500 events a second" in explain(result, Limit(OWN, None, 0.1, 0.3), Waits())


@pytest.mark.parametrize(("start_ms", "told"), [(None, False), (49.0, False), (51.0, True)])
def test_a_start_that_takes_a_twentieth_of_the_time_is_told(start_ms: float | None, told: bool) -> None:
    result = Result("handle", 100_000, 100_000.0, Cost(1.0, 0.95), None, start_ms=start_ms)
    assert ("51 ms to the first event" in explain(result, None, Waits())) == told


def test_of_a_short_run_nothing_is_said() -> None:
    explained = explain(Result("handle", 100, 1_000.0, Cost(0.1, 0.1), None), None, Waits())
    assert explained == "Too short to say more, at 0.100 s: give it more --events."
