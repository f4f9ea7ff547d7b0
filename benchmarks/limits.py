"""The engine's limit: the same work without Millstream, as fast as it goes.

For Redis, `engine.c` on hiredis, in several ways of which the best counts. For SQLite, what `millstream bench` takes:
the same rows in bare tables.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from benchmarks.figures import Found
from millstream.bench.scenarios import Load
from millstream.bench.sqlite_engine import SQLiteEngine

HERE = Path(__file__).parent
BINARY = HERE.parent / "build" / "engine"
COMPILE = ["cc", "-O2", "-std=c11", "-Wall", "-Wextra", "-pthread"]

MAX_WRITE_BYTES = 1 << 20  # of large events fewer go into one write: more gains nothing
LOADS: dict[str, Load] = {"publish": "publish", "consume": "handle", "both": "both", "latency": "latency"}
"""The modes of `engine.c`, as `millstream bench` calls them."""


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
    with tempfile.TemporaryDirectory() as folder:
        engine = SQLiteEngine("sqlite:///limit.db?synchronous=full", Path(folder) / "limit.db", limit.batches[-1])
        found = asyncio.run(engine.limit(LOADS[limit.mode], events, b"x" * size_bytes))
    return None if found is None else {"rate": found.rate}


def best(found: Iterable[Found]) -> Found:
    """The fastest; of latencies, the shortest."""
    return max(found, key=lambda one: 1 / one["p50_ms"] if "p50_ms" in one else one["rate"])
