"""What people and monitoring look through: reads of the file, each of one state of it, and three verbs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from sqlite3 import Connection
from typing import TYPE_CHECKING

from millstream.brokers.base import DeadLetter, GroupInfo, PendingInfo, StreamInfo, StreamSpec
from millstream.brokers.sqlite import group as groups
from millstream.brokers.sqlite import log
from millstream.errors import BrokerRefused

if TYPE_CHECKING:
    from millstream.brokers.sqlite.broker import SQLiteBroker

MAX_PAGE = 1_000  # dead letters in one answer, at up to 1 MiB each


class SQLiteAdmin:
    """What people and monitoring look through."""

    def __init__(self, broker: SQLiteBroker) -> None:
        self._broker = broker

    async def streams(self) -> list[StreamInfo]:
        """All streams of our namespace, by name."""

        def job(db: Connection) -> list[StreamInfo]:
            rows = db.execute("SELECT id, name, partitions, key, codec FROM stream ORDER BY name").fetchall()
            known = [(self._broker.outside(row[1]), log.Known._make(row)) for row in rows]
            return [_stream(db, name, stream) for name, stream in known if name is not None]

        return await self._broker.reader.ask(job)

    async def groups(self, stream: str) -> list[GroupInfo]:
        """All groups of a stream, by name. Empty for an unknown stream."""
        now_s, name = self._broker.clock.monotonic(), self._broker.inside(stream)

        def job(db: Connection) -> list[GroupInfo]:
            known = log.find(db, name)
            found = db.execute("SELECT id FROM grp WHERE stream = ? ORDER BY name", (known.id,)) if known else ()
            return [_group(db, stream, id_, now_s) for (id_,) in list(found)]

        return await self._broker.reader.ask(job)

    async def pending(self, stream: str, group: str, limit: int) -> list[PendingInfo]:
        """The oldest pending events of each partition, up to `limit` of each."""
        name = self._broker.inside(stream)

        def job(db: Connection) -> list[PendingInfo]:
            known, found = log.find(db, name), _find_group(db, name, group)
            if known is None or found is None:
                return []
            holders = db.execute("SELECT id, name FROM member WHERE grp = ?", (found,)).fetchall()
            partitions = range(known.partitions)
            return [info for p in partitions for info in _pending(db, found, known, p, [(0, ""), *holders], limit)]

        return await self._broker.reader.ask(job)

    async def dead(self, stream: str, group: str, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Dead letters in the order of their references, behind `after`."""
        name = self._broker.inside(stream)
        behind = int(after) if after.isdecimal() else 0

        def job(db: Connection) -> list[DeadLetter]:
            rows = db.execute(
                "SELECT id, reason, error, attempts, died_ms, "
                "row, event_id, type, source, stored_ms, time_ms, subject, headers, data "
                "FROM dead WHERE grp = ? AND id > ? ORDER BY id LIMIT ?",
                (_find_group(db, name, group), behind, min(limit, MAX_PAGE)),
            )
            return [_letter(stream, group, row) for row in rows.fetchall()]

        return await self._broker.reader.ask(job)

    async def replay(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Give dead letters back to their own group, attempts counted anew; False where letter or event is gone."""
        return await self._each(letters, groups.replay)

    async def drop(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Discard dead letters for ever; False where the letter is gone."""
        return await self._each(letters, groups.drop)

    async def adopt(self, stream: str, group: str, owner: str) -> None:
        """Make another app the owner of a group; it keeps its place."""
        name = self._broker.inside(stream)

        def job(db: Connection) -> None:
            found = _find_group(db, name, group)
            if found is None:
                raise BrokerRefused(f"stream {stream!r} has no group {group!r}")
            db.execute("UPDATE grp SET owner = ? WHERE id = ?", (owner, found))

        await self._broker.writer.ask(job, durable=True)

    async def _each(self, letters: Sequence[DeadLetter], verb: Callable[[Connection, int, int], bool]) -> list[bool]:
        inside = self._broker.inside

        def job(db: Connection) -> list[bool]:
            found = [_find_group(db, inside(letter.stream), letter.group) for letter in letters]
            return [
                id_ is not None and letter.ref.isdecimal() and verb(db, id_, int(letter.ref))
                for id_, letter in zip(found, letters, strict=True)
            ]

        return await self._broker.writer.ask(job, durable=True, rings=True)


def _find_group(db: Connection, stream: str, group: str) -> int | None:
    found = db.execute(
        "SELECT grp.id FROM grp JOIN stream ON stream.id = grp.stream WHERE stream.name = ? AND grp.name = ?",
        (stream, group),
    ).fetchone()
    return found[0] if found else None


def _stream(db: Connection, name: str, stream: log.Known) -> StreamInfo:
    logs = (stream.log(0), stream.log(stream.partitions - 1))
    added, bytes_, last_ms = db.execute(
        "SELECT SUM(last), SUM(bytes), MAX(last_ms) FROM log WHERE id BETWEEN ? AND ?", logs
    ).fetchone()
    first = [
        db.execute("SELECT stored_ms FROM event WHERE row = ?", (log.first_row(stream.id, p) | 1,)).fetchone()
        for p in range(stream.partitions)
    ]
    first_ms = min((row[0] for row in first if row), default=None)
    spec = StreamSpec(name, stream.partitions, stream.key, stream.codec)
    return StreamInfo(spec, added, added, bytes_, first_ms, last_ms or None)


def _group(db: Connection, stream: str, group: int, now_s: float) -> GroupInfo:
    name, owner, done, retried, replayed, dropped = db.execute(
        "SELECT name, owner, done, retried, replayed, dropped FROM grp WHERE id = ?", (group,)
    ).fetchone()
    lag, dead = db.execute(
        "SELECT SUM(last - seq), SUM(dead) FROM cursor JOIN log ON log.id = cursor.log WHERE grp = ?", (group,)
    ).fetchone()
    pending, waiting = db.execute("SELECT COUNT(*), SUM(consumer = 0) FROM pending WHERE grp = ?", (group,)).fetchone()
    # A clock that was started anew says nothing about a member that beat before.
    (alive,) = db.execute(
        "SELECT COUNT(*) FROM member WHERE grp = ? AND beat_s <= ? AND beat_s + lease_s > ?", (group, now_s, now_s)
    ).fetchone()
    return GroupInfo(
        stream=stream,
        group=name,
        owner=owner,
        consumers=alive,
        lag=lag,
        pending=pending,
        scheduled=waiting or 0,
        dead=dead,
        done=done,
        retried=retried,
        replayed=replayed,
        dropped=dropped,
    )


def _pending(
    db: Connection, group: int, stream: log.Known, partition: int, holders: Sequence[tuple[int, str]], limit: int
) -> list[PendingInfo]:
    # One small range for each holder, so that a hundred thousand waiting ones are not sorted for the first ten.
    found = [
        (row, PendingInfo(log.position_of(row), name, attempt, due_ms))
        for holder, name in holders
        for row, attempt, due_ms in db.execute(
            "SELECT row, attempt, due_ms FROM pending WHERE grp = ? AND consumer = ? AND row BETWEEN ? AND ? "
            "ORDER BY row LIMIT ?",
            (group, holder, log.first_row(stream.id, partition), log.first_row(stream.id, partition + 1) - 1, limit),
        )
    ]
    return [info for _, info in sorted(found, key=lambda item: item[0])[:limit]]


def _letter(stream: str, group: str, row: log.Row) -> DeadLetter:
    id_, reason, error, attempts, died_ms, *event = row
    return DeadLetter(stream, group, log.stored(event), reason, error, attempts, died_ms, str(id_))
