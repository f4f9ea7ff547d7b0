"""A row of the outbox, and what it must be to become an event."""

from __future__ import annotations

from typing import NamedTuple, Self

from millstream.sql.connections import Row
from millstream.units import (
    MAX_EVENT_BYTES,
    MAX_HEADERS_BYTES,
    MAX_ID_CHARS,
    MAX_KEY_BYTES,
)

SHARDS = 16
"""Of each stream: relays take them in turn, so more than that many at once have nothing to do."""


class Line(NamedTuple):
    """A row: an event that is to be published."""

    seq: int
    id: str
    type: str
    key: str | None
    headers: bytes
    data: bytes
    created_ms: int
    due_ms: int | None

    @classmethod
    def read(cls, row: Row) -> Self:
        """The row as a driver gives it: some wrap bytes."""
        seq, id_, type_, key, headers, data, created_ms, due_ms = row
        return cls(seq, id_, type_, key, bytes(headers), bytes(data), created_ms, due_ms)


def fault_of(line: Line) -> str:
    """Which limit it breaks, as other code than ours may have written it; empty when none."""
    if not 0 < len(line.id) <= MAX_ID_CHARS or not (line.id.isascii() and line.id.isprintable()):
        return f"its id {line.id[:20]!r} is not 1 to {MAX_ID_CHARS} printable ASCII characters"
    if line.key is not None and len(line.key.encode()) > MAX_KEY_BYTES:
        return f"its key is over {MAX_KEY_BYTES:,} bytes"
    if len(line.headers) > MAX_HEADERS_BYTES:
        return f"its headers are {len(line.headers):,} bytes, over the limit of {MAX_HEADERS_BYTES:,}"
    if len(line.data) > MAX_EVENT_BYTES:
        return f"it is {len(line.data):,} bytes, over the limit of {MAX_EVENT_BYTES:,}"
    return ""
