"""What dead letters need: to be replayed without order, an event must still lie in its log.

Letters are kept in the order in which they died, and events fail in any order: the first event that is needed may be any
letter's. So each is looked at once, page by page, and the least is remembered; when that letter has gone, or its event
has, all are looked at again. Until all were seen, everything counts as needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from millstream.brokers.redis.link import Link
from millstream.brokers.window import after

MAX_PAGES = 40  # in one round
FIRST_COUNT = 10  # letters of the first page; then as many as the size of these allows
MAX_COUNT = 500
MAX_PAGE_BYTES = 1_048_576
BEFORE_ALL = "0-1"


class Sources:
    """Of the dead letters of one group in one partition."""

    def __init__(self, dead: bytes) -> None:
        self._dead = dead
        self._last = self._letter = self._first = ""
        self._count = FIRST_COUNT

    async def look(self, link: Link, begin: str) -> tuple[str, str]:
        """The last letter that was looked at, and the first event that one of them needs of a log that begins there."""
        await self._check(link, begin)
        for _ in range(MAX_PAGES):
            start = f"({self._last}" if self._last else "-"
            page = await link.call("XRANGE", self._dead, start, "+", "COUNT", self._count)
            for id_, fields in page:
                self._see(id_.decode(), fields, begin)
            if len(page) < self._count:
                return self._last, self._first
            each = sum(sum(map(len, fields)) for _, fields in page) // len(page) + 1
            self._count = max(1, min(MAX_COUNT, MAX_PAGE_BYTES // each))
        return self._last, BEFORE_ALL

    async def _check(self, link: Link, begin: str) -> None:
        if not self._first:
            return
        gone = not begin or after(begin, self._first)
        if gone or not await link.call("XRANGE", self._dead, self._letter, self._letter):
            self._last = self._letter = self._first = ""

    def _see(self, letter: str, fields: Sequence[bytes], begin: str) -> None:
        self._last = letter
        position = dict(zip(fields[0:12:2], fields[1:12:2], strict=False)).get(b"position", b"")
        source = position.partition(b"@")[2].partition(b".")[0].decode(errors="replace")  # of a pack, the whole
        if not _is_offset(source) or not begin or after(begin, source):
            return
        if not self._first or after(self._first, source):
            self._first, self._letter = source, letter


def _is_offset(text: str) -> bool:
    ms, dash, seq = text.partition("-")
    return bool(dash) and ms.isdecimal() and seq.isdecimal()
