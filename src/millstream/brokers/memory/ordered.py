"""Groups of the memory broker that consume in the order of keys: the shortest correct ledger, and the model for others."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence
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
from millstream.brokers.letters import waiting
from millstream.brokers.memory.letters import Letters
from millstream.brokers.memory.log import ordinal
from millstream.brokers.memory.part import NEVER, Note, Parked, Part, Queue
from millstream.brokers.memory.tending import seen_ms
from millstream.brokers.window import keyless
from millstream.errors import BrokerFull, LeaseLost
from millstream.units import MAX_ERROR_CHARS

if TYPE_CHECKING:
    from millstream.brokers.memory.broker import MemoryBroker
    from millstream.brokers.memory.log import Log
    from millstream.clock import Clock


class OrderedGroup:
    """A group's whole state."""

    def __init__(self, log: Log, name: str, owner: str, begin: Sequence[int], born_s: float) -> None:
        self.log = log
        self.name = name
        self.owner = owner
        self.seen_s = born_s
        """When a member beat last, or its birth."""
        self.announced_s: float | None = None
        """When it was found that nobody had been seen in it for long; None while somebody is."""
        self.parts = [Part(count) for count in begin]
        self.members: dict[str, tuple[float, float]] = {}
        """Per name when it beat last, and its lease."""
        self.dead = Letters(log.spec.name, name)
        self.count: Counter[str] = Counter()

    def living(self, now_s: float) -> frozenset[str]:
        """Who has beaten within its lease."""
        return frozenset(name for name, (beat_s, lease_s) in self.members.items() if now_s - beat_s < lease_s)

    def beat(self, name: str, now_s: float, lease_s: float) -> None:
        """Note that a member lives."""
        self.members[name] = (now_s, lease_s)
        self.seen_s = now_s

    def settled(self) -> list[int]:
        """Of each partition, how many events that there ever were it does not need any more."""
        return [part.w for part in self.parts]

    def trimmed(self) -> None:
        """Count what is gone from the stream and had not been settled; who has read an event goes on with it."""
        for part, gone in zip(self.parts, self.log.gone, strict=True):
            self.count["lost"] += part.lose(gone)

    def newly_lost(self) -> int:
        """How many events it has lost since this was asked last."""
        lost = self.count["lost"] - self.count["told"]
        self.count["told"] = self.count["lost"]
        return lost

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
        part.owner = ""
        lost = part.lose(self.log.gone[seen.partition])  # what the last owner had read, and did not finish
        self.count["lost"] += lost
        part.read = part.w
        part.owner, part.epoch, part.seq, part.want, part.next = name, part.epoch + 1, 0, "", ""
        notes = {offset: note.crashes for offset, note in part.notes.items()}
        last = str(self.log.end(seen.partition))
        ours = seen.partition, part.epoch, str(part.w or ""), part.w, part.h, part.open, clean, last
        return Grant(*ours, frozenset(part.parked), part.events_parked(), notes, lost)

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
        try:
            broker.check_room([effect for effect in commit.effects if isinstance(effect, Output)])
        except BrokerFull:
            return Committed(State.FULL)
        for effect in commit.effects:
            self._apply(part, effect, now_ms, broker)
        part.seq, part.w, part.h, part.open = commit.seq, int(commit.w or 0), commit.h, frozenset(commit.open)
        part.gaps = [gap for gap in part.gaps if gap[1] > part.w]
        for offset in commit.cleared:
            part.notes.pop(offset, None)
        self.count["done"] += commit.done
        self.count["retried"] += commit.retried
        popped = {effect.key for effect in commit.effects if isinstance(effect, Pop)}
        part.answer = Committed(State.STORED, frozenset(popped - part.parked.keys()), part.events_parked())
        return part.answer

    def heads(self, part: Part, busy: Sequence[str], limit: int, now_ms: int) -> Heads:
        """Begin the first events of keys that are due, and count it."""
        ready = sorted((queue.due_ms, key) for key, queue in part.parked.items() if key not in busy)
        due = [key for due_ms, key in ready if due_ms <= now_ms]
        heads = [self._begin(part.parked[key], key, part.epoch) for key in due[:limit]]
        return Heads(heads, ready[len(heads)][0] if len(ready) > len(heads) else NEVER)

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
                queue.events[0].stored.position,
                queue.attempts,
                queue.shown_due_ms(),
                queue.error,
                queue.since_ms,
            )
            for partition, part in enumerate(self.parts)
            for key, queue in part.parked.items()
        ]
        return sorted(found, key=lambda key: key.since_ms)

    def parked(self, key: ParkedKey, limit: int) -> list[Stored]:
        """The first events that wait of a key."""
        queue = self.parts[key.partition].parked.get(key.key)
        return list(islice(waiting(queue.events), limit)) if queue else []

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

    def info(self, clock: Clock) -> GroupInfo:
        """The group as it is now; what is parked is pending."""
        parked = sum(part.events_parked() for part in self.parts)
        now = len(self.living(clock.monotonic())), self._lag(), parked, parked, len(self.dead)
        counts = self.count["done"], self.count["retried"], self.dead.replayed, self.dead.dropped, self.count["lost"]
        return GroupInfo(self.log.spec.name, self.name, self.owner, *now, *counts, seen_ms(self, clock))

    def pending_infos(self) -> list[PendingInfo]:
        """What is parked."""
        return [
            PendingInfo(event.stored.position, "", queue.attempts, queue.shown_due_ms())
            for part in self.parts
            for queue in part.parked.values()
            for event in queue.events
        ]

    def _apply(self, part: Part, effect: Effect, now_ms: int, broker: MemoryBroker) -> None:
        match effect:
            case Output():
                broker.store(effect)
            case Bury():
                self.dead.bury(effect, now_ms)
            case Park(key=key, stored=stored, left=left):
                queue = part.parked.get(key)
                if queue is None:
                    figures = effect.attempts, effect.postponed
                    error = effect.error[:MAX_ERROR_CHARS]
                    queue = part.parked[key] = Queue(effect.due_ms, now_ms, deque(), *figures, error=error)
                queue.events.append(Parked(stored, left))
            case Delay(key=key, offset=offset) if self._is_head(part, key, offset):
                part.parked[key].ended(effect)
            case Pop(key=key, offset=offset) if self._is_head(part, key, offset):
                part.parked[key].next()
                if not part.parked[key].events:
                    del part.parked[key]

    def _park(self, stored: Stored, now_ms: int) -> None:
        parked = self.parts[stored.position.partition].parked
        parked.setdefault(_key(stored), Queue(0.0, now_ms)).events.append(Parked(stored))
        self.log.wake()

    def _comes_anyway(self, stored: Stored) -> bool:
        part, position = self.parts[stored.position.partition], stored.position
        queue = part.parked.get(_key(stored))
        waits = queue is not None and any(event.stored.position == position for event in queue.events)
        return waits or not part.covers(ordinal(position))

    def _is_head(self, part: Part, key: str, offset: str) -> bool:
        return key in part.parked and part.parked[key].events[0].stored.position.offset == offset

    def _begin(self, queue: Queue, key: str, token: int) -> Head:
        queue.attempts += 1
        queue.started = True
        suspect = queue.crashes + 1 if queue.crashes else 0
        stored, left = queue.events[0]
        return Head(key, Claim.of(stored, queue.attempts, suspect, queue.postponed, token=token, left=left))

    def _lag(self) -> int:
        """Events behind the mark; what is parked is not among them."""
        parts = enumerate(self.parts)
        return sum(self.log.end(partition) - part.w - part.missing() for partition, part in parts)


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
        self._group.beat(self.name, self._clock.monotonic(), self._lease_s)

    async def beat(self) -> None:
        """Say that we live. Raises `LeaseLost` when the group was forgotten."""
        group = self._group
        if group.log.groups.get(group.name) is not group:
            raise LeaseLost(f"group {group.name!r} of stream {group.log.spec.name!r} was forgotten")
        self._group.beat(self.name, self._clock.monotonic(), self._lease_s)

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
                events = log.behind(partition, int(cursor.after or 0), min(cursor.room, limit - len(claims)))
                claims += [Claim.of(stored, 1, token=cursor.epoch) for stored in events]
                if events and (part := self._ours(partition, cursor.epoch)):
                    part.read = int(events[-1].position.offset)
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
            part.notes.setdefault(offset, Note()).started = True
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

    def _ours(self, partition: int, epoch: int) -> Part | None:
        part = self._group.parts[partition]
        return part if (part.owner, part.epoch) == (self.name, epoch) else None


def _key(stored: Stored) -> str:
    return stored.record.key or keyless(stored.position.offset)
