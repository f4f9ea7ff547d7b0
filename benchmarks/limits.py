"""The engine's limit: the same work without Millstream, as fast as it goes.

For Redis, `engine.c` on hiredis. For SQLite, a bare loop on one connection: rows of the same columns, 1,000 of them in
one durable commit; reading on behind a cursor, which each 1,000 rows are followed by a durable commit of. Where a
limit can be had in several ways, each is tried, and the best counts.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from benchmarks.figures import Found

HERE = Path(__file__).parent
BINARY = HERE.parent / "build" / "engine"
COMPILE = ["cc", "-O2", "-std=c11", "-Wall", "-Wextra", "-pthread"]

MAX_WRITE_BYTES = 1 << 20  # of large events fewer go into one write: more gains nothing
PER_COMMIT = 1_000


class Missing(Exception):
    """The limit cannot be had on this machine; says why."""


class Limit(NamedTuple):
    """What the engine is to do: a mode of engine.c, and its options; each size of a batch is tried."""

    mode: str
    batches: tuple[int, ...] = (100, 1_000)
    streams: int = 1
    ahead: int = 1


def build(binary: Path = BINARY) -> Path:
    """The C program, compiled if it is missing or older than its source. Raises `Missing`."""
    source = HERE / "engine.c"
    if binary.exists() and binary.stat().st_mtime >= source.stat().st_mtime:
        return binary
    if shutil.which(COMPILE[0]) is None:
        raise Missing("no C compiler: install the package gcc with libc6-dev (Debian, Ubuntu)")
    binary.parent.mkdir(parents=True, exist_ok=True)
    fresh = binary.with_suffix(f".{os.getpid()}")  # tests run side by side, and none may start half a program
    ran = subprocess.run([*COMPILE, "-o", fresh, source, "-lhiredis"], capture_output=True, text=True)
    if ran.returncode:
        hint = "install the package libhiredis-dev (Debian, Ubuntu)" if "hiredis" in ran.stderr else "read on"
        raise Missing(f"engine.c does not compile: {hint}\n{ran.stderr[-2_000:]}")
    return fresh.replace(binary)


def of(url: str, limit: Limit, events: int, size_bytes: int) -> Found | None:
    """The limit of the broker behind a URL; None where it has none. Raises `Missing` where it cannot be found out."""
    parts = urlsplit(url)
    if parts.scheme == "redis":
        return redis(parts.port or 6379, limit, events, size_bytes)
    return sqlite(limit, events, size_bytes) if parts.scheme == "sqlite" else None


def redis(port: int, limit: Limit, events: int, size_bytes: int) -> Found:
    """The limit of the Redis server on this port. Raises `Missing`."""
    binary = build()

    def tried(batch: int) -> Found:
        options = {"p": port, "n": events, "s": size_bytes, "k": limit.streams, "a": limit.ahead}
        options["b"] = max(1, min(batch, MAX_WRITE_BYTES // size_bytes))
        words = [word for name, value in options.items() for word in (f"-{name}", str(value))]
        ran = subprocess.run([binary, limit.mode, *words], capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(ran.stderr.strip())
        found: Found = json.loads(ran.stdout)
        return found

    return best(map(tried, limit.batches))


def sqlite(limit: Limit, events: int, size_bytes: int) -> Found | None:
    """The limit of SQLite with durable commits; None where it has nothing alike."""
    runs: dict[str, Callable[[sqlite3.Connection, int, int, int], float]] = {"publish": _insert, "consume": _read}
    if limit.mode not in runs:
        return None
    per_commit = 1 if limit.batches == (1,) else PER_COMMIT
    with tempfile.TemporaryDirectory() as folder, closing(sqlite3.connect(f"{folder}/limit.db")) as db:
        db.isolation_level = None
        db.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE place (at INTEGER);"
            "CREATE TABLE log (at INTEGER PRIMARY KEY, id, type, source, time, subject, headers, data)"
        )
        return {"rate": events / runs[limit.mode](db, events, size_bytes, per_commit)}


def _insert(db: sqlite3.Connection, events: int, size_bytes: int, per_commit: int) -> float:
    data = b"x" * size_bytes
    rows = [(f"{number:021}", "bench.sale", "bench", 0, None, b"", data) for number in range(events)]
    began = time.perf_counter()
    for begin in range(0, events, per_commit):
        db.execute("BEGIN IMMEDIATE")
        db.executemany(
            "INSERT INTO log (id, type, source, time, subject, headers, data) VALUES (?, ?, ?, ?, ?, ?, ?)",
            rows[begin : begin + per_commit],
        )
        db.execute("COMMIT")
    return time.perf_counter() - began


def _read(db: sqlite3.Connection, events: int, size_bytes: int, per_commit: int) -> float:
    _insert(db, events, size_bytes, PER_COMMIT)
    db.execute("INSERT INTO place VALUES (0)")
    at = seen = 0
    began = time.perf_counter()
    while rows := db.execute("SELECT * FROM log WHERE at > ? ORDER BY at LIMIT ?", (at, per_commit)).fetchall():
        at, seen = rows[-1][0], seen + len(rows)
        db.execute("UPDATE place SET at = ?", (at,))
    seconds = time.perf_counter() - began
    assert seen == events, seen
    return seconds


def best(found: Iterable[Found]) -> Found:
    """The fastest; of latencies, the shortest."""
    return max(found, key=lambda one: 1 / one["p50_ms"] if "p50_ms" in one else one["rate"])
