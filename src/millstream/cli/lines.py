"""The lines of a file or of stdin, as they arrive."""

from __future__ import annotations

import asyncio
import gzip
import os
import stat
import sys
import zlib
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Any, BinaryIO, Self

from millstream.clock import Clock

BLOCK_BYTES = 262_144  # read at once: a thousand events of the usual size
IDLE_S = 0.2  # how soon a stop is noticed while nothing arrives


class Unreadable(Exception):
    """The file ends in the middle, or is no gzip file."""


class Lines:
    """Lines of FILE, of FILE.gz, or of stdin (`-`). Holds one block and one line in memory."""

    def __init__(self, path: str) -> None:
        self._raw: BinaryIO = _opened(path)
        self._file: Any = gzip.GzipFile(fileobj=self._raw) if path.endswith(".gz") else self._raw
        self._descriptor: int | None = None
        self._bytes = 0
        with suppress(OSError):  # stdin may be no file at all
            self._descriptor = self._raw.fileno()
            found = os.fstat(self._descriptor)
            self._bytes = found.st_size if stat.S_ISREG(found.st_mode) else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    def part(self) -> float | None:
        """How much of the whole has been read; None where nobody knows the whole."""
        return self._raw.tell() / self._bytes if self._bytes else None

    async def blocks(self, stop: asyncio.Event, clock: Clock, most_bytes: int) -> AsyncIterator[list[bytes]]:
        """What has arrived, as lines without their ends; the last one when it ends too. Ends early after `stop`.

        A line over `most_bytes` comes cut. Raises `Unreadable`.
        """
        rest, cut = b"", False
        while await self._arrived(stop, clock):
            block = self._read()
            *lines, rest = (rest + block).split(b"\n")
            if cut and lines:  # the end of a line of which the beginning was passed on already
                lines, cut = lines[1:], False
            if rest and (not block or len(rest) > most_bytes):
                lines, rest, cut = lines if cut else [*lines, rest], b"", True
            if lines:
                yield lines
            if not block:
                return

    async def _arrived(self, stop: asyncio.Event, clock: Clock) -> bool:
        """True when reading will not block; False after `stop`. A pipe must not keep Ctrl-C waiting."""
        if self._descriptor is None or self._bytes:
            return not stop.is_set()
        ready, loop = asyncio.Event(), asyncio.get_running_loop()
        try:
            loop.add_reader(self._descriptor, ready.set)
        except (OSError, NotImplementedError):  # nothing to wait for: an empty file, /dev/null
            return not stop.is_set()
        try:
            while not stop.is_set():
                if await clock.wait(ready, IDLE_S):
                    return True
            return False
        finally:
            loop.remove_reader(self._descriptor)

    def _read(self) -> bytes:
        try:
            block: bytes = self._file.read1(BLOCK_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise Unreadable(str(error)) from None
        return block


def _opened(path: str) -> BinaryIO:
    if path == "-":
        return sys.stdin.buffer
    return open(path, "rb")  # closed by `Lines`
