"""Pages: what one read of the logs brings, and what is read ahead of the next one.

    read ─► pages ─► one was full, and its window has room for more ─► the next XREAD leaves at once ─► its answer lies ready

A server takes about as long to gather a page as we take to handle it, and one of both would wait for the other. What
was read ahead counts only where it begins at the cursor that is asked for, in the same epoch: a partition that was lost,
drained, or read otherwise meanwhile drops it, and reads again. Nothing is claimed by reading, so nothing is lost with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from hiredis import ReplyError

from millstream.brokers.budget import Budget
from millstream.brokers.ledger import Cursor
from millstream.brokers.redis.link import BLOCK_S, Answers, broker_error, pack
from millstream.brokers.redis.members import Place
from millstream.brokers.redis.pair import Pair
from millstream.brokers.redis.progress import BEFORE_ALL
from millstream.brokers.redis.sizes import MAX_REPLY_BYTES, Sizes
from millstream.brokers.redis.turns import MAX_EVENTS, PAGE, Turns

Page: TypeAlias = Sequence[tuple[bytes, Sequence[bytes]]]
"""Ids and fields, as the server answers them."""


class _Ahead(NamedTuple):
    """A read that was sent before it was asked for."""

    cursors: Mapping[int, Cursor]
    most: int
    """Events of each."""
    answers: Answers


class Pages:
    """Those of one life of a member."""

    def __init__(self, place: Place, pair: Pair, budget: Budget) -> None:
        self._place = place
        self._pair = pair
        self._partition_of = {at.log: partition for partition, at in enumerate(place.at)}
        self._turns = Turns()
        self._sizes = Sizes()
        self._budget = budget
        self._ahead: _Ahead | None = None

    @property
    def under_way(self) -> bool:
        """True while something is read ahead."""
        return self._ahead is not None

    def acquired(self, partition: int) -> None:
        """It is ours from now on, and nobody knows how much there is."""
        self._turns.acquired(partition)

    def seen(self, largest_bytes: int) -> None:
        """The largest event of what was read is of so many bytes."""
        self._sizes.seen(largest_bytes)

    async def read(self, cursors: Mapping[int, Cursor], limit: int, wait_s: float) -> dict[int, Page]:
        """By partition what lies behind the cursors, as far as they have room; waits for the first one."""
        ahead, self._ahead = self._ahead, None
        pages = await self._take(ahead, cursors) if ahead is not None else {}
        return pages or await self._read(cursors, limit, wait_s)

    async def read_ahead(self, cursors: Mapping[int, Cursor], pages: Mapping[int, Page], limit: int) -> None:
        """Send the read that comes after these pages, where it need not wait for anything."""
        if self._sizes.unsure:
            return
        read = {partition: _behind(cursors[partition], page) for partition, page in pages.items()}
        filled = [partition for partition, cursor in read.items() if cursor.room <= 0]
        partitions, busy = self._turns.busy(cursors, self._most, filled)
        if busy:
            asked = {partition: read.get(partition) or cursors[partition] for partition in partitions}
            count = self._count(asked, busy, limit)
            self._ahead = _Ahead(asked, count, await self._pair.post(self._command(asked, count, 0)))

    async def _take(self, ahead: _Ahead, cursors: Mapping[int, Cursor]) -> dict[int, Page]:
        (found,) = await ahead.answers
        pages = self._pages(found, ahead.cursors, ahead.most)
        asked = {partition: (cursor.after, cursor.epoch) for partition, cursor in ahead.cursors.items()}
        return {
            partition: page[: cursor.room]
            for partition, page in pages.items()
            if (cursor := cursors.get(partition)) is not None and (cursor.after, cursor.epoch) == asked[partition]
        }

    async def _read(self, cursors: Mapping[int, Cursor], limit: int, wait_s: float) -> dict[int, Page]:
        partitions, busy = self._turns.next(cursors, self._most)
        asked = {partition: cursors[partition] for partition in partitions}
        count = self._count(asked, busy, limit)
        block_s = 0.0 if busy or self._pair.woken else min(wait_s, BLOCK_S)
        block_ms = math.ceil(block_s * 1000)
        while True:
            found = await self._pair.read(self._command(asked, count, block_ms), block_ms / 1000)
            pages = self._pages(found, asked, count)
            if not self._sizes.unsure or all(len(page) < count for page in pages.values()):
                return pages
            # It was small since nobody knew what would come: the same again, larger, or callers would get a few at a time.
            self._sizes.seen(max(sum(map(len, fields)) for page in pages.values() for _, fields in page))
            less, count = count, self._count(asked, busy, limit)
            if count == less:
                return pages
            block_ms = 0

    def _pages(self, found: Any, asked: Mapping[int, Cursor], count: int) -> dict[int, Page]:
        if isinstance(found, ReplyError):
            raise broker_error(found, f"XREAD of {self._place.stream}")
        pages = {self._partition_of[log]: page for log, page in found or ()}
        self._turns.read(asked, [partition for partition, page in pages.items() if len(page) >= count])
        return {partition: page[: asked[partition].room] for partition, page in pages.items()}

    def _count(self, asked: Mapping[int, Cursor], busy: int, limit: int) -> int:
        page = max(PAGE, min(limit, MAX_EVENTS) // busy) if busy else MAX_EVENTS // len(asked)
        room = max([cursor.room for cursor in asked.values()])
        return max(1, min(page, room, self._most // len(asked)))

    @property
    def _most(self) -> int:
        return self._sizes.within(min(MAX_REPLY_BYTES, self._budget.read_bytes))

    def _command(self, asked: Mapping[int, Cursor], count: int, block_ms: int) -> bytes:
        block = ("BLOCK", block_ms) if block_ms > 0 else ()
        logs = [self._place.at[partition].log for partition in asked]
        ids = [cursor.after or BEFORE_ALL for cursor in asked.values()]
        return pack("XREAD", "COUNT", count, *block, "STREAMS", *logs, *ids)


def _behind(cursor: Cursor, page: Page) -> Cursor:
    return Cursor(page[-1][0].decode(), cursor.room - len(page), cursor.epoch)
