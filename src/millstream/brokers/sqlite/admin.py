"""What people and monitoring look through: reads of the file, each of one state of it; and what they do, by `verbs.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from sqlite3 import Connection
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace

from millstream.brokers.base import (
    DeadLetter,
    GroupInfo,
    ParkedKey,
    PendingInfo,
    Policy,
    Start,
    Stored,
    StreamInfo,
)
from millstream.brokers.ledger import HELD_MS
from millstream.brokers.sqlite import log, parked, verbs
from millstream.brokers.sqlite.member import alive
from millstream.brokers.sqlite.parked import Part
from millstream.errors import BrokerRefused
from millstream.wire import compression

if TYPE_CHECKING:
    from millstream.brokers.sqlite.broker import SQLiteBroker

T = TypeVar("T")

MAX_PAGE = 1_000  # whole events in one answer, at up to 1 MiB each


class SQLiteAdmin:
    """What people and monitoring look through."""

    def __init__(self, broker: SQLiteBroker) -> None:
        self._broker = broker

    async def streams(self) -> list[StreamInfo]:
        """All streams of our namespace, by name."""

        def job(db: Connection) -> list[StreamInfo]:
            rows = db.execute(f"SELECT {log.STREAM} FROM stream ORDER BY name").fetchall()  # noqa: S608 - a constant
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
            found = verbs.find(db, name, group)
            if found is None:
                return []
            if found.ordered:
                return [info for part in found.parts for info in _parked(db, part, limit)]
            holders = db.execute("SELECT id, name FROM member WHERE grp = ?", (found.id,)).fetchall()
            return [info for part in found.parts for info in _pending(db, part, [(0, ""), *holders], limit)]

        return await self._broker.reader.ask(job)

    async def dead(self, stream: str, group: str, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Dead letters in the order of their references, behind `after`."""
        name = self._broker.inside(stream)
        behind = int(after) if after.isdecimal() else 0

        def job(db: Connection) -> list[DeadLetter]:
            found = verbs.find(db, name, group)
            rows = db.execute(
                f"SELECT id, reason, error, attempts, died_ms, part, {verbs.LETTER} "  # noqa: S608 - a constant
                "FROM dead WHERE grp = ? AND id > ? ORDER BY id LIMIT ?",
                (found.id if found else None, behind, min(limit, MAX_PAGE)),
            )
            return [_letter(stream, group, row) for row in rows.fetchall()]

        return await self._broker.reader.ask(job)

    async def replay(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Give dead letters back to their own group, attempts counted anew; False where letter or event is gone."""
        now_ms = self._broker.clock.now_ms()
        return await self._each_letter(letters, lambda db, group, letter: verbs.replay(db, group, letter, now_ms))

    async def give(self, stream: str, group: str, events: Sequence[Stored]) -> int:
        """Let a group handle events once more, those that it has settled, in one step; how many."""
        now_ms = self._broker.clock.now_ms()
        return await self._change(stream, group, lambda db, found: verbs.give(db, found, events, now_ms))

    async def drop(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Discard dead letters for ever; False where the letter is gone."""
        return await self._each_letter(letters, verbs.drop)

    async def adopt(self, stream: str, group: str, owner: str) -> None:
        """Make another app the owner of a group; it keeps its place."""

        def verb(db: Connection, found: verbs.Known) -> None:
            db.execute("UPDATE grp SET owner = ? WHERE id = ?", (owner, found.id))

        await self._change(stream, group, verb)

    async def keys(self, stream: str, group: str, limit: int = 100) -> list[ParkedKey]:
        """The keys that wait, those that were parked first first."""
        name = self._broker.inside(stream)

        def job(db: Connection) -> list[ParkedKey]:
            found = verbs.find(db, name, group)
            return _keys(db, stream, group, found.id, limit) if found else []

        return await self._broker.reader.ask(job)

    async def parked(self, key: ParkedKey, limit: int = 100) -> list[Stored]:
        """The events that wait of a key, in order."""
        name = self._broker.inside(key.stream)

        def job(db: Connection) -> list[Stored]:
            found = verbs.find(db, name, key.group)
            return parked.events(db, found.part(key.partition), key.key, min(limit, MAX_PAGE)) if found else []

        return await self._broker.reader.ask(job)

    async def release_keys(self, keys: Sequence[ParkedKey]) -> list[bool]:
        """Let keys be tried at once, attempts counted anew; False where nothing is parked any more."""
        return await self._each_key(keys, verbs.release_key, False)

    async def drop_keys(self, keys: Sequence[ParkedKey]) -> list[int]:
        """Discard all that is parked of these keys, for ever; how many events each."""
        return await self._each_key(keys, verbs.drop_key, 0)

    async def seek(self, stream: str, group: str, start: Start, *, live: bool = False) -> None:
        """Move a group to another place; what is pending, or parked behind that place, is forgotten."""
        now_s = self._broker.clock.monotonic()

        def verb(db: Connection, found: verbs.Known) -> None:
            if not live:
                verbs.check_no_members(db, found, group, now_s)
            verbs.seek(db, found, start)

        await self._change(stream, group, verb)

    async def forget(self, stream: str, group: str) -> None:
        """Delete a group with all that it has."""
        now_s = self._broker.clock.monotonic()

        def verb(db: Connection, found: verbs.Known) -> None:
            verbs.check_no_members(db, found, group, now_s)
            verbs.forget(db, found)

        await self._change(stream, group, verb)

    async def apply(self, stream: str, policy: Policy) -> None:
        """Change what holds for a stream, from now on and for all who use it."""
        name = self._broker.inside(stream)

        def job(db: Connection) -> None:
            known = log.known_as(db, name)
            db.execute("UPDATE stream SET policy = ? WHERE id = ?", (log.written(policy), known.id))

        await self._broker.writer.ask(job, durable=True, rings=True)

    async def train(self, stream: str, number: int, content: bytes = b"") -> None:
        """Store a dictionary, and have publishers use it from now on."""
        compression.check_size(content)
        name = self._broker.inside(stream)
        await self._broker.writer.ask(lambda db: verbs.train(db, name, number, content), durable=True)

    async def discard(self, stream: str) -> None:
        """Delete a stream with all that it has, in short transactions: one that is interrupted has less, and no groups."""
        name, now_s = self._broker.inside(stream), self._broker.clock.monotonic()
        while await self._broker.writer.ask(lambda db: verbs.discard(db, name, now_s), durable=True, rings=True):
            pass

    async def slots(self, stream: str) -> Mapping[str, int]:
        """The schedules that have published to a stream, and the last slot of each."""
        name = self._broker.inside(stream)

        def job(db: Connection) -> dict[str, int]:
            known = log.find(db, name)
            found = db.execute("SELECT schedule, at_ms FROM slot WHERE stream = ?", (known.id if known else None,))
            return dict(found.fetchall())

        return await self._broker.reader.ask(job)

    async def _change(self, stream: str, group: str, verb: Callable[[Connection, verbs.Known], T]) -> T:
        name = self._broker.inside(stream)

        def job(db: Connection) -> T:
            found = verbs.find(db, name, group)
            if found is None:
                raise BrokerRefused(f"stream {stream!r} has no group {group!r}")
            return verb(db, found)

        return await self._broker.writer.ask(job, durable=True, rings=True)

    async def _each_letter(
        self, letters: Sequence[DeadLetter], verb: Callable[[Connection, verbs.Known, int], bool]
    ) -> list[bool]:
        inside = self._broker.inside

        def job(db: Connection) -> list[bool]:
            found = [verbs.find(db, inside(letter.stream), letter.group) for letter in letters]
            return [
                group is not None and letter.ref.isdecimal() and verb(db, group, int(letter.ref))
                for group, letter in zip(found, letters, strict=True)
            ]

        return await self._broker.writer.ask(job, durable=True, rings=True)

    async def _each_key(
        self, keys: Sequence[ParkedKey], verb: Callable[[Connection, verbs.Known, int, str], T], nothing: T
    ) -> list[T]:
        inside = self._broker.inside

        def job(db: Connection) -> list[T]:
            found = [verbs.find(db, inside(key.stream), key.group) for key in keys]
            return [
                verb(db, group, key.partition, key.key) if group is not None else nothing
                for group, key in zip(found, keys, strict=True)
            ]

        return await self._broker.writer.ask(job, durable=True, rings=True)


def _stream(db: Connection, name: str, stream: log.Known) -> StreamInfo:
    logs = db.execute("SELECT id, last, gone, bytes, last_ms FROM log WHERE id BETWEEN ? AND ?", stream.logs).fetchall()
    first = [
        db.execute("SELECT stored_ms FROM event WHERE row = ?", (id_ << log.SEQ_BITS | gone + 1,)).fetchone()
        for id_, last, gone, _, _ in logs
        if last > gone
    ]
    repeats, trimmed, delayed = db.execute(
        "SELECT repeats, trimmed, delayed FROM stream WHERE id = ?", (stream.id,)
    ).fetchone()
    return StreamInfo(
        replace(stream.spec, name=name),
        events=sum(last - gone for _, last, gone, _, _ in logs),
        added=sum(last for _, last, _, _, _ in logs),
        bytes=sum(bytes_ for _, _, _, bytes_, _ in logs),
        first_ms=min((row[0] for row in first if row), default=None),
        last_ms=max(last_ms for *_, last_ms in logs) or None,
        policy=stream.policy,
        delayed=delayed,
        repeats=repeats,
        trimmed=trimmed,
    )


def _group(db: Connection, stream: str, group: int, now_s: float) -> GroupInfo:
    name, owner, done, retried, replayed, dropped, lost, seen_ms = db.execute(
        "SELECT name, owner, done, retried, replayed, dropped, lost, seen_ms FROM grp WHERE id = ?", (group,)
    ).fetchone()
    lag, dead = db.execute(
        "SELECT SUM(last - MAX(seq, gone)), SUM(dead) FROM cursor JOIN log ON log.id = cursor.log WHERE grp = ?",
        (group,),
    ).fetchone()
    pending, waiting = db.execute(
        "SELECT COUNT(*), TOTAL(consumer = 0) FROM pending WHERE grp = ?", (group,)
    ).fetchone()
    (parked_,) = db.execute("SELECT TOTAL(parked) FROM lease WHERE grp = ?", (group,)).fetchone()
    return GroupInfo(
        stream=stream,
        group=name,
        owner=owner,
        consumers=alive(db, group, now_s),
        lag=lag,
        pending=pending + int(parked_),
        scheduled=int(waiting + parked_),
        dead=dead,
        done=done,
        retried=retried,
        replayed=replayed,
        dropped=dropped,
        lost=lost,
        seen_ms=seen_ms or None,
    )


def _pending(db: Connection, part: Part, holders: Sequence[tuple[int, str]], limit: int) -> list[PendingInfo]:
    # One small range for each holder, so that a hundred thousand waiting ones are not sorted for the first ten.
    first, behind = part.log << log.SEQ_BITS, part.log + 1 << log.SEQ_BITS
    found = [
        (row, PendingInfo(log.position_of(row), name, attempt, due_ms))
        for holder, name in holders
        for row, attempt, due_ms in db.execute(
            "SELECT row, attempt, due_ms FROM pending WHERE grp = ? AND consumer = ? AND row BETWEEN ? AND ? "
            "ORDER BY row LIMIT ?",
            (part.group, holder, first, behind - 1, limit),
        )
    ]
    return [info for _, info in sorted(found, key=lambda item: item[0])[:limit]]


def _parked(db: Connection, part: Part, limit: int) -> list[PendingInfo]:
    rows = db.execute(
        "SELECT row, part, attempts, due_ms FROM parked JOIN parked_key USING (grp, log, key) WHERE grp = ? AND log = ? "
        "ORDER BY row LIMIT ?",
        (*part, limit),
    )
    return [
        PendingInfo(log.position_of(row, number), "", attempts, _due_ms(due_ms))
        for row, number, attempts, due_ms in rows.fetchall()
    ]


def _keys(db: Connection, stream: str, group: str, id_: int, limit: int) -> list[ParkedKey]:
    rows = db.execute(
        "SELECT log, key, attempts, due_ms, error, since_ms, COUNT(*), row, part, MIN(parked.id) "
        "FROM (SELECT * FROM parked_key WHERE grp = ? ORDER BY since_ms, log, key LIMIT ?) "
        "JOIN parked USING (grp, log, key) GROUP BY log, key ORDER BY since_ms, log, key",
        (id_, limit),
    )
    keys = []
    for _, key, attempts, due_ms, error, since_ms, events, row, part, _ in rows.fetchall():
        first = log.position_of(row, part)
        keys.append(
            ParkedKey(
                *(stream, group, first.partition, key, events, first),
                *(attempts, _due_ms(due_ms), error, since_ms),
            )
        )
    return keys


def _due_ms(due_ms: int) -> int | None:
    return None if due_ms >= HELD_MS else due_ms


def _letter(stream: str, group: str, row: log.Row) -> DeadLetter:
    id_, reason, error, attempts, died_ms, part, *event = row
    return DeadLetter(stream, group, log.stored(event, part), reason, error, attempts, died_ms, str(id_))
