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
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import islice, takewhile
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from millstream.brokers.base import Claim, Dead, Done, Later, Outcome, Output, Position, Settlement
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
from millstream.brokers.portion import Portion

WINDOW = 2_048  # events from the first that is not settled to the last that was read

_NEVER = float("inf")


class Phase(IntEnum):
    """How far an event has come."""

    READY = 0
    OUT = 1
    BEHIND = 2
    SETTLED = 3
    COVERED = 4


class Slot(Struct, gc=False, eq=False):
    """One event of the window."""

    claim: Claim
    offset: str
    key: str
    phase: Phase = Phase.READY
    effects: Sequence[Effect] = ()
    handled: bool = False
    retried: bool = False


class _Ended(NamedTuple):
    """A head whose outcome is known."""

    head: Head
    effects: Sequence[Effect]
    handled: bool = False
    retried: bool = False
    given_back: bool = False

    @property
    def key(self) -> str:
        return self.head.key

    @property
    def offset(self) -> str:
        return self.head.claim.stored.position.offset


class _Sending(NamedTuple):
    """A commit that is under way: the same is sent until it is answered."""

    commit: Commit
    passed: Sequence[Slot]
    covered: Sequence[Slot]
    heads: Sequence[_Ended]


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
        self._ordinal = grant.ordinal
        self._open: Sequence[str] = sorted(grant.open, key=place)
        self._cursor = grant.w
        self._number = 0
        self._seq = 0
        self._slots: dict[str, Slot] = {}
        self._ready: deque[Slot] = deque()
        self._behind: dict[str, deque[Slot]] = {}
        self._out: dict[str, int] = {}
        self._joining: Counter[str] = Counter()
        self._heads: dict[str, Head] = {}
        self._ended: list[_Ended] = []
        self._sending: _Sending | None = None
        self._waiting_effects = 0
        self._uncovered = 0

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

    def put(self, claims: Iterable[Claim]) -> None:
        """Take in what was read, in order."""
        slots, add = self._slots, self._ready.append
        fresh = not self._grant.h and self._grant.clean  # the last owner left nothing that must be looked at
        for claim in claims:
            stored = claim.stored
            offset = stored.position.offset
            slot = slots[offset] = Slot(claim, offset, stored.record.key or keyless(offset))
            self._cursor = offset
            if fresh:
                add(slot)
            else:
                self._inherit(slot)

    # Handing out.

    def hand_out(self, limit: int, of_a_key: int = WINDOW) -> list[Claim]:
        """The next claims, in order; of one key not more at once, or a slow one would take all room.

        Events of a key that is parked are set aside instead.
        """
        claims: list[Claim] = []
        if self.draining:
            return claims
        ready, out, parked, behind = self._ready, self._out, self.parked, self._behind
        while ready and len(claims) < limit:
            slot = ready.popleft()
            key = slot.key
            if (parked and key in parked) or (behind and key in behind) or out.get(key, 0) >= of_a_key:
                self._put_behind(slot)
                continue
            slot.phase = Phase.OUT
            out[key] = out.get(key, 0) + 1
            claims.append(slot.claim)
        return claims

    @property
    def ready(self) -> bool:
        """True while something that was read can be handed out."""
        return bool(self._ready) and not self.draining

    def busy(self) -> list[str]:
        """Parked keys whose head is not to be begun now."""
        keys = [*(head.key for head in self._heads.values()), *(ended.key for ended in self._ended)]
        return keys + [key for key in self._out if key in self.parked]

    def begin(self, heads: Iterable[Head]) -> list[Claim]:
        """Hand out the heads of parked keys."""
        claims: list[Claim] = []
        for head in heads:
            self._heads[head.claim.stored.position.offset] = head
            self.parked.add(head.key)  # a person may have parked it: a replayed dead letter is one
            claims.append(head.claim)
        return claims

    def holds(self, offset: str) -> bool:
        """True while an event is handed out and not settled."""
        slot = self._slots.get(offset)
        return offset in self._heads or (slot is not None and slot.phase is Phase.OUT)

    def held(self) -> list[Position]:
        """All that is handed out and not settled."""
        offsets = [slot.offset for slot in self._slots.values() if slot.phase is Phase.OUT]
        return [Position(self.partition, offset) for offset in (*offsets, *self._heads)]

    def at_rest(self) -> bool:
        """True when nothing is handed out, and nothing waits for a commit."""
        return not (self._out or self._heads or self._ended or self._sending or self._waiting_effects)

    # Settling.

    def settle(self, settlement: Settlement) -> bool:
        """Take in an outcome. False when the event is not ours to settle; a repeat of what waits for a commit is True."""
        offset, outcome, outputs = settlement.position.offset, settlement.outcome, settlement.outputs
        head = self._heads.pop(offset, None)
        if head is not None:
            self._ended.append(_end_of_head(head, outcome, outputs))
            return True
        slot = self._slots.get(offset)
        if slot is None or slot.phase is Phase.READY or slot.phase is Phase.COVERED:
            return any(ended.offset == offset and not ended.given_back for ended in self._ended)
        if slot.phase is Phase.OUT:
            self._settle(slot, outcome, outputs)
        return True

    def bury_later(self, at_ms: int) -> None:
        """There is no room for dead letters: their events wait, and their keys with them."""
        for slot in self._slots.values():
            if slot.phase is Phase.SETTLED and any(isinstance(effect, Bury) for effect in slot.effects):
                claim = slot.claim
                slot.effects = (Park(slot.key, claim.stored, at_ms, claim.attempt - 1, claim.postponed),)
                self._park(slot.key, at_ms)
        for index, ended in enumerate(self._ended):
            for effect in ended.effects:
                if isinstance(effect, Bury):
                    postponed = ended.head.claim.postponed
                    delay = Delay(ended.key, ended.offset, at_ms, effect.attempts - 1, postponed)
                    self._ended[index] = _Ended(ended.head, (delay,))
        self._sending = None

    def give_back(self) -> None:
        """Take back all that is handed out, as if it had never been."""
        for slot in self._slots.values():
            if slot.phase is Phase.OUT:
                slot.phase = Phase.READY
        self._ready = deque(slot for slot in self._slots.values() if slot.phase is Phase.READY)
        self._out.clear()
        for offset, head in self._heads.items():
            claim = head.claim
            delay = Delay(head.key, offset, 0, claim.attempt - 1, claim.postponed)
            self._ended.append(_Ended(head, (delay,), given_back=True))
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
        if self.catching_up:
            return None
        portion = Portion(room=room, alone=alone)
        passed = list(takewhile(lambda slot: _coverable(slot, portion), self._slots.values()))
        covered = [slot for slot in passed if slot.phase is Phase.SETTLED]
        heads = [ended for ended in self._ended if portion.takes(ended.effects)]
        w = passed[-1].offset if passed else self.w
        h, opened = self._still_ahead(w, passed)
        if left := self._uncovered - len(covered):
            h, opened, ahead = _ahead(islice(self._slots.values(), len(passed), None), left, h, portion)
            covered += ahead
        if not (passed or heads or covered):
            return None
        ends: list[Slot | _Ended] = [*covered, *heads]
        commit = Commit(
            self.partition,
            self.epoch,
            self._seq + 1,
            w,
            None if self._ordinal is None else self._ordinal + len(passed),
            h,
            opened,
            [effect for end in ends for effect in end.effects],
            sum(end.handled for end in ends),
            sum(end.retried for end in ends),
            [slot.offset for slot in covered if slot.claim.suspect],
            portion.events > 1,
        )
        self._sending = _Sending(commit, passed, covered, heads)
        return commit

    def answered(self, answer: Committed) -> None:
        """Take in the answer to the last commit; all but LOST, which is the end of this window."""
        sending, self._sending = self._sending, None
        if sending is None or answer.state is not State.STORED:
            return
        commit = sending.commit
        self._seq, self.w, self._ordinal = commit.seq, commit.w, commit.ordinal
        self.h, self._open, self.events_parked = commit.h, commit.open, answer.events_parked
        self._uncovered -= len(sending.covered)
        for slot in sending.covered:
            slot.phase = Phase.COVERED
            self._waiting_effects -= bool(slot.effects)
            slot.effects = ()
        for slot in sending.passed:
            del self._slots[slot.offset]
        stored = {id(ended) for ended in sending.heads}
        self._ended = [ended for ended in self._ended if id(ended) not in stored]
        self._joined(commit.effects)
        for key in answer.emptied:
            if not self._joining[key]:
                self._unpark(key)
        if any(isinstance(effect, Pop) and effect.key not in answer.emptied for effect in commit.effects):
            self.due_ms = 0.0

    # Below: how.

    def _inherit(self, slot: Slot) -> None:
        """An event that the last owner may have settled, or may have been killed by."""
        grant, offset = self._grant, slot.offset
        self._number += 1
        if grant.h and offset not in grant.open and after(grant.h, offset, or_equal=True):
            slot.phase = Phase.COVERED
            return
        seen = self._number <= self._size and grant.last and after(grant.last, offset, or_equal=True)
        if seen and not grant.clean:
            crashes = grant.notes.get(offset, 0)
            slot.claim = replace(slot.claim, attempt=1 + crashes, suspect=1 + crashes)
        self._ready.append(slot)

    def _settle(self, slot: Slot, outcome: Outcome, outputs: Sequence[Output]) -> None:
        claim, key = slot.claim, slot.key
        slot.phase = Phase.SETTLED
        self._uncovered += 1
        match outcome:
            case Done():
                slot.handled = True
                slot.effects = outputs
            case Dead(reason=reason, error=error):
                slot.effects = (*outputs, Bury(claim.stored, reason, error, claim.attempt))
            case Later(at_ms=at_ms, error=error, counted=counted):
                attempts, postponed = claim.attempt - (not counted), claim.postponed + (not counted)
                slot.effects = (Park(key, claim.stored, at_ms, attempts, postponed, error),)
                slot.retried = counted
                self._park(key, at_ms)
        self._waiting_effects += bool(slot.effects)
        left = self._out[key] - 1
        if left:
            self._out[key] = left
        else:
            del self._out[key]
            if key in self._behind:
                self._flush(key)

    def _park(self, key: str, due_ms: float) -> None:
        self.parked.add(key)
        self._joining[key] += 1
        self.due_ms = min(self.due_ms, due_ms)

    def _put_behind(self, slot: Slot) -> None:
        slot.phase = Phase.BEHIND
        self._behind.setdefault(slot.key, deque()).append(slot)
        if slot.key not in self._out:
            self._flush(slot.key)

    def _flush(self, key: str) -> None:
        """All before them are settled: set those that wait behind aside, or let them go on."""
        slots = self._behind.pop(key)
        if key not in self.parked:
            for slot in reversed(slots):
                slot.phase = Phase.READY
                self._ready.appendleft(slot)
            return
        for slot in slots:
            slot.phase = Phase.SETTLED
            slot.effects = (Park(key, slot.claim.stored),)
            self._uncovered += 1
            self._waiting_effects += 1
            self._joining[key] += 1

    def _unpark(self, key: str) -> None:
        self.parked.discard(key)
        if key in self._behind and key not in self._out:
            self._flush(key)

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


def _ahead(slots: Iterable[Slot], left: int, before: str, portion: Portion) -> tuple[str, Sequence[str], list[Slot]]:
    """`h`, `open`, and the settled events that they cover; `left` are settled, and `h` stays no less than `before`."""
    h, opened, covered = "", 0, list[Slot]()
    unsettled: list[str] = []
    # Of these keys nothing goes past an event that stays open, or a crash would turn the two around.
    keys = set[str]()
    for slot in slots:
        if slot.phase is not Phase.COVERED and (slot.key in keys or not _coverable(slot, portion)):
            left -= slot.phase is Phase.SETTLED
            unsettled.append(slot.offset)
            keys.add(slot.key)
        else:
            h, opened = slot.offset, len(unsettled)
            if slot.phase is Phase.SETTLED:
                left -= 1
                covered.append(slot)
            if slot.offset == before:
                before = ""
        if not (left or before):  # nothing that follows is settled
            break
    return h, unsettled[:opened], covered


def _coverable(slot: Slot, portion: Portion) -> bool:
    return slot.phase is Phase.COVERED or (slot.phase is Phase.SETTLED and portion.takes(slot.effects))


def _end_of_head(head: Head, outcome: Outcome, outputs: Sequence[Output]) -> _Ended:
    key, claim = head.key, head.claim
    offset = claim.stored.position.offset
    match outcome:
        case Done():
            return _Ended(head, (*outputs, Pop(key, offset)), handled=True)
        case Dead(reason=reason, error=error):
            buried = Bury(claim.stored, reason, error, claim.attempt)
            return _Ended(head, (*outputs, buried, Pop(key, offset)))
        case Later(at_ms=at_ms, error=error, counted=counted):
            attempts, postponed = claim.attempt - (not counted), claim.postponed + (not counted)
            delay = Delay(key, offset, at_ms, attempts, postponed, error)
            return _Ended(head, (delay,), retried=counted)
