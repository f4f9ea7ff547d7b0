"""What groups have lost: events that were gone before they had settled them. Functions of a connection in a transaction.

Each is counted once, by whoever moves the group past it:

    tend        for groups without order; in an ordered one, for partitions that nobody works on
    acquire     whoever takes an ordered partition, for what went while it had another owner
    commit      the owner of an ordered partition, who has read past a hole: more sequence numbers than events
    take        a member of a group without order, likewise

What a living member holds is handled all the same. It is lost when that member gives it back, or dies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from sqlite3 import Connection
from typing import NamedTuple

from millstream.brokers.sqlite import log
from millstream.brokers.sqlite.pins import Keeper


class Mark(NamedTuple):
    """How far an ordered group has settled a partition, of what is there."""

    w: int
    h: int
    open: Sequence[int]
    last: int
    lost: int = 0
    regressed: bool = False


def mark(db: Connection, group: int, log_: int, h: int, opened: str) -> Mark:
    """The mark of a group behind what is gone, and what it has lost by that."""
    w, last = db.execute(
        "SELECT seq, last FROM cursor JOIN log ON log.id = cursor.log WHERE grp = ? AND log = ?", (group, log_)
    ).fetchone()
    if last < w:
        return Mark(0, 0, (), last, regressed=True)
    base = log_ << log.SEQ_BITS
    (first,) = db.execute("SELECT MIN(row) FROM event WHERE row > ? AND row <= ?", (base | w, base | last)).fetchone()
    gone = last if first is None else (first & log.MAX_SEQ) - 1
    ahead = [int(seq) for seq in opened.split()]
    lost = max(0, gone - max(w, h)) + sum(seq <= gone for seq in ahead)
    return Mark(gone, h if h > gone else 0, [seq for seq in ahead if seq > gone], last, lost)


def count(db: Connection, group: int, lost: int) -> None:
    """Count events as lost."""
    if lost:
        db.execute("UPDATE grp SET lost = lost + ? WHERE id = ?", (lost, group))


def pass_by(db: Connection, log_: int, gone: int, groups: Iterable[Keeper]) -> None:
    """Move groups past the end of what is gone of a partition, and count what they lose by that."""
    for group in groups:
        lose = _pass_by_in_order if group.ordered else _pass_by
        count(db, group.id, lose(db, log_, gone, group))


def catch_up(db: Connection, groups: Iterable[Keeper]) -> None:
    """Count what groups have lost in partitions whose owners have left them since."""
    for group in groups:
        behind = db.execute(
            "SELECT log.id, gone FROM cursor JOIN log ON log.id = cursor.log WHERE grp = ? AND seq < gone", (group.id,)
        ).fetchall()
        for log_, gone in behind:
            pass_by(db, log_, gone, [group])


def _pass_by(db: Connection, log_: int, gone: int, group: Keeper) -> int:
    part, base = (group.id, log_), log_ << log.SEQ_BITS
    (seq,) = db.execute("SELECT seq FROM cursor WHERE grp = ? AND log = ?", part).fetchone()
    if seq < gone:
        db.execute("UPDATE cursor SET seq = ? WHERE grp = ? AND log = ?", (gone, *part))
    delete = "DELETE FROM pending WHERE grp = ? AND consumer = ? AND row BETWEEN ? AND ?"
    pending = [db.execute(delete, (group.id, consumer, base, base | gone)).rowcount for consumer in (0, *group.silent)]
    return int(max(0, gone - seq)) + sum(pending)


def _pass_by_in_order(db: Connection, log_: int, gone: int, group: Keeper) -> int:
    part = (group.id, log_)
    owner, h, opened, w = db.execute(
        "SELECT owner, h, open, seq FROM lease JOIN cursor USING (grp, log) WHERE grp = ? AND log = ?", part
    ).fetchone()
    if w >= gone or owner in group.owners:
        return 0
    now = mark(db, group.id, log_, h, opened)
    db.execute("UPDATE cursor SET seq = ? WHERE grp = ? AND log = ?", (now.w, *part))
    # Whoever was silent and comes back must not go on from before: its partition is nobody's now.
    db.execute(
        "UPDATE lease SET owner = '', h = ?, open = ? WHERE grp = ? AND log = ?",
        (now.h, " ".join(map(str, now.open)), *part),
    )
    return now.lost
