"""What was confirmed on the disk survives the loss of power, and what was confirmed elsewhere the death of the server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from typing import Literal

import pytest

from millstream import App, Envelope, Event, Settings, Stream
from millstream.errors import BrokerError, PublishError
from tests.faults.conftest import LONG
from tests.faults.nemesis import PATIENCE_S
from tests.faults.proxy import Proxy
from tests.redis.brokers import run_in
from tests.servers import VERSIONS, RedisServer, Version, ask, wait_until

SEED = 31
ROUNDS = 30 if LONG else 5
LANES = 40
AT_LEAST = 2 * LANES  # are confirmed in each round
FAR = 1_000_000  # from the numbers of one round to those of the next
BEHIND_S = 0.1  # so far a replica is behind when its server dies

Told = Callable[[str, object], None]
Confirm = Literal["memory", "fsync", "replicated"]


class Entry(Event, type="entry"):
    number: int


def ledger(confirm: Confirm) -> Stream[Entry]:
    return Stream("ledger", Entry, partitions=2, confirm=confirm)


async def publish_until(url: str, confirm: Confirm, first: int, fate: Callable[[], Awaitable[None]]) -> set[str]:
    """Publish while enough is confirmed and the server's fate takes its course. What is confirmed then."""
    confirmed, over, stream = set[str](), asyncio.Event(), ledger(confirm)

    async def lane(number: int) -> None:
        while not over.is_set():
            with suppress(PublishError, BrokerError):
                await app.publish(Envelope(Entry(number=number), id=f"e-{number}"), to=stream)
                confirmed.add(f"e-{number}")
            number += LANES

    client = App("clerk", broker=url, streams=[stream], settings=Settings(publish_patience=0))
    async with client as app, asyncio.TaskGroup() as lanes:
        for number in range(first, first + LANES):
            lanes.create_task(lane(number))
        async with asyncio.timeout(PATIENCE_S):
            while len(confirmed) < AT_LEAST:
                await asyncio.sleep(0.001)
            await fate()
        over.set()
    return confirmed


async def stored(url: str) -> set[str]:
    async with App("reader", broker=url) as app:
        return {envelope.id async for envelope in app.read(ledger("memory"))}


async def lost_with_the_power(server: RedisServer, confirm: Confirm) -> tuple[set[str], int]:
    """What was confirmed and is gone after the power was lost some times, and how much was confirmed."""
    chance, confirmed, lost = random.Random(SEED), set[str](), set[str]()

    async def fail() -> None:
        await asyncio.sleep(chance.uniform(0.0, 0.5))  # the moment is to be any
        server.kill()

    for number in range(ROUNDS):
        confirmed |= await publish_until(server.url, confirm, FAR * number, fail)
        server.restart()
        lost |= confirmed - await stored(server.url)
    return lost, len(confirmed)


async def lost_with_the_server(version: Version, confirm: Confirm) -> tuple[set[str], int]:
    """What was confirmed and is not on the replica that takes over, each time, and how much was confirmed."""
    chance, confirmed, lost = random.Random(SEED), set[str](), set[str]()
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer.start(version))
        for number in range(ROUNDS):
            with Proxy(server.port) as proxy:
                replica = stack.enter_context(follower(version, server, proxy))

                async def fail(server: RedisServer = server, proxy: Proxy = proxy) -> None:
                    await asyncio.sleep(chance.uniform(0.0, 0.3))  # the moment is to be any
                    proxy.stalled = True
                    await asyncio.sleep(BEHIND_S)
                    server.kill()

                confirmed |= await publish_until(server.url, confirm, FAR * number, fail)
            run_in(replica, "REPLICAOF", "NO", "ONE")
            lost |= confirmed - await stored(replica.url)
            server = replica
    return lost, len(confirmed)


def follower(version: Version, server: RedisServer, proxy: Proxy) -> RedisServer:
    """A replica that has all that the server has."""
    replica = RedisServer.start(version, replicaof=f"127.0.0.1 {proxy.port}")
    online = b"state=online"
    wait_until(lambda: online in ask(server.port, "INFO replication"), PATIENCE_S, "the replica does not follow")
    return replica


def tell(told: Told, lost: set[str], confirmed: int) -> None:
    print(f"\nseed {SEED}, {ROUNDS} rounds, {confirmed} confirmed, {len(lost)} lost")
    for name, value in {"rounds": ROUNDS, "confirmed": confirmed, "lost": len(lost)}.items():
        told(name, value)


@pytest.mark.parametrize(("version", "fsync"), [("7", "always"), ("8", "everysec"), ("8", "always")])
def test_what_was_confirmed_on_the_disk_survives_a_loss_of_power(
    powered: None, record_property: Told, version: Version, fsync: str
) -> None:
    with RedisServer.start(version, appendonly="yes", appendfsync=fsync) as server:
        lost, confirmed = asyncio.run(lost_with_the_power(server, "fsync"))
    tell(record_property, lost, confirmed)
    assert not lost


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_confirmed_elsewhere_survives_the_death_of_the_server(record_property: Told, version: Version) -> None:
    lost, confirmed = asyncio.run(lost_with_the_server(version, "replicated"))
    tell(record_property, lost, confirmed)
    assert not lost


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_not_confirmed_on_the_disk_is_lost_with_the_power(powered: None, version: Version) -> None:
    """The judge can say no."""
    with RedisServer.start(version, appendonly="yes", appendfsync="everysec") as server:
        lost, _ = asyncio.run(lost_with_the_power(server, "memory"))
    assert lost


def test_what_was_not_confirmed_elsewhere_is_lost_with_the_server() -> None:
    """The judge can say no."""
    lost, _ = asyncio.run(lost_with_the_server("7", "memory"))
    assert lost
