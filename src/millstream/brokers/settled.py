"""Settled: the events of one window that have come to their end, and what a commit covers of them. See `window.py`.

Nearly all leave nothing behind but that they are done, so an event is one offset in a set here, and what a commit passes is
told by walking along the window once. Where a slow event holds up `w`, a commit looks on behind it, no further than the last
one that is settled, for what `h` and `open` can tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from itertools import takewhile
from typing import NamedTuple

from millstream.brokers.base import Claim
from millstream.brokers.ledger import Effect
from millstream.brokers.portion import Portion


class End(NamedTuple):
    """How an event ended with which something is stored."""

    effects: Sequence[Effect]
    handled: bool = True
    """False when it is dead, or set aside."""
    retried: bool = False


class Settled:
    """By offset, the events that are settled and that `w` has not passed."""

    def __init__(self) -> None:
        self.offsets: set[str] = set()
        self.covered: set[str] = set()
        """Those of them that are stored as settled: they lie ahead of one that is not."""
        self.ends: dict[str, End] = {}
        """Of those that are not covered, the ends of those with which something is stored."""

    @property
    def uncovered(self) -> int:
        """How many wait for a commit."""
        return len(self.offsets) - len(self.covered)

    def add(self, offset: str, end: End) -> None:
        """An event ended, and something is to be stored with it."""
        self.offsets.add(offset)
        self.ends[offset] = end

    def inherit(self, offset: str) -> None:
        """The last owner has stored it as settled."""
        self.offsets.add(offset)
        self.covered.add(offset)

    def passed(self, window: Iterable[str], portion: Portion) -> list[str]:
        """The first ones, up to one that is not settled, or that the portion does not take."""
        passed = list(takewhile(self.offsets.__contains__, window))
        if self.ends:
            for count, offset in enumerate(passed):
                if offset in self.ends and not portion.takes(self.ends[offset].effects):
                    return passed[:count]
        return passed

    def ahead(
        self, window: Iterable[tuple[str, Claim]], left: int, before: str, portion: Portion
    ) -> tuple[str, Sequence[str], list[str]]:
        """`h`, `open`, and the settled events that they cover; `left` are settled, and `h` stays no less than `before`."""
        h, opened, covered = "", 0, list[str]()
        unsettled: list[str] = []
        # Of these keys nothing goes past an event that stays open, or a crash would turn the two around.
        keys = set[str | None]()
        for offset, claim in window:
            goes = offset in self.covered
            if not goes and offset in self.offsets:
                left -= 1
                if goes := self._goes(offset, claim.record.key, keys, portion):
                    covered.append(offset)
            if goes:
                h, opened = offset, len(unsettled)
                if offset == before:
                    before = ""
            else:
                unsettled.append(offset)
                keys.add(claim.record.key)
            if not (left or before):  # nothing that follows is settled
                break
        return h, unsettled[:opened], covered

    def stored(self, passed: Sequence[str], ahead: Sequence[str]) -> None:
        """A commit that covers these is stored."""
        self.offsets.difference_update(passed)
        self.covered.difference_update(passed)
        self.covered.update(ahead)
        if self.ends:
            for offset in (*passed, *ahead):
                self.ends.pop(offset, None)

    def _goes(self, offset: str, key: str | None, waiting: Set[str | None], portion: Portion) -> bool:
        if key and key in waiting:
            return False
        return offset not in self.ends or portion.takes(self.ends[offset].effects)
