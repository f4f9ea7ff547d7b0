"""The shortest correct broker: everything in dictionaries of one process. The reference, and the model for tests.

    undelivered ─fetch─► held ─done─► gone
                          │  └─dead─► dead letter ─replay─► waiting
          later, release, │
         holder is silent ▼
                        waiting until due ─fetch─► held, attempt + 1

No method awaits while it changes something, so each is one step, and a cancelled one has done nothing. What is stored
lasts as long as the broker object, and belongs to this process alone; what a stream's policy does not bound, only its
memory does.
All time comes from the clock, so the whole of it runs under virtual time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from millstream.brokers.base import (
    Claim,
    Confirm,
    Consumer,
    Kept,
    Output,
    Policy,
    Position,
    Record,
    Settlement,
    Slot,
    Start,
    Stored,
    StreamSpec,
    Subscription,
    Tended,
    Traits,
    check_declared,
    check_mode,
    check_owner,
    finished,
)
from millstream.brokers.letters import put_off
from millstream.brokers.memory.admin import MemoryAdmin
from millstream.brokers.memory.group import Group, Member
from millstream.brokers.memory.log import Log, ordinal
from millstream.brokers.memory.ordered import MemoryLedger, OrderedGroup
from millstream.brokers.memory.tending import tend
from millstream.brokers.ordered import OrderedConsumer
from millstream.brokers.switching import subscribed
from millstream.clock import Clock
from millstream.errors import BrokerFull, BrokerRefused, LeaseLost, NotSupported
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from millstream.units import DEAD_FULL_S

G = TypeVar("G", Group, OrderedGroup)

LEAST_WAIT_S = 0.001  # due times are whole milliseconds: a shorter wait would spin until the next one


class MemoryBroker:
    """Keeps everything in this process, without a bound, for as long as this object lives."""

    traits = Traits(
        order=True,
        delayed=True,
        atomic_outputs=True,
        shared=False,
        dedupe=True,
        retention=True,
        slots=True,
        packs=True,
        dictionaries=True,
    )

    def __init__(self, url: str, settings: Settings, clock: Clock, telemetry: Telemetry) -> None:
        self.url = url
        self.admin = MemoryAdmin(self)
        self.clock = clock
        self.logs: dict[str, Log] = {}
        self._telemetry = telemetry

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to give up: what is stored stays with this object."""

    async def declare(self, stream: StreamSpec, policy: Policy | None = None) -> Policy:
        """Create the stream, or compare it with what is recorded."""
        log = self.logs.setdefault(stream.name, Log(stream, policy or Policy()))
        check_declared(log.spec, stream, self.url)
        return log.policy

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        """Store the records: all or, when it raises, none."""
        if confirm not in self.traits.confirms:
            raise NotSupported(f"{self.url} cannot confirm {confirm!r}: it keeps events in memory only")
        for record in records:
            self.check(stream, record)
        log, now_ms = self.log(stream), self.clock.now_ms()
        log.check_room(records, now_ms)
        return [log.store(record, now_ms) for record in records]

    async def append_slot(self, stream: str, slot: Slot, record: Record | None) -> bool:
        """Store the event of a slot, unless this one or a later one was there already."""
        log = self.log(stream)
        if slot.at_ms <= log.slots.get(slot.schedule, -1):
            return False
        if record is not None:
            await self.append(stream, [record])
        log.slots[slot.schedule] = slot.at_ms
        return True

    async def tend(self, stream: str) -> Tended:
        """Publish what has fallen due, remove what may go, count what is lost."""
        return tend(self.log(stream), self.clock)

    async def read(self, stream: str, partition: int, after: Position | None, limit: int) -> list[Stored]:
        """Up to `limit` events behind a position, in order; an empty list is the end."""
        return self.log(stream).behind(partition, ordinal(after), limit)

    async def locate(self, stream: str, start: Start) -> dict[int, Position | None]:
        """For each partition, the position behind which `read` begins."""
        before = enumerate(self.log(stream).find(start))
        return {partition: Position(partition, str(count)) if count else None for partition, count in before}

    async def policy(self, stream: str) -> Policy:
        """What holds for a declared stream."""
        return self.log(stream).policy

    async def dictionary(self, stream: str, number: int) -> bytes | None:
        """A dictionary of a stream, or None."""
        return self.log(stream).dictionaries.get(number)

    async def wait(self, stream: str, after: Mapping[int, Position | None], wait_s: float) -> None:
        """Return when there is an event behind one of these positions, or the time is up."""
        log = self.log(stream)
        until = self.clock.monotonic() + wait_s
        while all(log.end(partition) <= ordinal(position) for partition, position in after.items()):
            if not await self.clock.wait(log.changed, max(0, until - self.clock.monotonic())):
                return

    async def create(self, subscription: Subscription) -> None:
        """Make a group, if it is new, without joining it."""
        await self.declare(subscription.stream)
        log, name = self.log(subscription.stream.name), subscription.group
        if name in log.groups:
            check_owner(log.spec.name, name, log.groups[name].owner, subscription.owner)
        elif subscription.order:
            self.join(subscription, OrderedGroup)
        else:
            self.join(subscription, Group)

    async def subscribe(self, subscription: Subscription) -> Consumer:
        """Join a group, which is made if it is new."""
        await self.declare(subscription.stream)
        return await subscribed(self._consumer, subscription, self.clock)

    def join(self, subscription: Subscription, kind: type[G]) -> G:
        """The group, which is made if it is new. Raises `GroupOwned`, `OtherOrder`."""
        log, name, owner = self.log(subscription.stream.name), subscription.group, subscription.owner
        born_s = self.clock.monotonic()
        group = log.groups.setdefault(name, kind(log, name, owner, log.find(subscription.start), born_s))
        check_owner(log.spec.name, name, group.owner, owner)
        if not isinstance(group, kind):
            group = self._switched(group, kind)
        return group

    def quiet(self) -> bool:
        """True when nothing can happen before time passes or an event is published.

        That is: no event of any group, with or without members, is undelivered, held, or due by now.
        """
        now_ms, due_ms = self.clock.now_ms(), self.next_due_ms()
        groups = [group for log in self.logs.values() for group in log.groups.values()]
        return (due_ms is None or due_ms > now_ms) and all(group.quiet(now_ms) for group in groups)

    def next_due_ms(self) -> int | None:
        """When the first event that waits is due, in a group or to be published; possibly in the past, None for none."""
        waiting = [place for log in self.logs.values() for place in (log, *log.groups.values())]
        return min((due_ms for place in waiting if (due_ms := place.next_due_ms()) is not None), default=None)

    def log(self, stream: str) -> Log:
        """A declared stream's log. Raises `BrokerRefused` for any other."""
        if stream not in self.logs:
            raise BrokerRefused(f"no stream {stream!r} is declared on {self.url}")
        return self.logs[stream]

    def check(self, stream: str, record: Record) -> None:
        """Raise what speaks against storing this record."""
        self.log(stream).check(record.partition)

    def check_room(self, outputs: Sequence[Output]) -> None:
        """Raise `BrokerFull` when one of these, which were checked, could not be stored."""
        for stream in {output.stream for output in outputs}:
            ours = [output for output in outputs if output.stream == stream]
            own, derived = ([output.record for output in ours if output.derived == kind] for kind in (False, True))
            self.log(stream).check_room(own, self.clock.now_ms(), derived)

    def store(self, output: Output) -> None:
        """Store an output that was checked, and for which there is room."""
        self.log(output.stream).store(output.record, self.clock.now_ms(), derived=output.derived)

    async def _consumer(self, subscription: Subscription) -> Consumer:
        if not subscription.order:
            return MemoryConsumer(self, subscription)
        consumer = OrderedConsumer(
            lambda: MemoryLedger(self, self.join(subscription, OrderedGroup), subscription),
            subscription,
            self.clock,
            self._telemetry,
        )
        await consumer.enter()
        return consumer

    def _switched(self, group: Group | OrderedGroup, kind: type[G]) -> G:
        """The group as it goes on in the other way, if it has nothing to finish and nobody lives in it."""
        log, ordered = group.log, isinstance(group, OrderedGroup)
        info, until_ms = group.info(self.clock), _waits_until_ms(group)
        if until_ms or info.pending or info.consumers:
            check_mode(log.spec.name, group.name, ordered, not ordered, until_ms)
        switched = kind(log, group.name, group.owner, group.settled(), group.seen_s)
        switched.dead, switched.count = group.dead, group.count
        group.evict()
        log.groups[group.name] = switched
        return switched


class MemoryConsumer:
    """One member of a group. When it was found silent, `keep` tells it so, and it claims nothing before."""

    def __init__(self, broker: MemoryBroker, subscription: Subscription) -> None:
        self._broker = broker
        self._clock = broker.clock
        self._subscription = subscription
        self._lease_s = subscription.lease_s
        self._group = broker.join(subscription, Group)
        self._member = self._enter()

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        """Claim up to `limit` events; waits up to `wait_s` for the first one."""
        until = self._clock.monotonic() + wait_s
        while True:
            self._group.evict_silent(self._member, self._clock.monotonic())
            claims = self._group.claim(self._member, limit, self._clock.now_ms(), fresh=self._subscription.fresh)
            left_s = until - self._clock.monotonic()
            if claims or left_s <= 0:
                return claims
            await self._clock.wait(self._group.log.changed, min(left_s, self._next_change_s()))

    async def begin(self, positions: Sequence[Position]) -> None:
        """Note that the handlers of these suspects start now: all of them or, when it raises, none."""
        held = [self._group.held(self._member, position) for position in positions]
        if None in held:
            raise LeaseLost(f"somebody else has taken over what {self._member.name} held")
        for pending in filter(None, held):
            pending.started = True

    async def finish(self, positions: Sequence[Position]) -> list[bool]:
        """`settle` for events that are done, and with which nothing is stored."""
        return await self.settle(finished(positions))

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Store outcomes, each with its outputs in one step; False where an event was not ours any more."""
        for settlement in settlements:
            for output in settlement.outputs:
                self._broker.check(output.stream, output.record)
        full: BrokerFull | None = None
        results = []
        for settlement in settlements:
            try:
                results.append(self._settle(settlement))
            except BrokerFull as error:
                full = error
        if full is not None:
            raise full
        return results

    async def keep(self) -> Kept:
        """Heartbeat. After all was taken from this consumer: enter the group again, and tell what it lost."""
        member, now_s = self._member, self._clock.monotonic()
        if member.silent(now_s) or not member.present:
            self._group.log.wake()  # a fetch that waits may claim, and judge others, from now on
        if member.present:
            self._group.beat(member, now_s)
            return Kept()
        self._group = self._broker.join(self._subscription, Group)  # another one, when it was forgotten
        self._member = self._enter()
        return Kept(lost=frozenset(member.held))

    async def release(self, partitions: frozenset[int]) -> None:
        """Hand back, uncounted, all that is held of these partitions."""
        if self._member.present:
            self._group.hand_back(self._member, partitions)

    async def close(self) -> None:
        """Hand back all that is held, and leave the group."""
        await self.release(frozenset(range(self._group.log.spec.partitions)))
        self._group.members.pop(self._member.name, None)
        self._member.present = False

    def _enter(self) -> Member:
        member = Member(f"ms.{self._clock.nonce()}", self._lease_s, self._clock.monotonic())
        self._group.enter(member)
        return member

    def _settle(self, settlement: Settlement) -> bool:
        group, now_ms = self._group, self._clock.now_ms()
        pending = group.held(self._member, settlement.position)
        if pending is None:
            return False
        if group.full(settlement):
            settlement = put_off(settlement, now_ms + int(DEAD_FULL_S * 1000))
        self._broker.check_room(settlement.outputs)
        for output in settlement.outputs:
            self._broker.store(output)
        group.settle(pending, settlement, now_ms)
        return True

    def _next_change_s(self) -> float:
        """When something is due, or another member can be found silent."""
        group, now_s = self._group, self._clock.monotonic()
        if not self._member.present or self._member.silent(now_s):
            return self._lease_s  # nothing changes for it before `keep`
        moments = [member.beat_s + member.lease_s - now_s for member in group.members.values() if member.held]
        if group.due:
            moments.append((group.due[0][0] - self._clock.now_ms()) / 1000)
        return max(LEAST_WAIT_S, min(moments, default=self._lease_s))


def _waits_until_ms(group: Group | OrderedGroup) -> float:
    """When the last of what waits is due; 0 while nothing does."""
    if not isinstance(group, OrderedGroup):
        return max((max(1.0, due_ms) for due_ms, *_ in group.due), default=0.0)
    ahead = any(part.h for part in group.parts)
    return max((max(1.0, queue.due_ms) for part in group.parts for queue in part.parked.values()), default=float(ahead))
