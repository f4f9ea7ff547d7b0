"""What happens to a group in the file: each function is one step of it, inside one transaction.

Every step of a member begins with its fence and answers None, or False, when that is gone. `consumer.py` draws the states.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import NamedTuple

from millstream.brokers.base import (
    Claim,
    Dead,
    Done,
    Later,
    Outcome,
    Position,
    Record,
    Settlement,
    Stored,
    Subscription,
    check_owner,
)
from millstream.brokers.sqlite import log
from millstream.units import DEAD_FULL_S, MAX_APPEND_BYTES, MAX_DEAD, MAX_ERROR_CHARS

MAX_EVICTED = 8  # members in one transaction; the next beat takes the others
MAX_TAKE_BYTES = MAX_APPEND_BYTES  # events in one answer, the first one apart

_FINISH = "DELETE FROM pending WHERE grp = ? AND consumer = ? AND row = ? AND attempt = ?"
_WAIT = (
    "UPDATE pending SET consumer = 0, due_ms = ?, attempt = attempt - ?, postponed = postponed + ?, "
    "suspect = 0, started = 0 WHERE grp = ? AND consumer = ? AND row = ? AND attempt = ?"
)


class Life(NamedTuple):
    """Who enters."""

    name: str
    nonce: str
    beat_s: float


class Member(NamedTuple):
    """One life of a consumer: what it needs to find its own rows."""

    id: int
    nonce: str
    group: int
    stream: int


class Wish(NamedTuple):
    """What a fetch asks for."""

    limit: int
    now_ms: int
    turn: int
    """Grows by one with every fetch: each begins one partition further, or a busy first one would starve the others."""
    unsure: bool
    """Look first for what is held and not known."""


class Taken(NamedTuple):
    """What was claimed."""

    claims: list[Claim]
    unsure: bool
    """There may be more of what is held and not known."""


class Beat(NamedTuple):
    """A group's tick, and that of the other member who beat least recently."""

    tick: int
    oldest: int


class Look(NamedTuple):
    """What there is to do in a group."""

    ready: bool
    due_ms: int | None
    tick: int
    oldest: int


def enter(db: sqlite3.Connection, name: str, subscription: Subscription, life: Life) -> Member:
    """Join the group, which is made if it is new. Raises `GroupOwned`, `StreamMismatch`."""
    stream = log.declare(db, name, subscription.stream)
    found = db.execute(
        "SELECT id, owner FROM grp WHERE stream = ? AND name = ?", (stream.id, subscription.group)
    ).fetchone()
    group, owner = found or (_make(db, stream, subscription), subscription.owner)
    check_owner(subscription.stream.name, subscription.group, owner, subscription.owner)
    tick = _tick(db, group)
    row = (group, life.name, life.nonce, tick, life.beat_s, subscription.lease_s)
    added = db.execute("INSERT INTO member (grp, name, nonce, tick, beat_s, lease_s) VALUES (?, ?, ?, ?, ?, ?)", row)
    assert added.lastrowid is not None
    return Member(added.lastrowid, life.nonce, group, stream.id)


def leave(db: sqlite3.Connection, me: Member) -> None:
    """Hand back all that is held, uncounted, and give up the fence."""
    hand_back(db, me, None)
    db.execute("DELETE FROM member WHERE id = ? AND nonce = ?", (me.id, me.nonce))


def hand_back(db: sqlite3.Connection, me: Member, partitions: Iterable[int] | None) -> None:
    """Let what is held of these partitions (None: of all) wait, due at once, as if it had never been claimed."""
    if not _present(db, me):
        return
    for first, last in _ranges(me.stream, partitions):
        db.execute(
            "UPDATE pending SET consumer = 0, due_ms = 0, attempt = attempt - 1, started = 0 "
            "WHERE grp = ? AND consumer = ? AND row BETWEEN ? AND ?",
            (me.group, me.id, first, last),
        )


def beat(db: sqlite3.Connection, me: Member, beat_s: float) -> Beat | None:
    """Raise the group's tick, and go with it."""
    if not _present(db, me):
        return None
    tick = _tick(db, me.group)
    db.execute("UPDATE member SET tick = ?, beat_s = ? WHERE id = ?", (tick, beat_s, me.id))
    return Beat(tick, _oldest(db, me, tick))


def evict(db: sqlite3.Connection, me: Member, tick: int) -> list[tuple[str, int]]:
    """Take away the fence, and what they hold, of members that have not beaten since this tick: their names and counts.

    Their attempts stay counted, what they held is suspect. Who is as silent as those it judges, judges nobody.
    """
    mine = db.execute("SELECT tick FROM member WHERE id = ? AND nonce = ?", (me.id, me.nonce)).fetchone()
    if mine is None or mine[0] <= tick:
        return []
    silent = db.execute(
        "SELECT id, name FROM member WHERE grp = ? AND tick <= ? ORDER BY tick LIMIT ?", (me.group, tick, MAX_EVICTED)
    ).fetchall()
    return [(name, _evict(db, me.group, member)) for member, name in silent]


def look(db: sqlite3.Connection, me: Member, now_ms: int) -> Look:
    """What there is to do; writes nothing."""
    (due_ms,) = db.execute("SELECT MIN(due_ms) FROM pending WHERE grp = ? AND consumer = 0", (me.group,)).fetchone()
    ready = due_ms is not None and due_ms <= now_ms
    if not ready:
        fresh = "SELECT 1 FROM cursor JOIN log ON log.id = cursor.log WHERE grp = ? AND last > seq LIMIT 1"
        ready = db.execute(fresh, (me.group,)).fetchone() is not None
    (tick,) = db.execute("SELECT tick FROM grp WHERE id = ?", (me.group,)).fetchone()
    return Look(ready, due_ms, tick, _oldest(db, me, tick))


def take(db: sqlite3.Connection, me: Member, wish: Wish, held: Container[Position]) -> Taken | None:
    """Claim events: those due again first, then new ones. Nothing of what is held already."""
    if not _present(db, me):
        return None
    budget = _Budget(wish.limit)
    if wish.unsure and (found := list(_recover(db, me, budget, held))):
        return Taken(found, unsure=True)
    claims = _take_due(db, me, wish.now_ms, budget, held)
    if budget.events:
        claims += _take_fresh(db, me, wish.turn, budget)
    return Taken(claims, unsure=False)


def begin(db: sqlite3.Connection, me: Member, positions: Sequence[Position]) -> bool:
    """Note that these suspects are started now: all of them, else nothing and False."""
    if not _present(db, me):
        return False
    mine = [(me.group, me.id, log.row_of(me.stream, position)) for position in positions]
    held = "SELECT 1 FROM pending WHERE grp = ? AND consumer = ? AND row = ?"
    if any(db.execute(held, row).fetchone() is None for row in mine):
        return False
    db.executemany("UPDATE pending SET started = 1 WHERE grp = ? AND consumer = ? AND row = ? AND suspect > 0", mine)
    return True


def wakes(settlement: Settlement) -> bool:
    """True when somebody may find something to do after it."""
    return bool(settlement.outputs) or not isinstance(settlement.outcome, Done)


def settle(
    db: sqlite3.Connection,
    me: Member,
    items: Sequence[tuple[Settlement, int]],
    inside: Callable[[str], str],
    now_ms: int,
) -> list[bool] | None:
    """Store outcomes, and their outputs, of what is held at the attempt given; False for all else."""
    if not _present(db, me):
        return None
    outputs: dict[str, list[Record]] = {}
    done = retried = 0
    results = []
    for settlement, attempt in items:
        mine = (me.group, me.id, log.row_of(me.stream, settlement.position), attempt) if attempt else None
        settled = mine is not None and _settle(db, mine, settlement.outcome, now_ms)
        results.append(settled)
        if settled:
            done += isinstance(settlement.outcome, Done)
            retried += isinstance(settlement.outcome, Later) and settlement.outcome.counted
            for output in settlement.outputs:
                outputs.setdefault(output.stream, []).append(output.record)
    for stream, records in outputs.items():
        log.store(db, inside(stream), records, now_ms)
    if done or retried:
        db.execute("UPDATE grp SET done = done + ?, retried = retried + ? WHERE id = ?", (done, retried, me.group))
    return results


def replay(db: sqlite3.Connection, group: int, letter: int) -> bool:
    """Let the event of a dead letter wait, due at once, as if it were new; False when either is gone."""
    found = db.execute(
        "SELECT dead.row FROM dead JOIN event ON event.row = dead.row WHERE dead.id = ? AND grp = ?", (letter, group)
    ).fetchone()
    if found is None or not _forget(db, group, letter, "replayed"):
        return False
    db.execute("INSERT INTO pending (grp, consumer, row, attempt, due_ms) VALUES (?, 0, ?, 0, 0)", (group, found[0]))
    return True


def drop(db: sqlite3.Connection, group: int, letter: int) -> bool:
    """Forget a dead letter; False when it is gone."""
    return _forget(db, group, letter, "dropped")


def _make(db: sqlite3.Connection, stream: log.Known, subscription: Subscription) -> int:
    made = db.execute(
        "INSERT INTO grp (stream, name, owner) VALUES (?, ?, ?)", (stream.id, subscription.group, subscription.owner)
    )
    assert made.lastrowid is not None
    logs = [stream.log(partition) for partition in range(stream.partitions)]
    db.executemany(
        "INSERT INTO cursor (grp, log, seq) VALUES (?, ?, ?)",
        [(made.lastrowid, id_, log.locate(db, id_, subscription.start)) for id_ in logs],
    )
    return made.lastrowid


def _present(db: sqlite3.Connection, me: Member) -> bool:
    return db.execute("SELECT 1 FROM member WHERE id = ? AND nonce = ?", (me.id, me.nonce)).fetchone() is not None


def _tick(db: sqlite3.Connection, group: int) -> int:
    db.execute("UPDATE grp SET tick = tick + 1 WHERE id = ?", (group,))
    (tick,) = db.execute("SELECT tick FROM grp WHERE id = ?", (group,)).fetchone()
    return int(tick)


def _oldest(db: sqlite3.Connection, me: Member, tick: int) -> int:
    found = db.execute(
        "SELECT tick FROM member WHERE grp = ? AND id <> ? ORDER BY tick LIMIT 1", (me.group, me.id)
    ).fetchone()
    return int(found[0]) if found else tick + 1


def _evict(db: sqlite3.Connection, group: int, member: int) -> int:
    (events,) = db.execute("SELECT COUNT(*) FROM pending WHERE grp = ? AND consumer = ?", (group, member)).fetchone()
    # The only one that was held is suspected as if it had been seen to start: nothing else can be to blame.
    db.execute(
        "UPDATE pending SET consumer = 0, due_ms = 0, started = 0, "
        "suspect = CASE WHEN suspect = 0 THEN ? ELSE suspect + started END WHERE grp = ? AND consumer = ?",
        (2 if events == 1 else 1, group, member),
    )
    db.execute("DELETE FROM member WHERE id = ?", (member,))
    return int(events)


def _ranges(stream: int, partitions: Iterable[int] | None) -> list[tuple[int, int]]:
    if partitions is None:
        return [(log.first_row(stream, 0), log.first_row(stream + 1, 0) - 1)]
    return [(log.first_row(stream, p), log.first_row(stream, p + 1) - 1) for p in partitions]


class _Budget:
    """What one answer may still hold."""

    def __init__(self, events: int) -> None:
        self.events = events
        self._bytes = 0

    def spend(self, stored: Stored) -> bool:
        """Count an event in; False once there is no room for another one."""
        self._bytes += len(stored.record.data) + len(stored.record.headers)
        self.events = self.events - 1 if self._bytes < MAX_TAKE_BYTES else 0
        return self.events > 0


def _recover(db: sqlite3.Connection, me: Member, budget: _Budget, held: Container[Position]) -> Iterator[Claim]:
    rows = db.execute(
        f"SELECT attempt, suspect, postponed, {log.COLUMNS} FROM pending JOIN event ON event.row = pending.row "  # noqa: S608
        "WHERE grp = ? AND consumer = ?",
        (me.group, me.id),
    )
    return _claims(rows, budget, held, again=0)


def _take_due(
    db: sqlite3.Connection, me: Member, now_ms: int, budget: _Budget, held: Container[Position]
) -> list[Claim]:
    rows = db.execute(
        f"SELECT attempt, suspect, postponed, {log.COLUMNS} FROM pending JOIN event ON event.row = pending.row "  # noqa: S608
        "WHERE grp = ? AND consumer = 0 AND due_ms <= ? ORDER BY due_ms LIMIT ?",
        (me.group, now_ms, budget.events),
    )
    claims = list(_claims(rows, budget, held, again=1))
    db.executemany(
        "UPDATE pending SET consumer = ?, due_ms = NULL, attempt = attempt + 1 WHERE grp = ? AND consumer = 0 AND row = ?",
        [(me.id, me.group, log.row_of(me.stream, claim.stored.position)) for claim in claims],
    )
    return claims


def _claims(rows: Iterable[log.Row], budget: _Budget, held: Container[Position], again: int) -> Iterator[Claim]:
    for attempt, suspect, postponed, *event in rows:
        stored = log.stored(event)
        if stored.position in held:
            continue
        room = budget.spend(stored)
        yield Claim(stored, attempt + again, suspect, postponed)
        if not room:
            return


def _take_fresh(db: sqlite3.Connection, me: Member, turn: int, budget: _Budget) -> Iterator[Claim]:
    logs = db.execute(
        "SELECT log.id, seq, last FROM cursor JOIN log ON log.id = cursor.log WHERE grp = ? AND last > seq", (me.group,)
    ).fetchall()
    first = turn % len(logs) if logs else 0
    for id_, seq, last in logs[first:] + logs[:first]:
        if not budget.events:
            return
        base, taken = id_ << log.SEQ_BITS, 0
        rows = db.execute(
            f"SELECT {log.COLUMNS} FROM event WHERE row > ? AND row <= ? ORDER BY row LIMIT ?",  # noqa: S608 - a constant
            (base | seq, base | last, budget.events),
        )
        for row in rows:
            stored = log.stored(row)
            taken = row[0]
            room = budget.spend(stored)
            yield Claim(stored, 1)
            if not room:
                break
        if taken:
            db.execute(
                "INSERT INTO pending (grp, consumer, row, attempt) "
                "SELECT ?, ?, row, 1 FROM event WHERE row > ? AND row <= ?",
                (me.group, me.id, base | seq, taken),
            )
            db.execute("UPDATE cursor SET seq = ? WHERE grp = ? AND log = ?", (taken & log.MAX_SEQ, me.group, id_))


def _settle(db: sqlite3.Connection, mine: tuple[int, int, int, int], outcome: Outcome, now_ms: int) -> bool:
    """One outcome. False when the event is not ours at this attempt; then nothing is changed."""
    match outcome:
        case Done():
            return db.execute(_FINISH, mine).rowcount > 0
        case Later(at_ms=at_ms, counted=counted):
            return _wait(db, mine, at_ms, postponed=not counted)
        case Dead():
            return _bury(db, mine, outcome, now_ms)


def _wait(db: sqlite3.Connection, mine: tuple[int, int, int, int], at_ms: int, *, postponed: bool) -> bool:
    # The handler came to an end, so whatever the event is suspected of, it did not kill this time.
    return db.execute(_WAIT, (at_ms, postponed, postponed, *mine)).rowcount > 0


def _bury(db: sqlite3.Connection, mine: tuple[int, int, int, int], why: Dead, now_ms: int) -> bool:
    group, _, row, attempt = mine
    kept = (group, row >> log.SEQ_BITS)
    (dead,) = db.execute("SELECT dead FROM cursor WHERE grp = ? AND log = ?", kept).fetchone()
    if dead >= MAX_DEAD:
        return _wait(db, mine, now_ms + int(DEAD_FULL_S * 1000), postponed=False)
    if not db.execute(_FINISH, mine).rowcount:
        return False
    db.execute(
        "INSERT INTO dead (grp, row, reason, error, attempts, died_ms, "
        "event_id, type, source, stored_ms, time_ms, subject, headers, data) "
        "SELECT ?, row, ?, ?, ?, ?, id, type, source, stored_ms, time_ms, subject, headers, data FROM event WHERE row = ?",
        (group, why.reason, why.error[:MAX_ERROR_CHARS], attempt, now_ms, row),
    )
    db.execute("UPDATE cursor SET dead = dead + 1 WHERE grp = ? AND log = ?", kept)
    return True


def _forget(db: sqlite3.Connection, group: int, letter: int, counter: str) -> bool:
    found = db.execute("SELECT row FROM dead WHERE id = ? AND grp = ?", (letter, group)).fetchone()
    if found is None:
        return False
    db.execute("DELETE FROM dead WHERE id = ?", (letter,))
    db.execute("UPDATE cursor SET dead = dead - 1 WHERE grp = ? AND log = ?", (group, found[0] >> log.SEQ_BITS))
    db.execute(f"UPDATE grp SET {counter} = {counter} + 1 WHERE id = ?", (group,))  # noqa: S608 - one of our own words
    return True
