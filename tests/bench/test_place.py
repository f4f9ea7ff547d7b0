"""A run leaves nothing behind, however it ends; and it is not made where it would do harm."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from redis import Redis

from millstream.bench import place
from millstream.bench.measure import measure
from millstream.bench.scenarios import SCENARIOS
from millstream.brokers.base import Broker
from millstream.clock import Clock
from millstream.errors import BrokerError, BrokerRefused
from tests.servers import RedisServer, wait_until

# Says a word, then goes on until it is killed: with a worker that holds what it has fetched.
ENDLESS = """
import asyncio, sys
from millstream.bench import place, scenarios

async def main() -> None:
    async with place.found(sys.argv[1]) as here:
        run = scenarios.Run(scenarios.SCENARIOS["handle"], here.url, here.namespace, 100, 200)
        count = run.counts["bench"]
        count.left = 1_000
        async with run.app:
            await run.publish(run.made(), scenarios.many, scenarios.Meter(), lambda done: None)
            async with run.app.worker():
                while count.left > 900:
                    await run.clock.sleep(0.01)
                print("handled", flush=True)
                await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer.start("7") as server:
        yield server


@pytest.fixture
def client(server: RedisServer) -> Iterator[Redis]:
    with Redis(port=server.port) as client:
        yield client


def ignore(doing: str, done: int, events: int) -> None: ...


@pytest.mark.parametrize("name", ["publish-many", "handle", "handle-ordered", "both"])
async def test_a_server_is_as_empty_as_before(server: RedisServer, client: Redis, name: str) -> None:
    found = await measure(SCENARIOS[name], server.url, 1_000, 200, ignore)
    assert found.report.events == 1_000 and client.keys() == []


async def test_keys_of_others_stay(server: RedisServer, client: Redis) -> None:
    client.mset({"sales": "1", "millstream-bench": "2", "engine": "3"})
    await measure(SCENARIOS["handle"], f"{server.url}?namespace=shop", 500, 200, ignore)
    assert sorted(client.keys()) == [b"engine", b"millstream-bench", b"sales"]


async def test_a_folder_is_as_empty_as_before(tmp_path: Path) -> None:
    (tmp_path / "shop.db").write_text("somebody's")
    found = await measure(SCENARIOS["handle"], f"sqlite:///{tmp_path}/shop.db?synchronous=normal", 500, 200, ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["shop.db"]
    assert (tmp_path / "shop.db").read_text() == "somebody's"
    assert found.report.bytes_per_event is not None and found.report.bytes_per_event > 200


@pytest.mark.parametrize("failure", [BrokerError("it broke"), asyncio.CancelledError()])
async def test_what_fails_or_is_cancelled_is_removed(
    server: RedisServer, client: Redis, tmp_path: Path, failure: BaseException
) -> None:
    for url in (server.url, f"sqlite:///{tmp_path}/shop.db"):
        with pytest.raises(type(failure)):
            async with place.found(url) as here:
                await SCENARIOS["publish-many"].run(here.url, here.namespace, 500, 200)
                assert client.keys() or any(tmp_path.iterdir())
                raise failure
        assert client.keys() == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("installed", [True, False])
async def test_a_limit_that_is_cut_off_is_removed(
    server: RedisServer, client: Redis, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not installed:
        monkeypatch.setattr(shutil, "which", lambda program: None)
    measuring = asyncio.create_task(measure(SCENARIOS["publish-many"], server.url, 5_000_000, 200, ignore))
    while not client.keys("*:engine"):
        await asyncio.sleep(0)
    measuring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await measuring
    assert client.keys() == []


@pytest.mark.parametrize("broker", ["redis", "sqlite"])
async def test_what_a_killed_run_has_left_the_next_one_removes(
    server: RedisServer, client: Redis, tmp_path: Path, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLSTREAM_LEASE", "1s")
    url = server.url if broker == "redis" else f"sqlite:///{tmp_path}/shop.db"
    with subprocess.Popen([sys.executable, "-c", ENDLESS, url], stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None and killed.stdout.readline() == b"handled\n"
        others = await place.objections(url, 100, 200)
        assert client.keys() or any(tmp_path.iterdir()), "a run that lives is left alone"
        assert any("keys of others" in words for words in others) == (broker == "redis")
        killed.kill()
    assert await place.objections(url, 100, 200) == []
    assert client.keys() == [] and list(tmp_path.iterdir()) == []


async def test_waiting_for_the_worker_of_a_killed_run_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [BrokerRefused("a consumer is at work"), BrokerRefused("a consumer is at work")]

    class Held:
        @property
        def admin(self) -> Held:
            return self

        async def discard(self, stream: str) -> None:
            if refusals:
                raise refusals.pop()

    said: list[str] = []
    monkeypatch.setattr(place, "RETRY_S", 0)
    await place._discard(cast("Broker", Held()), "sales", said.append)
    (words,) = said
    assert not refusals and "a run was killed here: for up to 13 s" in words


def test_a_run_of_another_machine_counts_as_living_for_an_hour() -> None:
    now_ms = Clock().now_ms()
    assert not place._is_over(f"{place.RUNS}.01234567.1.{now_ms - 3_500_000}")
    assert place._is_over(f"{place.RUNS}.01234567.1.{now_ms - 3_700_000}")
    assert not place._is_over("orders") and not place._is_over(f"{place.RUNS}.txt")
    assert not place._is_over(f"{place.RUNS}.{place._machine()}.{os.getpid()}.0")


async def test_keys_of_others_and_too_little_memory_are_objections(client: Redis, server: RedisServer) -> None:
    assert await place.objections(server.url, 1_000, 200) == []
    client.select(3)
    client.set("theirs", "1")
    client.config_set("maxmemory", "20mb")
    memory, keys = await place.objections(server.url, 100_000, 200)
    assert "about 35,000,000 bytes" in memory and "of 20,971,520 (maxmemory)" in memory
    assert keys == "it holds keys of others (1)"


async def test_others_at_work_are_an_objection(server: RedisServer) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", f"from redis import Redis\nr = Redis(port={server.port})\nwhile True: r.ping()"]
    ) as busy:
        try:
            with Redis(port=server.port) as client:
                wait_until(lambda: int(client.info("stats")["total_commands_processed"]) > 500, 20, "nobody works")
            (words,) = await place.objections(server.url, 100, 200)
        finally:
            busy.kill()
    assert words.startswith("others send it ") and words.endswith(" commands a second")


async def test_too_small_a_disk_is_an_objection(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    assert await place.objections(url, 1_000, 200) == []
    (words,) = await place.objections(url, 10**12, 200)
    assert "are free in" in words


async def test_too_little_memory_is_an_objection_to_memory() -> None:
    assert await place.objections("memory://", 10, 200) == []
    (words,) = await place.objections("memory://", 10**12, 200)
    assert "bytes of memory" in words
