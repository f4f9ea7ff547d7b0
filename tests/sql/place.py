"""A broker that only remembers: what relays publish to in these tests, with dedupe and a gate; and relays on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from millstream import BrokerDown, Dedupe, Event, Position, Stream
from millstream.brokers.base import Broker, Policy, Record, StreamSpec, Traits
from millstream.clock import Clock
from millstream.handlers.router import Runtime
from millstream.sql import Outbox, Relay
from millstream.telemetry import Telemetry
from tests.sql.ways import Way, maybe


class Paid(Event, type="paid"):
    order: str
    number: int = 0


class Sent(Event, type="sent"):
    order: str


orders = Stream("orders", Paid | Sent, key="order", partitions=4, dedupe="1h")
parcels = Stream("parcels", Sent, dedupe=Dedupe("1h"), confirm="fsync")
outbox = Outbox(orders, parcels, source="shop")


class Log:
    """Stores records once for each id, in order."""

    def __init__(self) -> None:
        self.url = "log://"
        self.traits = Traits(delayed=True)
        self.policy: Policy | None = None
        self.stored: dict[str, tuple[str, Record]] = {}
        self.appended = asyncio.Condition()
        self.calls = 0
        self.errors: list[Exception] = []

    async def declare(self, stream: StreamSpec, policy: Policy | None = None) -> Policy:
        return self.policy or policy or Policy()

    async def append(self, stream: str, records: Sequence[Record], confirm: str = "memory") -> list[Position]:
        assert confirm == ("fsync" if stream == "parcels" else "memory")
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        for record in records:
            self.stored.setdefault(record.id, (stream, record))
        async with self.appended:
            self.appended.notify_all()
        return [Position(record.partition, "0") for record in records]

    def numbers(self, key: str) -> list[int]:
        """What was stored of a key, in order."""
        return [int(record.data.partition(b'"number":')[2][:-1]) for _, record in self.of(key)]

    def of(self, key: str | None) -> list[tuple[str, Record]]:
        return [(stream, record) for stream, record in self.stored.values() if record.key == key]

    async def until(self, met: Callable[[], bool]) -> None:
        """Return as soon as what is stored is what is waited for."""
        async with asyncio.timeout(20), self.appended:
            await self.appended.wait_for(met)


class Gate:
    """Stands before a log: what comes waits until it is opened."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.url, self.traits = log.url, log.traits
        self.waits = asyncio.Event()
        self.open = asyncio.Event()

    async def declare(self, stream: StreamSpec, policy: Policy | None = None) -> Policy:
        return await self._log.declare(stream, policy)

    async def append(self, stream: str, records: Sequence[Record], confirm: str = "memory") -> list[Position]:
        self.waits.set()
        await self.open.wait()
        return await self._log.append(stream, records, confirm)


class Place:
    """What a running app offers to a relay."""

    def __init__(self, broker: Any) -> None:
        self.broker = cast("Broker", broker)
        self.clock = Clock()
        self.telemetry = Telemetry()
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.telemetry.listen(lambda name, measured: self.told.append((name, dict(measured))))


@asynccontextmanager
async def relaying(relay: Relay, broker: Any) -> AsyncIterator[Place]:
    """A relay at work."""
    place = Place(broker)
    async with relay.running(cast("Runtime", place)):
        yield place


async def created(way: Way) -> Way:
    async with way.transaction() as connection:
        await maybe(outbox.create(connection))
    return way


async def left(way: Way) -> int:
    """Events that are not published yet."""
    async with way.transaction() as connection:
        return sum(lag.waiting for lag in (await maybe(outbox.lag(connection))).values())


async def until_empty(way: Way) -> None:
    async with asyncio.timeout(20):
        while await left(way):
            await asyncio.sleep(0.01)


def down() -> BrokerDown:
    return BrokerDown("it is away")
