"""How full a stream is, and its ceiling. Functions of a connection inside a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from sqlite3 import Connection
from typing import NamedTuple

from millstream.brokers.sqlite import log
from millstream.errors import BrokerFull


class Size(NamedTuple):
    """What a stream holds, over all partitions."""

    events: int
    bytes: int


def size(db: Connection, stream: log.Known) -> Size:
    """What a stream holds now."""
    row = db.execute("SELECT SUM(last - gone), SUM(bytes) FROM log WHERE id BETWEEN ? AND ?", stream.logs)
    return Size._make(row.fetchone())


def fullness(stream: log.Known, now: Size) -> float:
    """How near the ceiling it is: 1 is full; 0 without one."""
    policy = stream.policy
    events = now.events / policy.ceiling_events if policy.ceiling_events else 0.0
    return max(events, now.bytes / policy.ceiling_bytes if policy.ceiling_bytes else 0.0)


def check(db: Connection, stream: log.Known, events: int) -> None:
    """Raise `BrokerFull` when a stream has no room for so many events more."""
    policy = stream.policy
    if not policy.ceiling_events and not policy.ceiling_bytes:
        return
    now = size(db, stream)
    if policy.ceiling_events and now.events + events > policy.ceiling_events:
        what = f"{now.events:,} events, and its ceiling is {policy.ceiling_events:,}"
    elif policy.ceiling_bytes and now.bytes >= policy.ceiling_bytes:
        what = f"{now.bytes:,} bytes, and its ceiling is {policy.ceiling_bytes:,}"
    else:
        return
    (pinned_by,) = db.execute("SELECT pinned FROM stream WHERE id = ?", (stream.id,)).fetchone()
    who = f"what is kept is kept for {pinned_by}" if pinned_by else "nothing of it may go yet"
    raise BrokerFull(
        f"stream {stream.name!r} has {what}; {who}: run the groups that are behind or forget them, replay or drop dead "
        "letters, or raise the ceiling with `millstream stream apply`"
    )


def fitting(db: Connection, stream: log.Known, sizes_bytes: Sequence[int]) -> int:
    """How many of these events, by their sizes, have room one after the other."""
    policy, now = stream.policy, size(db, stream)
    count, bytes_ = len(sizes_bytes), now.bytes
    if policy.ceiling_events:
        count = max(0, min(count, policy.ceiling_events - now.events))
    if policy.ceiling_bytes:
        for number, size_bytes in enumerate(sizes_bytes[:count]):
            if bytes_ >= policy.ceiling_bytes:
                return number
            bytes_ += size_bytes
    return count
