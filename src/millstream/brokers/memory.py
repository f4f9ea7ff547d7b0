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

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import groupby, islice

from msgspec.structs import replace

from millstream.brokers.base import (
    Claim,
    Confirm,
    Dead,
    DeadLetter,
    Done,
    GroupInfo,
    Kept,
    Later,
    Outcome,
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
    check_owner,
)
from millstream.clock import Clock
from millstream.errors import BrokerRefused, LeaseLost, NotSupported
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from millstream.units import DEAD_FULL_S, MAX_DEAD, MAX_ERROR_CHARS

LEAST_WAIT_S = 0.001  # due times are whole milliseconds: a shorter wait would spin until the next one


class MemoryBroker:
    """Keeps everything in this process, without a bound, for as long as this object lives."""

    traits = Traits(order=False, delayed=False, atomic_outputs=True, confirms=frozenset({"memory"}), shared=False)

    def __init__(self, url: str, settings: Settings, clock: Clock, telemetry: Telemetry) -> None:
        self.url = url
        self.admin = MemoryAdmin(self)
        self.clock = clock
        self.logs: dict[str, _Log] = {}

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to give up: what is stored stays with this object."""

    async def declare(self, stream: StreamSpec) -> None:
        """Create the stream, or compare it with what is recorded."""
        check_declared(self.logs.setdefault(stream.name, _Log(stream)).spec, stream, self.url)

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

    async def subscribe(self, subscription: Subscription) -> MemoryConsumer:
        """Join a group, which is made if it is new."""
        if subscription.order:
            raise NotSupported(f"{self.url} cannot consume in the order of keys")
        await self.declare(subscription.stream)
        log, name, owner = self.logs[subscription.stream.name], subscription.group, subscription.owner
        group = log.groups.setdefault(name, _Group(log, name, owner, log.find(subscription.start)))
        check_owner(log.spec.name, name, group.owner, owner)
        return MemoryConsumer(self, group, subscription.lease_s)

    def quiet(self) -> bool:
        """True when nothing can happen before time passes or an event is published.

        That is: no event of any group, with or without members, is undelivered, held, or due by now.
        """
        now_ms = self.clock.now_ms()
        return all(group.quiet(now_ms) for log in self.logs.values() for group in log.groups.values())

    def next_due_ms(self) -> int | None:
        """When the first waiting event of all groups is due, possibly in the past; None when none waits."""
        waiting = (group.due for log in self.logs.values() for group in log.groups.values() if group.due)
        return min((due[0][0] for due in waiting), default=None)

    def log(self, stream: str) -> _Log:
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


class MemoryConsumer:
    """One member of a group. When it was found silent, `keep` tells it so, and it claims nothing before."""

    def __init__(self, broker: MemoryBroker, group: _Group, lease_s: float) -> None:
        self._broker = broker
        self._clock = broker.clock
        self._group = group
        self._lease_s = lease_s
        self._member = self._enter()

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        """Claim up to `limit` events; waits up to `wait_s` for the first one."""
        until = self._clock.monotonic() + wait_s
        while True:
            self._group.evict_silent(self._member, self._clock.monotonic())
            claims = self._group.claim(self._member, limit, self._clock.now_ms())
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
        """Heartbeat. After this consumer was found silent: enter the group again, and tell what it lost."""
        member, now_s = self._member, self._clock.monotonic()
        if member.silent(now_s):
            self._group.log.wake()  # a fetch that waits may claim, and judge others, from now on
        if member.present:
            member.beat_s = now_s
            return Kept()
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

    def _enter(self) -> _Member:
        member = _Member(f"ms.{self._clock.nonce()}", self._lease_s, self._clock.monotonic())
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
        infos = [pending.info() for pending in found.pending.values()] if found else []
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

    async def drop(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Discard dead letters for ever."""
        return [self._take(letter, replay=False) for letter in letters]

    async def adopt(self, stream: str, group: str, owner: str) -> None:
        """Make another app the owner of a group."""
        found = self._group(stream, group)
        if found is None:
            raise BrokerRefused(f"stream {stream!r} has no group {group!r}")
        found.owner = owner

    def _take(self, letter: DeadLetter, replay: bool) -> bool:
        group = self._group(letter.stream, letter.group)
        return group is not None and group.take_letter(letter.ref, replay)

    def _group(self, stream: str, group: str) -> _Group | None:
        log = self._broker.logs.get(stream)
        return log.groups.get(group) if log else None


class _Log:
    """A stream: per partition a list of events, and when each was stored. An offset is the ordinal, from 1."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.groups: dict[str, _Group] = {}
        self.changed = asyncio.Event()
        self._events: list[list[Stored]] = [[] for _ in range(spec.partitions)]
        self._stored_ms: list[list[int]] = [[] for _ in range(spec.partitions)]
        self._bytes = 0

    def partition(self, number: int) -> list[Stored]:
        if not 0 <= number < self.spec.partitions:
            raise BrokerRefused(f"stream {self.spec.name!r} has {self.spec.partitions} partitions, none is {number}")
        return self._events[number]

    def append(self, record: Record, now_ms: int) -> Position:
        events, stored_ms = self._events[record.partition], self._stored_ms[record.partition]
        position = Position(record.partition, str(len(events) + 1))
        events.append(Stored(position, replace(record, time_ms=record.time_ms or now_ms)))
        stored_ms.append(max(now_ms, stored_ms[-1]) if stored_ms else now_ms)  # never back, so that it can be searched
        self._bytes += len(record.data) + len(record.headers)
        self.wake()
        return position

    def find(self, start: Start) -> list[int]:
        """How many events of each partition lie before the start."""
        if isinstance(start, int):
            return [bisect_left(stored_ms, start) for stored_ms in self._stored_ms]
        return [len(events) if start == "now" else 0 for events in self._events]

    def wake(self) -> None:
        """Let all that wait look again."""
        self.changed.set()
        self.changed = asyncio.Event()

    def info(self) -> StreamInfo:
        count = sum(map(len, self._events))
        first_ms = min((times[0] for times in self._stored_ms if times), default=None)
        last_ms = max((times[-1] for times in self._stored_ms if times), default=None)
        return StreamInfo(self.spec, count, count, self._bytes, first_ms, last_ms)


@dataclass(slots=True, eq=False)
class _Member:
    """One life of a consumer: from its entry until it leaves or is found silent."""

    name: str
    lease_s: float
    beat_s: float
    held: dict[Position, None] = field(default_factory=dict)
    present: bool = True

    def silent(self, now_s: float) -> bool:
        return now_s - self.beat_s >= self.lease_s


@dataclass(slots=True, eq=False)
class _Pending:
    """An event delivered and not settled: held by a present member, or waiting. See `Claim` for the numbers."""

    stored: Stored
    attempt: int = 0
    suspect: int = 0
    postponed: int = 0
    started: bool = False
    holder: _Member | None = None
    due_ms: int = 0

    def info(self) -> PendingInfo:
        name, due_ms = (self.holder.name, None) if self.holder else ("", self.due_ms)
        return PendingInfo(self.stored.position, name, self.attempt, due_ms)


class _Group:
    """A group's whole state. Every pending event either has a holder, or lies in `due`."""

    def __init__(self, log: _Log, name: str, owner: str, cursor: list[int]) -> None:
        self.log = log
        self.name = name
        self.owner = owner
        self.cursor = cursor
        self.pending: dict[Position, _Pending] = {}
        self.due: list[tuple[int, int, _Pending]] = []  # a heap: due time, who came first, what
        self.members: dict[str, _Member] = {}
        self.dead: dict[str, DeadLetter] = {}
        self.count: Counter[str] = Counter()

    def claim(self, member: _Member, limit: int, now_ms: int) -> list[Claim]:
        """Up to `limit` events for a member: those due again, then new ones."""
        if not member.present:
            return []
        claims: list[Claim] = []
        while self.due and self.due[0][0] <= now_ms and len(claims) < limit:
            claims.append(self._hold(member, heappop(self.due)[2]))
        # Each call begins one partition further, or a busy first one would starve the others.
        self.count["turn"] += 1
        for step in range(len(self.cursor)):
            partition = (self.count["turn"] + step) % len(self.cursor)
            begin = self.cursor[partition]
            fresh = self.log.partition(partition)[begin : begin + limit - len(claims)]
            self.cursor[partition] += len(fresh)
            claims += [self._hold(member, _Pending(stored)) for stored in fresh]
        return claims

    def held(self, member: _Member, position: Position) -> _Pending | None:
        """The pending event at this position, if the member holds it."""
        return self.pending[position] if member.present and position in member.held else None

    def full(self, partition: int) -> bool:
        """True when there is no room for a dead letter of this partition."""
        if len(self.dead) < MAX_DEAD:
            return False
        return sum(letter.stored.position.partition == partition for letter in self.dead.values()) >= MAX_DEAD

    def settle(self, pending: _Pending, outcome: Outcome, now_ms: int) -> None:
        """Turn a held event into a finished one, one that waits, or a dead letter."""
        pending.suspect = 0  # its process survived it
        match outcome:
            case Done():
                self._let_go(pending, forget=True)
                self.count["done"] += 1
            case Later(at_ms=at_ms, counted=counted):
                pending.attempt -= not counted
                pending.postponed += not counted
                self.count["retried"] += counted
                self._wait(pending, at_ms)
            case Dead(reason=reason, error=error):
                self._let_go(pending, forget=True)
                self.count["buried"] += 1
                ref = f"{self.count['buried']:012}"
                what = (self.log.spec.name, self.name, pending.stored, reason, error[:MAX_ERROR_CHARS])
                self.dead[ref] = DeadLetter(*what, pending.attempt, now_ms, ref)

    def hand_back(self, member: _Member, partitions: frozenset[int]) -> None:
        """Let what a member holds of these partitions wait, due at once, as if it had not been claimed."""
        for position in [position for position in member.held if position.partition in partitions]:
            self.pending[position].attempt -= 1
            self._wait(self.pending[position], 0)

    def evict_silent(self, judge: _Member, now_s: float) -> None:
        """Take away what silent members hold: the attempt stays counted, and it is suspect from now on.

        One who was silent itself judges nobody: after a pause of the whole process all look alike.
        """
        if judge.silent(now_s):
            return
        for member in [member for member in self.members.values() if member.silent(now_s)]:
            taken = dict(member.held)
            for pending in [self.pending[position] for position in taken]:
                if pending.suspect == 0:
                    pending.suspect = 2 if len(taken) == 1 else 1
                elif pending.started:
                    pending.suspect += 1
                self._wait(pending, 0)
            member.held, member.present = taken, False  # which `keep` will tell it
            del self.members[member.name]

    def take_letter(self, ref: str, replay: bool) -> bool:
        """Remove a dead letter, to forget it or to let its event wait as a new one; False when it is gone."""
        letter = self.dead.pop(ref, None)
        if letter is None:
            return False
        self.count["replayed" if replay else "dropped"] += 1
        if replay:
            pending = self.pending[letter.stored.position] = _Pending(letter.stored)
            self._wait(pending, 0)
        return True

    def quiet(self, now_ms: int) -> bool:
        due = bool(self.due) and self.due[0][0] <= now_ms
        return not due and len(self.pending) == len(self.due) and self._lag() == 0

    def info(self, now_s: float) -> GroupInfo:
        names = (self.log.spec.name, self.name, self.owner)
        members = sum(not member.silent(now_s) for member in self.members.values())
        now = (members, self._lag(), len(self.pending), len(self.due), len(self.dead))
        return GroupInfo(*names, *now, *(self.count[name] for name in ("done", "retried", "replayed", "dropped")))

    def _hold(self, member: _Member, pending: _Pending) -> Claim:
        position = pending.stored.position
        self.pending[position] = pending
        member.held[position] = None
        pending.holder = member
        pending.attempt += 1
        return Claim(pending.stored, pending.attempt, pending.suspect, pending.postponed)

    def _wait(self, pending: _Pending, due_ms: int) -> None:
        self._let_go(pending)
        pending.due_ms = due_ms
        pending.started = False
        self.count["waited"] += 1
        heappush(self.due, (due_ms, self.count["waited"], pending))
        self.log.wake()

    def _let_go(self, pending: _Pending, forget: bool = False) -> None:
        if pending.holder is not None:
            del pending.holder.held[pending.stored.position]
            pending.holder = None
        if forget:
            del self.pending[pending.stored.position]

    def _lag(self) -> int:
        return sum(len(self.log.partition(p)) - cursor for p, cursor in enumerate(self.cursor))


def _ordinal(position: Position | None) -> int:
    return 0 if position is None else int(position.offset)
