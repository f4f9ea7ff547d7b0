"""Members of an ordered group over ledgers that do as they are told: the memory broker's, with faults between."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from millstream.brokers.base import (
    Claim,
    Done,
    Later,
    Outcome,
    Output,
    Position,
    Record,
    Settlement,
    StreamSpec,
    Subscription,
)
from millstream.brokers.ledger import Commit, Committed, Cursor, Grant, Heads, Lease, View
from millstream.brokers.memory.broker import MemoryBroker
from millstream.brokers.memory.ordered import MemoryLedger, OrderedGroup
from millstream.brokers.ordered import OrderedConsumer
from millstream.errors import BrokerError
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from millstream.testing.clock import VirtualClock
from millstream.units import MAX_PARKED

T = TypeVar("T")
Step: TypeAlias = Callable[[], Awaitable[Any]]
Fault: TypeAlias = Callable[[Step], Awaitable[Any]]

MAILS = StreamSpec("mails")
LEASE_S = 10.0


async def works(step: Step) -> Any:
    """No fault: the one behind it is for the next call."""
    return await step()


def refuses(error: BrokerError) -> Fault:
    """It does nothing, and raises."""

    async def fault(step: Step) -> Any:
        raise error

    return fault


def loses_the_reply(error: BrokerError) -> Fault:
    """It does what it was asked to, and raises."""

    async def fault(step: Step) -> Any:
        await step()
        raise error

    return fault


def answers(value: Any) -> Fault:
    """It does nothing, and answers this."""

    async def fault(step: Step) -> Any:
        return value

    return fault


def waits(until: asyncio.Event) -> Fault:
    """It does what it was asked to, and answers late."""

    async def fault(step: Step) -> Any:
        answer = await step()
        await until.wait()
        return answer

    return fault


class Script:
    """What was asked of the ledgers of a member, and what is to go wrong."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)

    def next(self, name: str, *faults: Fault) -> None:
        """The next calls of this method go wrong."""
        self._faults[name] += faults

    def asked(self, name: str) -> list[Any]:
        """What this method was called with."""
        return [argument for called, argument in self.calls if called == name]

    async def play(self, name: str, argument: Any, step: Callable[[], Awaitable[T]]) -> T:
        self.calls.append((name, argument))
        if self._faults[name]:
            answer: T = await self._faults[name].popleft()(step)
            return answer
        return await step()


class ScriptedLedger(MemoryLedger):
    """The memory broker's ledger, call by call through a script."""

    def __init__(self, script: Script, broker: MemoryBroker, group: OrderedGroup, subscription: Subscription) -> None:
        super().__init__(broker, group, subscription)
        self._script = script

    async def enter(self) -> None:
        await self._script.play("enter", self.name, super().enter)

    async def beat(self) -> None:
        await self._script.play("beat", self.name, super().beat)

    async def look(self) -> View:
        return await self._script.play("look", self.name, super().look)

    async def acquire(self, seen: Lease) -> Grant | None:
        step = super().acquire
        return await self._script.play("acquire", seen.partition, lambda: step(seen))

    async def release(self, partition: int, epoch: int, heir: str) -> None:
        step = super().release
        await self._script.play("release", (partition, heir), lambda: step(partition, epoch, heir))

    async def read(self, cursors: Mapping[int, Cursor], limit: int, wait_s: float) -> list[Claim]:
        step = super().read
        return await self._script.play("read", dict(cursors), lambda: step(cursors, limit, wait_s))

    async def heads(self, partition: int, epoch: int, busy: Sequence[str], limit: int) -> Heads | None:
        step = super().heads
        return await self._script.play("heads", partition, lambda: step(partition, epoch, busy, limit))

    async def begin(self, partition: int, epoch: int, offsets: Sequence[str]) -> bool:
        step = super().begin
        return await self._script.play("begin", (partition, list(offsets)), lambda: step(partition, epoch, offsets))

    async def commit(self, commits: Sequence[Commit]) -> list[Committed]:
        step = super().commit
        return await self._script.play("commit", list(commits), lambda: step(commits))

    async def leave(self) -> None:
        await self._script.play("leave", self.name, super().leave)


class Place:
    """A stream, an ordered group of it, and its members, in virtual time."""

    def __init__(self, partitions: int = 1) -> None:
        self.clock = VirtualClock()
        self.telemetry = Telemetry()
        self.broker = MemoryBroker("memory://", Settings(), self.clock, self.telemetry)
        self.stream = StreamSpec("orders", partitions)

    async def open(self) -> None:
        await self.broker.declare(self.stream)
        await self.broker.declare(MAILS)
        log = self.broker.logs["orders"]
        self.group = OrderedGroup(log, "billing", "shop", [0] * self.stream.partitions, self.clock.monotonic())
        log.groups["billing"] = self.group

    async def member(self, max_parked: int = MAX_PARKED, *, enter: bool = True) -> tuple[OrderedConsumer, Script]:
        """One that has entered the group, and what is asked of its ledgers."""
        script = Script()
        subscription = Subscription(self.stream, "billing", "shop", lease_s=LEASE_S, order=True, max_parked=max_parked)
        consumer = OrderedConsumer(
            lambda: ScriptedLedger(script, self.broker, self.group, subscription),
            subscription,
            self.clock,
            self.telemetry,
        )
        if enter:
            await consumer.enter()
        return consumer, script

    async def publish(self, keys: str, partition: int = 0) -> list[Position]:
        """One event per letter, which is its key."""
        records = [Record(partition, f"{partition}{key}", "order.placed", b"{}", key) for key in keys]
        return await self.broker.append("orders", records)

    async def mails(self) -> list[str]:
        """The ids of what handlers have published."""
        return [stored.record.id for stored in await self.broker.read(MAILS.name, 0, None, 100)]


async def opened(partitions: int = 1) -> Place:
    place = Place(partitions)
    await place.open()
    return place


def positions(some: Sequence[Claim]) -> list[Position]:
    return [claim.position for claim in some]


def settlement(claim: Claim, outcome: Outcome | None = None, *, mail: str = "") -> Settlement:
    outputs = [Output("mails", Record(0, mail, "mail.sent", b"{}"))] if mail else []
    return Settlement(claim.position, outcome or Done(), outputs)


def later(claim: Claim, at_ms: int = 0) -> Settlement:
    return settlement(claim, Later(at_ms, "busy"))


async def park(place: Place, consumer: OrderedConsumer, *keys: str) -> list[Position]:
    """Publish these events, the keys of each partition, and have them fail and due again at once."""
    parked = [position for partition, some in enumerate(keys) for position in await place.publish(some, partition)]
    claims = await consumer.fetch(len(parked), 0)
    assert await consumer.settle([later(claim) for claim in claims]) == [True] * len(parked)
    return parked
