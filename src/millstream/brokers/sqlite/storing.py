"""Storing events: at the end of their partitions, or aside until they are due. Functions of a connection in a transaction.

A stream without a policy costs one statement to find it, one to find the ends of its partitions, one for fifty events and
one per end. Ids are looked at first, so that a repeat needs no room; then the ceiling. What raises has stored nothing:
its transaction is rolled back.

Of a 200-byte event among a thousand, 0.5 µs are its row and its position, 1.1 its INSERT, 0.7 the commit. The INSERT took
1.5 as a statement of its own, which is set up, stepped and reset each time. And 2.3, before: for each None and each `bytes`
it is given, `sqlite3` looks for an adapter and words two errors on finding none. So a row has neither: a `bytearray` is
bound as it is, and SQL makes NULL of what is empty.

Over 256 partitions all this takes 10 µs in place of 3: SQLite writes whole pages, and the ends of that many partitions lie
in as many, 4.6 KB for each of a thousand events, and 1.5 KB for each of ten thousand. So pages of 8 KB, which save 0.3 µs in
one partition, cost more than that in 64. Rows are inserted partition by partition, which finds each page once: with one look
at all ends that is 13 % of the instructions outside of the system's own.
"""

# ruff: noqa: S608 - what statements are put together from are constants of this file

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from sqlite3 import Connection
from typing import NamedTuple

from millstream.brokers.base import LATER, Output, Position, Record, Slot
from millstream.brokers.sqlite import log, remembered, room

MAX_RIPE = 1_000  # delayed events in one step: others want to write too
AT_ONCE = 50  # rows in one INSERT; a hundred cost no less, and SQLite keeps a copy of them until the next fifty

_EMPTY = bytearray()
_ROW = "(?, ?, ?, ?, ?, NULLIF(?, 0), NULLIF(?, ''), ?, ?)"
_INSERT = f"INSERT INTO event VALUES {_ROW}"
# OR FAIL: else SQLite keeps a copy of each page, to undo this statement alone. Whoever asked undoes the whole transaction.
_INSERT_MANY = f"INSERT OR FAIL INTO event VALUES {', '.join([_ROW] * AT_ONCE)}"


class Ripe(NamedTuple):
    """What became of the events that were published for later."""

    published: int
    due_ms: int | None
    """When the next one is due, which may be past when there is no room."""


class _End:
    """Where the next event of a partition goes, while a request is being stored."""

    __slots__ = ("base", "bytes", "last", "last_ms", "log", "rows")

    def __init__(self, log_: int, last: int, last_ms: int, bytes: int) -> None:
        self.log = log_
        self.base = log_ << log.SEQ_BITS
        self.last = last
        self.last_ms = last_ms
        self.bytes = bytes
        self.rows: list[log.Row] = []


def store(
    db: Connection, stream: log.Known, records: Sequence[Record], now_ms: int, derived: Collection[int] = ()
) -> list[Position]:
    """Store records; the derived ones, by their numbers, without a look at remembered ids.

    Raises `BrokerRefused`, `BrokerFull`.
    """
    if not stream.policy.dedupe_ms:
        return _put(db, stream, records, now_ms)
    keys = [(record.partition, record.id) for record in records]
    compared = dict.fromkeys(key for number, key in enumerate(keys) if number not in derived)
    places = remembered.known(db, stream, compared, now_ms)
    seen, fresh = set(places), []
    for number, key in enumerate(keys):
        if number in derived:
            fresh.append(number)
        elif key not in seen:
            seen.add(key)
            fresh.append(number)
    placed = dict(zip(fresh, _put(db, stream, [records[number] for number in fresh], now_ms), strict=True))
    new = {keys[number]: position for number, position in placed.items() if number not in derived}
    remembered.remember(db, stream, new, now_ms)
    if repeats := len(records) - len(fresh):
        db.execute("UPDATE stream SET repeats = repeats + ? WHERE id = ?", (repeats, stream.id))
    places |= new
    return [placed[number] if number in placed else places[key] for number, key in enumerate(keys)]


def store_outputs(db: Connection, outputs: Sequence[Output], inside: Callable[[str], str], now_ms: int) -> None:
    """Store what handlers published, in order within each stream."""
    streams: dict[str, list[Output]] = {}
    for output in outputs:
        streams.setdefault(output.stream, []).append(output)
    for name, those in streams.items():
        derived = {number for number, output in enumerate(those) if output.derived}
        store(db, log.known_as(db, inside(name)), [output.record for output in those], now_ms, derived)


def store_slot(db: Connection, name: str, slot: Slot, record: Record | None, now_ms: int) -> bool:
    """Store the event of a slot, and that it was; False when this one or a later one was there already."""
    stream = log.known_as(db, name)
    taken = db.execute(
        "INSERT INTO slot (stream, schedule, at_ms) VALUES (?, ?, ?) "
        "ON CONFLICT (stream, schedule) DO UPDATE SET at_ms = excluded.at_ms WHERE excluded.at_ms > at_ms",
        (stream.id, slot.schedule, slot.at_ms),
    )
    if not taken.rowcount:
        return False
    if record is not None:
        store(db, stream, [record], now_ms)
    return True


def ripen(db: Connection, name: str, now_ms: int) -> Ripe:
    """Publish some of the events that have fallen due, in that order, as far as there is room."""
    stream = log.known_as(db, name)
    rows = _due(db, stream, now_ms)
    fitting = room.fitting(db, stream, [len(headers) + len(data) for *_, headers, data in rows]) if rows else 0
    records = [
        Record(id_ - stream.log(0), event_id, type_, data, subject, time_ms, headers, None, source)
        for _, id_, event_id, type_, source, time_ms, subject, headers, data in rows[:fitting]
    ]
    if records:
        placed = _put(db, stream, records, now_ms)
        if stream.policy.dedupe_ms:
            remembered.find_place(db, stream, list(zip((record.id for record in records), placed, strict=True)))
        db.executemany("DELETE FROM delayed WHERE id = ?", [row[:1] for row in rows[:fitting]])
        db.execute("UPDATE stream SET delayed = delayed - ? WHERE id = ?", (fitting, stream.id))
    (due_ms,) = db.execute("SELECT MIN(due_ms) FROM delayed WHERE stream = ?", (stream.id,)).fetchone()
    return Ripe(fitting, due_ms)


def _put(db: Connection, stream: log.Known, records: Sequence[Record], now_ms: int) -> list[Position]:
    """Store records whose ids do not matter."""
    if not records:
        return []
    ends = _ends(db, stream, records, now_ms)
    later: list[Record] = []
    positions = []
    for record in records:
        partition = record.partition
        if record.due_ms is not None and record.due_ms > now_ms:
            later.append(record)
            positions.append(Position(partition, LATER))
            continue
        end = ends[partition]
        headers, data = bytearray(record.headers) if record.headers else _EMPTY, bytearray(record.data)
        end.bytes += len(data) + len(headers)
        end.last = seq = end.last + 1
        row, key = end.base | seq, record.key or ""
        end.rows.append((row, record.id, record.type, record.source, end.last_ms, record.time_ms, key, headers, data))
        positions.append(Position(partition, str(seq)))
    if rows := list(chain.from_iterable([end.rows for end in ends.values()])):
        room.check(db, stream, len(rows))
        _insert(db, rows)
        db.executemany(
            "UPDATE log SET last = ?, last_ms = ?, bytes = ? WHERE id = ?",
            [(end.last, end.last_ms, end.bytes, end.log) for end in ends.values() if end.rows],
        )
    if later:
        _keep_aside(db, stream, later)
    return positions


def _insert(db: Connection, rows: Sequence[log.Row]) -> None:
    whole = len(rows) // AT_ONCE * AT_ONCE
    for begin in range(0, whole, AT_ONCE):
        db.execute(_INSERT_MANY, list(chain.from_iterable(rows[begin : begin + AT_ONCE])))
    db.executemany(_INSERT, rows[whole:])


def _due(db: Connection, stream: log.Known, now_ms: int) -> list[log.Row]:
    """The first events that are due, as many as one step may have in its hands."""
    found = db.execute(
        "SELECT id, log, event_id, type, source, time_ms, subject, headers, data FROM delayed "
        "WHERE stream = ? AND due_ms <= ? ORDER BY due_ms, id LIMIT ?",
        (stream.id, now_ms, MAX_RIPE),
    )
    rows, left_bytes = [], log.MAX_TAKE_BYTES
    for row in found:
        rows.append(row)
        left_bytes -= len(row[-1])
        if left_bytes <= 0:
            break
    return rows


def _keep_aside(db: Connection, stream: log.Known, records: Sequence[Record]) -> None:
    db.executemany(
        "INSERT INTO delayed (log, stream, due_ms, event_id, type, source, time_ms, subject, headers, data) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                *(stream.log(record.partition), stream.id, record.due_ms, record.id, record.type, record.source),
                *(record.time_ms, record.key, record.headers, record.data),
            )
            for record in records
        ],
    )
    db.execute("UPDATE stream SET delayed = delayed + ? WHERE id = ?", (len(records), stream.id))


def _ends(db: Connection, stream: log.Known, records: Sequence[Record], now_ms: int) -> dict[int, _End]:
    """Of each partition that records go to, in the order of the file."""
    needed = {stream.log(partition): partition for partition in {record.partition for record in records}}
    found = db.execute("SELECT id, last, last_ms, bytes FROM log WHERE id BETWEEN ? AND ?", (min(needed), max(needed)))
    return {
        needed[id_]: _End(id_, last, max(last_ms, now_ms), bytes_)
        for id_, last, last_ms, bytes_ in found
        if id_ in needed
    }
