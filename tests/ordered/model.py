"""One partition, its ledger and its worker, moved by chance: what must hold at every step, and at the end.

The ledger checks each commit against what was stored before: what is settled stays settled, what an event leaves behind
comes with the commit that covers it and never again, and the queue of a parked key is in the order of the log. The worker
runs one event of a key at a time; when one must wait, it puts back what it has of that key, sooner or later. It checks
that the events of a key come to their first end in the order of the log, and that a commit tells all that is settled. In an
unruly world the broker is full at times, and what is put back comes in any order.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from millstream.brokers.base import Claim, Dead, Done, Later, Outcome, Output, Settlement, Stored
from millstream.brokers.ledger import (
    NEEDS_ROOM,
    Bury,
    Commit,
    Committed,
    Delay,
    Effect,
    Grant,
    Head,
    Park,
    Pop,
    State,
)
from millstream.brokers.window import Window, keyless
from tests.ordered.helpers import PUT_BACK, event, output

KEYS = "aaabc-"
SIZE = 6


class ModelLedger:
    """What is durable."""

    def __init__(self) -> None:
        self.log: list[Stored] = []
        self.w = 0
        self.h = 0
        self.open: frozenset[str] = frozenset()
        self.parked: dict[str, deque[Stored]] = {}
        self.ended: set[str] = set()
        """Events whose end was stored: their output, or their dead letter."""
        self.seq = 0
        self._epoch = 0
        self._answer = Committed(State.STORED)

    def grant(self, *, clean: bool) -> Grant:
        self._epoch, self.seq = self._epoch + 1, 0
        return Grant(
            0,
            self._epoch,
            str(self.w or ""),
            self.w,
            str(self.h or ""),
            self.open,
            clean,
            str(len(self.log) or ""),
            frozenset(self.parked),
        )

    def settled(self) -> set[str]:
        return {str(n) for n in range(1, max(self.w, self.h) + 1) if n <= self.w or str(n) not in self.open}

    def commit(self, commit: Commit) -> Committed:
        assert commit.epoch == self._epoch
        if commit.seq == self.seq:
            return self._answer
        assert commit.seq == self.seq + 1
        before = self.settled()
        self.seq, self.w, self.h, self.open = commit.seq, int(commit.w or 0), int(commit.h or 0), frozenset(commit.open)
        assert commit.ordinal == self.w
        now = self.settled()
        assert before <= now, f"settled no more: {before - now}"
        for effect in commit.effects:
            self._apply(effect, now - before)
        fresh = [int(effect.stored.position.offset) for effect in commit.effects if isinstance(effect, Park)]
        assert fresh == sorted(fresh)
        popped = {effect.key for effect in commit.effects if isinstance(effect, Pop)}
        parked = sum(map(len, self.parked.values()))
        self._answer = Committed(State.STORED, frozenset(popped - self.parked.keys()), parked)
        return self._answer

    def heads(self, busy: Sequence[str], limit: int) -> list[Head]:
        due = [key for key in self.parked if key not in busy]
        return [Head(key, Claim.of(self.parked[key][0], 2)) for key in due[:limit]]

    def _apply(self, effect: Effect, covered: set[str]) -> None:
        match effect:
            case Output(record=record):
                self._end(record.id)
            case Bury(stored=stored):
                self._end(stored.position.offset)
            case Park(key=key, stored=stored):
                assert stored.position.offset in covered, "set aside, and not covered by the same commit"
                queue = self.parked.setdefault(key, deque())
                assert not queue or int(queue[-1].position.offset) < int(stored.position.offset), "turned around"
                queue.append(stored)
            case Pop(key=key, offset=offset):
                assert self.parked[key].popleft().position.offset == offset
                if not self.parked[key]:
                    del self.parked[key]
            case Delay(key=key, offset=offset):
                assert self.parked[key][0].position.offset == offset

    def _end(self, offset: str) -> None:
        assert offset not in self.ended, f"{offset} had its effect before"
        self.ended.add(offset)


class World:
    """One run."""

    def __init__(self, chance: random.Random, *, unruly: bool = False) -> None:
        self.ledger = ModelLedger()
        self._chance = chance
        self._unruly = unruly
        self._window = Window(self.ledger.grant(clean=True), SIZE)
        self._in_hand: dict[str, deque[Claim]] = defaultdict(deque)
        self._put_back: list[Claim] = []
        self._last_end: dict[str, int] = defaultdict(int)
        self._completed: set[str] = set()
        self._settled: set[str] = set()
        """What this owner has settled."""
        self._under_way = False
        self._room = True

    def run(self, steps: int) -> None:
        """So many things happen."""
        kinds: dict[Callable[[], None], int] = {
            self._publish: 3,
            self._read: 3,
            self._hand_out: 4,
            self._heads: 4,
            self._work: 8,
            self._give_up: 3,
            self._send: 3,
            self._send_and_hear_nothing: 2,
            self._refuse: 2,
            self._crash: 1,
            self._hand_over: 1,
        }
        for _ in range(steps):
            (happen,) = self._chance.choices(list(kinds), list(kinds.values()))
            happen()

    def calm_down(self) -> None:
        """All that is left is handled, without any faults; then nothing is missing."""
        log = self.ledger.log
        for _ in range(4 * len(log) + 4):
            self._room = True
            for step in (self._read, self._hand_out, self._heads, self._give_up, self._send):
                step()
            for key in list(self._in_hand):
                self._end_one(key, Done())
        assert self._completed == {stored.position.offset for stored in log}
        assert self.ledger.w == len(log) and not self.ledger.parked and self._window.at_rest()
        assert not self._window.parked

    def _publish(self) -> None:
        key = self._chance.choice(KEYS)
        self.ledger.log.append(event(len(self.ledger.log) + 1, None if key == "-" else key))

    def _read(self) -> None:
        cursor = self._window.cursor
        begin, room = int(cursor.after or 0), 3 if self._window.catching_up else min(3, max(0, cursor.room))
        self._window.put([Claim.of(stored, 1) for stored in self.ledger.log[begin : begin + room]])

    def _hand_out(self) -> None:
        self._take(self._window.hand_out(self._chance.randint(1, 4)))

    def _heads(self) -> None:
        self._take(self._window.begin(self.ledger.heads(self._window.busy(), self._chance.randint(1, 2))))

    def _take(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            offset = claim.position.offset
            assert self._window.holds(offset)
            self._in_hand[claim.record.key or keyless(offset)].append(claim)

    def _work(self) -> None:
        keys = [key for key, queue in self._in_hand.items() if queue]
        if keys:
            outcomes = Done(), Done(), Done(), Dead("failed"), Later(0, "busy"), Later(0, "soon", counted=False)
            self._end_one(self._chance.choice(keys), self._chance.choice(outcomes))

    def _end_one(self, key: str, outcome: Outcome) -> None:
        queue = self._in_hand[key]
        if not queue:
            return
        claim = queue.popleft()
        offset = claim.position.offset
        if isinstance(outcome, Later):
            self._put_back += queue
            queue.clear()
        elif offset not in self._completed:
            assert self._last_end[key] < int(offset), f"{offset} of {key!r} came behind {self._last_end[key]}"
            self._last_end[key] = int(offset)
            self._completed.add(offset)
        outputs = [output(int(offset))] if isinstance(outcome, Done) and self._chance.random() < 0.5 else []
        self._settle(Settlement(claim.position, outcome, outputs))

    def _give_up(self) -> None:
        if self._put_back:
            index = self._chance.randrange(len(self._put_back)) if self._unruly else 0
            self._settle(Settlement(self._put_back.pop(index).stored.position, PUT_BACK))

    def _settle(self, settlement: Settlement) -> None:
        if settlement == Settlement(settlement.position, Done()) and self._chance.random() < 0.5:
            assert self._window.finish([settlement.position.offset]) == []
        else:
            assert self._window.settle(settlement)
        self._settled.add(settlement.position.offset)
        assert not self._window.holds(settlement.position.offset)

    def _send(self) -> None:
        commit = self._window.commit(room=self._room)
        answer = None if commit is None else self.ledger.commit(commit)
        if self._room and not self._under_way:
            self._check_all_is_told()
        if commit is not None and answer is not None:
            assert self._window.commit(room=not self._room) is commit
            self._room, self._under_way = True, False
            if self._chance.random() < 0.5:
                self._work()  # an outcome arrives before the answer
                self._hand_out()
            self._window.answered(answer)

    def _check_all_is_told(self) -> None:
        """What is settled is durable, of each key up to its first event that is not."""
        durable, waiting = self.ledger.settled(), set[str]()
        for stored in self.ledger.log:
            offset, key = stored.position.offset, stored.record.key
            if offset not in durable:
                assert offset not in self._settled or key in waiting, (
                    f"{offset} is settled, and the ledger does not know"
                )
                waiting.add(key or keyless(offset))

    def _send_and_hear_nothing(self) -> None:
        commit = self._window.commit(room=self._room)
        if commit is not None:
            self.ledger.commit(commit)
            self._under_way = True

    def _refuse(self) -> None:
        commit = self._window.commit()
        self._under_way = commit is not None
        if commit is None or commit.seq == self.ledger.seq:
            return
        if any(isinstance(effect, Bury) for effect in commit.effects) and self._chance.random() < 0.5:
            self._window.answered(Committed(State.DEAD_FULL))
            self._under_way = False
            self._window.bury_later(0)
        elif self._unruly and any(isinstance(effect, NEEDS_ROOM) for effect in commit.effects):
            self._window.answered(Committed(State.FULL))
            self._room = self._under_way = False

    def _crash(self) -> None:
        self._begin_anew(clean=False)

    def _hand_over(self) -> None:
        self._window.draining = True
        self._window.give_back()
        while (commit := self._window.commit()) is not None:
            self._window.answered(self.ledger.commit(commit))
        self._begin_anew(clean=True)

    def _begin_anew(self, *, clean: bool) -> None:
        self._in_hand.clear()
        self._put_back.clear()
        self._settled.clear()
        self._under_way = False
        self._window = Window(self.ledger.grant(clean=clean), SIZE)
        while self._window.catching_up:
            self._read()
