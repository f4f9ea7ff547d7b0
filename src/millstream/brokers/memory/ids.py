"""The ids that a partition of the memory broker remembers, each for a window of time."""

from __future__ import annotations

from itertools import takewhile
from typing import NamedTuple

from millstream.brokers.base import LATER, Position


class _Known(NamedTuple):
    position: Position
    since_ms: int


class Ids:
    """Where the first event with each id lies; the oldest ids first, since none is moved."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, id_: str) -> Position | None:
        """Where the event with this id lies; None when it is not remembered."""
        known = self._known.get(id_)
        return known.position if known else None

    def add(self, id_: str, position: Position, now_ms: int) -> None:
        """Remember an id that was not known."""
        self._known[id_] = _Known(position, now_ms)

    def came(self, id_: str, position: Position) -> None:
        """The event that was kept aside lies here now; its id may have been forgotten, and be another one's."""
        known = self._known.get(id_)
        if known and known.position.offset == LATER:
            self._known[id_] = _Known(position, known.since_ms)

    def forget(self, until_ms: int) -> None:
        """Forget what is remembered since then, or for longer."""
        old = list(takewhile(lambda item: item[1].since_ms <= until_ms, self._known.items()))
        for id_, _ in old:
            del self._known[id_]
