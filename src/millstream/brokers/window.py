"""The window: one partition in the hands of its owner. Pure: events and outcomes go in, claims and commits come out.

    read ──► ready ──hand_out──► out ──Done, Dead──────────────► settled ──commit──► covered ──w passes──► gone
             ▲ │                  └──Later──► parks its key ────────┘ ▲
             │ └─ its key is parked ──► behind ── all before it are settled ┘
             └──── its key has enough out ─┘

Events come in the order of the log; those of different keys are settled in any order. The mark `w` follows the first one
that is not settled; what is settled beyond it is told by `h` and `open`, so that a crash does not repeat it. **A commit
covers all that is settled, of each key up to its first event that is not; and effects go into the first commit that covers
their event, in the order of the log.** Whoever settled something therefore knows by the answer whether it was still ours.

A key that must wait is parked: its event, and every later one of the key, are stored aside, and the log goes on. The rule
that keeps the order: an event is set aside behind others only when all events of its key before it are settled. Until then
it waits here, *behind*; or a commit in between would turn two events of the key around.

What is parked is run one event of a key at a time, as its *head*.

An event costs 0.7 µs here: 0.16 to be put in, 0.16 to be handed out, 0.24 to be settled, 0.13 for its part of a commit of
128. So each has one slot, one count of its key and one step of its phase at a time; whatever follows from an outcome, or
from the last owner, is looked at only where there is any; and a commit walks along what it passes once (`slots.py`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from msgspec.structs import replace

from millstream.brokers.base import Claim, Dead, Done, Later, Position, Settlement
from millstream.brokers.budget import Held
from millstream.brokers.ended import Ended, bury_later, end, give_back
from millstream.brokers.ledger import (
    Bury,
    Commit,
    Committed,
    Cursor,
    Delay,
    Effect,
    Grant,
    Head,
    Park,
    Pop,
    State,
)
from millstream.brokers.letters import buried, unburied
from millstream.brokers.portion import Portion
from millstream.brokers.slots import BEHIND, COVERED, OUT, READY, SETTLED, Slot, ahead, over

WINDOW = 2_048  # events from the first that is not settled to the last that was read

_NEVER = float("inf")


class _Sending(NamedTuple):
    """A commit that is under way: the same is sent until it is answered."""

    commit: Commit
    passed: Sequence[Slot]
    ahead: Sequence[Slot]
    heads: Sequence[Ended]
    events: int
    """Of both, how many were not covered before."""
    eventful: int
    """How many of those have effects."""


class Window:
    """A partition that is ours, from its grant on."""

    def __init__(self, grant: Grant, size: int = WINDOW) -> None:
        self.partition = grant.partition
        self.epoch = grant.epoch
        self.w = grant.w
        self.h = grant.h
        self.draining = False
        """True when nothing more is to be handed out."""
        self.due_ms = 0.0 if grant.parked else _NEVER
        """When the next parked key may be due, at the earliest."""
        self.parked: set[str] = set(grant.parked)
        """Keys that wait: those of the ledger, and those of which a commit is still to come."""
        self.events_parked = grant.events_parked
        self._size = size
        self._grant = grant
        self._inherits = bool(grant.h) or not grant.clean
        self._ordinal = grant.ordinal
        self._open: Sequence[str] = sorted(grant.open, key=place)
        self._cursor = grant.w
        self._held = Held()
        self._number = 0
        self._seq = 0
        self._slots: dict[str, Slot] = {}
        self._ready: deque[Slot] = deque()
        self._behind: dict[str, deque[Slot]] = {}
        self._out: dict[str, int] = {}
        self._joining: Counter[str] = Counter()
        self._heads: dict[str, Head] = {}
        self._ended: list[Ended] = []
        self._sending: _Sending | None = None
        self._waiting_effects = 0
        self._uncovered = 0
        self._ahead = 0

    # Reading.

    @property
    def cursor(self) -> Cursor:
        """How far it was read, and how much more may be."""
        return Cursor(self._cursor, 0 if self.draining else self._size - len(self._slots), self.epoch)

    @property
    def catching_up(self) -> bool:
        """True until all was read that the last owner had settled ahead; before that nothing is committed."""
        return bool(self._grant.h) and not after(self._cursor or "0", self._grant.h, or_equal=True)

    def caught_up(self) -> None:
        """There is nothing more to read up to `h`: somebody has trimmed it."""
        self._grant = replace(self._grant, h="")

    @property
    def held_bytes(self) -> int:
        """How much is held of it, about."""
        return self._held.size_bytes

    def cursor_within(self, share_bytes: int) -> Cursor:
        """The same, where the window may hold so much."""
        room = 0 if self.draining else min(self._size - len(self._slots), self._held.room(share_bytes))
        return Cursor(self._cursor, room, self.epoch)

    def put(self, claims: Iterable[Claim]) -> None:
        """Take in what was read, in order."""
        slots, add, offset = self._slots, self._inherit if self._inherits else self._ready.append, self._cursor
        before, data_bytes = len(slots), 0
        for claim in claims:
            record, offset = claim.record, claim.position.offset
            data_bytes += len(record.data)
            slot = slots[offset] = Slot(claim, offset, record.key or keyless(offset))
            add(slot)
        self._cursor = offset
        self._held.read(len(slots) - before, data_bytes)
        self._inherits = self._inherits and (self.catching_up or self._was_seen(offset))

    # Handing out.

    def hand_out(self, limit: int, of_a_key: int = WINDOW) -> list[Claim]:
        """The next claims, in order; of one key not more at once, or a slow one would take all room.

        Events of a key that is parked are set aside instead.
        """
        claims: list[Claim] = []
        if self.draining:
            return claims
        ready, out, parked, behind = self._ready, self._out, self.parked, self._behind
        waits = bool(parked or behind)
        while ready and len(claims) < limit:
            slot = ready.popleft()
            key = slot.key
            count = out.get(key, 0)
            if count >= of_a_key or (waits and (key in parked or key in behind)):
                self._put_behind(slot)
                waits = True
                continue
            slot.phase = OUT
            out[key] = count + 1
            claims.append(slot.claim)
        return claims

    @property
    def ready(self) -> bool:
        """True while something that was read can be handed out."""
        return bool(self._ready) and not self.draining

    @property
    def left(self) -> int:
        """How many events that is."""
        return len(self._ready) if self.ready else 0

    def busy(self) -> list[str]:
        """Parked keys whose head is not to be begun now."""
        keys = [*(head.key for head in self._heads.values()), *(ended.key for ended in self._ended)]
        return keys + [key for key in self._out if key in self.parked]

    def begin(self, heads: Iterable[Head]) -> list[Claim]:
        """Hand out the heads of parked keys."""
        claims: list[Claim] = []
        for head in heads:
            self._heads[head.claim.position.offset] = head
            self.parked.add(head.key)  # a person may have parked it: a replayed dead letter is one
            claims.append(head.claim)
        return claims

    def holds(self, offset: str) -> bool:
        """True while an event is handed out and not settled."""
        slot = self._slots.get(offset)
        return offset in self._heads or (slot is not None and slot.phase is OUT)

    def held(self) -> list[Position]:
        """All that is handed out and not settled."""
        offsets = [slot.offset for slot in self._slots.values() if slot.phase is OUT]
        return [Position(self.partition, offset) for offset in (*offsets, *self._heads)]

    def at_rest(self) -> bool:
        """True when nothing is handed out, and nothing waits for a commit."""
        return not (self._out or self._heads or self._ended or self._sending or self._waiting_effects)

    # Settling.

    def settle(self, settlement: Settlement) -> bool:
        """Take in an outcome. False when the event is not ours to settle; a repeat of what waits for a commit is True."""
        offset = settlement.position.offset
        slot = self._slots.get(offset)
        if slot is not None and slot.phase is OUT:
            slot.phase = SETTLED
            self._uncovered += 1
            if settlement.outputs or settlement.letters or type(settlement.outcome) is not Done:
                self._follow(slot, settlement)
            key = slot.key
            left = self._out.pop(key) - 1
            if left:
                self._out[key] = left
            elif self._behind and key in self._behind:
                self._flush(key)
            return True
        if (head := self._heads.pop(offset, None)) is not None:
            self._ended.append(end(head, settlement))
            return True
        if slot is not None and slot.phase in (BEHIND, SETTLED):
            return True
        return any(ended.offset == offset and not ended.given_back for ended in self._ended)

    def bury_later(self, at_ms: int) -> None:
        """There is no room for dead letters: their events wait, and their keys with them."""
        for slot in self._slots.values():
            if slot.phase is SETTLED and any(isinstance(effect, Bury) for effect in slot.effects):
                self._bury_later(slot, at_ms)
        self._ended = [bury_later(ended, at_ms) for ended in self._ended]
        self._sending = None

    def give_back(self) -> None:
        """Take back all that is handed out, as if it had never been."""
        for slot in self._slots.values():
            if slot.phase is OUT:
                slot.phase = READY
        self._ready = deque(slot for slot in self._slots.values() if slot.phase is READY)
        self._out.clear()
        self._ended += map(give_back, self._heads.values())
        self._heads.clear()

    # Committing.

    def commit(self, *, room: bool = True, alone: bool = False) -> Commit | None:
        """What is to be stored now; None when there is nothing. The same again until it is answered.

        Without `room`, what a full broker would refuse stays out, and so do the events that it belongs to. With it, the
        outputs and dead letters of so many events come in as one commit takes: of one at least, for they are never
        parted, and of no more when it is to go `alone`.
        """
        if self._sending is not None:
            return self._sending.commit
        if self.catching_up or not (self._uncovered or self._ahead or self._ended):
            return None
        portion = Portion(room=room, alone=alone)
        passed = over(self._slots.values(), portion)
        covered = [slot for slot in passed if slot.phase is SETTLED] if self._ahead else passed
        heads = [ended for ended in self._ended if portion.takes(ended.effects)]
        w = passed[-1].offset if passed else self.w
        h, opened, settled_ahead = *self._still_ahead(w, passed), list[Slot]()
        if left := self._uncovered - len(covered):
            h, opened, settled_ahead = ahead(islice(self._slots.values(), len(passed), None), left, h, portion)
        if not (passed or heads or settled_ahead):
            return None
        covered = [*covered, *settled_ahead]
        eventful = [slot for slot in covered if slot.effects] if self._waiting_effects else []
        ends: list[Slot | Ended] = [*eventful, *heads]
        commit = Commit(
            self.partition,
            self.epoch,
            self._seq + 1,
            w,
            None if self._ordinal is None else self._ordinal + len(passed),
            h,
            opened,
            [effect for end in ends for effect in end.effects],
            len(covered) - len(eventful) + sum(end.handled for end in ends),
            sum(end.retried for end in ends),
            [] if self._grant.clean else [slot.offset for slot in covered if slot.claim.suspect],
            portion.events > 1,
        )
        self._sending = _Sending(commit, passed, settled_ahead, heads, len(covered), len(eventful))
        return commit

    def answered(self, answer: Committed) -> None:
        """Take in the answer to the last commit; all but LOST, which is the end of this window."""
        sending, self._sending = self._sending, None
        if sending is None or answer.state is not State.STORED:
            return
        commit = sending.commit
        self._seq, self.w, self._ordinal = commit.seq, commit.w, commit.ordinal
        self.h, self._open, self.events_parked = commit.h, commit.open, answer.events_parked
        self._uncovered -= sending.events
        self._waiting_effects -= sending.eventful
        self._ahead += sending.events - len(sending.passed)
        for slot in sending.passed:
            del self._slots[slot.offset]
        self._held.passed(len(sending.passed))
        for slot in sending.ahead:
            slot.phase, slot.effects = COVERED, ()
        if commit.effects:
            self._took_effect(sending, answer)

    # Below: how.

    def _inherit(self, slot: Slot) -> None:
        """An event that the last owner may have settled, or may have been killed by."""
        grant, offset = self._grant, slot.offset
        self._number += 1
        if grant.h and offset not in grant.open and after(grant.h, offset, or_equal=True):
            slot.phase = COVERED
            self._ahead += 1
            return
        if self._was_seen(offset):
            crashes = grant.notes.get(offset, 0)
            slot.claim = replace(slot.claim, attempt=1 + crashes, suspect=1 + crashes)
        self._ready.append(slot)

    def _was_seen(self, offset: str) -> bool:
        """True when the last owner has crashed, and may have had this event in its window."""
        last = "" if self._grant.clean or self._number > self._size else self._grant.last
        return last != "" and after(last, offset, or_equal=True)

    def _follow(self, slot: Slot, settlement: Settlement) -> None:
        """Note what follows from an outcome."""
        claim, key = slot.claim, slot.key
        dead = buried(settlement.position, claim.attempt, settlement.letters)
        stored: tuple[Effect, ...] = (*settlement.outputs, *dead)
        match settlement.outcome:
            case Done():
                slot.effects = stored
            case Dead(reason=reason, error=error):
                slot.effects = (*stored, Bury(claim.stored, reason, error, claim.attempt))
                slot.handled = False
            case Later(at_ms=at_ms, error=error, counted=counted, left=left):
                attempts, postponed = claim.attempt - (not counted), claim.postponed + (not counted)
                park = Park(key, claim.stored, at_ms, attempts, postponed, error, left)
                slot.effects = (*stored, park)
                slot.handled, slot.retried = False, counted
                self._park(key, at_ms)
        self._waiting_effects += 1

    def _bury_later(self, slot: Slot, at_ms: int) -> None:
        claim, (outputs, left) = slot.claim, unburied(slot.effects)
        if not any(isinstance(effect, Park) for effect in slot.effects):
            self._park(slot.key, at_ms)
        park = Park(slot.key, claim.stored, at_ms, claim.attempt - 1, claim.postponed, left=left)
        slot.effects, slot.handled, slot.retried = (*outputs, park), False, False

    def _park(self, key: str, due_ms: float) -> None:
        self.parked.add(key)
        self._joining[key] += 1
        self.due_ms = min(self.due_ms, due_ms)

    def _put_behind(self, slot: Slot) -> None:
        slot.phase = BEHIND
        self._behind.setdefault(slot.key, deque()).append(slot)
        if slot.key not in self._out:
            self._flush(slot.key)

    def _flush(self, key: str) -> None:
        """All before them are settled: set those that wait behind aside, or let them go on."""
        slots = self._behind.pop(key)
        if key not in self.parked:
            for slot in reversed(slots):
                slot.phase = READY
                self._ready.appendleft(slot)
            return
        for slot in slots:
            slot.phase, slot.handled = SETTLED, False
            slot.effects = (Park(key, slot.claim.stored),)
            self._uncovered += 1
            self._waiting_effects += 1
            self._joining[key] += 1

    def _unpark(self, key: str) -> None:
        self.parked.discard(key)
        if key in self._behind and key not in self._out:
            self._flush(key)

    def _took_effect(self, sending: _Sending, answer: Committed) -> None:
        stored, effects = {id(ended) for ended in sending.heads}, sending.commit.effects
        self._ended = [ended for ended in self._ended if id(ended) not in stored]
        self._joined(effects)
        for key in answer.emptied:
            if not self._joining[key]:
                self._unpark(key)
        if any(isinstance(effect, Pop) and effect.key not in answer.emptied for effect in effects):
            self.due_ms = 0.0

    def _joined(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Park):
                self._joining[effect.key] -= 1
                if not self._joining[effect.key]:
                    del self._joining[effect.key]
                # One that has none of these has joined others, which are due first.
                if effect.due_ms or effect.attempts or effect.postponed:
                    self.due_ms = min(self.due_ms, effect.due_ms)
            elif isinstance(effect, Delay):
                self.due_ms = min(self.due_ms, effect.due_ms)

    def _still_ahead(self, w: str, passed: Sequence[Slot]) -> tuple[str, Sequence[str]]:
        """`h` and `open` as they are stored, without what `w` passes."""
        if not self.h or after(w or "0", self.h, or_equal=True):
            return "", ()
        gone = {slot.offset for slot in passed}
        return self.h, [offset for offset in self._open if offset not in gone]


def place(offset: str) -> tuple[int, ...]:
    """An offset as numbers, to be compared within its partition."""
    return tuple(map(int, offset.split("-")))


def after(one: str, other: str, *, or_equal: bool = False) -> bool:
    """True when an offset lies behind another one of its partition."""
    return (or_equal and one == other) or place(one) > place(other)


def keyless(offset: str) -> str:
    """In place of a key, for an event that has none: it waits for nobody, and nobody for it."""
    return f"\0{offset}"
