"""Removing what may go: one step of it, inside one transaction, small enough that others can write in between.

What may go is counted over all partitions together, and the oldest events of each go, see `shares.py`. `pins.py`
tells what groups need of that, `loss.py` what they lose when it goes all the same.

Events always go from the front of a partition. `log.gone` is how far; when the first event lies behind that, somebody else
has removed the ones before, and groups are told so like of any loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from sqlite3 import Connection
from typing import NamedTuple

from millstream.brokers.base import Policy, Tended
from millstream.brokers.shares import level
from millstream.brokers.sqlite import log, loss, pins, remembered, room
from millstream.brokers.sqlite.pins import Keeper, Pin

MAX_TRIMMED = 1_000  # events in one step
MAX_TRIMMED_BYTES = 4_194_304  # likewise: SQLite may write over what it deletes


class Step(NamedTuple):
    """What one step has done and found, and whether there is more to do."""

    tended: Tended
    more: bool


class _Part(NamedTuple):
    """A partition."""

    log: int
    last: int
    gone: int
    bytes: int
    first_ms: int

    @property
    def events(self) -> int:
        return self.last - self.gone

    @property
    def base(self) -> int:
        return self.log << log.SEQ_BITS


class _Limit(NamedTuple):
    """What may go of a partition: up to a sequence number, what is older, so many of the oldest bytes."""

    seq: int
    before_ms: int
    bytes: int

    def lets_go(self, seq: int, stored_ms: int, bytes_before: int) -> bool:
        return seq <= self.seq or stored_ms < self.before_ms or bytes_before < self.bytes


class _Cut(NamedTuple):
    """What goes of a partition now: up to where, its size, and what ended it."""

    seq: int
    bytes: int
    pinned: bool = False
    more: bool = False


class _Kept(NamedTuple):
    """Events that may go, and stay since they are needed: how many about, and by whom."""

    events: int
    by: str


def trim(db: Connection, name: str, now_ms: int, now_s: float) -> Step:
    """Remove some of what may go, and some of the ids that are remembered no more."""
    stream = log.known_as(db, name)
    policy = stream.policy
    forget_ms = policy.forget_ms if policy.keep and (policy.age_ms or policy.events or policy.bytes) else 0
    groups = pins.announce(db, pins.keepers(db, stream, now_s), forget_ms, now_ms)
    parts = _parts(db, stream, groups)
    loss.catch_up(db, groups)
    limits = [(part, limit) for part, limit in _limits(policy, parts, now_ms) if _begins(part, limit)]
    forgotten = _forgotten(groups, forget_ms, now_ms)
    counting = [group for group in groups if policy.keep and group.name not in forgotten]
    found = {part.log: pins.pins(db, part.log, part.gone, counting) for part, _ in limits}
    until = {part.log: min((pin.seq for pin in found[part.log]), default=part.last) for part, _ in limits}
    total = sum(part.events for part, _ in limits if until[part.log] > part.gone)
    trimmed, more, kept = 0, remembered.forget_old(db, stream, now_ms), []
    for part, limit in limits:
        pin = until[part.log]
        cut = _cut(db, part, limit, pin, part.events / total if pin > part.gone else 0.0)
        trimmed += _remove(db, part, cut, groups)
        more = more or cut.more
        if cut.pinned:
            kept.append(_kept(db, part, limit, found[part.log]))
    most = max(kept, default=None)
    pinned_by = most.by if most else ""
    db.execute("UPDATE stream SET trimmed = trimmed + ? WHERE id = ? AND ? > 0", (trimmed, stream.id, trimmed))
    db.execute("UPDATE stream SET pinned = ? WHERE id = ? AND pinned <> ?", (pinned_by, stream.id, pinned_by))
    tended = Tended(
        trimmed=trimmed,
        lost=_lost(db, stream),
        fading=_fading(db, parts, counting, forget_ms),
        forgotten=forgotten,
        fullness=room.fullness(stream, room.size(db, stream)),
        pinned_by=pinned_by,
    )
    return Step(tended, more)


def _parts(db: Connection, stream: log.Known, groups: Sequence[Keeper]) -> list[_Part]:
    """The partitions that are not empty, from their first event on."""
    rows = db.execute(
        "SELECT id, last, gone, bytes FROM log WHERE id BETWEEN ? AND ? AND last > gone", stream.logs
    ).fetchall()
    parts = [_whole(db, _Part._make((*row, 0)), groups) for row in rows]
    return [part for part in parts if part.events]


def _whole(db: Connection, part: _Part, groups: Sequence[Keeper]) -> _Part:
    """A partition with its first event; what somebody else has removed before that is noticed."""
    first = db.execute(
        "SELECT row, stored_ms FROM event WHERE row > ? AND row <= ? ORDER BY row LIMIT 1",
        (part.base | part.gone, part.base | part.last),
    ).fetchone()
    row, first_ms = first or ((part.base | part.last) + 1, 0)
    gone = (row & log.MAX_SEQ) - 1
    if gone == part.gone:
        return part._replace(first_ms=first_ms)
    bytes_ = part.bytes * (part.last - gone) // part.events  # nobody knows what those events took up
    db.execute("UPDATE log SET gone = ?, bytes = ? WHERE id = ?", (gone, bytes_, part.log))
    loss.pass_by(db, part.log, gone, groups)
    return part._replace(gone=gone, bytes=bytes_, first_ms=first_ms)


def _limits(policy: Policy, parts: Sequence[_Part], now_ms: int) -> list[tuple[_Part, _Limit]]:
    counts, sizes = [part.events for part in parts], [part.bytes for part in parts]
    most = level(counts, policy.events or sum(counts))
    most_bytes = level(sizes, policy.bytes or sum(sizes))
    before_ms = now_ms - policy.age_ms if policy.age_ms else 0
    return [(part, _Limit(part.last - min(most, part.events), before_ms, part.bytes - most_bytes)) for part in parts]


def _begins(part: _Part, limit: _Limit) -> bool:
    """True when the first event may go."""
    return limit.lets_go(part.gone + 1, part.first_ms, 0)


def _forgotten(groups: Sequence[Keeper], forget_ms: int, now_ms: int) -> frozenset[str]:
    ends = {group.name: group.ends_ms(forget_ms) for group in groups}
    return frozenset(name for name, ends_ms in ends.items() if ends_ms is not None and ends_ms < now_ms)


def _cut(db: Connection, part: _Part, limit: _Limit, pin: int, share: float) -> _Cut:
    """What goes of a partition, which has this share of the step: none where its first event is needed."""
    quota = math.ceil(MAX_TRIMMED * share)
    rows = db.execute(
        "SELECT row, stored_ms, LENGTH(data) + IFNULL(LENGTH(headers), 0) FROM event WHERE row > ? AND row <= ? "
        "ORDER BY row LIMIT ?",
        (part.base | part.gone, part.base | part.last, quota + 1),
    ).fetchall()
    seq, bytes_ = part.gone, 0
    for number, (row, stored_ms, size_bytes) in enumerate(rows):
        next_ = row & log.MAX_SEQ
        if not limit.lets_go(next_, stored_ms, bytes_):
            return _Cut(seq, bytes_)
        if next_ > pin:
            return _Cut(seq, bytes_, pinned=True)
        if number == quota or bytes_ >= MAX_TRIMMED_BYTES * share:
            return _Cut(seq, bytes_, more=True)
        seq, bytes_ = next_, bytes_ + size_bytes
    return _Cut(part.last, bytes_)


def _remove(db: Connection, part: _Part, cut: _Cut, groups: Sequence[Keeper]) -> int:
    if cut.seq == part.gone:
        return 0
    removed = db.execute(
        "DELETE FROM event WHERE row > ? AND row <= ?", (part.base | part.gone, part.base | cut.seq)
    ).rowcount
    db.execute("UPDATE log SET gone = ?, bytes = MAX(0, bytes - ?) WHERE id = ?", (cut.seq, cut.bytes, part.log))
    loss.pass_by(db, part.log, cut.seq, groups)
    return removed


def _kept(db: Connection, part: _Part, limit: _Limit, found: Sequence[Pin]) -> _Kept:
    first = min(found, key=lambda pin: pin.seq)
    # By size it may be more, which is not worth to be added up.
    until = max(limit.seq, log.locate(db, part.log, limit.before_ms), first.seq + 1)
    return _Kept(until - first.seq, first.by)


def _fading(db: Connection, parts: Sequence[_Part], groups: Sequence[Keeper], forget_ms: int) -> dict[str, int]:
    """Groups that need something, half of whose time has passed: a group is told of in good time, no restart is.

    Also while nothing of that may go yet: it may be too late to tell when it does.
    """
    ends = {group.name: ends_ms for group in groups if (ends_ms := group.ends_ms(forget_ms)) is not None}
    silent = [group for group in groups if group.name in ends]
    found = [(pin, part.last) for part in parts for pin in pins.pins(db, part.log, part.gone, silent)]
    return {pin.group: ends[pin.group] for pin, last in found if pin.seq < last}


def _lost(db: Connection, stream: log.Known) -> dict[str, int]:
    """What was lost and not yet told; it is told now."""
    lost = db.execute("SELECT name, lost - told FROM grp WHERE stream = ? AND lost > told", (stream.id,)).fetchall()
    if lost:
        db.execute("UPDATE grp SET told = lost WHERE stream = ? AND lost > told", (stream.id,))
    return dict(lost)
