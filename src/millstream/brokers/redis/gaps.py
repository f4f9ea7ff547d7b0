"""Events that were trimmed away before their owner read them.

XTRIM leaves no trace but the numbers: a log counts the entries that were ever added, so those before its first one are told
by `entries-added` less its length. Who has counted what it read knows how many of them it never saw. Without this, the lag
that a commit stores would be too large for ever.
"""

from __future__ import annotations

from millstream.brokers.ledger import Cursor, Grant
from millstream.brokers.redis.progress import BEFORE_ALL
from millstream.brokers.window import after


class Gaps:
    """Of one partition, from its grant on. Redis 6.2 counts nothing: then there are none."""

    def __init__(self, grant: Grant) -> None:
        self._epoch = grant.epoch
        self._after = grant.w or BEFORE_ALL
        self._ordinal = grant.ordinal
        self._gaps: list[tuple[str, int]] = []

    def passed(self, cursor: Cursor, last: str, count: int) -> None:
        """So many events were read behind the cursor."""
        if (cursor.epoch, cursor.after or BEFORE_ALL) != (self._epoch, self._after):
            self._ordinal = None  # what was read in between is not known, so nothing can be told any more
        if self._ordinal is not None:
            self._ordinal += count
        self._after = last

    def look(self, added: int, length: int, first: str) -> int:
        """How many events are newly gone, as the log is now; `first` is empty where it has none."""
        removed = added - length
        if self._ordinal is None or removed <= self._ordinal or (first and not after(first, self._after)):
            return 0
        lost, self._ordinal = removed - self._ordinal, removed
        self._gaps.append((self._after, lost))
        return lost

    def before(self, w: str) -> int:
        """How many events that were never read lie before this one."""
        return sum(lost for offset, lost in self._gaps if after(w or BEFORE_ALL, offset))
