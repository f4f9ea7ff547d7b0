"""Turns: which partitions one read looks at, and how many events it asks of each.

A read of everything is right where little happens, and wrong behind a backlog: of 256 partitions it brings 256 pages, which
fill the memory; and a few events of each make as many commits, which cost more than the events. So a partition of which
there may be more is *busy*, and busy ones are read in turn, a few at a time, a page of each. Quiet ones are looked at
beside, some in each read, so that none of 256 waits for longer than 16 reads. All are read at once, and waited for, when
none is busy.

So a read brings five hundred events at most, however many partitions there are: of two thousand, those that are handled last
are out of the processor's cache by then, and each event costs a quarter more. On 256 partitions it costs about a third more
than on 8, since there are fewer of each partition to a commit.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_BUSY = 2
MAX_QUIET = 16
PAGE = 256  # events of one partition: a commit costs as much as ten of them, a handler may hold up a page for long
MAX_EVENTS = MAX_BUSY * PAGE


class Turns:
    """Those of one life of a member."""

    def __init__(self) -> None:
        self._reads = 0
        self._read_at: dict[int, int] = {}
        self._quiet: set[int] = set()

    def acquired(self, partition: int) -> None:
        """It is ours from now on, and nobody knows how much there is."""
        self._quiet.discard(partition)

    def next(self, partitions: Iterable[int], most: int = MAX_EVENTS) -> tuple[list[int], int]:
        """Of these, those whose turn it is, and how many of them are busy; with none all of them may be waited for.

        There are fewer where events are so large that a read is to bring no more than so many.
        """
        waiting = sorted(partitions, key=lambda partition: self._read_at.get(partition, 0))
        busy = [partition for partition in waiting if partition not in self._quiet][: min(MAX_BUSY, most)]
        quiet = [partition for partition in waiting if partition in self._quiet]
        return busy + (quiet[: min(MAX_QUIET, most)] if busy else quiet), len(busy)

    def read(self, partitions: Iterable[int], full: Iterable[int]) -> None:
        """These were read, and of the full ones there may be more."""
        self._reads += 1
        partitions = list(partitions)
        self._read_at.update(dict.fromkeys(partitions, self._reads))
        self._quiet.update(partitions)
        self._quiet.difference_update(full)
