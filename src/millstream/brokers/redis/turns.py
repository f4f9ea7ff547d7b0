"""Turns: which partitions one read looks at, and how many events it asks of each.

A read of everything is right where little happens, and wrong behind a backlog: of 256 partitions it brings 256 pages, which
fill the memory; and a few events of each make as many commits, which cost more than the events. So a partition of which
there may be more is *busy*, and busy ones are read in turn, a few at a time, a page of each. Quiet ones are looked at
beside, some in each read, so that none of 256 waits for longer than 16 reads. All are read at once, and waited for, when
none is busy.

So a read brings five hundred events at most, however many partitions there are: of two thousand, those that are handled last
are out of the processor's cache by then, and each event costs a quarter more. On 256 partitions it costs a tenth to a
fifth more than on 8, since there are fewer of each partition to a commit.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable
from itertools import islice

MAX_BUSY = 2
MAX_QUIET = 16
PAGE = 256  # events of one partition: a commit costs as much as ten of them, a handler may hold up a page for long
MAX_EVENTS = MAX_BUSY * PAGE


class Turns:
    """Those of one life of a member. Busy and quiet partitions stand in two lines, and one that was read goes to the end."""

    def __init__(self) -> None:
        self._busy: dict[int, None] = {}
        self._quiet: dict[int, None] = {}

    def acquired(self, partition: int) -> None:
        """It is ours from now on, and nobody knows how much there is."""
        self._quiet.pop(partition, None)
        self._busy[partition] = None

    def next(self, partitions: Collection[int], most: int = MAX_EVENTS) -> tuple[list[int], int]:
        """Of these, those whose turn it is, and how many of them are busy; with none all of them may be waited for.

        There are fewer where events are so large that a read is to bring no more than so many.
        """
        chosen, busy = self.busy(partitions, most)
        return (chosen, busy) if busy else (list(partitions), 0)

    def busy(self, partitions: Container[int], most: int, without: Collection[int] = ()) -> tuple[list[int], int]:
        """The same, and none at all when none is busy."""
        busy = (partition for partition in self._busy if partition in partitions and partition not in without)
        chosen = list(islice(busy, min(MAX_BUSY, most)))
        if not chosen:
            return [], 0
        quiet = (partition for partition in self._quiet if partition in partitions and partition not in without)
        return [*chosen, *islice(quiet, min(MAX_QUIET, most))], len(chosen)

    def read(self, partitions: Iterable[int], full: Collection[int]) -> None:
        """These were read, and of the full ones there may be more."""
        for partition in partitions:
            self._busy.pop(partition, None)
            self._quiet.pop(partition, None)
            (self._busy if partition in full else self._quiet)[partition] = None
