"""Groups of the memory broker that consume in the order of keys: the shortest correct ledger, and the model for others."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from millstream.brokers.base import (
    Claim,
    GroupInfo,
    Output,
    ParkedKey,
    PendingInfo,
    Stored,
    Subscription,
)
from millstream.brokers.ledger import (
    HELD_MS,
    Bury,
    Commit,
    Committed,
    Cursor,
    Delay,
    Effect,
    Grant,
    Head,
    Heads,
    Lease,
    Park,
    Pop,
    State,
    View,
)
from millstream.brokers.memory.letters import Letters
from millstream.brokers.window import keyless
from millstream.errors import LeaseLost
from millstream.units import MAX_ERROR_CHARS

if TYPE_CHECKING:
    from millstream.brokers.memory.broker import MemoryBroker
    from millstream.brokers.memory.log import Log

_NEVER = float("inf")


@dataclass(slots=True, eq=False)
class _Queue:
    """What is parked of one key. The figures are those of its first event."""

    due_ms: float
    since_ms: int
    events: deque[Stored] = field(default_factory=deque)
    attempts: int = 0
    postponed: int = 0
    crashes: int = 0
    started: bool = False
    error: str = ""

    def next(self) -> None:
        self.events.popleft()
        self.anew()

    def anew(self) -> None:
        """The head is due, and was never tried."""
        self.attempts = self.postponed = self.crashes = 0
        self.started, self.error, self.due_ms = False, "", 0.0

    def shown_due_ms(self) -> int | None:
        """For people: when the head is tried; None while it waits for one of them."""
        return None if self.due_ms >= HELD_MS else int(self.due_ms)

    def ended(self, due_ms: float, attempts: int, postponed: int, error: str) -> None:
        """The head has come to an end that is not its last: it did not kill its process."""
        self.due_ms, self.attempts, self.postponed, self.error = due_ms, attempts, postponed, error
        self.crashes, self.started = 0, False


@dataclass(slots=True, eq=False)
class _Note:
    """Of an event that a crash left behind."""

    crashes: int = 0
    started: bool = False


@dataclass(slots=True, eq=False)
class _Part:
    """A partition's share of a group."""

    w: int
    owner: str = ""
    epoch: int = 0
    seq: int = 0
    h: str = ""
    open: frozenset[str] = frozenset()
    clean: bool = True
    want: str = ""
    next: str = ""
    parked: dict[str, _Queue] = field(default_factory=dict)
    notes: dict[str, _Note] = field(default_factory=dict)
    answer: Committed = field(default_factory=lambda: Committed(State.STORED))

    def due_ms(self) -> float:
        return min((queue.due_ms for queue in self.parked.values()), default=_NEVER)

    def events_parked(self) -> int:
        return sum(len(queue.events) for queue in self.parked.values())

    def covers(self, offset: str) -> bool:
        """True for what is settled, as far as that is stored."""
        return int(offset) <= max(self.w, int(self.h or 0)) and offset not in self.open

    def fence(self) -> None:
        """The lease is nobody's; whoever had it finds that out. Nothing crashed."""
        self.owner, self.want, self.next, self.clean = "", "", "", True
        self.epoch += 1

    def seek(self, w: int) -> None:
        """Go on behind so many events. What is parked behind them comes again, and is parked no more."""
        self.fence()
        self.w, self.h, self.open = w, "", frozenset()
        self.notes.clear()
        for key, queue in list(self.parked.items()):
            head = queue.events[0]
            queue.events = deque(stored for stored in queue.events if int(stored.position.offset) <= w)
            queue.started = False
            if not queue.events:
                del self.parked[key]
            elif queue.events[0] is not head:
                queue.anew()


class OrderedGroup:
    """A group's whole state."""

    def __init__(self, log: Log, name: str, owner: str, begin: Sequence[int]) -> None:
        self.log = log
        self.name = name
        self.owner = owner
        self.parts = [_Part(count) for count in begin]
        self.members: dict[str, tuple[float, float]] = {}
        """Per name when it beat last, and its lease."""
        self.dead = Letters(log.spec.name, name)
        self.count: Counter[str] = Counter()

    def living(self, now_s: float) -> frozenset[str]:
        """Who has beaten within its lease."""
        return frozenset(name for name, (beat_s, lease_s) in self.members.items() if now_s - beat_s < lease_s)

    def acquire(self, seen: Lease, name: str) -> Grant | None:
        """Give a partition to a member, if it is as it was seen."""
        part = self.parts[seen.partition]
        if (part.owner, part.epoch) != (seen.owner, seen.epoch):
            return None
        if not part.clean:
            for queue in part.parked.values():
                queue.crashes += queue.started
                queue.started = False
            for note in part.notes.values():
                note.crashes += note.started
                note.started = False
        clean, part.clean = part.clean, False
        part.owner, part.epoch, part.seq, part.want, part.next = name, part.epoch + 1, 0, "", ""
        notes = {offset: note.crashes for offset, note in part.notes.items()}
        last = str(len(self.log.partition(seen.partition)))
        ours = seen.partition, part.epoch, str(part.w or ""), part.w, part.h, part.open, clean, last
        return Grant(*ours, frozenset(part.parked), part.events_parked(), notes)

    def commit(self, commit: Commit, name: str, now_ms: int, broker: MemoryBroker) -> Committed:
        """Store progress with its effects, in one step."""
        part = self.parts[commit.partition]
        if (part.owner, part.epoch) != (name, commit.epoch):
            return Committed(State.LOST)
        if commit.seq == part.seq:
            return part.answer
        buried = sum(isinstance(effect, Bury) for effect in commit.effects)
        if buried and self.dead.full(commit.partition, buried):
            return Committed(State.DEAD_FULL)
        for effect in commit.effects:
            self._apply(part, effect, now_ms, broker)
        part.seq, part.w, part.h, part.open = commit.seq, int(commit.w or 0), commit.h, frozenset(commit.open)
        for offset in commit.cleared:
            part.notes.pop(offset, None)
        self.count["done"] += commit.done
        self.count["retried"] += commit.retried
        popped = {effect.key for effect in commit.effects if isinstance(effect, Pop)}
        part.answer = Committed(State.STORED, frozenset(popped - part.parked.keys()), part.events_parked())
        return part.answer

    def heads(self, part: _Part, busy: Sequence[str], limit: int, now_ms: int) -> Heads:
        """Begin the first events of keys that are due, and count it."""
        ready = sorted((queue.due_ms, key) for key, queue in part.parked.items() if key not in busy)
        due = [key for due_ms, key in ready if due_ms <= now_ms]
        heads = [self._begin(part.parked[key], key, part.epoch) for key in due[:limit]]
        return Heads(heads, ready[len(heads)][0] if len(ready) > len(heads) else _NEVER)

    def take_letter(self, ref: str, now_ms: int, *, replay: bool) -> bool:
        """Remove a dead letter, to forget it or to park its event as a new one; False when it is gone."""
        letter = self.dead.take(ref, replay=replay)
        if letter is not None and replay:
            self._park(letter.stored, now_ms)
        return letter is not None

    def give(self, events: Sequence[Stored], now_ms: int) -> int:
        """Park events at the ends of their keys, those that are settled and not parked; how many."""
        count = 0
        for stored in events:
            if not self._comes_anyway(stored):
                self._park(stored, now_ms)
                count += 1
        return count

    def keys(self) -> list[ParkedKey]:
        """The keys that wait, those that were parked first first."""
        found = [
            ParkedKey(
                self.log.spec.name,
                self.name,
                partition,
                key,
                len(queue.events),
                queue.events[0].position,
                queue.attempts,
                queue.shown_due_ms(),
                queue.error,
                queue.since_ms,
            )
            for partition, part in enumerate(self.parts)
            for key, queue in part.parked.items()
        ]
        return sorted(found, key=lambda key: key.since_ms)

    def parked(self, key: ParkedKey) -> list[Stored]:
        """The events that wait of a key."""
        queue = self.parts[key.partition].parked.get(key.key)
        return list(queue.events) if queue else []

    def release_key(self, key: ParkedKey) -> bool:
        """Let a key be tried at once, attempts counted anew; False when it does not wait."""
        queue = self.parts[key.partition].parked.get(key.key)
        if queue is not None:
            queue.anew()
            self.log.wake()
        return queue is not None

    def drop_key(self, key: ParkedKey) -> int:
        """Discard what is parked of a key; how many events."""
        queue = self.parts[key.partition].parked.pop(key.key, None)
        return len(queue.events) if queue else 0

    def seek(self, begin: Sequence[int]) -> None:
        """Go on behind so many events of each partition."""
        for part, count in zip(self.parts, begin, strict=True):
            part.seek(count)
        self.log.wake()

    def evict(self) -> None:
        """Take all leases away."""
        for part in self.parts:
            part.fence()

    def quiet(self, now_ms: int) -> bool:
        """True when nothing can happen before time passes or an event is published."""
        return self._lag() == 0 and min(part.due_ms() for part in self.parts) > now_ms

    def next_due_ms(self) -> int | None:
        """When the first parked key is due."""
        due_ms = min(part.due_ms() for part in self.parts)
        return None if due_ms >= HELD_MS else int(due_ms)

    def info(self, now_s: float) -> GroupInfo:
        """The group as it is now; what is parked is pending."""
        parked = sum(part.events_parked() for part in self.parts)
        now = len(self.living(now_s)), self._lag(), parked, parked, len(self.dead)
        counts = self.count["done"], self.count["retried"], self.dead.replayed, self.dead.dropped
        return GroupInfo(self.log.spec.name, self.name, self.owner, *now, *counts)

    def pending_infos(self) -> list[PendingInfo]:
        """What is parked."""
        return [
            PendingInfo(stored.position, "", queue.attempts, queue.shown_due_ms())
            for part in self.parts
            for queue in part.parked.values()
            for stored in queue.events
        ]

    def _apply(self, part: _Part, effect: Effect, now_ms: int, broker: MemoryBroker) -> None:
        match effect:
            case Output(stream=stream, record=record):
                broker.store(stream, record)
            case Bury(stored=stored, reason=reason, error=error, attempts=attempts):
                self.dead.bury(stored, reason, error, attempts, now_ms)
            case Park(key=key, stored=stored):
                queue = part.parked.get(key)
                if queue is None:
                    figures = effect.attempts, effect.postponed
                    error = effect.error[:MAX_ERROR_CHARS]
                    queue = part.parked[key] = _Queue(effect.due_ms, now_ms, deque(), *figures, error=error)
                queue.events.append(stored)
            case Delay(key=key, offset=offset) if self._is_head(part, key, offset):
                error = effect.error[:MAX_ERROR_CHARS]
                part.parked[key].ended(effect.due_ms, effect.attempts, effect.postponed, error)
            case Pop(key=key, offset=offset) if self._is_head(part, key, offset):
                part.parked[key].next()
                if not part.parked[key].events:
                    del part.parked[key]

    def _park(self, stored: Stored, now_ms: int) -> None:
        parked = self.parts[stored.position.partition].parked
        parked.setdefault(_key(stored), _Queue(0.0, now_ms)).events.append(stored)
        self.log.wake()

    def _comes_anyway(self, stored: Stored) -> bool:
        part = self.parts[stored.position.partition]
        queue = part.parked.get(_key(stored))
        waits = queue is not None and any(event.position == stored.position for event in queue.events)
        return waits or not part.covers(stored.position.offset)

    def _is_head(self, part: _Part, key: str, offset: str) -> bool:
        return key in part.parked and part.parked[key].events[0].position.offset == offset

    def _begin(self, queue: _Queue, key: str, token: int) -> Head:
        queue.attempts += 1
        queue.started = True
        suspect = queue.crashes + 1 if queue.crashes else 0
        return Head(key, Claim(queue.events[0], queue.attempts, suspect, queue.postponed, token=token))

    def _lag(self) -> int:
        """Events behind the mark; what is parked is not among them."""
        ends = (len(self.log.partition(partition)) for partition in range(len(self.parts)))
        return sum(end - part.w for end, part in zip(ends, self.parts, strict=True))


class MemoryLedger:
    """One life of a member."""

    def __init__(self, broker: MemoryBroker, group: OrderedGroup, subscription: Subscription) -> None:
        self.name = f"ms.{broker.clock.nonce()}"
        self._broker = broker
        self._clock = broker.clock
        self._group = group
        self._lease_s = subscription.lease_s
        self._wake = asyncio.Event()

    @property
    def now_ms(self) -> float:
        """The time by which things are due."""
        return self._clock.now_ms()

    async def enter(self) -> None:
        """Become a member."""
        self._group.members[self.name] = (self._clock.monotonic(), self._lease_s)

    async def beat(self) -> None:
        """Say that we live. Raises `LeaseLost` when the group was forgotten."""
        group = self._group
        if group.log.groups.get(group.name) is not group:
            raise LeaseLost(f"group {group.name!r} of stream {group.log.spec.name!r} was forgotten")
        self._group.members[self.name] = (self._clock.monotonic(), self._lease_s)

    async def look(self) -> View:
        """See who lives, and who has what. One who was silent itself judges nobody."""
        group = self._group
        living = group.living(self._clock.monotonic())
        members = living if self.name in living else frozenset(group.members)
        leases = [
            Lease(number, part.owner, part.epoch, part.want, part.next, part.due_ms())
            for number, part in enumerate(group.parts)
        ]
        return View(members, leases)

    async def acquire(self, seen: Lease) -> Grant | None:
        """Take a lease that is free, or whose owner is silent."""
        if seen.owner and seen.owner in self._group.living(self._clock.monotonic()) - {self.name}:
            return None
        return self._group.acquire(seen, self.name)

    async def ask(self, seen: Lease) -> None:
        """Ask the owner of a lease for it."""
        part = self._group.parts[seen.partition]
        if (part.owner, part.epoch, part.want) == (seen.owner, seen.epoch, seen.want):
            part.want = self.name

    async def release(self, partition: int, epoch: int, heir: str) -> None:
        """Give a lease back."""
        if part := self._ours(partition, epoch):
            part.owner, part.next, part.want, part.clean = "", heir, "", True

    async def read(self, cursors: Mapping[int, Cursor], limit: int, wait_s: float) -> list[Claim]:
        """Events behind the cursors; waits for the first one."""
        until, log = self._clock.monotonic() + wait_s, self._group.log
        while True:
            changed = log.changed
            claims: list[Claim] = []
            for partition, cursor in cursors.items():
                begin = int(cursor.after or 0)
                events = islice(log.partition(partition), begin, begin + min(cursor.room, limit - len(claims)))
                claims += [Claim(stored, 1, token=cursor.epoch) for stored in events]
            left_s = until - self._clock.monotonic()
            if claims or left_s <= 0 or self._wake.is_set() or not await self._clock.wait(changed, left_s):
                self._wake.clear()
                return claims

    def wake(self) -> None:
        """End a `read` that waits."""
        self._wake.set()
        self._group.log.wake()

    async def heads(self, partition: int, epoch: int, busy: Sequence[str], limit: int) -> Heads | None:
        """Begin the first events of parked keys that are due."""
        part = self._ours(partition, epoch)
        return self._group.heads(part, busy, limit, self._clock.now_ms()) if part else None

    async def begin(self, partition: int, epoch: int, offsets: Sequence[str]) -> bool:
        """Note that the handlers of these suspects start now."""
        part = self._ours(partition, epoch)
        if part is None:
            return False
        for offset in offsets:
            part.notes.setdefault(offset, _Note()).started = True
        return True

    async def commit(self, commits: Sequence[Commit]) -> list[Committed]:
        """Store progress."""
        now_ms = self._clock.now_ms()
        for commit in commits:
            for effect in commit.effects:
                if isinstance(effect, Output):
                    self._broker.check(effect.stream, effect.record)
        return [self._group.commit(commit, self.name, now_ms, self._broker) for commit in commits]

    async def leave(self) -> None:
        """Be a member no longer."""
        self._group.members.pop(self.name, None)

    def _ours(self, partition: int, epoch: int) -> _Part | None:
        part = self._group.parts[partition]
        return part if (part.owner, part.epoch) == (self.name, epoch) else None


def _key(stored: Stored) -> str:
    return stored.record.key or keyless(stored.position.offset)
