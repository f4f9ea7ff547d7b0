"""What is parked in the file: per key a queue of whole events, with the figures of its first one.

Functions of a connection inside a transaction. Whoever parks or removes something counts it in `lease.parked` himself, once
for all that he does.
"""

# ruff: noqa: S608 - what statements are put together from are constants of this file

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice
from sqlite3 import Connection
from typing import NamedTuple

from millstream.brokers.base import Claim, Stored
from millstream.brokers.ledger import Delay, Head, Heads, Park, Pop
from millstream.brokers.letters import waiting
from millstream.brokers.sqlite import log
from millstream.units import MAX_ERROR_CHARS
from millstream.wire.packs import part_of

_EVENT = "row, event_id, type, source, time_ms, time_ms, subject, headers, data"  # as `log.stored` takes it
_OF_KEY = "WHERE grp = ? AND log = ? AND key = ?"
_ANEW = "due_ms = 0, attempts = 0, postponed = 0, crashes = 0, started = 0, error = ''"


class Part(NamedTuple):
    """A group's share in a partition."""

    group: int
    log: int

    def row(self, offset: str) -> int:
        """The place of an event of this partition in the file, or of the pack that it is of."""
        return self.place(offset)[0]

    def place(self, offset: str) -> tuple[int, int | None]:
        """The same, and which event of the pack it is; None for one that is of none."""
        seq, part = part_of(offset)
        return self.log << log.SEQ_BITS | int(seq), part


def park(db: Connection, part: Part, effect: Park, now_ms: int) -> None:
    """Set an event aside behind what is parked of its key."""
    figures = (effect.due_ms, effect.attempts, effect.postponed, effect.error[:MAX_ERROR_CHARS], now_ms)
    db.execute(
        "INSERT INTO parked_key (grp, log, key, due_ms, attempts, postponed, error, since_ms) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (*part, effect.key, *figures),
    )
    record = effect.stored.record
    db.execute(
        "INSERT INTO parked (grp, log, key, row, part, left, event_id, type, source, time_ms, subject, headers, data) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(*part, effect.key, *part.place(effect.stored.position.offset), log.left_written(effect.left)),
            *(record.id, record.type, record.source, record.time_ms, record.key, record.headers, record.data),
        ),
    )


def delay(db: Connection, part: Part, effect: Delay) -> None:
    """Let the first event of a key, if it is this one, be tried again: it did not kill its process."""
    found = _head(db, part, effect)
    if found is not None:
        figures = (effect.due_ms, effect.attempts, effect.postponed, effect.error[:MAX_ERROR_CHARS])
        db.execute(
            "UPDATE parked_key SET due_ms = ?, attempts = ?, postponed = ?, error = ?, crashes = 0, started = 0 "
            f"{_OF_KEY}",
            (*figures, *part, effect.key),
        )
        if effect.left:
            db.execute("UPDATE parked SET left = ? WHERE id = ?", (log.left_written(effect.left), found))


def pop(db: Connection, part: Part, effect: Pop) -> int:
    """Remove the first event of a key, if it is this one; the next is due at once. How many were removed."""
    found = _head(db, part, effect)
    if found is None:
        return 0
    db.execute("DELETE FROM parked WHERE id = ?", (found,))
    if waits(db, part, effect.key):
        release(db, part, effect.key)
    else:
        db.execute(f"DELETE FROM parked_key {_OF_KEY}", (*part, effect.key))
    return 1


def waits(db: Connection, part: Part, key: str) -> bool:
    """True when something is parked of a key."""
    return db.execute(f"SELECT 1 FROM parked {_OF_KEY} LIMIT 1", (*part, key)).fetchone() is not None


def heads(db: Connection, part: Part, busy: Collection[str], limit: int, now_ms: int, token: int) -> Heads:
    """Begin the first events of keys that are due and not busy, and count it."""
    rows = db.execute(
        "SELECT key, due_ms, attempts, crashes, postponed FROM parked_key WHERE grp = ? AND log = ? "
        "ORDER BY due_ms, key LIMIT ?",
        (*part, len(busy) + limit + 1),
    ).fetchall()
    ready = [row for row in rows if row[0] not in busy]
    budget, found = log.Budget(limit), []
    for key, due_ms, attempts, crashes, postponed in ready:
        if due_ms > now_ms or not budget.events:
            break
        db.execute(f"UPDATE parked_key SET attempts = attempts + 1, started = 1 {_OF_KEY}", (*part, key))
        [(stored, left)] = _events(db, part, key, 1)
        budget.spend(stored)
        suspect = crashes + 1 if crashes else 0
        found.append(Head(key, Claim.of(stored, attempts + 1, suspect, postponed, token=token, left=left)))
    return Heads(found, float(ready[len(found)][1]) if len(ready) > len(found) else float("inf"))


def events(db: Connection, part: Part, key: str, limit: int) -> list[Stored]:
    """The first events of a key, in order."""
    return list(islice(waiting(_events(db, part, key, limit)), limit))


def places(db: Connection, part: Part, key: str) -> set[tuple[int, int | None]]:
    """The places of all that is parked of a key."""
    return set(db.execute(f"SELECT row, part FROM parked {_OF_KEY}", (*part, key)).fetchall())


def crashed(db: Connection, part: Part, crashes: int) -> None:
    """The owner is gone: what it had started ran in so many crashes more."""
    db.execute(
        "UPDATE parked_key SET crashes = crashes + ?, started = 0 WHERE grp = ? AND log = ? AND started = 1",
        (crashes, *part),
    )


def release(db: Connection, part: Part, key: str) -> bool:
    """Let the first event of a key be tried at once, as if for the first time; False when nothing is parked of it."""
    return db.execute(f"UPDATE parked_key SET {_ANEW} {_OF_KEY}", (*part, key)).rowcount > 0


def drop(db: Connection, part: Part, key: str) -> int:
    """Forget all that is parked of a key; how many events."""
    db.execute(f"DELETE FROM parked_key {_OF_KEY}", (*part, key))
    return db.execute(f"DELETE FROM parked {_OF_KEY}", (*part, key)).rowcount


def drop_behind(db: Connection, part: Part, row: int) -> None:
    """Forget all that is parked and lies behind this place."""
    head = "(SELECT row FROM parked AS p WHERE p.grp = k.grp AND p.log = k.log AND p.key = k.key ORDER BY id LIMIT 1)"
    db.execute(f"UPDATE parked_key AS k SET {_ANEW} WHERE grp = ? AND log = ? AND {head} > ?", (*part, row))
    db.execute("DELETE FROM parked WHERE grp = ? AND log = ? AND row > ?", (*part, row))
    db.execute(f"DELETE FROM parked_key AS k WHERE grp = ? AND log = ? AND {head} IS NULL", part)


def _head(db: Connection, part: Part, effect: Delay | Pop) -> int | None:
    """The number of a key's first event, if it is the one that the effect is about."""
    found = db.execute(
        f"SELECT id, row, part FROM parked {_OF_KEY} ORDER BY id LIMIT 1", (*part, effect.key)
    ).fetchone()
    return found[0] if found and found[1:] == part.place(effect.offset) else None


def _events(db: Connection, part: Part, key: str, limit: int) -> list[tuple[Stored, Sequence[int]]]:
    """The first events of a key, and what is left of those that are packs."""
    rows = db.execute(f"SELECT part, left, {_EVENT} FROM parked {_OF_KEY} ORDER BY id LIMIT ?", (*part, key, limit))
    return [(log.stored(event, number), log.left(left)) for number, left, *event in rows.fetchall()]
