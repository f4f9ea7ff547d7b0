"""SQLite as an engine: the same rows in bare tables, in transactions that are as large as Millstream ever makes them.

- `publish`: a thousand rows, commit;
- `handle`: read five hundred rows, note that they are taken, commit; strike the notes out, commit. Only the second
  commit waits for the disk: a note that a power cut takes back is made again;
- `both`: both in turn.

It is the sqlite3 of this Python, with the `synchronous` of the URL, in a file of its own on the same disk.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qs

from millstream.bench.engine import MAX_SHARE, Limit, Waits
from millstream.bench.scenarios import Load
from millstream.clock import Clock

STORED_AT_ONCE = 1_000
HANDLED_AT_ONCE = 500
ROW_BYTES = 150  # of an event, beside its data
COPIES = 2  # what is stored is written to the log first, then to the file

_TABLES = """
CREATE TABLE event (row INTEGER PRIMARY KEY, id TEXT NOT NULL, type TEXT NOT NULL, source TEXT NOT NULL,
    stored_ms INTEGER NOT NULL, time_ms INTEGER, subject TEXT, headers BLOB, data BLOB NOT NULL);
CREATE TABLE taken (row INTEGER PRIMARY KEY, attempt INTEGER NOT NULL);
"""


class SQLiteEngine:
    """The library, and the disk below it. All that it writes is in one file, which whoever names it removes."""

    def __init__(self, url: str, path: Path, stored_at_once: int = STORED_AT_ONCE) -> None:
        self._path = path
        self._stored_at_once = stored_at_once
        self._synchronous = parse_qs(url.partition("?")[2]).get("synchronous", ["full"])[0]
        self._clock = Clock()
        self._commits_s = 0.0

    async def objections(self, events: int, size_bytes: int) -> list[str]:
        """Only that the disk may be too full."""
        needed = events * (size_bytes + ROW_BYTES) * COPIES
        free = shutil.disk_usage(self._path.parent).free
        if needed > MAX_SHARE * free:
            return [f"the events take about {needed:,} bytes, and {free:,} are free in {self._path.parent}"]
        return []

    async def limit(self, load: Load, events: int, data: bytes) -> Limit | None:
        """See above; none for latency, where a library has nobody to wake up."""
        if load == "latency":
            return None
        with closing(self._connected()) as db:
            db.executescript(_TABLES)
            if load == "handle":
                await self._publish(db, 0, events, data)
                self._commits_s = 0.0
            step = events if load != "both" else self._stored_at_once
            began_s = self._clock.monotonic()
            for first in range(0, events, step):
                count = min(step, events - first)
                if load != "handle":
                    await self._publish(db, first, count, data)
                if load != "publish":
                    await self._handle(db, first, count)
            seconds = self._clock.monotonic() - began_s
        return Limit(f"bare sqlite3 {sqlite3.sqlite_version}, synchronous={self._synchronous}", events / seconds)

    async def waits(self) -> Waits:
        """The commits of the limit, where they wait for the disk."""
        return Waits(commits_s=self._commits_s, syncs="synchronous=full") if self._synchronous == "full" else Waits()

    async def cpu_s(self) -> float | None:
        """None: it works in this process."""
        return None

    def _connected(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {self._synchronous}")
        return db

    async def _publish(self, db: sqlite3.Connection, begin: int, events: int, data: bytes) -> None:
        now_ms = self._clock.now_ms()
        fields = "0" * 21, "bench.sale", "bench", now_ms, None, None, b"", data
        for first in range(begin, begin + events, self._stored_at_once):
            last = min(first + self._stored_at_once, begin + events)
            db.execute("BEGIN IMMEDIATE")
            db.executemany(
                "INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [(row, *fields) for row in range(first, last)]
            )
            await self._commit(db)

    async def _handle(self, db: sqlite3.Connection, begin: int, events: int) -> None:
        for first in range(begin, begin + events, HANDLED_AT_ONCE):
            last = min(first + HANDLED_AT_ONCE, begin + events)
            db.execute("PRAGMA synchronous = normal")
            db.execute("BEGIN IMMEDIATE")
            rows = db.execute("SELECT * FROM event WHERE row >= ? AND row < ?", (first, last)).fetchall()
            db.executemany("INSERT INTO taken VALUES (?, 1)", [row[:1] for row in rows])
            db.execute("COMMIT")
            db.execute(f"PRAGMA synchronous = {self._synchronous}")
            db.execute("BEGIN IMMEDIATE")
            db.execute("DELETE FROM taken WHERE row >= ? AND row < ?", (first, last))
            await self._commit(db)

    async def _commit(self, db: sqlite3.Connection) -> None:
        began_s = self._clock.monotonic()
        db.execute("COMMIT")
        self._commits_s += self._clock.monotonic() - began_s
        await self._clock.sleep(0)  # Ctrl-C gets its turn
