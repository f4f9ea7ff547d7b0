"""Inbox: that an event was handled is written in the transaction of what its handler does.

    async with session.begin():
        if await inbox.first(session, delivery):
            ...                       # what is to happen once

Both are stored or neither is, so it happens once, however often the event comes and whatever is killed in between.

Two that handle one event at the same time, since a process was taken for dead that was not: the database makes the second
wait at the event's row until the first one's transaction has ended. If that was committed the second is told so, if it was
rolled back the second is the first. On PostgreSQL this holds for READ COMMITTED, the default. Under REPEATABLE READ and
SERIALIZABLE the second gets a serialization error where the first committed: nothing is stored, and the event's next
attempt is told. On SQLite the second waits for the file, as long as the driver's own limit.

Considered and left out: to refuse a process that wakes up late by the delivery's fencing token. What its successor has done
is refused already, by its row. The token would add the events that the successor gave up, at the price of a lock on one row
of each partition in every transaction.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, overload

from millstream.clock import Clock
from millstream.delivery import Envelope
from millstream.errors import BadSetting
from millstream.sql.connections import Asynchronous, Statement, Work, check_in_transaction, checked_dialect, perform
from millstream.units import Duration, check_name, seconds

MAX_PURGED = 10_000  # rows of one call: a transaction that the database, and those who wait for it, hardly notice

# The same for both databases. WITHOUT ROWID would save SQLite a tree, and is not SQL.
TABLE = """
CREATE TABLE IF NOT EXISTS millstream_inbox (
    inbox TEXT NOT NULL,
    event_id TEXT NOT NULL,
    seen_ms BIGINT NOT NULL,
    PRIMARY KEY (inbox, event_id)
)"""
INDEX = "CREATE INDEX IF NOT EXISTS millstream_inbox_seen ON millstream_inbox (inbox, seen_ms)"

FIRST = """
INSERT INTO millstream_inbox (inbox, event_id, seen_ms) VALUES (:inbox, :event_id, :now)
ON CONFLICT DO NOTHING RETURNING 1"""

PURGE = """
DELETE FROM millstream_inbox WHERE inbox = :inbox AND event_id IN
    (SELECT event_id FROM millstream_inbox WHERE inbox = :inbox AND seen_ms < :before ORDER BY seen_ms LIMIT :limit)
RETURNING 1"""


class Inbox:
    """The events that one handler has handled, by their ids, in a table of the user's database.

    `name` tells apart those who share the table: give each handler its own, which keeps its name as a group does. With a
    connection or session that is asynchronous, each call is awaited.
    """

    def __init__(self, name: str) -> None:
        self.name = check_name("inbox", name)
        self._clock = Clock()

    @overload
    def first(self, connection: Asynchronous, event: Envelope[Any] | str) -> Coroutine[Any, Any, bool]: ...
    @overload
    def first(self, connection: Any, event: Envelope[Any] | str) -> bool: ...
    def first(self, connection: Any, event: Envelope[Any] | str) -> bool | Coroutine[Any, Any, bool]:
        """True for an event, or an id, that this inbox has not seen; from the end of this transaction on, it has.

        Waits while another transaction is busy with the same event. Raises `MillstreamError` outside of a transaction, and
        what the driver raises.
        """
        id_ = event if isinstance(event, str) else event.id
        if not id_:
            raise BadSetting("an event without an id cannot be told from others: give what was delivered")
        check_in_transaction(connection)
        return perform(connection, self._first(id_))

    @overload
    def purge(self, connection: Asynchronous, *, older: Duration) -> Coroutine[Any, Any, int]: ...
    @overload
    def purge(self, connection: Any, *, older: Duration) -> int: ...
    def purge(self, connection: Any, *, older: Duration) -> int | Coroutine[Any, Any, int]:
        """Forget events that were seen so long ago, the oldest first, and return how many: at most 10,000.

        Call it and commit until it returns 0. What is forgotten would be handled again if it came again, so let it be older
        than all that may be replayed.
        """
        before = self._clock.now_ms() - int(seconds(older) * 1000)
        return perform(connection, self._purge(before))

    @overload
    def create(self, connection: Asynchronous) -> Coroutine[Any, Any, None]: ...
    @overload
    def create(self, connection: Any) -> None: ...
    def create(self, connection: Any) -> Coroutine[Any, Any, None] | None:
        """Make the table, unless it is there. Commit it yourself."""
        return perform(connection, _create())

    @staticmethod
    def ddl(dialect: str) -> str:
        """The statements that make the table, for a migration. Raises `NotSupported` for an unknown dialect."""
        checked_dialect(dialect)
        return f"{TABLE.strip()};\n{INDEX};\n"

    def _first(self, id_: str) -> Work[bool]:
        values = {"inbox": self.name, "event_id": id_, "now": self._clock.now_ms()}
        return bool((yield Statement(FIRST, values)))

    def _purge(self, before_ms: int) -> Work[int]:
        return len((yield Statement(PURGE, {"inbox": self.name, "before": before_ms, "limit": MAX_PURGED})))


def _create() -> Work[None]:
    yield Statement(TABLE)
    yield Statement(INDEX)
