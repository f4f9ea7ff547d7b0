"""Groups of the memory broker that consume without order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from millstream.brokers.base import (
    Claim,
    Dead,
    Done,
    GroupInfo,
    Later,
    PendingInfo,
    Position,
    Settlement,
    Stored,
)
from millstream.brokers.ledger import Bury
from millstream.brokers.letters import buried
from millstream.brokers.memory.letters import Letters
from millstream.brokers.memory.log import ordinal
from millstream.brokers.memory.tending import seen_ms
from millstream.wire.packs import part_of

if TYPE_CHECKING:
    from millstream.brokers.memory.log import Log
    from millstream.clock import Clock


@dataclass(slots=True, eq=False)
class Member:
    """One life of a consumer: from its entry until it leaves or is found silent."""

    name: str
    lease_s: float
    beat_s: float
    held: dict[Position, None] = field(default_factory=dict)
    present: bool = True

    def silent(self, now_s: float) -> bool:
        """True when it has not beaten for a lease."""
        return now_s - self.beat_s >= self.lease_s


@dataclass(slots=True, eq=False)
class Pending:
    """An event delivered and not settled: held by a present member, or waiting. See `Claim` for the numbers."""

    stored: Stored
    attempt: int = 0
    suspect: int = 0
    postponed: int = 0
    started: bool = False
    copy: bool = False
    """Given back by people: it does not need the event in the stream."""
    left: Sequence[int] = ()
    holder: Member | None = None
    due_ms: int = 0

    def info(self) -> PendingInfo:
        """For people."""
        name, due_ms = (self.holder.name, None) if self.holder else ("", self.due_ms)
        return PendingInfo(self.stored.position, name, self.attempt, due_ms)


class Group:
    """A group's whole state. Every pending event either has a holder, or lies in `due`."""

    def __init__(self, log: Log, name: str, owner: str, cursor: list[int], born_s: float) -> None:
        self.log = log
        self.name = name
        self.owner = owner
        self.cursor = cursor
        self.seen_s = born_s
        """When a member beat last, or its birth."""
        self.announced_s: float | None = None
        """When it was found that nobody had been seen in it for long; None while somebody is."""
        self.pending: dict[Position, Pending] = {}
        self.due: list[tuple[int, int, Pending]] = []  # a heap: due time, who came first, what
        self.members: dict[str, Member] = {}
        self.dead = Letters(log.spec.name, name)
        self.count: Counter[str] = Counter()

    def claim(self, member: Member, limit: int, now_ms: int, *, fresh: bool) -> list[Claim]:
        """Up to `limit` events for a member: those due again, then, if it asks for them, new ones."""
        if not member.present:
            return []
        claims: list[Claim] = []
        while self.due and self.due[0][0] <= now_ms and len(claims) < limit:
            claims.append(self._hold(member, heappop(self.due)[2]))
        return claims + self._claim_fresh(member, limit - len(claims)) if fresh else claims

    def held(self, member: Member, position: Position) -> Pending | None:
        """The pending event at this position, if the member holds it."""
        return self.pending[position] if member.present and position in member.held else None

    def full(self, settlement: Settlement) -> bool:
        """True when there is no room for the dead letters of this settlement."""
        count = len(settlement.letters) + isinstance(settlement.outcome, Dead)
        return count > 0 and self.dead.full(settlement.position.partition, count)

    def settle(self, pending: Pending, settlement: Settlement, now_ms: int) -> None:
        """Turn a held event into a finished one, one that waits, or a dead letter; and store the letters of a pack."""
        pending.suspect = 0  # its process survived it
        for letter in buried(settlement.position, pending.attempt, settlement.letters):
            self.dead.bury(letter, now_ms)
        match settlement.outcome:
            case Done():
                self._let_go(pending, forget=True)
                self.count["done"] += 1
            case Later(at_ms=at_ms, counted=counted, left=left):
                pending.left = left or pending.left
                pending.attempt -= not counted
                pending.postponed += not counted
                self.count["retried"] += counted
                self._wait(pending, at_ms)
            case Dead(reason=reason, error=error):
                self._let_go(pending, forget=True)
                self.dead.bury(Bury(pending.stored, reason, error, pending.attempt), now_ms)

    def hand_back(self, member: Member, partitions: frozenset[int]) -> None:
        """Let what a member holds of these partitions wait, due at once, as if it had not been claimed."""
        for position in [position for position in member.held if position.partition in partitions]:
            self.pending[position].attempt -= 1
            self._wait(self.pending[position], 0)

    def evict_silent(self, judge: Member, now_s: float) -> None:
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

    def enter(self, member: Member) -> None:
        """Make somebody a member."""
        self.members[member.name] = member
        self.seen_s = member.beat_s

    def beat(self, member: Member, now_s: float) -> None:
        """Note that a member lives."""
        self.seen_s = member.beat_s = now_s

    def living(self, now_s: float) -> int:
        """How many members have beaten within their leases."""
        return sum(not member.silent(now_s) for member in self.members.values())

    def settled(self) -> list[int]:
        """Of each partition, how many events that there ever were it does not need any more."""
        settled = list(self.cursor)
        for position, pending in self.pending.items():
            if not (pending.copy or self._is_gone(pending)):
                settled[position.partition] = min(settled[position.partition], ordinal(position) - 1)
        return settled

    def trimmed(self) -> None:
        """Count what is gone from the stream and had not been settled; who works on an event has it, and goes on."""
        for partition, gone in enumerate(self.log.gone):
            self.count["lost"] += max(0, gone - self.cursor[partition])
            self.cursor[partition] = max(gone, self.cursor[partition])
        lost = [pending for pending in self.pending.values() if pending.holder is None and self._is_gone(pending)]
        for pending in lost:
            self._let_go(pending, forget=True)
        if lost:
            self.count["lost"] += len(lost)
            self.due = [entry for entry in self.due if entry[2].stored.position in self.pending]
            heapify(self.due)

    def newly_lost(self) -> int:
        """How many events it has lost since this was asked last."""
        lost = self.count["lost"] - self.count["told"]
        self.count["told"] = self.count["lost"]
        return lost

    def take_letter(self, ref: str, now_ms: int, *, replay: bool) -> bool:
        """Remove a dead letter, to forget it or to let its event wait as a new one; False when it is gone."""
        letter = self.dead.take(ref, replay=replay)
        if letter is not None and replay and not self._comes(letter.stored.position):
            self._give(letter.stored, now_ms)
        return letter is not None

    def give(self, events: Sequence[Stored], now_ms: int) -> int:
        """Let events wait as new ones, those that are settled; how many."""
        count = 0
        for stored in events:
            if self._is_settled(stored.position):
                self._give(stored, now_ms)
                count += 1
        return count

    def seek(self, begin: list[int]) -> None:
        """Go on behind so many events of each partition; what is pending is forgotten."""
        self.evict()
        self.pending.clear()
        self.due.clear()
        self.cursor = begin
        self.log.wake()

    def evict(self) -> None:
        """Take away what all members hold, which `keep` will tell them."""
        for member in self.members.values():
            member.present = False
        self.members.clear()

    def quiet(self, now_ms: int) -> bool:
        """True when nothing can happen before time passes or an event is published."""
        due = bool(self.due) and self.due[0][0] <= now_ms
        return not due and len(self.pending) == len(self.due) and self._lag() == 0

    def next_due_ms(self) -> int | None:
        """When the first waiting event is due, possibly in the past."""
        return self.due[0][0] if self.due else None

    def pending_infos(self) -> list[PendingInfo]:
        """What is held, or waits."""
        return [pending.info() for pending in self.pending.values()]

    def info(self, clock: Clock) -> GroupInfo:
        """The group as it is now."""
        names = (self.log.spec.name, self.name, self.owner)
        now = (self.living(clock.monotonic()), self._lag(), len(self.pending), len(self.due), len(self.dead))
        counts = self.count["done"], self.count["retried"], self.dead.replayed, self.dead.dropped, self.count["lost"]
        return GroupInfo(*names, *now, *counts, seen_ms(self, clock))

    def _claim_fresh(self, member: Member, limit: int) -> list[Claim]:
        claims: list[Claim] = []
        # Each call begins one partition further, or a busy first one would starve the others.
        self.count["turn"] += 1
        for step in range(len(self.cursor)):
            partition = (self.count["turn"] + step) % len(self.cursor)
            begin = self.cursor[partition]
            fresh = self.log.behind(partition, begin, limit - len(claims))
            self.cursor[partition] += len(fresh)
            claims += [self._hold(member, Pending(stored)) for stored in fresh]
        return claims

    def _hold(self, member: Member, pending: Pending) -> Claim:
        position = pending.stored.position
        self.pending[position] = pending
        member.held[position] = None
        pending.holder = member
        pending.attempt += 1
        return Claim.of(pending.stored, pending.attempt, pending.suspect, pending.postponed, left=pending.left)

    def _comes(self, position: Position) -> bool:
        """True for what comes by itself, as what had died may after a seek: it is not to come twice."""
        if position in self.pending or ordinal(position) > self.cursor[position.partition]:
            return True
        entry, part = part_of(position.offset)
        pack = self.pending.get(Position(position.partition, entry))
        return pack is not None and (not pack.left or part in pack.left)

    def _is_settled(self, position: Position) -> bool:
        return not self._comes(position) and ordinal(position) > self.log.gone[position.partition]

    def _is_gone(self, pending: Pending) -> bool:
        position = pending.stored.position
        return not pending.copy and ordinal(position) <= self.log.gone[position.partition]

    def _give(self, stored: Stored, now_ms: int) -> None:
        pending = self.pending[stored.position] = Pending(stored, copy=True)
        self._wait(pending, now_ms)

    def _wait(self, pending: Pending, due_ms: int) -> None:
        gone = self._is_gone(pending)
        self._let_go(pending, forget=gone)
        if gone:
            self.count["lost"] += 1
            return
        pending.due_ms = due_ms
        pending.started = False
        self.count["waited"] += 1
        heappush(self.due, (due_ms, self.count["waited"], pending))
        self.log.wake()

    def _let_go(self, pending: Pending, forget: bool = False) -> None:
        if pending.holder is not None:
            del pending.holder.held[pending.stored.position]
            pending.holder = None
        if forget:
            del self.pending[pending.stored.position]

    def _lag(self) -> int:
        return sum(self.log.end(partition) - cursor for partition, cursor in enumerate(self.cursor))
