"""What happens to a group without order in the file: each function is one step of it, inside one transaction.

Every step of a member begins with its fence and answers None, or False, when that is gone. `consumer.py` draws the states.

Among 500 at once, a 200-byte event takes 3.2 µs of CPU here: 1.0 to be read, 0.4 to become a claim, 0.6 for its row in
`pending`, 0.9 to be settled, 0.3 for both commits. Settling took 2.3 with a statement for each event. What is done lies in
runs without a gap, and one DELETE lets go a whole run; only where it finds less than that, since something of it was not
ours any more, it is undone and they go one by one. To count them first cost as much as to let them go.

A pack has one row in `pending`, with what is left of it. What people give back of one that is held joins it only with its
next claim: who holds it does not know of that, so where it is done it waits once more, with that alone.
"""

# ruff: noqa: S608 - what statements are put together from are constants of this file

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import compress
from typing import NamedTuple

from millstream.brokers.base import (
    Claim,
    Dead,
    Done,
    Later,
    Outcome,
    Output,
    Position,
    Settlement,
)
from millstream.brokers.letters import buried, put_off
from millstream.brokers.sqlite import letters, log, loss, storing
from millstream.brokers.sqlite.member import Member, oldest, present
from millstream.brokers.sqlite.parked import Part
from millstream.units import DEAD_FULL_S, MAX_DEAD, MAX_ERROR_CHARS

LEAST_RUN = 8  # events that are worth a savepoint
MAX_EVICTED = 8  # members in one transaction; the next beat takes the others

_OURS = "WHERE grp = ? AND consumer = ? AND row = ? AND attempt = ?"
_FINISH = f"DELETE FROM pending {_OURS} AND given IS NULL"
_FINISH_RUN = (
    "DELETE FROM pending WHERE grp = ? AND consumer = ? AND row BETWEEN ? AND ? AND attempt = ? AND given IS NULL"
)
_COME_AGAIN = (
    "UPDATE pending SET consumer = 0, due_ms = 0, attempt = 0, postponed = 0, suspect = 0, started = 0, "
    f"left = given, given = NULL {_OURS}"
)
_WAIT = (
    "UPDATE pending SET consumer = 0, due_ms = ?, attempt = attempt - ?, postponed = postponed + ?, "
    f"suspect = 0, started = 0, left = IFNULL(?, left) {_OURS}"
)
_LEFT = "IFNULL(left || ' ' || given, left)"


class Wish(NamedTuple):
    """What a fetch asks for."""

    limit: int
    now_ms: int
    turn: int
    """Grows by one with every fetch: each begins one partition further, or a busy first one would starve the others."""
    unsure: bool
    """Look first for what is held and not known."""
    fresh: bool
    """Take new events too."""


class Taken(NamedTuple):
    """What was claimed."""

    claims: list[Claim]
    unsure: bool
    """There may be more of what is held and not known."""


class _Mine(NamedTuple):
    """An event that is held, at one attempt."""

    group: int
    consumer: int
    row: int
    attempt: int

    @property
    def part(self) -> Part:
        """Where it lies."""
        return Part(self.group, self.row >> log.SEQ_BITS)


class Look(NamedTuple):
    """What there is to do in a group."""

    ready: bool
    due_ms: int | None
    tick: int
    oldest: int


def leave(db: sqlite3.Connection, me: Member) -> None:
    """Hand back all that is held, uncounted, and give up the fence."""
    hand_back(db, me, None)
    db.execute("DELETE FROM member WHERE id = ? AND nonce = ?", (me.id, me.nonce))


def hand_back(db: sqlite3.Connection, me: Member, partitions: Iterable[int] | None) -> None:
    """Let what is held of these partitions (None: of all) wait, due at once, as if it had never been claimed."""
    if not present(db, me):
        return
    for first, last in _ranges(me.stream, partitions):
        db.execute(
            "UPDATE pending SET consumer = 0, due_ms = 0, attempt = attempt - 1, started = 0 "
            "WHERE grp = ? AND consumer = ? AND row BETWEEN ? AND ?",
            (me.group, me.id, first, last),
        )


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


def look(db: sqlite3.Connection, me: Member, now_ms: int, *, fresh: bool) -> Look:
    """What there is to do; writes nothing."""
    (due_ms,) = db.execute("SELECT MIN(due_ms) FROM pending WHERE grp = ? AND consumer = 0", (me.group,)).fetchone()
    ready = due_ms is not None and due_ms <= now_ms
    if fresh and not ready:
        unread = "SELECT 1 FROM cursor JOIN log ON log.id = cursor.log WHERE grp = ? AND last > seq LIMIT 1"
        ready = db.execute(unread, (me.group,)).fetchone() is not None
    (tick,) = db.execute("SELECT tick FROM grp WHERE id = ?", (me.group,)).fetchone()
    return Look(ready, due_ms, tick, oldest(db, me, tick))


def take(db: sqlite3.Connection, me: Member, wish: Wish, held: Container[Position]) -> Taken | None:
    """Claim events: those due again first, then new ones. Nothing of what is held already."""
    if not present(db, me):
        return None
    budget = log.Budget(wish.limit)
    if wish.unsure and (found := list(_recover(db, me, budget, held))):
        return Taken(found, unsure=True)
    claims = _take_due(db, me, wish.now_ms, budget, held)
    if budget.events and wish.fresh:
        claims += _take_fresh(db, me, wish.turn, budget)
    return Taken(claims, unsure=False)


def begin(db: sqlite3.Connection, me: Member, positions: Sequence[Position]) -> bool:
    """Note that these suspects are started now: all of them, else nothing and False."""
    if not present(db, me):
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


def finish(
    db: sqlite3.Connection, me: Member, positions: Sequence[Position], attempts: Sequence[int]
) -> list[bool] | None:
    """`settle` for what is done and leaves nothing."""
    if not present(db, me):
        return None
    rows = _rows(me, positions, attempts)
    finished = _finish_all(db, me, zip(rows, attempts, strict=True))
    _count(db, me, len(finished), 0)
    return [finished.pop(row, False) for row in rows]  # told once


def settle(
    db: sqlite3.Connection,
    me: Member,
    settlements: Sequence[Settlement],
    attempts: Sequence[int],
    inside: Callable[[str], str],
    now_ms: int,
) -> list[bool] | None:
    """Store outcomes, and their outputs, of what is held at the attempt given, not 0; False for all else."""
    if not present(db, me):
        return None
    rows = _rows(me, [settlement.position for settlement in settlements], attempts)
    plain = [type(settlement.outcome) is Done and not settlement.letters for settlement in settlements]
    finished = _finish_all(db, me, compress(zip(rows, attempts, strict=True), plain))
    done, retried, outputs, results = len(finished), 0, list[Output](), list[bool]()
    for row, attempt, is_plain, settlement in zip(rows, attempts, plain, settlements, strict=True):
        if is_plain:
            settled = finished.pop(row, False)
        else:
            end = _settle(db, _Mine(me.group, me.id, row, attempt), settlement, now_ms) if attempt else None
            settled = end is not None
            done += isinstance(end, Done)
            retried += isinstance(end, Later) and end.counted
        results.append(settled)
        if settled:
            outputs += settlement.outputs
    storing.store_outputs(db, outputs, inside, now_ms)
    _count(db, me, done, retried)
    return results


def _rows(me: Member, positions: Sequence[Position], attempts: Sequence[int]) -> list[int]:
    """Where these lie; 0 for those that are not held, which may have no place of ours."""
    first = log.log_of(me.stream, 0)
    return [
        first + position.partition << log.SEQ_BITS | int(position.offset) if attempt else 0
        for position, attempt in zip(positions, attempts, strict=True)
    ]


def _count(db: sqlite3.Connection, me: Member, done: int, retried: int) -> None:
    if done or retried:
        db.execute("UPDATE grp SET done = done + ?, retried = retried + ? WHERE id = ?", (done, retried, me.group))


def _finish_all(db: sqlite3.Connection, me: Member, held: Iterable[tuple[int, int]]) -> dict[int, bool]:
    """Let go what is done, and leaves nothing but outputs: rows and attempts. True for each that was ours."""
    done: defaultdict[int, set[int]] = defaultdict(set)
    for row, attempt in held:
        if attempt:
            done[attempt].add(row)
    finished: dict[int, bool] = {}
    for attempt, rows in done.items():
        for run in _runs(sorted(rows)):
            finished |= dict.fromkeys(_finish(db, me, attempt, run), True)
    return finished


def _finish(db: sqlite3.Connection, me: Member, attempt: int, run: Sequence[int]) -> Sequence[int]:
    """Let go rows without a gap: those that are held at this attempt. All at once, as nearly always all of them are."""
    if len(run) >= LEAST_RUN:
        db.execute("SAVEPOINT run")
        gone = db.execute(_FINISH_RUN, (me.group, me.id, run[0], run[-1], attempt)).rowcount
        if gone < len(run):
            db.execute("ROLLBACK TO run")
        db.execute("RELEASE run")
        if gone == len(run):
            return run
    return [row for row in run if _let_go(db, _Mine(me.group, me.id, row, attempt))]


def _runs(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut sorted rows into pieces without a gap."""
    if rows and rows[-1] - rows[0] == len(rows) - 1:
        yield rows
        return
    begin = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield rows[begin:end]
            begin = end


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


def _recover(db: sqlite3.Connection, me: Member, budget: log.Budget, held: Container[Position]) -> Iterator[Claim]:
    rows = db.execute(
        f"SELECT attempt, suspect, postponed, left, {log.COLUMNS} FROM pending JOIN event ON event.row = pending.row "
        "WHERE grp = ? AND consumer = ?",
        (me.group, me.id),
    )
    return _claims(rows, budget, held, again=0)


def _take_due(
    db: sqlite3.Connection, me: Member, now_ms: int, budget: log.Budget, held: Container[Position]
) -> list[Claim]:
    rows = db.execute(
        f"SELECT pending.row, attempt, suspect, postponed, {_LEFT}, {log.COLUMNS} "
        "FROM pending LEFT JOIN event ON event.row = pending.row "
        "WHERE grp = ? AND consumer = 0 AND due_ms <= ? ORDER BY due_ms LIMIT ?",
        (me.group, now_ms, budget.events),
    )
    lost: list[int] = []
    claims = list(_claims(_there(rows, lost), budget, held, again=1))
    _lose(db, me, lost)
    db.executemany(
        f"UPDATE pending SET consumer = ?, due_ms = NULL, attempt = attempt + 1, left = {_LEFT}, given = NULL "
        "WHERE grp = ? AND consumer = 0 AND row = ?",
        [(me.id, me.group, log.row_of(me.stream, claim.position)) for claim in claims],
    )
    return claims


def _there(rows: Iterable[log.Row], lost: list[int]) -> Iterator[log.Row]:
    """Those that have an event still; the places of the others are noted."""
    for row, *rest in rows:
        if rest[-1] is None:
            lost.append(row)
        else:
            yield rest


def _lose(db: sqlite3.Connection, me: Member, rows: Sequence[int]) -> None:
    """Let go what waits and has no event any more."""
    if rows:
        db.executemany(
            "DELETE FROM pending WHERE grp = ? AND consumer = 0 AND row = ?", [(me.group, row) for row in rows]
        )
        loss.count(db, me.group, len(rows))


def _claims(rows: Iterable[log.Row], budget: log.Budget, held: Container[Position], again: int) -> Iterator[Claim]:
    for attempt, suspect, postponed, left, *event in rows:
        stored = log.stored(event)
        if stored.position in held:
            continue
        room = budget.spend(stored)
        yield Claim.of(stored, attempt + again, suspect, postponed, left=log.left(left))
        if not room:
            return


def _take_fresh(db: sqlite3.Connection, me: Member, turn: int, budget: log.Budget) -> list[Claim]:
    logs = db.execute(
        "SELECT log.id, seq, last FROM cursor JOIN log ON log.id = cursor.log WHERE grp = ? AND last > seq",
        (me.group,),
    ).fetchall()
    first = turn % len(logs) if logs else 0
    claims: list[Claim] = []
    for id_, seq, last in logs[first:] + logs[:first]:
        if not budget.events:
            break
        base = id_ << log.SEQ_BITS
        page = log.page(db, base | seq, base | last, budget)
        claims += [Claim(stored.position, stored.record, 1) for stored in page]
        taken = last if budget.events else int(page[-1].position.offset)
        db.execute(
            "INSERT INTO pending (grp, consumer, row, attempt) SELECT ?, ?, row, 1 FROM event WHERE row > ? AND row <= ?",
            (me.group, me.id, base | seq, base | taken),
        )
        db.execute("UPDATE cursor SET seq = ? WHERE grp = ? AND log = ?", (taken, me.group, id_))
        loss.count(db, me.group, taken - seq - len(page))
    return claims


def _settle(db: sqlite3.Connection, mine: _Mine, settlement: Settlement, now_ms: int) -> Outcome | None:
    """One settlement that is not plain; what became of it. None when the event is not ours: then nothing is changed."""
    part, dying = mine.part, len(settlement.letters) + isinstance(settlement.outcome, Dead)
    if dying and _dead(db, part) + dying > MAX_DEAD:
        settlement = put_off(settlement, now_ms + int(DEAD_FULL_S * 1000))
    match settlement.outcome:
        case Done():
            settled = _let_go(db, mine)
        case Later() as later:
            settled = _wait(db, mine, later)
        case Dead() as dead:
            settled = _bury(db, mine, dead, now_ms)
    if not settled:
        return None
    for letter in buried(settlement.position, mine.attempt, settlement.letters):
        letters.bury(db, part, letter, now_ms)
    _count_dead(db, part, len(settlement.letters))
    return settlement.outcome


def _let_go(db: sqlite3.Connection, mine: _Mine) -> bool:
    """It is done, but for what was given back of it meanwhile."""
    return db.execute(_FINISH, mine).rowcount > 0 or db.execute(_COME_AGAIN, mine).rowcount > 0


def _wait(db: sqlite3.Connection, mine: _Mine, later: Later) -> bool:
    # The handler came to an end, so whatever the event is suspected of, it did not kill this time.
    postponed = not later.counted
    return db.execute(_WAIT, (later.at_ms, postponed, postponed, log.left_written(later.left), *mine)).rowcount > 0


def _bury(db: sqlite3.Connection, mine: _Mine, why: Dead, now_ms: int) -> bool:
    if not db.execute(f"DELETE FROM pending {_OURS}", mine).rowcount:
        return False
    kept = db.execute(
        "INSERT INTO dead (grp, row, reason, error, attempts, died_ms, "
        "event_id, type, source, stored_ms, time_ms, subject, headers, data) "
        "SELECT ?, row, ?, ?, ?, ?, id, type, source, stored_ms, time_ms, subject, headers, data FROM event WHERE row = ?",
        (mine.group, why.reason, why.error[:MAX_ERROR_CHARS], mine.attempt, now_ms, mine.row),
    ).rowcount
    if kept:
        _count_dead(db, mine.part, 1)
    else:  # retention took the event while it was held: nothing of it is left to keep
        loss.count(db, mine.group, 1)
    return True


def _dead(db: sqlite3.Connection, part: Part) -> int:
    """How many dead letters of a partition are kept."""
    (count,) = db.execute("SELECT dead FROM cursor WHERE grp = ? AND log = ?", part).fetchone()
    return int(count)


def _count_dead(db: sqlite3.Connection, part: Part, more: int) -> None:
    if more:
        db.execute("UPDATE cursor SET dead = dead + ? WHERE grp = ? AND log = ?", (more, *part))
