"""The shortest correct broker: everything in dictionaries of one process. The reference, and the model for tests.

    undelivered ─fetch─► held ─done─► gone
                          │  └─dead─► dead letter ─replay─► waiting
          later, release, │
         holder is silent ▼
                        waiting until due ─fetch─► held, attempt + 1

No method awaits while it changes something, so each is one step, and a cancelled one has done nothing. What is stored
lasts as long as the broker object, belongs to this process alone, and is never trimmed: the only bound is its memory.
All time comes from the clock, so the whole of it runs under virtual time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from typing import TypeVar

from millstream.brokers.base import (
    Claim,
    Confirm,
    Consumer,
    Dead,
    DeadLetter,
    GroupInfo,
    Kept,
    Later,
    ParkedKey,
    PendingInfo,
    Position,
    Record,
    Settlement,
    Start,
    Stored,
    StreamInfo,
    StreamSpec,
    Subscription,
    Traits,
    check_declared,
    check_mode,
    check_owner,
)
from millstream.brokers.memory.group import Group, Member
from millstream.brokers.memory.log import Log
from millstream.brokers.memory.ordered import MemoryLedger, OrderedGroup
from millstream.brokers.ordered import OrderedConsumer
from millstream.brokers.switching import subscribed
from millstream.clock import Clock
from millstream.errors import BrokerRefused, LeaseLost, NotSupported
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from millstream.units import DEAD_FULL_S

G = TypeVar("G", Group, OrderedGroup)

LEAST_WAIT_S = 0.001  # due times are whole milliseconds: a shorter wait would spin until the next one


class MemoryBroker:
    """Keeps everything in this process, without a bound, for as long as this object lives."""

    traits = Traits(order=True, delayed=False, atomic_outputs=True, confirms=frozenset({"memory"}), shared=False)

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

    async def declare(self, stream: StreamSpec) -> None:
        """Create the stream, or compare it with what is recorded."""
        check_declared(self.logs.setdefault(stream.name, Log(stream)).spec, stream, self.url)

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        """Store the records: all or, when it raises, none."""
        if confirm not in self.traits.confirms:
            raise NotSupported(f"{self.url} cannot confirm {confirm!r}: it keeps events in memory only")
        for record in records:
            self.check(stream, record)
        return [self.store(stream, record) for record in records]

    async def read(self, stream: str, partition: int, after: Position | None, limit: int) -> list[Stored]:
        """Up to `limit` events behind a position, in order; an empty list is the end."""
        begin = _ordinal(after)
        return self.log(stream).partition(partition)[begin : begin + limit]

    async def locate(self, stream: str, start: Start) -> dict[int, Position | None]:
        """For each partition, the position behind which `read` begins."""
        before = enumerate(self.log(stream).find(start))
        return {partition: Position(partition, str(count)) if count else None for partition, count in before}

    async def wait(self, stream: str, after: Mapping[int, Position | None], wait_s: float) -> None:
        """Return when there is an event behind one of these positions, or the time is up."""
        log = self.log(stream)
        until = self.clock.monotonic() + wait_s
        while all(len(log.partition(partition)) <= _ordinal(position) for partition, position in after.items()):
            if not await self.clock.wait(log.changed, max(0, until - self.clock.monotonic())):
                return

    async def subscribe(self, subscription: Subscription) -> Consumer:
        """Join a group, which is made if it is new."""
        await self.declare(subscription.stream)
        return await subscribed(self._consumer, subscription, self.clock)

    def join(self, subscription: Subscription, kind: type[G]) -> G:
        """The group, which is made if it is new. Raises `GroupOwned`, `OtherOrder`."""
        log, name, owner = self.logs[subscription.stream.name], subscription.group, subscription.owner
        group = log.groups.setdefault(name, kind(log, name, owner, log.find(subscription.start)))
        check_owner(log.spec.name, name, group.owner, owner)
        if not isinstance(group, kind):
            group = self._switched(group, kind)
        return group

    def quiet(self) -> bool:
        """True when nothing can happen before time passes or an event is published.

        That is: no event of any group, with or without members, is undelivered, held, or due by now.
        """
        now_ms = self.clock.now_ms()
        return all(group.quiet(now_ms) for log in self.logs.values() for group in log.groups.values())

    def next_due_ms(self) -> int | None:
        """When the first waiting event of all groups is due, possibly in the past; None when none waits."""
        due = (group.next_due_ms() for log in self.logs.values() for group in log.groups.values())
        return min((due_ms for due_ms in due if due_ms is not None), default=None)

    def log(self, stream: str) -> Log:
        """A declared stream's log. Raises `BrokerRefused` for any other."""
        if stream not in self.logs:
            raise BrokerRefused(f"no stream {stream!r} is declared on {self.url}")
        return self.logs[stream]

    def check(self, stream: str, record: Record) -> None:
        """Raise what speaks against storing this record."""
        self.log(stream).partition(record.partition)
        if record.due_ms is not None:
            raise NotSupported(f"{self.url} cannot delay events")

    def store(self, stream: str, record: Record) -> Position:
        """Store a record that was checked."""
        return self.log(stream).append(record, self.clock.now_ms())

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
        info, until_ms = group.info(self.clock.monotonic()), _waits_until_ms(group)
        if until_ms or info.pending or info.consumers:
            check_mode(log.spec.name, group.name, ordered, not ordered, until_ms)
        switched = kind(log, group.name, group.owner, _settled(group))
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

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Store outcomes, each with its outputs in one step; False where an event was not ours any more."""
        for settlement in settlements:
            for output in settlement.outputs:
                self._broker.check(output.stream, output.record)
        return [self._settle(settlement) for settlement in settlements]

    async def keep(self) -> Kept:
        """Heartbeat. After all was taken from this consumer: enter the group again, and tell what it lost."""
        member, now_s = self._member, self._clock.monotonic()
        if member.silent(now_s) or not member.present:
            self._group.log.wake()  # a fetch that waits may claim, and judge others, from now on
        if member.present:
            member.beat_s = now_s
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
        self._group.members[member.name] = member
        return member

    def _settle(self, settlement: Settlement) -> bool:
        group, now_ms = self._group, self._clock.now_ms()
        pending = group.held(self._member, settlement.position)
        if pending is None:
            return False
        outcome = settlement.outcome
        if isinstance(outcome, Dead) and group.full(settlement.position.partition):
            outcome = Later(now_ms + int(DEAD_FULL_S * 1000), "no room for more dead letters", counted=False)
        for output in settlement.outputs:
            self._broker.store(output.stream, output.record)
        group.settle(pending, outcome, now_ms)
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


class MemoryAdmin:
    """What people and monitoring look through."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    async def streams(self) -> list[StreamInfo]:
        """All declared streams, by name."""
        return [log.info() for _, log in sorted(self._broker.logs.items())]

    async def groups(self, stream: str) -> list[GroupInfo]:
        """All groups of a stream, by name. Empty for an unknown stream."""
        groups = self._broker.logs[stream].groups if stream in self._broker.logs else {}
        return [group.info(self._broker.clock.monotonic()) for _, group in sorted(groups.items())]

    async def pending(self, stream: str, group: str, limit: int) -> list[PendingInfo]:
        """The oldest pending events of each partition."""
        found = self._group(stream, group)
        infos = found.pending_infos() if found else []
        infos.sort(key=lambda info: (info.position.partition, _ordinal(info.position)))
        partitions = groupby(infos, key=lambda info: info.position.partition)
        return [info for _, oldest in partitions for info in islice(oldest, limit)]

    async def dead(self, stream: str, group: str, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Dead letters in the order of their references, behind `after`."""
        found = self._group(stream, group)
        letters = found.dead.values() if found else ()
        return list(islice((letter for letter in letters if letter.ref > after), limit))

    async def replay(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Give dead letters back to their own group, attempts counted anew."""
        return [self._take(letter, replay=True) for letter in letters]

    async def give(self, stream: str, group: str, events: Sequence[Stored]) -> int:
        """Let a group handle events once more, those that it has settled; how many."""
        return self._known(stream, group).give(events, self._broker.clock.now_ms())

    async def drop(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Discard dead letters for ever."""
        return [self._take(letter, replay=False) for letter in letters]

    async def adopt(self, stream: str, group: str, owner: str) -> None:
        """Make another app the owner of a group."""
        self._known(stream, group).owner = owner

    async def keys(self, stream: str, group: str, limit: int = 100) -> list[ParkedKey]:
        """The keys that wait, those that were parked first first."""
        found = self._ordered(stream, group)
        return found.keys()[:limit] if found else []

    async def parked(self, key: ParkedKey, limit: int = 100) -> list[Stored]:
        """The events that wait of a key, in order."""
        found = self._ordered(key.stream, key.group)
        return found.parked(key)[:limit] if found else []

    async def release_keys(self, keys: Sequence[ParkedKey]) -> list[bool]:
        """Let keys be tried at once, attempts counted anew."""
        groups = [self._ordered(key.stream, key.group) for key in keys]
        return [group is not None and group.release_key(key) for group, key in zip(groups, keys, strict=True)]

    async def drop_keys(self, keys: Sequence[ParkedKey]) -> list[int]:
        """Discard all that is parked of these keys, for ever."""
        groups = [self._ordered(key.stream, key.group) for key in keys]
        return [group.drop_key(key) if group else 0 for group, key in zip(groups, keys, strict=True)]

    async def seek(self, stream: str, group: str, start: Start, *, live: bool = False) -> None:
        """Move a group to another place."""
        found = self._known(stream, group)
        if not live:
            self._check_no_members(found)
        found.seek(found.log.find(start))

    async def forget(self, stream: str, group: str) -> None:
        """Delete a group with all that it has."""
        found = self._known(stream, group)
        self._check_no_members(found)
        del found.log.groups[group]
        found.evict()

    def _take(self, letter: DeadLetter, replay: bool) -> bool:
        group = self._group(letter.stream, letter.group)
        return group is not None and group.take_letter(letter.ref, self._broker.clock.now_ms(), replay=replay)

    def _check_no_members(self, group: Group | OrderedGroup) -> None:
        count = group.info(self._broker.clock.monotonic()).consumers
        if count:
            raise BrokerRefused(
                f"group {group.name!r} of stream {group.log.spec.name!r} has {count} members: stop them"
            )

    def _known(self, stream: str, group: str) -> Group | OrderedGroup:
        found = self._group(stream, group)
        if found is None:
            raise BrokerRefused(f"stream {stream!r} has no group {group!r}")
        return found

    def _ordered(self, stream: str, group: str) -> OrderedGroup | None:
        found = self._group(stream, group)
        return found if isinstance(found, OrderedGroup) else None

    def _group(self, stream: str, group: str) -> Group | OrderedGroup | None:
        log = self._broker.logs.get(stream)
        return log.groups.get(group) if log else None


def _waits_until_ms(group: Group | OrderedGroup) -> float:
    """When the last of what waits is due; 0 while nothing does."""
    if not isinstance(group, OrderedGroup):
        return max((max(1.0, due_ms) for due_ms, *_ in group.due), default=0.0)
    ahead = any(part.h for part in group.parts)
    return max((max(1.0, queue.due_ms) for part in group.parts for queue in part.parked.values()), default=float(ahead))


def _settled(group: Group | OrderedGroup) -> list[int]:
    """How many events of each partition a group has behind it, which has nothing to finish."""
    return [part.w for part in group.parts] if isinstance(group, OrderedGroup) else group.cursor


def _ordinal(position: Position | None) -> int:
    return 0 if position is None else int(position.offset)
