"""What one test of the conformance suite has in its hands: an open broker, consumers that beat, and patience.

Nothing here sleeps for a fixed time: what must come is asked for again until it is there, what must not come is asked
for once it could have come. Under a virtual clock time passes whenever everybody waits.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from msgspec.structs import replace

from millstream.brokers.base import (
    Broker,
    Claim,
    Consumer,
    Done,
    GroupInfo,
    Kept,
    Outcome,
    Output,
    Policy,
    Position,
    Record,
    Settlement,
    Start,
    Stored,
    StreamInfo,
    StreamSpec,
    Subscription,
    Tended,
    Traits,
)
from millstream.brokers.urls import Factory, broker_for
from millstream.clock import Clock
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from millstream.testing.clock import VirtualClock

T = TypeVar("T")

ORDERS = StreamSpec("orders")
PARTED = StreamSpec("parted", partitions=3, key="order_id")

PATIENCE_S = 15.0  # for what must come: a loaded machine may take a hundred times as long as an idle one
POLL_S = 0.02
STEP_S = 0.25  # one wait of a fetch that is repeated
CONDITIONS: dict[object, Callable[[Traits], bool]] = {}

GLANCE_S = 0.05  # for what must not come, and could have come long ago


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a broker is to be tried: an empty store that belongs to one test."""

    url: str
    factory: Factory = broker_for
    """Called with the URL, the settings, the clock and a telemetry; by default, the URL's scheme decides."""
    settings: Settings = field(default_factory=Settings)
    clock: Clock = field(default_factory=Clock)
    """A `VirtualClock` where a broker needs no socket, thread or file to answer."""
    lease_s: float = 1.0
    moment_s: float = 1.0
    """How much longer than the lease a takeover may take on this machine."""
    spare: int = 0
    """So many events of a partition may stay beyond what retention asks for."""


class Trial:
    """One test's broker, open, with the streams `orders` and `parted` declared."""

    def __init__(self, place: Place, traits: Traits, tasks: asyncio.TaskGroup) -> None:
        self.place = place
        self.traits = traits
        self.clock = place.clock
        self.brokers: list[Broker] = []
        self.consumers: list[Consumer] = []
        self._tasks = tasks
        self._beats: dict[int, asyncio.Task[None]] = {}
        self._heard: dict[int, Kept] = {}
        self._issued = 0
        self._streams: dict[StreamSpec, Policy | None] = {ORDERS: None, PARTED: None}

    @property
    def broker(self) -> Broker:
        """The first one."""
        return self.brokers[0]

    async def another(self) -> Broker:
        """The same place through another object, as another process would see it; the same object if none can."""
        if self.brokers and not self.traits.shared:
            return self.broker
        place = self.place
        broker = place.factory(place.url, place.settings, place.clock, Telemetry())
        await broker.open()
        self.brokers.append(broker)
        for stream, policy in self._streams.items():
            await broker.declare(stream, policy)
        return broker

    async def declared(self, policy: Policy, *, name: str = "kept", partitions: int = 1) -> StreamSpec:
        """A new stream for which this holds, declared to all brokers."""
        stream = StreamSpec(name, partitions, "order_id" if partitions > 1 else "")
        self._streams[stream] = policy
        for broker in self.brokers:
            assert await broker.declare(stream, policy) == policy
        return stream

    async def tended(
        self, stream: StreamSpec, good: Callable[[Tended], bool], *, within_s: float = PATIENCE_S
    ) -> Tended:
        """Tend until that is good: what is counted since this call, all else as the last round found it."""
        published = trimmed = 0
        lost: Counter[str] = Counter()

        async def tend() -> Tended:
            nonlocal published, trimmed
            found = await self.broker.tend(stream.name)
            published, trimmed = published + found.published, trimmed + found.trimmed
            lost.update(found.lost)
            return replace(found, published=published, trimmed=trimmed, lost=dict(lost))

        return await self.eventually(tend, good, within_s=within_s)

    async def consumer(
        self,
        group: str = "billing",
        *,
        stream: StreamSpec = ORDERS,
        start: Start = "beginning",
        owner: str = "shop",
        broker: Broker | None = None,
        order: bool = False,
    ) -> Consumer:
        """A member of a group, kept alive until the test's end or `silence`."""
        subscription = Subscription(stream, group, owner, start, self.place.lease_s, order)
        consumer = await (broker or self.broker).subscribe(subscription)
        self.consumers.append(consumer)
        self.revive(consumer)
        return consumer

    def silence(self, *consumers: Consumer) -> None:
        """Let them fall silent, as if their process had crashed or stood still."""
        for consumer in consumers:
            self._beats.pop(id(consumer)).cancel()

    def revive(self, consumer: Consumer) -> None:
        """Let it beat, until the test's end or `silence`."""
        self._beats[id(consumer)] = self._tasks.create_task(self._beat(consumer))

    def record(
        self,
        data: bytes | None = None,
        *,
        partition: int = 0,
        key: str | None = None,
        due_ms: int | None = None,
    ) -> Record:
        """A record with an id of its own, and a number as its data."""
        self._issued += 1
        data = b'{"n":%d}' % self._issued if data is None else data
        return Record(partition, self.clock.new_id(), "order.placed", data, key, due_ms=due_ms, source="shop")

    async def publish(
        self, count: int = 1, *, stream: StreamSpec = ORDERS, partition: int = 0, key: str | None = None
    ) -> list[Position]:
        """Append so many new events."""
        return await self.broker.append(stream.name, [self.record(partition=partition, key=key) for _ in range(count)])

    async def claims(self, consumer: Consumer, count: int, *, within_s: float = PATIENCE_S) -> list[Claim]:
        """Exactly so many claims, in the order in which they came."""
        claims: list[Claim] = []
        until = self.clock.monotonic() + within_s
        while len(claims) < count:
            left_s = until - self.clock.monotonic()
            assert left_s > 0, f"{len(claims)} of {count} events came within {within_s:g} s: {claims}"
            claims += await consumer.fetch(count - len(claims), min(left_s, STEP_S))
        return claims

    async def claim(self, consumer: Consumer, *, within_s: float = PATIENCE_S) -> Claim:
        """The next claim."""
        return (await self.claims(consumer, 1, within_s=within_s))[0]

    async def nothing(self, consumer: Consumer, *, within_s: float = GLANCE_S) -> None:
        """Make sure that there is nothing to claim."""
        assert await consumer.fetch(10, within_s) == []

    async def eventually(
        self, ask: Callable[[], Awaitable[T]], good: Callable[[T], bool], *, within_s: float = PATIENCE_S
    ) -> T:
        """Ask until the answer is good. Fails with the last answer when that takes too long."""
        until = self.clock.monotonic() + within_s
        while not good(answer := await ask()):
            assert self.clock.monotonic() < until, f"still {answer!r} after {within_s:g} s"
            await self.clock.sleep(POLL_S)
        return answer

    async def info(self, group: str = "billing", *, stream: StreamSpec = ORDERS) -> GroupInfo:
        """What the admin says about a group."""
        infos = {info.group: info for info in await self.broker.admin.groups(stream.name)}
        return infos[group]

    async def about(self, stream: StreamSpec) -> StreamInfo:
        """What the admin says about a stream."""
        infos = {info.spec: info for info in await self.broker.admin.streams()}
        return infos[stream]

    async def stored(self, *, stream: StreamSpec = ORDERS, partition: int = 0) -> list[Stored]:
        """The first thousand events of a partition."""
        found: list[Stored] = []
        while left := 1_000 - len(found):
            page = await self.broker.read(stream.name, partition, found[-1].position if found else None, left)
            if not page:
                break
            found += page
        return found

    async def turns(self, count: int = 10) -> None:
        """Let other tasks of this process go on, for so many turns of the loop."""
        for _ in range(count):
            await self.clock.sleep(0)

    def heard(self, consumer: Consumer) -> Kept:
        """What its heartbeats have told it since the last call."""
        return self._heard.pop(id(consumer), Kept())

    async def _beat(self, consumer: Consumer) -> None:
        while True:  # from `consumer` on, until it is silenced or the test ends
            kept, before = await consumer.keep(), self.heard(consumer)
            self._heard[id(consumer)] = Kept(before.lost | kept.lost, before.drain | kept.drain)
            await self.clock.sleep(self.place.lease_s / 4)

    async def _end(self) -> None:
        for beat in self._beats.values():
            beat.cancel()
        for consumer in self.consumers:
            await consumer.close()
        for broker in self.brokers:
            await broker.close()


def where(condition: Callable[[Traits], bool]) -> Callable[[T], T]:
    """Mark a test that only some brokers have: those whose traits meet the condition."""

    def mark(test: T) -> T:
        CONDITIONS[test] = condition
        return test

    return mark


@asynccontextmanager
async def trial(place: Place, traits: Traits) -> AsyncIterator[Trial]:
    """A trial at this place; at its end, all consumers and brokers are closed."""
    async with asyncio.TaskGroup() as tasks:
        flow = tasks.create_task(_flow(place.clock))
        trial = Trial(place, traits, tasks)
        try:
            await trial.another()
            yield trial
        finally:
            await trial._end()
            flow.cancel()


def settle(claim: Claim, outcome: Outcome | None = None, *outputs: Output) -> Settlement:
    """The settlement of a claim: done, unless said otherwise."""
    return Settlement(claim.position, outcome or Done(), outputs)


def positions(claims: list[Claim]) -> list[Position]:
    """Where the claimed events lie."""
    return [claim.position for claim in claims]


async def _flow(clock: Clock) -> None:
    while isinstance(clock, VirtualClock):  # until the trial ends
        await clock.advance(clock.next_timer_s() or 0)
