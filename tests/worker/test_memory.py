"""A worker's memory: what was handled leaves nothing behind, and large events are never held all at once."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millstream import App, Event, Settings, Stream
from tests.servers import RedisServer
from tests.worker.place import settled, until

ROUND = 5_000
LEFT_BYTES = 16  # of an event, at most: a list of offsets alone would be 60
PAGE = 1_000

PICTURES = 160
PICTURE_BYTES = 1_000_000
MOST_BYTES = 90_000_000


class Line(Event, type="line"):
    number: int
    text: str


keyed = Stream("keyed", Line, key="number", partitions=8)
loose = Stream("loose", Line)


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/lines.db?synchronous=normal"
    else:
        with RedisServer.start() as server:
            yield server.url


class Lines:
    """An app that handles lines, and keeps nothing of them."""

    def __init__(self, url: str, stream: Stream[Line]) -> None:
        self.app = App("lines", broker=url, settings=Settings())
        self.stream = stream

        @self.app.subscriber(stream, "count")
        async def count(event: Line) -> None: ...

    async def round(self) -> int:
        """Publish and handle so many events; the bytes that are in use afterwards."""
        for first in range(0, ROUND, PAGE):
            lines = [Line(number=number, text="-" * 150) for number in range(first, first + PAGE)]
            await self.app.publish_many(lines, to=self.stream)
        await settled(self.app.broker, "count", self.stream.name)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("stream", [keyed, loose], ids=["ordered", "unordered"])
async def test_what_was_handled_leaves_nothing_behind(url: str, stream: Stream[Any]) -> None:
    lines = Lines(url, stream)
    async with lines.app.worker():
        warm = max([await lines.round(), await lines.round()])
        for _ in range(2):
            last = await lines.round()
    assert last - warm < 2 * ROUND * LEFT_BYTES, f"{(last - warm) / (2 * ROUND):.0f} bytes an event"


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("stream", [keyed, loose], ids=["ordered", "unordered"])
async def test_a_backlog_of_large_events_is_handled_and_not_held_all_at_once(stream: Stream[Line], url: str) -> None:
    app, handled = App("pictures", broker=url, streams=[stream], settings=Settings()), set[int]()
    async with app:
        for number in range(PICTURES):
            await app.publish(Line(number=number, text="-" * PICTURE_BYTES), to=stream)

    @app.subscriber(stream, "show")
    async def show(event: Line) -> None:
        handled.add(event.number)

    tracemalloc.reset_peak()
    async with app.worker():
        await until(lambda: len(handled) == PICTURES)
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
