"""A partition's share of an ordered group of the memory broker: who may work on it, how far it is, and what is parked.

What is gone from the stream before it was settled is passed over and counted. What the owner had read by then it has whole,
and goes on with; should it lose the partition, the rest of that is counted when the next one takes over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from millstream.brokers.base import Stored
from millstream.brokers.ledger import HELD_MS, Committed, Delay, State
from millstream.brokers.memory.log import ordinal
from millstream.units import MAX_ERROR_CHARS

NEVER = float("inf")


class Parked(NamedTuple):
    """An event that is set aside; of a pack, what is left of it."""

    stored: Stored
    left: Sequence[int] = ()


@dataclass(slots=True, eq=False)
class Queue:
    """What is parked of one key. The figures are those of its first event."""

    due_ms: float
    since_ms: int
    events: deque[Parked] = field(default_factory=deque)
    attempts: int = 0
    postponed: int = 0
    crashes: int = 0
    started: bool = False
    error: str = ""

    def next(self) -> None:
        """The head is finished."""
        self.events.popleft()
        self.anew()

    def anew(self) -> None:
        """The head is due, and was never tried."""
        self.attempts = self.postponed = self.crashes = 0
        self.started, self.error, self.due_ms = False, "", 0.0

    def shown_due_ms(self) -> int | None:
        """For people: when the head is tried; None while it waits for one of them."""
        return None if self.due_ms >= HELD_MS else int(self.due_ms)

    def ended(self, again: Delay) -> None:
        """The head has come to an end that is not its last: it did not kill its process."""
        self.due_ms, self.attempts, self.postponed = again.due_ms, again.attempts, again.postponed
        self.crashes, self.started, self.error = 0, False, again.error[:MAX_ERROR_CHARS]
        self.events[0] = self.events[0]._replace(left=again.left)


@dataclass(slots=True, eq=False)
class Note:
    """Of an event that a crash left behind."""

    crashes: int = 0
    started: bool = False


@dataclass(slots=True, eq=False)
class Part:
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
    read: int = 0
    """How many events that there ever were its owner has read, and so has whole."""
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """Beyond `w`: behind so many events and up to so many, all that was not settled is gone, and was counted as lost."""
    parked: dict[str, Queue] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    answer: Committed = field(default_factory=lambda: Committed(State.STORED))

    def due_ms(self) -> float:
        """When the first of its keys is tried."""
        return min((queue.due_ms for queue in self.parked.values()), default=NEVER)

    def events_parked(self) -> int:
        """How many events are parked of all its keys."""
        return sum(len(queue.events) for queue in self.parked.values())

    def covers(self, number: int) -> bool:
        """True for what is settled, as far as that is stored."""
        return number <= max(self.w, int(self.h or 0)) and str(number) not in self.open

    def lose(self, gone: int) -> int:
        """Pass over what is gone from the stream, was not settled, and nobody has; how many events are newly lost."""
        if self.owner:
            begin = max(self.w, self.read, *(until for _, until in self.gaps))
            if begin < gone:
                self.gaps.append((begin, gone))
            return self._unsettled(begin, gone)
        lost, begin = 0, self.w
        for since, until in [*self.gaps, (gone, gone)]:
            lost += self._unsettled(begin, min(since, gone))
            begin = max(begin, until)
        if self.w < gone:
            self.w, self.gaps = gone, []
            self.h = self.h if int(self.h or 0) > gone else ""
            self.open = frozenset(offset for offset in self.open if int(offset) > gone)
        return lost

    def missing(self) -> int:
        """How many events behind the mark are gone, and counted as lost."""
        return sum(max(0, until - max(since, self.w)) for since, until in self.gaps)

    def fence(self) -> None:
        """The lease is nobody's; whoever had it finds that out. Nothing crashed."""
        self.owner, self.want, self.next, self.clean = "", "", "", True
        self.epoch += 1

    def seek(self, w: int) -> None:
        """Go on behind so many events. What is parked behind them comes again, and is parked no more."""
        self.fence()
        self.w, self.h, self.open, self.gaps = w, "", frozenset(), []
        self.notes.clear()
        for key, queue in list(self.parked.items()):
            head = queue.events[0]
            queue.events = deque(event for event in queue.events if ordinal(event.stored.position) <= w)
            queue.started = False
            if not queue.events:
                del self.parked[key]
            elif queue.events[0] is not head:
                queue.anew()

    def _unsettled(self, begin: int, end: int) -> int:
        return sum(not self.covers(number) for number in range(begin + 1, end + 1))
