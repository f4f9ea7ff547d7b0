"""The ids that streams remember: each function is one step, inside one transaction.

An id is remembered for the window of the stream's policy, counted by the broker's clock. One that is older is as good as
gone; it is removed by whoever comes across it, by those who need its room, and by `tend`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from sqlite3 import Connection
from typing import TypeAlias

from millstream.brokers.base import LATER, Position
from millstream.brokers.sqlite import log
from millstream.errors import BrokerFull

Key: TypeAlias = tuple[int, str]
"""A partition, and an id."""

MAX_FORGOTTEN = 1_000  # in one step: others want to write too

_EVER = 1 << 62  # past any time: where none are asked for any more, all go


def known(db: Connection, stream: log.Known, keys: Iterable[Key], now_ms: int) -> dict[Key, Position]:
    """Where those events lie whose ids are remembered."""
    found, old = {}, []
    since_ms = now_ms - stream.policy.dedupe_ms
    for key in keys:
        partition, id_ = key
        place = (stream.log(partition), id_)
        row = db.execute("SELECT seq, at_ms FROM remembered WHERE log = ? AND id = ?", place).fetchone()
        if row is not None and row[1] > since_ms:
            found[key] = Position(partition, str(row[0] or LATER))
        elif row is not None:
            old.append(place)
    if old:
        db.executemany("DELETE FROM remembered WHERE log = ? AND id = ?", old)
        db.executemany("UPDATE log SET ids = ids - 1 WHERE id = ?", [(id_,) for id_, _ in old])
    return found


def remember(db: Connection, stream: log.Known, placed: Mapping[Key, Position], now_ms: int) -> None:
    """Remember ids that are not remembered yet. Raises `BrokerFull`."""
    policy = stream.policy
    for partition, count in Counter(partition for partition, _ in placed).items():
        id_ = stream.log(partition)
        # At least as many go as come, if they may: so those that are old do not pile up.
        _forget(db, id_, now_ms - policy.dedupe_ms, max(count, MAX_FORGOTTEN))
        (ids,) = db.execute("SELECT ids FROM log WHERE id = ?", (id_,)).fetchone()
        if ids + count > policy.dedupe_ids:
            raise BrokerFull(
                f"stream {stream.name!r} remembers {ids:,} ids in partition {partition}, and at most "
                f"{policy.dedupe_ids:,}: publish more slowly, or allow more with Dedupe(ids=…) and `millstream stream apply`"
            )
        db.execute("UPDATE log SET ids = ids + ? WHERE id = ?", (count, id_))
    db.executemany(
        "INSERT INTO remembered (log, id, seq, at_ms) VALUES (?, ?, ?, ?)",
        [(stream.log(partition), id_, _seq(position), now_ms) for (partition, id_), position in placed.items()],
    )


def find_place(db: Connection, stream: log.Known, placed: Sequence[tuple[str, Position]]) -> None:
    """Note where events lie now that were published for later, if their ids are remembered still."""
    db.executemany(
        "UPDATE remembered SET seq = ? WHERE log = ? AND id = ? AND seq = 0",
        [(_seq(position), stream.log(position.partition), id_) for id_, position in placed],
    )


def forget_old(db: Connection, stream: log.Known, now_ms: int) -> bool:
    """Remove some of the ids whose time is up; True when there may be more."""
    window_ms = stream.policy.dedupe_ms
    until_ms = now_ms - window_ms if window_ms else _EVER
    with_ids = db.execute("SELECT id FROM log WHERE id BETWEEN ? AND ? AND ids > 0", stream.logs).fetchall()
    room = MAX_FORGOTTEN
    for (id_,) in with_ids:
        room -= _forget(db, id_, until_ms, room)
    return room == 0


def _seq(position: Position) -> int:
    """The sequence number of a position; 0 for later."""
    return 0 if position.offset == LATER else int(position.offset)


def _forget(db: Connection, id_: int, until_ms: int, limit: int) -> int:
    gone = db.execute(
        "DELETE FROM remembered WHERE log = ? AND id IN "
        "(SELECT id FROM remembered WHERE log = ? AND at_ms <= ? ORDER BY at_ms LIMIT ?)",
        (id_, id_, until_ms, limit),
    ).rowcount
    if gone:
        db.execute("UPDATE log SET ids = ids - ? WHERE id = ?", (gone, id_))
    return gone
