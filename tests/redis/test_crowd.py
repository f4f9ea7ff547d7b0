"""Many members of one group: they share evenly, and no event wakes more than one of them.

What they cost is counted in commands, which are the same on every machine; members that wait ask again after `BLOCK_S`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from millstream import App, Event, Settings, Stream
from millstream.brokers.redis.link import BLOCK_S
from millstream.telemetry import ACQUIRED, RELEASED
from tests.redis.brokers import run_in, server, started
from tests.servers import RedisServer
from tests.worker.place import until

__all__ = ["server", "started"]

MEMBERS = 12
EVENTS = 40


class Ping(Event, type="ping"):
    key: str


keyed = Stream("keyed", Ping, key="key", partitions=8)
loose = Stream("loose", Ping)


class Crowd:
    """So many apps with one group, and what they do."""

    def __init__(self, url: str, stream: Stream[Ping]) -> None:
        self.owned: Counter[int] = Counter(dict.fromkeys(range(MEMBERS), 0))
        self.handled = 0
        self.apps = [self._app(number, url, stream) for number in range(MEMBERS)]

    def _app(self, number: int, url: str, stream: Stream[Ping]) -> App:
        app = App("crowd", broker=url, settings=Settings(lease="10s"))

        @app.subscriber(stream, "crowd")
        async def handle(event: Ping) -> None:
            self.handled += 1

        def hear(name: str, _: Mapping[str, Any]) -> None:
            self.owned[number] += (name == ACQUIRED) - (name == RELEASED)

        app.telemetry.listen(hear)
        return app

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await asyncio.gather(*(stack.enter_async_context(app.worker()) for app in self.apps))
            yield


def commands(server: RedisServer) -> Counter[str]:
    """How often each command was called."""
    lines = run_in(server, "INFO", "commandstats").decode().split()
    stats = dict(line.removeprefix("cmdstat_").split(":") for line in lines if line.startswith("cmdstat_"))
    return Counter({name: int(words.split(",")[0].removeprefix("calls=")) for name, words in stats.items()})


async def test_members_have_equally_many_partitions_and_those_without_one_wait(server: RedisServer) -> None:
    crowd = Crowd(server.url, keyed)
    async with crowd.at_work():
        await until(lambda: sorted(crowd.owned.values()) == [0] * 4 + [1] * 8, f"they do not share: {crowd.owned}")


@pytest.mark.parametrize(("stream", "read"), [(keyed, "xread"), (loose, "xreadgroup")])
async def test_an_event_wakes_one_member_however_many_wait(
    server: RedisServer, stream: Stream[Ping], read: str
) -> None:
    crowd = Crowd(server.url, stream)
    async with crowd.at_work():
        await until(lambda: stream is loose or sorted(crowd.owned.values()) == [0] * 4 + [1] * 8)
        before, began_s = commands(server), time.monotonic()
        for number in range(EVENTS):
            await crowd.apps[0].publish(Ping(key=f"k-{number}"), to=stream)
            await until(lambda: crowd.handled > number)  # noqa: B023
        calls, seconds = commands(server) - before, time.monotonic() - began_s
    by_themselves = MEMBERS * (2 + 2 * seconds / BLOCK_S)
    assert calls[read] <= EVENTS + by_themselves, calls
