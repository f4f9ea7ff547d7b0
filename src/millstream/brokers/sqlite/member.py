"""Members of a group in the file, of either way to consume: each function is one step, inside one transaction.

A member's row in `member` is its fence: without it, it gets nothing any more. `watch.py` says who is silent.
"""

from __future__ import annotations

from sqlite3 import Connection
from typing import NamedTuple

from millstream.brokers.base import Subscription, check_mode, check_owner
from millstream.brokers.sqlite import log


class Life(NamedTuple):
    """Who enters."""

    name: str
    nonce: str
    beat_s: float
    beat_ms: int


class Member(NamedTuple):
    """One life of a consumer: what it needs to find its own rows."""

    id: int
    name: str
    nonce: str
    group: int
    stream: int


class Beat(NamedTuple):
    """A group's tick, and that of the other member who beat least recently."""

    tick: int
    oldest: int


def enter(db: Connection, name: str, subscription: Subscription, life: Life) -> Member:
    """Join the group, which is made if it is new. Raises `GroupOwned`, `StreamMismatch`, `OtherOrder`."""
    stream = log.declare(db, name, subscription.stream)
    group = _known(db, stream, subscription, life.beat_s) or _make(db, stream, subscription, life.beat_ms)
    row = (group, life.name, life.nonce, _tick(db, group, life.beat_ms), life.beat_s, subscription.lease_s)
    added = db.execute("INSERT INTO member (grp, name, nonce, tick, beat_s, lease_s) VALUES (?, ?, ?, ?, ?, ?)", row)
    assert added.lastrowid is not None
    return Member(added.lastrowid, life.name, life.nonce, group, stream.id)


def create(db: Connection, name: str, subscription: Subscription, now_ms: int) -> None:
    """Make the group if it is new, and nobody its member. Raises `GroupOwned`, `StreamMismatch`."""
    stream = log.declare(db, name, subscription.stream)
    found = _find(db, stream, subscription)
    if found is None:
        _make(db, stream, subscription, now_ms)


def beat(db: Connection, me: Member, beat_s: float, beat_ms: int) -> Beat | None:
    """Raise the group's tick, and go with it."""
    if not present(db, me):
        return None
    tick = _tick(db, me.group, beat_ms)
    db.execute("UPDATE member SET tick = ?, beat_s = ? WHERE id = ?", (tick, beat_s, me.id))
    return Beat(tick, oldest(db, me, tick))


def present(db: Connection, me: Member) -> bool:
    """True while a member has its fence."""
    return db.execute("SELECT 1 FROM member WHERE id = ? AND nonce = ?", (me.id, me.nonce)).fetchone() is not None


def oldest(db: Connection, me: Member, tick: int) -> int:
    """The tick of the other member who beat least recently; past the group's when there is no other."""
    found = db.execute(
        "SELECT tick FROM member WHERE grp = ? AND id <> ? ORDER BY tick LIMIT 1", (me.group, me.id)
    ).fetchone()
    return int(found[0]) if found else tick + 1


def alive(db: Connection, group: int, now_s: float) -> int:
    """How many members have beaten within their lease, as far as boot clocks can tell: for people, who decide by it."""
    # A clock that was started anew says nothing about a member that beat before.
    (count,) = db.execute(
        "SELECT COUNT(*) FROM member WHERE grp = ? AND beat_s <= ? AND beat_s + lease_s > ?", (group, now_s, now_s)
    ).fetchone()
    return int(count)


def _find(db: Connection, stream: log.Known, subscription: Subscription) -> tuple[int, int] | None:
    """The group, and whether it is ordered; None when it is new."""
    found = db.execute(
        "SELECT id, ordered, owner FROM grp WHERE stream = ? AND name = ?", (stream.id, subscription.group)
    ).fetchone()
    if found is None:
        return None
    group, ordered, owner = found
    check_owner(subscription.stream.name, subscription.group, owner, subscription.owner)
    return group, ordered


def _known(db: Connection, stream: log.Known, subscription: Subscription, now_s: float) -> int | None:
    found = _find(db, stream, subscription)
    if found is None:
        return None
    group, ordered = found
    if ordered != subscription.order:
        until_ms = _waits_until_ms(db, group)
        if until_ms or _occupied(db, group, now_s):
            check_mode(subscription.stream.name, subscription.group, bool(ordered), subscription.order, until_ms)
        _switch(db, group, stream, subscription.order)
    return group


def _make(db: Connection, stream: log.Known, subscription: Subscription, now_ms: int) -> int:
    made = db.execute(
        "INSERT INTO grp (stream, name, owner, seen_ms) VALUES (?, ?, ?, ?)",
        (stream.id, subscription.group, subscription.owner, now_ms),
    )
    assert made.lastrowid is not None
    db.executemany(
        "INSERT INTO cursor (grp, log, seq) VALUES (?, ?, ?)",
        [(made.lastrowid, id_, log.begin(db, id_, subscription.start)) for id_ in _logs(stream)],
    )
    if subscription.order:
        _switch(db, made.lastrowid, stream, ordered=True)
    return made.lastrowid


def _waits_until_ms(db: Connection, group: int) -> float:
    """When the last of what waits is due; 0 while nothing does, 1 for what is due now."""
    (due_ms,) = db.execute(
        "SELECT MAX(due_ms) FROM (SELECT MAX(due_ms) AS due_ms FROM pending WHERE grp = ? AND consumer = 0 "
        "UNION ALL SELECT MAX(due_ms) FROM parked_key WHERE grp = ?)",
        (group, group),
    ).fetchone()
    ahead = db.execute("SELECT 1 FROM lease WHERE grp = ? AND (parked > 0 OR h > 0) LIMIT 1", (group,)).fetchone()
    return float(bool(ahead)) if due_ms is None else max(1.0, due_ms)


def _occupied(db: Connection, group: int, now_s: float) -> bool:
    """True while somebody lives in a group, or has left events there that he held."""
    held = db.execute("SELECT 1 FROM pending WHERE grp = ? LIMIT 1", (group,)).fetchone()
    return bool(held or alive(db, group, now_s))


def _switch(db: Connection, group: int, stream: log.Known, ordered: bool) -> None:
    """Let a group consume in this way from now on, from its cursors, and whoever was silent find its fence gone."""
    db.execute("DELETE FROM member WHERE grp = ?", (group,))
    db.execute("DELETE FROM note WHERE grp = ?", (group,))
    db.execute("UPDATE grp SET ordered = ? WHERE id = ?", (ordered, group))
    db.execute(
        "UPDATE lease SET owner = '', epoch = epoch + 1, clean = 1, want = '', next = '' WHERE grp = ?", (group,)
    )
    if ordered:
        rows = [(group, id_) for id_ in _logs(stream)]
        db.executemany("INSERT INTO lease (grp, log) VALUES (?, ?) ON CONFLICT DO NOTHING", rows)


def _logs(stream: log.Known) -> list[int]:
    return [stream.log(partition) for partition in range(stream.partitions)]


def _tick(db: Connection, group: int, now_ms: int) -> int:
    db.execute("UPDATE grp SET tick = tick + 1, seen_ms = ? WHERE id = ?", (now_ms, group))
    (tick,) = db.execute("SELECT tick FROM grp WHERE id = ?", (group,)).fetchone()
    return int(tick)
