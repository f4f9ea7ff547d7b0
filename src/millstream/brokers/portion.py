"""The portion: how much of what needs room, outputs and dead letters, goes into one commit.

A ledger stores a commit in one step, and that holds up everybody else: a window of a thousand events, each with ten outputs,
is no single step. What follows from one event is never parted, however much it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from millstream.brokers.base import Output
from millstream.brokers.ledger import NEEDS_ROOM, Bury, Effect

MAX_LARGE = 200
MAX_LARGE_BYTES = 1_048_576


class Portion:
    """That of one commit. Past the first that it does not take, it takes no more; without `room`, none at all.

    With `alone`, one event is all: what has no room together may have it one by one.
    """

    def __init__(self, *, room: bool = True, alone: bool = False) -> None:
        self.events = 0
        """How many of those that it took need room."""
        self._open = room
        self._alone = alone
        self._count = self._size_bytes = 0

    def takes(self, effects: Sequence[Effect]) -> bool:
        """True when all that follows from one event goes in; it counts from now on."""
        large = [effect for effect in effects if isinstance(effect, NEEDS_ROOM)] if effects else ()
        if not large or not self._open:
            return not large
        self._count += len(large)
        self._size_bytes += sum(map(_size_bytes, large))
        within = self._count <= MAX_LARGE and self._size_bytes <= MAX_LARGE_BYTES
        self._open = not self.events or (within and not self._alone)
        self.events += self._open
        return self._open


def _size_bytes(effect: Bury | Output) -> int:
    record = effect.record if isinstance(effect, Output) else effect.stored.record
    return len(record.data) + len(record.headers)
