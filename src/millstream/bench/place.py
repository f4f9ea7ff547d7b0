"""Where a run lives, and how it leaves nothing behind, however it ends.

A run's name tells its machine, its process and when it began. On a server that name is a namespace, and it is announced
before it is used: as an empty stream in the namespace `millstream-bench`. At the end the streams of the run are
discarded one by one, then the announcement. So what a killed run has left is known by name, and the next run removes
it; nothing is ever searched for among the keys of others. On SQLite a run has files of its own beside the one that the
URL names, on the same disk and with the same options.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, TypeAlias
from urllib.parse import parse_qsl, quote, unquote, urlencode

from millstream.bench import redis_engine
from millstream.bench.engine import Engine, NoEngine
from millstream.bench.redis_engine import RedisEngine
from millstream.bench.sqlite_engine import SQLiteEngine
from millstream.brokers.base import Broker, StreamSpec
from millstream.brokers.urls import broker_for, mask
from millstream.clock import Clock
from millstream.errors import BrokerError, BrokerRefused
from millstream.settings import Settings
from millstream.telemetry import Telemetry, logger
from millstream.units import seconds

RUNS = "millstream-bench"
"""The namespace in which runs are announced; the name of each begins with it too."""

_NAME = re.compile(rf"{RUNS}\.([0-9a-f]{{8}})\.(\d+)\.(\d+)")

FOREIGN_MS = 3_600_000  # nobody can ask another machine whether a process lives, and a run takes less than an hour
RETRY_S = 0.5
MARGIN_S = 3.0  # beyond the lease, until a worker that was killed counts as gone


Say: TypeAlias = Callable[[str], None]
"""Told, for people, what is waited for."""


class Place(NamedTuple):
    """Where one run stores its events."""

    url: str
    namespace: str
    engine: Engine
    file: Path | None = None
    """On SQLite: what the events are in."""


@asynccontextmanager
async def found(url: str) -> AsyncIterator[Place]:
    """A place for one run, which is removed at its end, also when it fails or is cancelled."""
    name = f"{RUNS}.{_machine()}.{os.getpid()}.{Clock().now_ms()}"
    if _is_sqlite(url):
        file = _file(url, name)
        try:
            yield Place(_at(url, file), name, _sqlite_engine(url, name), file)
        finally:
            _unlink(file.parent, name)
    elif _is_memory(url):
        yield Place(url, name, NoEngine(in_memory=True))
    else:
        url = _without_namespace(url)
        async with _opened(url, RUNS) as runs:
            await runs.declare(StreamSpec(name))
        try:
            async with _engine(url, name) as engine:
                yield Place(url, name, engine)
        finally:
            await _remove(url, name)


async def objections(url: str, events: int, size_bytes: int, say: Say = logger.info) -> list[str]:
    """Why a run should not be made here. What killed runs have left is removed before it is asked.

    `say` is told what is waited for, where that takes seconds.
    """
    if _is_sqlite(url):
        folder = _file(url, RUNS).parent
        if not folder.is_dir():
            raise BrokerRefused(f"{url}: {folder} is no directory: create it, or name another path")
        for name in {match[0] for path in folder.iterdir() if (match := _NAME.match(path.name))}:
            if _is_over(name):
                _unlink(folder, name)
        return await _sqlite_engine(url, RUNS).objections(events, size_bytes)
    if _is_memory(url):
        return await NoEngine(in_memory=True).objections(events, size_bytes)
    url = _without_namespace(url)
    async with _opened(url, RUNS) as runs:
        names = [info.spec.name for info in await runs.admin.streams()]
    for name in filter(_is_over, names):
        await _remove(url, name, say)
    async with _engine(url, RUNS) as engine:
        return await engine.objections(events, size_bytes)


async def _remove(url: str, name: str, say: Say = logger.info) -> None:
    """Remove all that a run has stored; what cannot be removed is said, and left to the next run."""
    try:
        async with _opened(url, name) as broker:
            for info in await broker.admin.streams():
                await _discard(broker, info.spec.name, say)
        if _is_redis(url):
            await redis_engine.remove(url, name)
        async with _opened(url, RUNS) as runs:
            await runs.admin.discard(name)
    except BrokerError as error:
        logger.error("run %s has left something on %s, the next run removes it: %s", name, mask(url), error)


async def _discard(broker: Broker, stream: str, say: Say) -> None:
    """Discard a stream. A worker that was killed counts as a member until its lease is over."""
    clock, most_s = Clock(), seconds(Settings.load().lease) + MARGIN_S
    began_s, said = clock.monotonic(), False
    while True:
        try:
            return await broker.admin.discard(stream)
        except BrokerRefused:
            if clock.monotonic() > began_s + most_s:
                raise
        if not said:
            say(f"a run was killed here: for up to {most_s:g} s its worker may count as alive, then its events go")
            said = True
        await clock.sleep(RETRY_S)


@asynccontextmanager
async def _opened(url: str, namespace: str) -> AsyncIterator[Broker]:
    broker = broker_for(url, Settings.load(namespace=namespace), Clock(), Telemetry())
    try:
        await broker.open()
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def _engine(url: str, namespace: str) -> AsyncIterator[Engine]:
    if not _is_redis(url):
        yield NoEngine(in_memory=False)
        return
    async with RedisEngine.opened(url, namespace) as engine:
        yield engine


def _sqlite_engine(url: str, name: str) -> SQLiteEngine:
    return SQLiteEngine(url, _file(url, f"{name}.engine"))


def _is_redis(url: str) -> bool:
    return url.startswith(("redis:", "redis+unix:", "unix:"))


def _is_sqlite(url: str) -> bool:
    return url.startswith("sqlite:")


def _is_memory(url: str) -> bool:
    return url.startswith("memory:")


def _file(url: str, name: str) -> Path:
    """A file of this name beside the one of an SQLite URL."""
    path = unquote(url.partition("?")[0].removeprefix("sqlite:///"))
    return Path(path).absolute().with_name(f"{name}.db")


def _at(url: str, file: Path) -> str:
    """The URL with another file."""
    _, mark, query = url.partition("?")
    return f"sqlite:///{quote(str(file))}{mark}{query}"


def _unlink(folder: Path, name: str) -> None:
    """Remove the files of a run: those of the broker, and of the engine."""
    for path in folder.glob(f"{name}.*"):
        path.unlink(missing_ok=True)


def _without_namespace(url: str) -> str:
    """The URL, which would have the last word about the namespace, without one."""
    base, _, query = url.partition("?")
    given = [pair for pair in parse_qsl(query) if pair[0] != "namespace"]
    return f"{base}?{urlencode(given)}" if given else base


def _machine() -> str:
    return sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_over(name: str) -> bool:
    """True when nobody can be at work in this run any more; what has another name is no run."""
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    machine, process, began_ms = match.groups()
    if machine != _machine():
        return Clock().now_ms() - int(began_ms) > FOREIGN_MS
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives, and is somebody else's
        return False
    return False
