"""The outbox's two tables, and what is said to them.

`millstream_outbox` has a row for every event that is not published yet. `seq` is given when the row is written, and never
twice: on SQLite that takes AUTOINCREMENT, without which a relay that comes late would delete a new event that had got an old
one's number. `aside` is 1 for a row that cannot be published, whose `error` says why, and for the later ones of its key,
whose `error` is empty. The indexes are partial, so that looking for work costs the same whatever is aside.

`millstream_relay` has a row for each shard of a stream: which relay has its batch in hand (`holder`), and until when others
leave it alone. Times are the database's, so that relays need not agree about them. Whoever changes what is aside writes the
shard's row first: that puts them one after the other, and no row stays aside behind one that is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from millstream.sql.connections import Dialect

MAX_IDLE_MS = 10_000  # far more than a relay needs between two statements

_OUTBOX = """
CREATE TABLE IF NOT EXISTS millstream_outbox (
    seq {seq},
    stream TEXT NOT NULL,
    shard INTEGER NOT NULL,
    event_id TEXT NOT NULL,
    type TEXT NOT NULL,
    key TEXT,
    headers {bytes} NOT NULL,
    data {bytes} NOT NULL,
    created_ms BIGINT NOT NULL,
    due_ms BIGINT,
    aside INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT ''
)"""

_RELAY = """
CREATE TABLE IF NOT EXISTS millstream_relay (
    stream TEXT NOT NULL,
    shard INTEGER NOT NULL,
    holder TEXT NOT NULL DEFAULT '',
    until_ms BIGINT NOT NULL DEFAULT 0,
    served_ms BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (stream, shard)
)"""

_READY = "CREATE INDEX IF NOT EXISTS millstream_outbox_ready ON millstream_outbox (stream, shard, seq) WHERE aside = 0"
_ASIDE = "CREATE INDEX IF NOT EXISTS millstream_outbox_aside ON millstream_outbox (stream, key, seq) WHERE aside = 1"
_STUCK = (
    "CREATE INDEX IF NOT EXISTS millstream_outbox_stuck ON millstream_outbox (stream, seq) "
    "WHERE aside = 1 AND error <> ''"
)

_TYPES = {
    "sqlite": {"seq": "INTEGER PRIMARY KEY AUTOINCREMENT", "bytes": "BLOB"},
    "postgresql": {"seq": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", "bytes": "BYTEA"},
}

_NOW = {
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)",
}

# A relay that stands still in the middle of a transaction would hold its row for as long as the connection lives. So
# PostgreSQL ends that; the wish is one of this transaction only, and costs no statement of its own.
_GUARD = {
    "sqlite": "1",
    "postgresql": f"set_config('idle_in_transaction_session_timeout', '{MAX_IDLE_MS}', true)",
}

INSERT: Final = """
INSERT INTO millstream_outbox (stream, shard, event_id, type, key, headers, data, created_ms, due_ms)
VALUES (:stream, :shard, :event_id, :type, :key, :headers, :data, :created_ms, :due_ms)"""

# Once per stream: the rows that relays take in turn.
SHARD: Final = (
    "INSERT INTO millstream_relay (stream, shard) VALUES (:stream, :shard) ON CONFLICT (stream, shard) DO NOTHING"
)

# In the order of the index, so that PostgreSQL takes that: else it takes the table for full of what is asked for, and reads
# past all that is not there any more.
READY: Final = "SELECT 1 FROM millstream_outbox WHERE stream = :stream AND aside = 0 ORDER BY shard, seq LIMIT 1"

# What others leave alone for now, the one that was served longest ago first. Those who look at the same moment get
# different ones; on SQLite there is one at a time.
_CLAIM = """
UPDATE millstream_relay SET holder = :holder, until_ms = {now} + :hold_ms
WHERE stream = :stream AND shard = (
    SELECT r.shard FROM millstream_relay r
    WHERE r.stream = :stream AND r.until_ms <= {now} AND EXISTS (
        SELECT 1 FROM millstream_outbox o WHERE o.stream = r.stream AND o.shard = r.shard AND o.aside = 0)
    ORDER BY r.served_ms, r.shard LIMIT 1 {lock})
RETURNING shard, {guard}"""

# A batch: the oldest rows, as many as a write may have in number and in bytes, and one at least. The statement sees one
# moment of the database. `behind` is true where an earlier event of the key is aside.
BATCH: Final = """
SELECT o.seq, o.event_id, o.type, o.key, o.headers, o.data, o.created_ms, o.due_ms, EXISTS (
    SELECT 1 FROM millstream_outbox a WHERE a.stream = o.stream AND a.key = o.key AND a.aside = 1) AS behind
FROM millstream_outbox o JOIN (
    SELECT seq, bytes, SUM(bytes) OVER (ORDER BY seq) AS total FROM (
        SELECT seq, length(data) AS bytes FROM millstream_outbox
        WHERE stream = :stream AND shard = :shard AND aside = 0 ORDER BY seq LIMIT :limit) oldest) b ON b.seq = o.seq
WHERE b.total <= :bytes OR b.total = b.bytes
ORDER BY o.seq"""

# Only for whom the shard still belongs to. No row: somebody else took it over, and does all of it again.
_RELEASE = """
UPDATE millstream_relay SET holder = '', until_ms = 0, served_ms = {now}
WHERE stream = :stream AND shard = :shard AND holder = :holder RETURNING {guard}"""

# Whoever holds it finds that it does not, and does its batch again.
SEIZE: Final = """
UPDATE millstream_relay SET holder = '', until_ms = 0 WHERE stream = :stream AND shard = :shard"""

PUT_ASIDE: Final = "UPDATE millstream_outbox SET aside = 1, error = :error WHERE seq = :seq"

# What was set aside for a reason of its own, and might be published now.
HEADS: Final = """
SELECT seq, event_id, type, key, headers, data, created_ms, due_ms, shard FROM millstream_outbox
WHERE stream = :stream AND aside = 1 AND error <> '' AND seq > :after AND length(data) <= :bytes
ORDER BY seq LIMIT :limit"""

STUCK: Final = """
SELECT seq, stream, shard, event_id, type, key, error, created_ms FROM millstream_outbox
WHERE stream = :stream AND aside = 1 AND error <> '' ORDER BY seq LIMIT :limit"""

PUT_BACK: Final = (
    "UPDATE millstream_outbox SET aside = 0, error = '' WHERE seq = :seq AND stream = :stream AND aside = 1"
)

PUT_BACK_LATER: Final = """
UPDATE millstream_outbox SET aside = 0 WHERE stream = :stream AND key = :key AND aside = 1 AND error = ''"""

DISCARD: Final = "DELETE FROM millstream_outbox WHERE stream = :stream AND seq = :seq RETURNING 1"

LAG: Final = "SELECT stream, aside, COUNT(*), MIN(created_ms) FROM millstream_outbox GROUP BY stream, aside"


def tables(dialect: Dialect) -> list[str]:
    """The statements that make the tables."""
    return [text.format(**_TYPES[dialect]).strip() for text in (_OUTBOX, _READY, _ASIDE, _STUCK, _RELAY)]


def strays(count: int) -> str:
    """The statement that finds the rows of all but so many streams, `:stream0` and on."""
    names = ", ".join(f":stream{index}" for index in range(count))
    return f"""
SELECT seq, stream, shard, event_id, type, key, error, created_ms FROM millstream_outbox
WHERE stream NOT IN ({names}) ORDER BY seq LIMIT :limit"""  # noqa: S608 - names of ours


def delete(seqs: Sequence[int]) -> str:
    """The statement that removes these rows, and no other that has come between them since."""
    return f"DELETE FROM millstream_outbox WHERE seq IN ({', '.join(map(str, seqs))})"  # noqa: S608 - numbers of ours


def claim(dialect: Dialect) -> str:
    """The statement that takes a shard for one batch."""
    lock = "FOR UPDATE SKIP LOCKED" if dialect == "postgresql" else ""
    return _CLAIM.format(now=_NOW[dialect], lock=lock, guard=_GUARD[dialect])


def release(dialect: Dialect) -> str:
    """The statement that gives a shard back, with its batch done or not."""
    return _RELEASE.format(now=_NOW[dialect], guard=_GUARD[dialect])
