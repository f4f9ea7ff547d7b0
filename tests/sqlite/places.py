"""What the tests of the SQLite broker share: open brokers, records, consumers that beat, and other processes."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import TypeVar

from millstream.brokers.base import (
    Claim,
    Consumer,
    Done,
    GroupInfo,
    Outcome,
    Record,
    Settlement,
    StreamSpec,
    Subscription,
    Tended,
)
from millstream.brokers.sqlite.broker import SQLiteBroker
from millstream.clock import Clock
from millstream.settings import Settings
from millstream.telemetry import Telemetry

T = TypeVar("T")

ORDERS = StreamSpec("orders", partitions=2)
LEASE_S = 1.0
PATIENCE_S = 20.0
ROOT = Path(__file__).parents[2]


class Clockwork(Clock):
    """Real timers, but the time of day and the time since boot are moved by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.shift_s = 0.0
        self.shift_ms = 0

    def monotonic(self) -> float:
        return super().monotonic() + self.shift_s

    def now_ms(self) -> int:
        return super().now_ms() + self.shift_ms


def broker_at(path: Path, *, query: str = "", namespace: str = "", clock: Clock | None = None) -> SQLiteBroker:
    settings = Settings(namespace=namespace)
    return SQLiteBroker(f"sqlite:///{path}{query}", settings, clock or Clock(), Telemetry())


@asynccontextmanager
async def opened(
    path: Path, *, query: str = "", namespace: str = "", clock: Clock | None = None
) -> AsyncIterator[SQLiteBroker]:
    broker = broker_at(path, query=query, namespace=namespace, clock=clock)
    await broker.open()
    try:
        await broker.declare(ORDERS)
        yield broker
    finally:
        await broker.close()


async def joined(broker: SQLiteBroker, group: str = "billing", *, order: bool = False) -> Consumer:
    return await broker.subscribe(Subscription(ORDERS, group, "shop", lease_s=LEASE_S, order=order))


async def about(broker: SQLiteBroker, group: str = "billing") -> GroupInfo:
    infos = {info.group: info for info in await broker.admin.groups("orders")}
    return infos[group]


async def tended(broker: SQLiteBroker, stream: str = "orders") -> list[Tended]:
    """Rounds of housekeeping, until one finds nothing to remove and nothing to publish."""
    rounds = [await broker.tend(stream)]
    while rounds[-1].trimmed or rounds[-1].published:
        rounds.append(await broker.tend(stream))
    return rounds


def records(*names: str, partition: int = 0, size_bytes: int = 20) -> list[Record]:
    return [Record(partition, name, "order.placed", b"x" * size_bytes) for name in names]


def ids(claims: list[Claim]) -> list[str]:
    return [claim.record.id for claim in claims]


def outcomes(claims: list[Claim], outcome: Outcome | None = None) -> list[Settlement]:
    return [Settlement(claim.position, outcome or Done()) for claim in claims]


async def eventually(ask: Callable[[], Awaitable[T]], met: Callable[[T], object]) -> T:
    """Ask until the answer is the one that must come."""
    until_s = time.monotonic() + PATIENCE_S
    while not met(answer := await ask()):
        assert time.monotonic() < until_s, f"still {answer!r}"
        await asyncio.sleep(0.005)
    return answer


def intact(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def counted(path: Path) -> bool:
    """True when every counter in the file says what is there."""
    ours = "FROM event WHERE row >> 40 = log.id"
    wrong = (
        f"SELECT * FROM log WHERE gone <> IFNULL((SELECT MIN(row) & 0xFFFFFFFFFF {ours}) - 1, last)",
        f"SELECT * FROM log WHERE bytes <> (SELECT TOTAL(LENGTH(data) + LENGTH(headers)) {ours})",
        "SELECT * FROM log WHERE ids <> (SELECT COUNT(*) FROM remembered WHERE remembered.log = log.id)",
        "SELECT * FROM stream WHERE delayed <> (SELECT COUNT(*) FROM delayed WHERE delayed.stream = stream.id)",
        "SELECT * FROM stream WHERE trimmed <> (SELECT SUM(gone) FROM log WHERE log.id / 1024 = stream.id)",
    )
    with closing(sqlite3.connect(path)) as connection:
        return [connection.execute(statement).fetchall() for statement in wrong] == [[]] * len(wrong)


@contextmanager
def process(*words: object) -> Iterator[subprocess.Popen[str]]:
    """A process that runs one verb of `process.py`; killed at the end of the block if it is still there."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.sqlite.process", *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


def lines(child: subprocess.Popen[str], count: int) -> list[str]:
    """The next lines that it prints; fewer when it ends before."""
    assert child.stdout is not None
    return [line.strip() for line in (child.stdout.readline() for _ in range(count)) if line]


def rest(child: subprocess.Popen[str]) -> list[str]:
    """All that it prints until it ends. A killed process may leave half a line, which says nothing."""
    assert child.stdout is not None
    return [line.strip() for line in child.stdout if line.endswith("\n")]
