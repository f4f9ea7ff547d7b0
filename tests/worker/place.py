"""What the worker's tests share: two events on a stream, an app at work on a memory broker, and a broker that fails."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from millstream import App, Event, Settings, Stream
from millstream.brokers.base import Claim, Consumer, Kept, Position, Settlement, Subscription
from millstream.brokers.memory.broker import MemoryBroker
from millstream.clock import Clock
from millstream.worker.process import Process

T = TypeVar("T")

PATIENCE_S = 20.0


class Base(Event):
    n: int = 0


class Placed(Base, type="order.placed"):
    pass


class Cancelled(Base, type="order.cancelled"):
    pass


class Charged(Event, type="payment.charged"):
    n: int


orders = Stream("orders", Placed | Cancelled, partitions=2)
payments = Stream("payments", Charged)

QUICK = Settings(lease="1s", grace="2s", concurrency=8)


def app_of(settings: Settings = QUICK, **options: Any) -> App:
    return App("shop", streams=[orders, payments], settings=settings, **options)


@asynccontextmanager
async def at_work(app: App, broker: Any = None) -> AsyncIterator[Process]:
    """The app's handlers run inside the block, on a memory broker in real time; leaving it drains."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.opened(broker=broker or memory(app)))
        yield await stack.enter_async_context(app._working())


def memory(app: App, clock: Clock | None = None) -> MemoryBroker:
    return MemoryBroker("memory://", app.settings, clock or app.clock, app.telemetry)


def heard(app: App, *names: str) -> list[Mapping[str, Any]]:
    """What the app tells under these names, from now on."""
    told: list[Mapping[str, Any]] = []
    app.telemetry.listen(lambda name, measurements: told.append(measurements) if name in names else None)
    return told


async def until(met: Callable[[], object], why: str = "it never came to it") -> None:
    """Return as soon as the condition is met."""
    until_s = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < until_s, why
        await asyncio.sleep(0.001)


async def settled(broker: Any, group: str = "billing", stream: str = "orders") -> None:
    """Return when a group has nothing undelivered and nothing pending."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        (info,) = (info for info in await broker.admin.groups(stream) if info.group == group)
        if info.lag == 0 and info.pending == 0:
            return
        assert time.monotonic() < until_s, f"not settled: {info}"
        await asyncio.sleep(0.002)


class Faulty:
    """A memory broker whose consumers fail as told: `before` a call takes effect, or `after` it, as a lost reply does."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.before: dict[str, Exception] = {}
        self.after: dict[str, Exception] = {}
        self.hanging: dict[str, asyncio.Event] = {}
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.broker, name)

    async def subscribe(self, subscription: Subscription) -> FaultyConsumer:
        return FaultyConsumer(self, await self.broker.subscribe(subscription))

    async def call(self, name: str, work: Callable[[], Awaitable[T]]) -> T:
        self.calls[name] += 1
        if name in self.hanging:
            await self.hanging[name].wait()
        if name in self.before:
            raise self.before[name]
        result = await work()
        if name in self.after:
            raise self.after[name]
        return result


class FaultyConsumer:
    """A consumer of a `Faulty` broker."""

    def __init__(self, faults: Faulty, consumer: Consumer) -> None:
        self._faults = faults
        self._consumer = consumer

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        # A lost reply to a fetch is the broker's to mend, so this one fails before it takes effect only.
        return await self._faults.call("fetch", lambda: self._consumer.fetch(limit, wait_s))

    async def begin(self, positions: Sequence[Position]) -> None:
        await self._faults.call("begin", lambda: self._consumer.begin(positions))

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        return await self._faults.call("settle", lambda: self._consumer.settle(settlements))

    async def finish(self, positions: Sequence[Position]) -> list[bool]:
        return await self._faults.call("settle", lambda: self._consumer.finish(positions))

    async def keep(self) -> Kept:
        return await self._faults.call("keep", self._consumer.keep)

    async def release(self, partitions: frozenset[int]) -> None:
        await self._consumer.release(partitions)

    async def close(self) -> None:
        await self._consumer.close()
