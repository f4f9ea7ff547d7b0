"""What happens to a group in the order of keys in the file: each function is one step of it, inside one transaction.

Every step of an owner finds its lease by partition, owner and epoch, and answers None, False or LOST when that is not its
own any more: whoever was taken over changes nothing. `cursor.seq` is `w`; `lease` and the tables behind it are the rest of
what `brokers/ledger.py` draws. Names are never used again and epochs grow, so a lease needs no look at its owner's fence.
"""

# ruff: noqa: S608 - what statements are put together from are constants of this file

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from sqlite3 import Connection
from typing import NamedTuple

from millstream.brokers.base import Claim, Output
from millstream.brokers.ledger import (
    Bury,
    Commit,
    Committed,
    Cursor,
    Delay,
    Grant,
    Heads,
    Lease,
    Park,
    Pop,
    State,
)
from millstream.brokers.sqlite import letters, log, loss, parked, storing
from millstream.brokers.sqlite.member import Member, present
from millstream.brokers.sqlite.parked import Part
from millstream.errors import LeaseLost
from millstream.units import MAX_DEAD, MAX_PARTITIONS

MAX_PAGES = 16  # partitions in one read: three events of each of 256 cost three times as much as sixty of each of 16

_OURS = "WHERE grp = ? AND log = ? AND owner = ? AND epoch = ?"
_NOTES = "WHERE grp = ? AND row BETWEEN ? AND ?"


class Sight(NamedTuple):
    """A group as it is: its tick, its members with theirs, its leases."""

    tick: int
    members: Mapping[str, int]
    leases: Sequence[Lease]


def look(db: Connection, me: Member) -> Sight:
    """See who lives, and who has what; writes nothing. Raises `LeaseLost` when there is no such group."""
    found = db.execute("SELECT tick FROM grp WHERE id = ?", (me.group,)).fetchone()
    if found is None:
        raise LeaseLost("the group was deleted")
    members = db.execute("SELECT name, tick FROM member WHERE grp = ?", (me.group,)).fetchall()
    rows = db.execute(
        "SELECT log, owner, epoch, want, next, "
        "(SELECT MIN(due_ms) FROM parked_key AS k WHERE k.grp = lease.grp AND k.log = lease.log) "
        "FROM lease WHERE grp = ? ORDER BY log",
        (me.group,),
    )
    leases = [
        Lease(id_ % MAX_PARTITIONS, owner, epoch, want, next_, float("inf") if due_ms is None else due_ms)
        for id_, owner, epoch, want, next_, due_ms in rows.fetchall()
    ]
    return Sight(found[0], dict(members), leases)


def acquire(db: Connection, me: Member, seen: Lease, tick: int) -> Grant | None:
    """Take a lease that is free, or whose owner has not beaten since this tick; None when it is not as it was seen."""
    part = _part(me, seen.partition)
    lease = db.execute(
        "SELECT owner, epoch, clean, h, open, parked FROM lease WHERE grp = ? AND log = ?", part
    ).fetchone()
    if not present(db, me):
        raise LeaseLost(f"{me.name} was found silent")
    if lease is None or lease[:2] != (seen.owner, seen.epoch) or _holds(db, me, seen.owner, tick):
        return None
    _, epoch, clean, h, opened, count = lease
    mark = loss.mark(db, *part, h, opened)
    loss.count(db, me.group, mark.lost)
    db.execute("UPDATE cursor SET seq = ? WHERE grp = ? AND log = ?", (mark.w, *part))
    db.execute(
        "UPDATE lease SET owner = ?, epoch = epoch + 1, clean = 0, want = '', next = '', commits = 0, skipped = 0, "
        "h = ?, open = ? "
        "WHERE grp = ? AND log = ?",
        (me.name, mark.h, " ".join(map(str, mark.open)), *part),
    )
    parked.crashed(db, part, not clean)
    keys = db.execute("SELECT key FROM parked_key WHERE grp = ? AND log = ?", part).fetchall()
    return Grant(
        seen.partition,
        epoch + 1,
        w=_offset(mark.w),
        ordinal=mark.w,
        h=_offset(mark.h),
        open=frozenset(map(str, mark.open)),
        clean=bool(clean),
        last=_offset(mark.last),
        parked=frozenset(key for (key,) in keys),
        events_parked=count,
        notes=_notes(db, part, log.MAX_SEQ if mark.regressed else mark.w, not clean),
        lost=mark.lost,
        regressed=mark.regressed,
    )


def ask(db: Connection, me: Member, seen: Lease) -> None:
    """Ask the owner of a lease for it, if it is as it was seen."""
    db.execute(
        f"UPDATE lease SET want = ? {_OURS} AND want = ?",
        (me.name, *_part(me, seen.partition), seen.owner, seen.epoch, seen.want),
    )


def release(db: Connection, me: Member, partition: int, epoch: int, heir: str) -> None:
    """Give a lease back."""
    db.execute(
        f"UPDATE lease SET owner = '', next = ?, want = '', clean = 1 {_OURS}",
        (heir, *_part(me, partition), me.name, epoch),
    )


def tidy(db: Connection, me: Member, tick: int) -> list[str]:
    """Take away the fence of members that have not beaten since this tick and own nothing; their names.

    Who is as silent as those it judges, judges nobody.
    """
    if not _alive(db, me, me.name, tick):
        return []
    owners = {owner for (owner,) in db.execute("SELECT owner FROM lease WHERE grp = ?", (me.group,)).fetchall()}
    silent = db.execute("SELECT id, name FROM member WHERE grp = ? AND tick <= ?", (me.group, tick)).fetchall()
    gone = [(id_, name) for id_, name in silent if name not in owners]
    db.executemany("DELETE FROM member WHERE id = ?", [(id_,) for id_, _ in gone])
    return [name for _, name in gone]


def leave(db: Connection, me: Member) -> None:
    """Be a member no longer."""
    db.execute("DELETE FROM member WHERE id = ? AND nonce = ?", (me.id, me.nonce))


def read(db: Connection, me: Member, cursors: Mapping[int, Cursor], limit: int, turn: int) -> list[Claim]:
    """Events behind the cursors, in order within each partition; a like share of each that has some.

    Where those are many, of the next ones behind the partition `turn`.
    """
    logs = log.log_of(me.stream, min(cursors)), log.log_of(me.stream, max(cursors))
    ends = db.execute("SELECT id, last FROM log WHERE id BETWEEN ? AND ?", logs).fetchall()
    found = [(id_, cursors[id_ % MAX_PARTITIONS], last) for id_, last in ends if id_ % MAX_PARTITIONS in cursors]
    fresh = [(id_, cursor) for id_, cursor, last in found if last > int(cursor.after or 0)]
    fresh.sort(key=lambda part: (part[0] % MAX_PARTITIONS <= turn, part[0]))
    some = fresh[:MAX_PAGES]
    claims: list[Claim] = []
    for id_, cursor in some:
        base = id_ << log.SEQ_BITS
        budget = log.Budget(min(cursor.room, max(1, limit // len(some))), log.MAX_TAKE_BYTES // len(some))
        page = log.page(db, base | int(cursor.after or 0), base | log.MAX_SEQ, budget)
        claims += [Claim.of(stored, 1, token=cursor.epoch) for stored in page]
    return claims


def heads(
    db: Connection, me: Member, partition: int, epoch: int, busy: Collection[str], limit: int, now_ms: int
) -> Heads | None:
    """Begin the first events of parked keys that are due and not busy; None when the lease is not ours."""
    part = _part(me, partition)
    return parked.heads(db, part, busy, limit, now_ms, epoch) if _owns(db, part, me, epoch) else None


def begin(db: Connection, me: Member, partition: int, epoch: int, offsets: Sequence[str]) -> bool:
    """Note that the handlers of these suspects start now; False when the lease is not ours."""
    part = _part(me, partition)
    if not _owns(db, part, me, epoch):
        return False
    db.executemany(
        "INSERT INTO note (grp, row, started) VALUES (?, ?, 1) ON CONFLICT (grp, row) DO UPDATE SET started = 1",
        [(part.group, part.row(offset)) for offset in offsets],
    )
    return True


def commit(
    db: Connection, me: Member, commits: Sequence[Commit], inside: Callable[[str], str], now_ms: int
) -> list[Committed]:
    """Store progress with its effects: a commit is stored as a whole, or changes nothing."""
    return [_commit(db, me, commit, inside, now_ms) for commit in commits]


def _commit(db: Connection, me: Member, commit: Commit, inside: Callable[[str], str], now_ms: int) -> Committed:
    part = _part(me, commit.partition)
    ours = (*part, me.name, commit.epoch)
    lease = db.execute(
        f"SELECT commits, parked, dead, skipped FROM lease JOIN cursor USING (grp, log) {_OURS}", ours
    ).fetchone()
    if lease is None:
        return Committed(State.LOST)
    stored, count, dead, skipped = lease
    if commit.seq != stored:
        buried = sum(isinstance(effect, Bury) for effect in commit.effects)
        if buried and dead + buried > MAX_DEAD:
            return Committed(State.DEAD_FULL)
        more = _apply(db, part, commit, inside, now_ms)
        _move(db, me, part, commit, buried, more)
        _skip(db, part, commit, skipped)
        count += more
    popped = {effect.key for effect in commit.effects if isinstance(effect, Pop)}
    emptied = frozenset(key for key in popped if not parked.waits(db, part, key))
    return Committed(State.STORED, emptied, count)


def _apply(db: Connection, part: Part, commit: Commit, inside: Callable[[str], str], now_ms: int) -> int:
    """Store the effects; by how many events there are more parked."""
    more = 0
    outputs: list[Output] = []
    for effect in commit.effects:
        match effect:
            case Output():
                outputs.append(effect)
            case Bury():
                letters.bury(db, part, effect, now_ms)
            case Park():
                parked.park(db, part, effect, now_ms)
                more += 1
            case Delay():
                parked.delay(db, part, effect)
            case Pop():
                more -= parked.pop(db, part, effect)
    storing.store_outputs(db, outputs, inside, now_ms)
    return more


def _move(db: Connection, me: Member, part: Part, commit: Commit, buried: int, more: int) -> None:
    db.execute(
        "UPDATE cursor SET seq = ?, dead = dead + ? WHERE grp = ? AND log = ?", (int(commit.w or 0), buried, *part)
    )
    db.execute(
        "UPDATE lease SET commits = ?, h = ?, open = ?, parked = parked + ? WHERE grp = ? AND log = ?",
        (commit.seq, int(commit.h or 0), " ".join(commit.open), more, *part),
    )
    if commit.cleared:
        rows = [(me.group, part.log << log.SEQ_BITS | int(offset)) for offset in commit.cleared]
        db.executemany("DELETE FROM note WHERE grp = ? AND row = ?", rows)
    if commit.done or commit.retried:
        counts = (commit.done, commit.retried, me.group)
        db.execute("UPDATE grp SET done = done + ?, retried = retried + ? WHERE id = ?", counts)


def _skip(db: Connection, part: Part, commit: Commit, skipped: int) -> None:
    """Count as lost what the owner has read past: more sequence numbers than events."""
    holes = skipped if commit.ordinal is None else int(commit.w or 0) - commit.ordinal
    if holes != skipped:
        db.execute("UPDATE lease SET skipped = ? WHERE grp = ? AND log = ?", (holes, *part))
        loss.count(db, part.group, holes - skipped)


def _notes(db: Connection, part: Part, w: int, crashed: bool) -> dict[str, int]:
    """In how many crashes each event behind `w` was running, the last one included."""
    base = part.log << log.SEQ_BITS
    db.execute(f"DELETE FROM note {_NOTES}", (part.group, base, base | w))
    behind = (part.group, base | w, base | log.MAX_SEQ)
    db.execute(f"UPDATE note SET crashes = crashes + ?, started = 0 {_NOTES} AND started = 1", (crashed, *behind))
    rows = db.execute(f"SELECT row, crashes FROM note {_NOTES}", behind).fetchall()
    return {_offset(row & log.MAX_SEQ): crashes for row, crashes in rows}


def _holds(db: Connection, me: Member, owner: str, tick: int) -> bool:
    """True when a lease cannot be taken from another owner, who lives, or whom we may not judge."""
    if owner == me.name or not _alive(db, me, owner, -1):
        return False
    return _alive(db, me, owner, tick) or not _alive(db, me, me.name, tick)


def _alive(db: Connection, me: Member, name: str, tick: int) -> bool:
    """True when there is such a member, and it has beaten since this tick."""
    found = db.execute("SELECT tick FROM member WHERE grp = ? AND name = ?", (me.group, name)).fetchone()
    return found is not None and found[0] > tick


def _owns(db: Connection, part: Part, me: Member, epoch: int) -> bool:
    return db.execute(f"SELECT 1 FROM lease {_OURS}", (*part, me.name, epoch)).fetchone() is not None


def _part(me: Member, partition: int) -> Part:
    return Part(me.group, log.log_of(me.stream, partition))


def _offset(seq: int) -> str:
    return str(seq or "")
