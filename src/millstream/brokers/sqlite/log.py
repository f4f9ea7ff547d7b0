"""The events of the file: places, storing, reading, finding a time. Functions of a connection inside a transaction.

A place is one integer, `log << 40 | sequence number`, with `log = stream * 1024 + partition`; see `schema.sql`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from millstream.brokers.base import Position, Record, Start, Stored, StreamSpec, check_declared
from millstream.errors import BrokerRefused, NotSupported
from millstream.units import MAX_APPEND_BYTES, MAX_PARTITIONS

SEQ_BITS = 40
MAX_SEQ = (1 << SEQ_BITS) - 1
MAX_STREAMS = (1 << 63 - SEQ_BITS) // MAX_PARTITIONS - 1  # 8,191: what is left of 63 bits

MAX_TAKE_BYTES = MAX_APPEND_BYTES  # events in one answer, the first one apart

COLUMNS = "event.row, event.id, type, source, stored_ms, time_ms, subject, headers, data"

Row: TypeAlias = Sequence[Any]


class Known(NamedTuple):
    """A stream as the file knows it."""

    id: int
    name: str
    partitions: int
    key: str
    codec: str

    def log(self, partition: int) -> int:
        """The partition's number in the file. Raises `BrokerRefused` when there is no such partition."""
        if not 0 <= partition < self.partitions:
            raise BrokerRefused(f"stream {self.name!r} has no partition {partition}, only {self.partitions}")
        return log_of(self.id, partition)


class Budget:
    """What one answer may still hold."""

    def __init__(self, events: int, max_bytes: int = MAX_TAKE_BYTES) -> None:
        self.events = events
        self._left_bytes = max_bytes

    def spend(self, stored: Stored) -> bool:
        """Count an event in; False once there is no room for another one."""
        self._left_bytes -= len(stored.record.data) + len(stored.record.headers)
        self.events = self.events - 1 if self._left_bytes > 0 else 0
        return self.events > 0


class _End:
    """Where the next event of a partition goes, while a request is being stored."""

    __slots__ = ("bytes", "last", "last_ms")

    def __init__(self, last: int, last_ms: int, bytes: int) -> None:
        self.last = last
        self.last_ms = last_ms
        self.bytes = bytes


def declare(db: sqlite3.Connection, name: str, spec: StreamSpec) -> Known:
    """The stream under this name, made if it is new. Raises `StreamMismatch`."""
    known = find(db, name)
    if known is None:
        row = (name, spec.partitions, spec.key, spec.codec)
        db.execute("INSERT INTO stream (name, partitions, key, codec) VALUES (?, ?, ?, ?)", row)
        known = known_as(db, name)
        if known.id > MAX_STREAMS:
            raise BrokerRefused(f"the file has {MAX_STREAMS:,} streams, more do not fit: use another file")
        db.executemany("INSERT INTO log (id) VALUES (?)", [(known.log(p),) for p in range(spec.partitions)])
    check_declared(StreamSpec(spec.name, *known[2:]), spec, "this file")
    return known


def find(db: sqlite3.Connection, name: str) -> Known | None:
    """The stream under this name, or None."""
    found = db.execute("SELECT id, name, partitions, key, codec FROM stream WHERE name = ?", (name,)).fetchone()
    return Known._make(found) if found else None


def known_as(db: sqlite3.Connection, name: str) -> Known:
    """The stream under this name, or `BrokerRefused`."""
    found = find(db, name)
    if found is None:
        raise BrokerRefused(f"no stream {name!r} is declared in this file")
    return found


def store(db: sqlite3.Connection, name: str, records: Sequence[Record], now_ms: int) -> list[Position]:
    """Store records at the ends of their partitions. Raises `BrokerRefused`, `NotSupported`; then nothing is stored."""
    stream = known_as(db, name)
    ends: dict[int, _End] = {}
    rows = []
    positions = []
    for record in records:
        if record.due_ms is not None:
            raise NotSupported("an SQLite file cannot delay events")
        partition = record.partition
        end = ends.get(partition)
        if end is None:
            end = ends[partition] = _end(db, stream.log(partition), now_ms)
        end.last += 1
        end.bytes += len(record.data) + len(record.headers)
        row = first_row(stream.id, partition) | end.last
        time_ms = record.time_ms or None
        rows.append(
            (row, record.id, record.type, record.source, end.last_ms, time_ms, record.key, record.headers, record.data)
        )
        positions.append(Position(partition, str(end.last)))
    db.executemany("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    db.executemany(
        "UPDATE log SET last = ?, last_ms = ?, bytes = ? WHERE id = ?",
        [(end.last, end.last_ms, end.bytes, stream.log(partition)) for partition, end in ends.items()],
    )
    return positions


def read(db: sqlite3.Connection, name: str, partition: int, after: Position | None, limit: int) -> list[Stored]:
    """Up to `limit` events behind a position, in order."""
    first = known_as(db, name).log(partition) << SEQ_BITS
    rows = db.execute(
        f"SELECT {COLUMNS} FROM event WHERE row > ? AND row <= ? ORDER BY row LIMIT ?",  # noqa: S608 - a constant
        (first | seq_of(after), first | MAX_SEQ, limit),
    )
    return [stored(row) for row in rows.fetchall()]


def locate(db: sqlite3.Connection, log: int, start: Start) -> int:
    """The sequence number behind which reading a partition begins; 0 for the beginning."""
    if start == "beginning":
        return 0
    (last,) = db.execute("SELECT last FROM log WHERE id = ?", (log,)).fetchone()
    if start == "now":
        return int(last)
    # Times never go back within a log, so a binary search finds the first event that is not before the start.
    before, behind = 0, last + 1
    while behind - before > 1:
        middle = (before + behind) // 2
        found = db.execute("SELECT stored_ms FROM event WHERE row = ?", (log << SEQ_BITS | middle,)).fetchone()
        if found is None or found[0] < start:
            before = middle
        else:
            behind = middle
    return int(before)


def stored(row: Row) -> Stored:
    """The event of a row that was selected as `COLUMNS`."""
    place, id_, type_, source, stored_ms, time_ms, subject, headers, data = row
    position = position_of(place)
    record = Record(position.partition, id_, type_, data, subject, time_ms or stored_ms, headers or b"", None, source)
    return Stored(position, record)


def position_of(row: int) -> Position:
    """The position of a place in the file."""
    return Position((row >> SEQ_BITS) % MAX_PARTITIONS, str(row & MAX_SEQ))


def log_of(stream: int, partition: int) -> int:
    """A partition's number in the file."""
    return stream * MAX_PARTITIONS + partition


def first_row(stream: int, partition: int) -> int:
    """Where a partition begins in the file; the next one's is where it ends."""
    return log_of(stream, partition) << SEQ_BITS


def row_of(stream: int, position: Position) -> int:
    """The place of a position in the file."""
    return first_row(stream, position.partition) | int(position.offset)


def seq_of(position: Position | None) -> int:
    """The sequence number of a position; 0 for the beginning. Raises `BrokerRefused` for a foreign one."""
    if position is None:
        return 0
    if not position.offset.isdecimal() or int(position.offset) > MAX_SEQ:
        raise BrokerRefused(f"{position} is no position in an SQLite file: its offsets are whole numbers")
    return int(position.offset)


def _end(db: sqlite3.Connection, log: int, now_ms: int) -> _End:
    last, last_ms, bytes_ = db.execute("SELECT last, last_ms, bytes FROM log WHERE id = ?", (log,)).fetchone()
    return _End(last, max(last_ms, now_ms), bytes_)
