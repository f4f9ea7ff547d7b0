"""Brokers on Redis servers of their own, and a look at these from outside."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hiredis import Reader, pack_command

from millstream.brokers.base import Broker, StreamSpec
from millstream.brokers.redis.broker import RedisBroker
from millstream.clock import Clock
from millstream.settings import Settings
from millstream.stream import Position
from millstream.telemetry import Telemetry
from millstream.wire.entry import Record
from tests.servers import VERSIONS, RedisServer

ORDERS = StreamSpec("orders", partitions=4, key="order_id")
ALERTS = StreamSpec("alerts")


@pytest.fixture(scope="module", params=VERSIONS)
def started(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer.start(request.param, unix=True) as server:
        yield server


@pytest.fixture
def server(started: RedisServer) -> RedisServer:
    run_in(started, "FLUSHALL")
    return started


def run_in(server: RedisServer, *command: str | int | bytes) -> Any:
    """One command, from outside of everything that is tested here."""
    reader = Reader()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(pack_command(command))  # type: ignore[arg-type]  # its stub knows commands of one word only
        while (reply := reader.gets()) is False:
            received = connection.recv(65_536)
            assert received, "the server ended the connection"
            reader.feed(received)
    assert not isinstance(reply, Exception), reply
    return reply


def made(url: str, **settings: Any) -> RedisBroker:
    return RedisBroker(url, Settings(**settings), Clock(), Telemetry())


@asynccontextmanager
async def opened(url: str, *declared: StreamSpec, **settings: Any) -> AsyncIterator[RedisBroker]:
    broker = made(url, **settings)
    await broker.open()
    try:
        for spec in declared:
            await broker.declare(spec)
        yield broker
    finally:
        await broker.close()


def records(count: int, *, partitions: int = 1, size_bytes: int = 20, first: int = 0) -> list[Record]:
    data = b'"%b"' % (b"x" * size_bytes)
    return [
        Record(n % partitions, f"id-{n}", "order.placed", data, key=f"k{n % 7}", time_ms=1_700_000_000_000 + n)
        for n in range(first, first + count)
    ]


async def everything(broker: Broker, stream: str, partition: int = 0) -> dict[str, Position]:
    """Event id to position, of all events of a partition, page by page."""
    found: dict[str, Position] = {}
    after = None
    while page := await broker.read(stream, partition, after, 700):
        found |= {stored.record.id: stored.position for stored in page}
        after = page[-1].position
    return found


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not met():
            await asyncio.sleep(0.002)
