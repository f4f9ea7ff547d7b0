"""What people do to a group in the file, of either way to consume: each function is one step, inside one transaction."""

# ruff: noqa: S608 - what statements are put together from are constants of this file

from __future__ import annotations

from collections.abc import Sequence
from sqlite3 import Connection
from typing import NamedTuple

from msgspec.structs import replace

from millstream.brokers.base import Start, Stored
from millstream.brokers.dictionaries import refused
from millstream.brokers.ledger import Park
from millstream.brokers.sqlite import log, parked
from millstream.brokers.sqlite.member import alive
from millstream.brokers.sqlite.parked import Part
from millstream.brokers.window import keyless
from millstream.errors import BrokerRefused
from millstream.units import MAX_DICTIONARIES

LETTER = "row, event_id, type, source, stored_ms, time_ms, subject, headers, data"  # as `log.stored` takes it

MAX_DISCARDED = 1_000  # events, or ids, in one step: others want to write too

# Whoever holds it, by the primary key.
_PENDING = "WHERE grp = ? AND row = ? AND consumer IN (SELECT 0 UNION ALL SELECT id FROM member WHERE grp = ?)"
_TABLES = ("cursor", "member", "pending", "dead", "lease", "parked_key", "parked", "note")


class Known(NamedTuple):
    """A group as the file knows it."""

    id: int
    stream: log.Known
    ordered: bool

    def part(self, partition: int) -> Part:
        """Its share in a partition."""
        return Part(self.id, self.stream.log(partition))

    @property
    def parts(self) -> list[Part]:
        """Its share in each partition."""
        return [self.part(partition) for partition in range(self.stream.partitions)]


def find(db: Connection, stream: str, group: str) -> Known | None:
    """The group under this name, or None."""
    known = log.find(db, stream)
    if known is None:
        return None
    found = db.execute("SELECT id, ordered FROM grp WHERE stream = ? AND name = ?", (known.id, group)).fetchone()
    return Known(found[0], known, bool(found[1])) if found else None


def replay(db: Connection, group: Known, letter: int, now_ms: int) -> bool:
    """Let the event of a dead letter come again as if it were new, in order behind all that waits of its key.

    False when the letter is gone; without order also when its event is.
    """
    found = db.execute(f"SELECT part, {LETTER} FROM dead WHERE id = ? AND grp = ?", (letter, group.id)).fetchone()
    if found is None:
        return False
    number, row, *_ = found
    if group.ordered:
        _park(db, Part(group.id, row >> log.SEQ_BITS), [log.stored(found[1:], number)], now_ms)
    elif not _is_stored(db, row):
        return False
    else:
        _wait(db, group.id, row, number)
    return _forget(db, group.id, letter, "replayed")


def give(db: Connection, group: Known, events: Sequence[Stored], now_ms: int) -> int:
    """Let events come again as if they were new, those that the group has settled; how many."""
    parts: dict[Part, list[Stored]] = {}
    for stored in events:
        parts.setdefault(group.part(stored.position.partition), []).append(stored)
    if group.ordered:
        return sum(_park_settled(db, part, those, now_ms) for part, those in parts.items())
    places = [part.place(stored.position.offset) for part, those in parts.items() for stored in those]
    return sum(_wait(db, group.id, row, number) for row, number in places if _is_stored(db, row))


def drop(db: Connection, group: Known, letter: int) -> bool:
    """Forget a dead letter; False when it is gone."""
    return _forget(db, group.id, letter, "dropped")


def release_key(db: Connection, group: Known, partition: int, key: str) -> bool:
    """Let a key be tried at once, attempts counted anew; False when nothing of it is parked."""
    return parked.release(db, group.part(partition), key)


def drop_key(db: Connection, group: Known, partition: int, key: str) -> int:
    """Forget all that is parked of a key; how many events."""
    part = group.part(partition)
    count = parked.drop(db, part, key)
    db.execute("UPDATE lease SET parked = parked - ? WHERE grp = ? AND log = ?", (count, *part))
    return count


def seek(db: Connection, group: Known, start: Start) -> None:
    """Go on from another place. Whoever holds something finds that it has lost it: nothing of it was his fault."""
    db.execute("DELETE FROM pending WHERE grp = ?", (group.id,))
    if not group.ordered:
        db.execute("DELETE FROM member WHERE grp = ?", (group.id,))
    db.execute("DELETE FROM note WHERE grp = ?", (group.id,))
    for part in group.parts:
        seq = log.begin(db, part.log, start)
        db.execute("UPDATE cursor SET seq = ? WHERE grp = ? AND log = ?", (seq, *part))
        if group.ordered:
            _seek(db, part, seq)


def forget(db: Connection, group: Known) -> None:
    """Delete a group with all that it has."""
    for table in _TABLES:
        db.execute(f"DELETE FROM {table} WHERE grp = ?", (group.id,))
    db.execute("DELETE FROM grp WHERE id = ?", (group.id,))


def train(db: Connection, stream: str, number: int, content: bytes) -> None:
    """Store a dictionary, and that it is in use; 0 for none any more. Raises `BrokerRefused`."""
    known = log.known_as(db, stream)
    there = log.dictionary(db, known, number)
    if number and there is None:
        (count,) = db.execute("SELECT COUNT(*) FROM dictionary WHERE stream = ?", (known.id,)).fetchone()
        if not content or count >= MAX_DICTIONARIES:
            raise refused(stream, number, "FULL" if content else "UNKNOWN")
        db.execute("INSERT INTO dictionary VALUES (?, ?, ?)", (known.id, number, content))
    elif number and content not in (b"", there):
        raise refused(stream, number, "TAKEN")
    policy = replace(known.policy, dictionary=number)
    db.execute("UPDATE stream SET policy = ? WHERE id = ?", (log.written(policy), known.id))


def discard(db: Connection, stream: str, now_s: float) -> bool:
    """Delete a stream with its groups, or a part of it; True when there is more. Raises `BrokerRefused`."""
    known = log.known_as(db, stream)
    names = db.execute("SELECT name FROM grp WHERE stream = ?", (known.id,)).fetchall()
    groups = {name: find(db, stream, name) for (name,) in names}
    for name, group in groups.items():
        if group is not None:
            check_no_members(db, group, name, now_s)
            forget(db, group)
    if any(_empty(db, known.log(partition)) for partition in range(known.partitions)) or _empty_aside(db, known):
        return True
    db.execute("DELETE FROM slot WHERE stream = ?", (known.id,))
    db.execute("DELETE FROM dictionary WHERE stream = ?", (known.id,))
    db.execute("DELETE FROM log WHERE id BETWEEN ? AND ?", known.logs)
    db.execute("DELETE FROM stream WHERE id = ?", (known.id,))
    return False


def check_no_members(db: Connection, group: Known, name: str, now_s: float) -> None:
    """Raise `BrokerRefused` when somebody consumes."""
    if count := alive(db, group.id, now_s):
        raise BrokerRefused(f"group {name!r} of stream {group.stream.name!r} has {count} members: stop them")


def _empty(db: Connection, log_: int) -> bool:
    """Delete the first events and ids of a partition; False when it has none."""
    base = log_ << log.SEQ_BITS
    rows = db.execute(
        "SELECT row, LENGTH(data) + IFNULL(LENGTH(headers), 0) FROM event WHERE row > ? AND row <= ? ORDER BY row LIMIT ?",
        (base, base | log.MAX_SEQ, MAX_DISCARDED),
    ).fetchall()
    if rows:
        end, bytes_ = rows[-1][0], sum(size_bytes for _, size_bytes in rows)
        db.execute("DELETE FROM event WHERE row > ? AND row <= ?", (base, end))
        gone = (end & log.MAX_SEQ, bytes_, log_)
        db.execute("UPDATE log SET gone = MAX(gone, ?), bytes = MAX(0, bytes - ?) WHERE id = ?", gone)
        return True
    some = "SELECT id FROM remembered WHERE log = ? LIMIT ?"
    ids = db.execute(
        f"DELETE FROM remembered WHERE log = ? AND id IN ({some})",
        (log_, log_, MAX_DISCARDED),
    ).rowcount
    db.execute("UPDATE log SET ids = ids - ? WHERE id = ?", (ids, log_))
    return ids > 0


def _empty_aside(db: Connection, stream: log.Known) -> bool:
    """Delete some events that are not due yet; False when there are none."""
    some = "SELECT id FROM delayed WHERE stream = ? LIMIT ?"
    gone = db.execute(f"DELETE FROM delayed WHERE id IN ({some})", (stream.id, MAX_DISCARDED)).rowcount
    db.execute("UPDATE stream SET delayed = delayed - ? WHERE id = ?", (gone, stream.id))
    return gone > 0


def _seek(db: Connection, part: Part, seq: int) -> None:
    parked.drop_behind(db, part, part.log << log.SEQ_BITS | seq)
    db.execute(
        "UPDATE lease SET owner = '', epoch = epoch + 1, clean = 1, want = '', next = '', h = 0, open = '', "
        "parked = (SELECT COUNT(*) FROM parked AS p WHERE p.grp = lease.grp AND p.log = lease.log) "
        "WHERE grp = ? AND log = ?",
        part,
    )


def _park(db: Connection, part: Part, events: Sequence[Stored], now_ms: int) -> int:
    for stored in events:
        parked.park(db, part, Park(_key(stored), stored), now_ms)
    db.execute("UPDATE lease SET parked = parked + ? WHERE grp = ? AND log = ?", (len(events), *part))
    return len(events)


def _park_settled(db: Connection, part: Part, events: Sequence[Stored], now_ms: int) -> int:
    """Park those events that are settled, and not parked."""
    w, h, opened = db.execute(
        "SELECT seq, h, open FROM cursor JOIN lease USING (grp, log) WHERE grp = ? AND log = ?", part
    ).fetchone()
    last = (part.log << log.SEQ_BITS) + max(w, h)
    passed_over = {part.log << log.SEQ_BITS | int(seq) for seq in opened.split()}
    waiting = {key: parked.places(db, part, key) for key in {_key(stored) for stored in events}}
    settled: list[Stored] = []
    for stored in events:
        place, waits = part.place(stored.position.offset), waiting[_key(stored)]
        if place[0] <= last and place[0] not in passed_over and place not in waits:
            waits.add(place)
            settled.append(stored)
    return _park(db, part, settled, now_ms)


def _key(stored: Stored) -> str:
    return stored.record.key or keyless(stored.position.offset)


def _is_stored(db: Connection, row: int) -> bool:
    return db.execute("SELECT 1 FROM event WHERE row = ?", (row,)).fetchone() is not None


def _wait(db: Connection, group: int, row: int, part: int | None) -> bool:
    """Let an event be claimed again, or this one of a pack.

    False when it comes by itself, as it may after a seek: it is not to come twice.
    """
    added = db.execute(
        "INSERT INTO pending (grp, consumer, row, attempt, due_ms, left) SELECT grp, 0, ?, 0, 0, ? FROM cursor "
        f"WHERE grp = ? AND log = ? AND seq >= ? AND NOT EXISTS (SELECT 1 FROM pending {_PENDING})",
        (row, part, group, row >> log.SEQ_BITS, row & log.MAX_SEQ, group, row, group),
    )
    return added.rowcount > 0 or (part is not None and _join(db, group, row, part))


def _join(db: Connection, group: int, row: int, part: int) -> bool:
    """Let an event of a pack that is held, or waits, come with what is left of that; False when it does already."""
    joined = db.execute(
        f"UPDATE pending SET given = IFNULL(given || ' ', '') || ? {_PENDING} "
        "AND INSTR(' ' || left || ' ' || IFNULL(given, '') || ' ', ?) = 0",
        (part, group, row, group, f" {part} "),
    )
    return joined.rowcount > 0


def _forget(db: Connection, group: int, letter: int, counter: str) -> bool:
    found = db.execute("SELECT row FROM dead WHERE id = ? AND grp = ?", (letter, group)).fetchone()
    if found is None:
        return False
    db.execute("DELETE FROM dead WHERE id = ?", (letter,))
    db.execute("UPDATE cursor SET dead = dead - 1 WHERE grp = ? AND log = ?", (group, found[0] >> log.SEQ_BITS))
    db.execute(f"UPDATE grp SET {counter} = {counter} + 1 WHERE id = ?", (group,))
    return True
