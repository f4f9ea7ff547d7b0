"""Where a run of the demo lives, and how it leaves nothing behind."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from urllib.parse import parse_qsl, urlencode

from millstream import BrokerDown, Settings
from millstream.brokers.base import Broker
from millstream.brokers.urls import broker_for, mask
from millstream.clock import Clock
from millstream.demo.flights import flights
from millstream.telemetry import Telemetry, logger

APP = "millstream.demo.app:app"
REMOVED_AT_ONCE = 500  # keys in one UNLINK


@dataclass
class Place:
    """A broker URL, and the namespace of this run."""

    url: str
    namespace: str
    reached: bool = False
    """Whether the broker was ever open."""

    @property
    def settings(self) -> Settings:
        """Settings of all that has to do with this run; Ctrl-C must not last long."""
        return Settings.load(namespace=self.namespace, grace="5s")

    @property
    def hint(self) -> str:
        """A shell line with which every other command looks at the same place; a password is to be filled in."""
        named = f" MILLSTREAM_NAMESPACE={self.namespace}" if self.namespace else ""
        return f"export MILLSTREAM_BROKER={shlex.quote(mask(self.url))} MILLSTREAM_APP={APP}{named}"

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Broker]:
        """A broker of its own, with its own connections."""
        broker = broker_for(self.url, self.settings, Clock(), Telemetry())
        await broker.open()
        try:
            yield broker
        finally:
            await broker.close()


@asynccontextmanager
async def found(url: str | None, *, keep: bool) -> AsyncIterator[Place]:
    """A place for one run; at its end, and when it is interrupted, all is removed again unless it is to be kept.

    Without a URL it is a new SQLite file in a temporary folder. On a Redis server it is a new namespace, whose keys are
    removed by their names. An SQLite file that somebody named is his and stays: a run that finds flights in it goes on
    beside them, in a namespace.
    """
    name = f"demo-{Clock().nonce()[:8]}"
    if url is None:
        folder = Path(mkdtemp(prefix="millstream-demo-"))
        try:
            yield Place(f"sqlite:///{folder / 'flights.db'}", "")
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
    elif url.startswith("redis"):
        here = Place(_in_namespace(url, name), "")
        try:
            yield here
        except BrokerDown:
            keep = keep or not here.reached  # then there is nothing to remove, and no complaint about it either
            raise
        finally:
            if not keep:
                await _remove(url, name)
    else:
        place = Place(url, "")
        yield Place(url, name) if await _is_taken(place) else place


async def _is_taken(place: Place) -> bool:
    async with place.opened() as broker:
        return any(info.spec.name == flights.name for info in await broker.admin.streams())


def _in_namespace(url: str, namespace: str) -> str:
    base, _, query = url.partition("?")
    given = [pair for pair in parse_qsl(query) if pair[0] != "namespace"]
    return f"{base}?{urlencode([*given, ('namespace', namespace)])}"


async def _remove(url: str, namespace: str) -> None:
    """Remove the keys of a namespace, which begin with its name or with `{` and its name."""
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    base, _, query = url.partition("?")
    given = [pair for pair in parse_qsl(query) if pair[0] in ("db", "username", "password")]
    base = base.replace("redis+unix://", "unix://", 1)
    try:
        async with Redis.from_url(f"{base}?{urlencode(given)}", socket_timeout=5, socket_connect_timeout=5) as server:
            for pattern in (f"{namespace}:*", f"{{{namespace}:*"):
                keys = [key async for key in server.scan_iter(pattern, count=1_000)]
                for first in range(0, len(keys), REMOVED_AT_ONCE):
                    await server.unlink(*keys[first : first + REMOVED_AT_ONCE])
    except (RedisError, OSError) as error:
        logger.warning("keys that begin with %s: are left on %s: %s", namespace, mask(url), error)
