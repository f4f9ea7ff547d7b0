"""The events of the file: streams, places, reading, finding a time. Functions of a connection inside a transaction.

A place is one integer, `log << 40 | sequence number`, with `log = stream * 1024 + partition`; see `schema.sql`. Retention
removes the first events of a log: those up to `log.gone` are not there any more.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from msgspec import json

from millstream.brokers.base import Policy, Position, Record, Start, Stored, StreamSpec, check_declared
from millstream.errors import BrokerRefused
from millstream.units import MAX_APPEND_BYTES, MAX_PARTITIONS
from millstream.wire.packs import part_offset

SEQ_BITS = 40
MAX_SEQ = (1 << SEQ_BITS) - 1
MAX_STREAMS = (1 << 63 - SEQ_BITS) // MAX_PARTITIONS - 1  # 8,191: what is left of 63 bits

MAX_TAKE_BYTES = MAX_APPEND_BYTES  # events in one answer to a group, the first one apart
MAX_PAGE_BYTES = 33_554_432  # events in one answer to a reader

STREAM = "id, name, partitions, key, codec, policy"  # as `Known` takes it
COLUMNS = "event.row, event.id, type, source, stored_ms, time_ms, subject, headers, data"

_PAGE = f"SELECT {COLUMNS} FROM event WHERE row > ? AND row <= ? ORDER BY row LIMIT ?"  # noqa: S608 - a constant

Row: TypeAlias = Sequence[Any]


class Known(NamedTuple):
    """A stream as the file knows it."""

    id: int
    name: str
    partitions: int
    key: str
    codec: str
    asked: str | None

    @property
    def spec(self) -> StreamSpec:
        """How it was declared, under its name inside the file."""
        return StreamSpec(self.name, self.partitions, self.key, self.codec)

    @property
    def policy(self) -> Policy:
        """What holds for it."""
        return _policy(self.asked)

    @property
    def logs(self) -> tuple[int, int]:
        """The first and the last of its partitions' numbers in the file."""
        return self.log(0), self.log(self.partitions - 1)

    def log(self, partition: int) -> int:
        """The partition's number in the file. Raises `BrokerRefused` when there is no such partition."""
        if not 0 <= partition < self.partitions:
            raise BrokerRefused(f"stream {self.name!r} has no partition {partition}, only {self.partitions}")
        return log_of(self.id, partition)


class Budget:
    """What one answer may still hold."""

    def __init__(self, events: int, max_bytes: int = MAX_TAKE_BYTES) -> None:
        self.events = events
        self.bytes = max_bytes

    def spend(self, stored: Stored) -> bool:
        """Count an event in; False once there is no room for another one."""
        self.spend_all(1, len(stored.record.data) + len(stored.record.headers))
        return self.events > 0

    def spend_all(self, events: int, bytes: int) -> None:
        """Count several in."""
        self.bytes -= bytes
        self.events = self.events - events if self.bytes > 0 else 0


def declare(db: sqlite3.Connection, name: str, spec: StreamSpec, policy: Policy | None = None) -> Known:
    """The stream under this name, made with this policy if it is new. Raises `StreamMismatch`."""
    known = find(db, name)
    if known is None:
        row = (name, spec.partitions, spec.key, spec.codec, written(policy or Policy()))
        db.execute("INSERT INTO stream (name, partitions, key, codec, policy) VALUES (?, ?, ?, ?, ?)", row)
        known = known_as(db, name)
        if known.id > MAX_STREAMS:
            raise BrokerRefused(f"the file has {MAX_STREAMS:,} streams, more do not fit: use another file")
        db.executemany("INSERT INTO log (id) VALUES (?)", [(known.log(p),) for p in range(spec.partitions)])
    check_declared(StreamSpec(spec.name, known.partitions, known.key, known.codec), spec, "this file")
    return known


def written(policy: Policy) -> str | None:
    """A policy as the file has it; None for one that asks for nothing."""
    return None if policy == Policy() else json.encode(policy).decode()


def find(db: sqlite3.Connection, name: str) -> Known | None:
    """The stream under this name, or None."""
    found = db.execute(f"SELECT {STREAM} FROM stream WHERE name = ?", (name,)).fetchone()  # noqa: S608 - a constant
    return Known._make(found) if found else None


def known_as(db: sqlite3.Connection, name: str) -> Known:
    """The stream under this name, or `BrokerRefused`."""
    found = find(db, name)
    if found is None:
        raise BrokerRefused(f"no stream {name!r} is declared in this file")
    return found


def dictionary(db: sqlite3.Connection, stream: Known, number: int) -> bytes | None:
    """The dictionary of a stream with this number, or None."""
    found = db.execute("SELECT content FROM dictionary WHERE stream = ? AND number = ?", (stream.id, number)).fetchone()
    return found[0] if found else None


def read(db: sqlite3.Connection, name: str, partition: int, after: Position | None, limit: int) -> list[Stored]:
    """Up to `limit` events behind a position, in order, as many as one answer holds."""
    first = known_as(db, name).log(partition) << SEQ_BITS
    return page(db, first | seq_of(after), first | MAX_SEQ, Budget(limit, MAX_PAGE_BYTES))


def page(db: sqlite3.Connection, behind: int, last: int, budget: Budget) -> list[Stored]:
    """Events behind a place of the file and up to another one, as many as the budget allows; one at least, if any."""
    events: list[Stored] = []
    taken_bytes, most_bytes = 0, budget.bytes
    # One that is left open keeps its statement: the next page would have to compile it anew, for 3 µs.
    with closing(db.execute(_PAGE, (behind, last, budget.events))) as rows:
        for row in rows:
            events.append(stored(row))
            taken_bytes += len(row[-1]) + len(row[-2] or b"")
            if taken_bytes >= most_bytes:
                break
    budget.spend_all(len(events), taken_bytes)
    return events


def locate(db: sqlite3.Connection, log: int, start: Start) -> int:
    """The sequence number behind which reading a partition begins; 0 for the beginning."""
    if start == "beginning":
        return 0
    last, gone = db.execute("SELECT last, gone FROM log WHERE id = ?", (log,)).fetchone()
    if start == "now":
        return int(last)
    # Times never go back within a log, so a binary search finds the first event that is not before the start.
    before, behind = gone, last + 1
    while behind - before > 1:
        middle = (before + behind) // 2
        found = db.execute("SELECT stored_ms FROM event WHERE row = ?", (log << SEQ_BITS | middle,)).fetchone()
        if found is None or found[0] < start:
            before = middle
        else:
            behind = middle
    return int(before)


def begin(db: sqlite3.Connection, log: int, start: Start) -> int:
    """The sequence number behind which a group begins in a partition: it has not lost what was gone before."""
    (gone,) = db.execute("SELECT gone FROM log WHERE id = ?", (log,)).fetchone()
    return max(int(gone), locate(db, log, start))


def ends_behind(db: sqlite3.Connection, log: int, seq: int) -> bool:
    """True when a partition has an event behind this one."""
    last, gone = db.execute("SELECT last, gone FROM log WHERE id = ?", (log,)).fetchone()
    return bool(last > max(seq, gone))


def stored(row: Row, part: int | None = None) -> Stored:
    """The event of a row that was selected as `COLUMNS`; with a part, it is that one of the pack that lies there."""
    place, id_, type_, source, stored_ms, time_ms, subject, headers, data = row
    partition, offset = (place >> SEQ_BITS) % MAX_PARTITIONS, str(place & MAX_SEQ)
    record = Record(partition, id_, type_, data, subject, time_ms or stored_ms, headers or b"", None, source)
    return Stored(Position(partition, offset if part is None else part_offset(offset, part)), record)


def left(text: str | None) -> Sequence[int]:
    """Which events of a pack are left; empty for all of them, and for what is no pack."""
    return sorted(map(int, text.split())) if text else ()


def left_written(left: Sequence[int]) -> str | None:
    """The same as the file has it."""
    return " ".join(map(str, left)) or None


def position_of(row: int, part: int | None = None) -> Position:
    """The position of a place in the file, or of one event of the pack that lies there."""
    offset = str(row & MAX_SEQ)
    return Position((row >> SEQ_BITS) % MAX_PARTITIONS, offset if part is None else part_offset(offset, part))


def log_of(stream: int, partition: int) -> int:
    """A partition's number in the file."""
    return stream * MAX_PARTITIONS + partition


def first_row(stream: int, partition: int) -> int:
    """Where a partition begins in the file; the next one's is where it ends."""
    return log_of(stream, partition) << SEQ_BITS


def row_of(stream: int, position: Position) -> int:
    """The place of a position in the file."""
    return stream * MAX_PARTITIONS + position.partition << SEQ_BITS | int(position.offset)


def seq_of(position: Position | None) -> int:
    """The sequence number of a position, or of the pack that its event is of; 0 for the beginning.

    Raises `BrokerRefused` for a foreign one.
    """
    if position is None:
        return 0
    seq = position.offset.partition(".")[0]
    if not seq.isdecimal() or int(seq) > MAX_SEQ:
        raise BrokerRefused(f"{position} is no position in an SQLite file: its offsets are whole numbers")
    return int(seq)


@lru_cache(maxsize=1_024)
def _policy(text: str | None) -> Policy:
    return Policy() if text is None else json.decode(text, type=Policy)
