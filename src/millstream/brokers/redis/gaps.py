"""Events that were gone before their owner read them, in the order of keys.

XTRIM leaves no trace but the numbers: a log counts the entries that were ever added, so those before its first one are told
by `entries-added` less its length. Who counts what it reads knows how many it never saw: the first entry lies ahead, and
more are gone than were read; or the end is reached, and more were added than were read. What is in memory is not lost.

A gap is counted as lost when it is found. Progress passes it later, and only then its events count as settled, else the lag
would be too large for ever. Until then the gap stands in the lease, so that the next owner does not count it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hiredis import ReplyError
from msgspec.structs import replace

from millstream.brokers.ledger import Commit, Cursor, Grant
from millstream.brokers.redis.link import Link
from millstream.brokers.redis.members import SWEEP_S, Place
from millstream.brokers.redis.scripts import scripts
from millstream.brokers.window import after
from millstream.clock import Clock
from millstream.telemetry import logger

_BEFORE_ALL = "0-0"


class Gap(NamedTuple):
    """Events that are gone: behind which offset, and how many were ever added before and after them."""

    offset: str
    begin: int
    end: int


class Gaps:
    """All that a member has found in its partitions. Redis 6.2 counts nothing: then there are none."""

    def __init__(self, place: Place, name: str, clock: Clock, lease_s: float) -> None:
        self._place = place
        self._name = name
        self._clock = clock
        self._period_s = min(lease_s / 2, SWEEP_S)
        self._look_at = 0.0
        self._counts: dict[int, Count] = {}

    def begin(self, grant: Grant, gaps: bytes) -> None:
        """A partition is ours; these gaps were found by its last owner."""
        self._counts[grant.partition] = Count(grant, gaps.decode())

    def passed(self, partition: int, cursor: Cursor, last: str, count: int) -> None:
        """So many events were read behind the cursor."""
        if partition in self._counts:
            self._counts[partition].passed(cursor, last, count)

    def counted(self, commit: Commit) -> Commit:
        """A commit whose ordinal counts what was never read."""
        count = self._counts.get(commit.partition)
        missing = count.missing(commit.w or _BEFORE_ALL) if count is not None else 0
        if not missing or commit.ordinal is None:
            return commit
        return replace(commit, ordinal=commit.ordinal + missing)

    @property
    def due(self) -> bool:
        """True when the next look is due: then nothing is to be read before it."""
        return self._clock.monotonic() >= self._look_at

    async def look(self, link: Link, partitions: Iterable[int]) -> None:
        """Now and then, while no read of these is under way, find out what is gone, and count it."""
        if not self.due:
            return
        self._look_at = self._clock.monotonic() + self._period_s
        looked = [partition for partition in partitions if partition in self._counts]
        ends = await link.run_each(scripts["ends"], [((self._place.at[partition].log,), ()) for partition in looked])
        for partition, reply in zip(looked, ends, strict=True):
            if isinstance(reply, ReplyError):
                raise link.failure(reply, "script ends")
            gap = self._counts[partition].look(*reply) if reply else None
            if gap is not None:
                await self._lose(link, partition, gap)

    async def _lose(self, link: Link, partition: int, gap: Gap) -> None:
        at, count = self._place.at[partition], self._counts[partition]
        who = self._place.group, self._name, count.epoch
        if await link.run(scripts["lose"], (at.log, at.lease, at.stats), (*who, *gap)) != b"OK":
            return
        count.add(gap)
        where = self._place.group, self._place.stream, gap.end - gap.begin, partition
        logger.error("group %s of %s: %d events of partition %d were trimmed away before they were read", *where)


class Count:
    """What was read of one partition, from its grant on."""

    def __init__(self, grant: Grant, gaps: str) -> None:
        self.epoch = grant.epoch
        self._after = grant.w or _BEFORE_ALL
        self._ordinal = grant.ordinal
        self._gaps = [gap for gap in _parsed(gaps) if after(gap.offset, self._after)]

    def passed(self, cursor: Cursor, last: str, count: int) -> None:
        """So many events were read behind the cursor."""
        if (cursor.epoch, cursor.after or _BEFORE_ALL) != (self.epoch, self._after):
            self._ordinal = None  # what was read in between is not known, so nothing can be told any more
        if self._ordinal is not None:
            self._ordinal += count + self.missing(last) - self.missing(self._after)
        self._after = last

    def look(self, length: int, added: int | None, first: bytes, last: bytes) -> Gap | None:
        """What is newly gone, as the log is now: see `ends.lua`."""
        if added is None:
            return None
        at_end = last.decode() == self._after
        if self._ordinal is None:  # exact again at the end
            self._ordinal = added if at_end else None
        elif not first or after(first.decode(), self._after):
            return self._gap(added - length)
        elif at_end:
            return self._gap(added)
        return None

    def add(self, gap: Gap) -> None:
        """This one is counted."""
        self._gaps.append(gap)
        self._ordinal = gap.end

    def missing(self, offset: str) -> int:
        """How many events that were never read lie before what follows this one."""
        return sum(gap.end - gap.begin for gap in self._gaps if after(offset, gap.offset, or_equal=True))

    def _gap(self, end: int) -> Gap | None:
        return Gap(self._after, self._ordinal, end) if self._ordinal is not None and end > self._ordinal else None


def _parsed(gaps: str) -> Iterator[Gap]:
    for words in gaps.split():
        offset, begin, end = words.split(":")
        yield Gap(offset, int(begin), int(end))
