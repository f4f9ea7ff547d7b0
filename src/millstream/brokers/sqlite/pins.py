"""Which events the groups of a stream keep. Functions of a connection inside a transaction.

A group without order needs what is pending, what it was not given yet, and what its dead letters would be replayed from. An
ordered one needs what lies behind its mark: what it has parked, and its dead letters, are whole events.

What is gone already is not needed any more: a dead letter from before a group was forgotten, say, keeps nothing.

A group in which nobody is seen is announced when half of the time is over after which it is forgotten, and the other half
begins then at the earliest. Else who comes first after a standstill of everything, or after the clock was put forward,
would cost the others their events.
"""

from __future__ import annotations

from collections.abc import Sequence
from sqlite3 import Connection
from typing import NamedTuple

from millstream.brokers.sqlite import log


class Keeper(NamedTuple):
    """A group."""

    id: int
    name: str
    ordered: bool
    seen_ms: int
    announced_ms: int
    members: tuple[int, ...]
    silent: tuple[int, ...]
    """Of the members, those that have not beaten within their lease, as far as boot clocks can tell."""
    owners: frozenset[str]
    """The names of the others."""

    def fades(self, forget_ms: int, at_ms: int) -> bool:
        """True when half of the time was over by then; False while somebody lives in it, or where nobody can tell."""
        return bool(forget_ms and self.seen_ms and not self.owners) and 2 * (at_ms - self.seen_ms) >= forget_ms

    def ends_ms(self, forget_ms: int) -> int | None:
        """When it keeps nothing any more; None unless it is announced."""
        return max(self.seen_ms + forget_ms, self.announced_ms + forget_ms // 2) if self.announced_ms else None


class Pin(NamedTuple):
    """Up to where a group lets events of a partition go."""

    seq: int
    by: str
    group: str


def keepers(db: Connection, stream: log.Known, now_s: float) -> list[Keeper]:
    """All groups of a stream."""
    groups = db.execute(
        "SELECT id, name, ordered, seen_ms, announced_ms FROM grp WHERE stream = ?", (stream.id,)
    ).fetchall()
    return [_keeper(db, group, now_s) for group in groups]


def announce(db: Connection, groups: Sequence[Keeper], forget_ms: int, now_ms: int) -> list[Keeper]:
    """Note which groups fade, and since when that is known; those in which somebody was seen do not any more."""
    return [_announce(db, group, forget_ms, now_ms) for group in groups]


def pins(db: Connection, log_: int, gone: int, groups: Sequence[Keeper]) -> list[Pin]:
    """Up to where each of these groups lets events of a partition go, of those behind what is gone."""
    return [pin for group in groups for pin in _pins(db, log_, gone, group)]


def _keeper(db: Connection, group: log.Row, now_s: float) -> Keeper:
    id_, name, ordered, seen_ms, announced_ms = group
    members = db.execute(
        "SELECT id, name, beat_s <= ? AND beat_s + lease_s > ? FROM member WHERE grp = ?", (now_s, now_s, id_)
    ).fetchall()
    return Keeper(
        *(id_, name, bool(ordered), seen_ms, announced_ms),
        members=tuple(member for member, _, _ in members),
        silent=tuple(member for member, _, lives in members if not lives),
        owners=frozenset(owner for _, owner, lives in members if lives),
    )


def _announce(db: Connection, group: Keeper, forget_ms: int, now_ms: int) -> Keeper:
    known_ms = group.announced_ms if group.fades(forget_ms, group.announced_ms) else now_ms  # not of an earlier silence
    announced_ms = known_ms if group.fades(forget_ms, now_ms) else 0
    if announced_ms != group.announced_ms:
        db.execute("UPDATE grp SET announced_ms = ? WHERE id = ?", (announced_ms, group.id))
    return group._replace(announced_ms=announced_ms)


def _pins(db: Connection, log_: int, gone: int, group: Keeper) -> list[Pin]:
    (seq,) = db.execute("SELECT seq FROM cursor WHERE grp = ? AND log = ?", (group.id, log_)).fetchone()
    if group.ordered:
        return [Pin(seq, group.name, group.name)]
    base = log_ << log.SEQ_BITS
    first = base | gone + 1
    pending, dead = (
        "SELECT MIN(row) FROM pending WHERE grp = ? AND consumer = ? AND row BETWEEN ? AND ?",
        "SELECT MIN(row) FROM dead WHERE grp = ? AND row BETWEEN ? AND ?",
    )
    firsts = [
        db.execute(pending, (group.id, consumer, first, base | seq)).fetchone()[0] for consumer in (0, *group.members)
    ]
    needed = min((row for row in firsts if row is not None), default=(base | seq) + 1)
    found = [Pin((needed & log.MAX_SEQ) - 1, group.name, group.name)]
    (letter,) = db.execute(dead, (group.id, first, base | log.MAX_SEQ)).fetchone()
    if letter is not None:
        found.append(Pin((letter & log.MAX_SEQ) - 1, f"dead letters of {group.name}", group.name))
    return found
