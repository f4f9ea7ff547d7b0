"""Dead letters in the file that are made from what is at hand: the stream may not have the event any more.

One of an event of a pack has the place of that pack.
"""

from __future__ import annotations

from sqlite3 import Connection

from millstream.brokers.ledger import Bury
from millstream.brokers.sqlite.parked import Part
from millstream.units import MAX_ERROR_CHARS


def bury(db: Connection, part: Part, why: Bury, now_ms: int) -> None:
    """Keep an event that was given up. Whoever calls it counts it in `cursor.dead` himself, once for all that he does."""
    record = why.stored.record
    db.execute(
        "INSERT INTO dead (grp, row, part, reason, error, attempts, died_ms, "
        "event_id, type, source, stored_ms, time_ms, subject, headers, data) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(
                part.group,
                *part.place(why.stored.position.offset),
                why.reason,
                why.error[:MAX_ERROR_CHARS],
                why.attempts,
                now_ms,
            ),
            *(record.id, record.type, record.source, record.time_ms, record.time_ms),
            *(record.key, record.headers, record.data),
        ),
    )
