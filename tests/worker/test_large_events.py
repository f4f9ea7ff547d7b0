"""Large events: a backlog of them is handled, and never held all at once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream import App, Event, Settings, Stream
from tests.servers import RedisServer
from tests.worker.place import until

EVENTS = 160
SIZE = 1_000_000
MOST_BYTES = 90_000_000


class Picture(Event, type="picture"):
    number: int
    pixels: str


keyed = Stream("keyed", Picture, key="number", partitions=8)
loose = Stream("loose", Picture)


@pytest.fixture(params=["redis", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/pictures.db?synchronous=normal"
        return
    with RedisServer.start() as server:
        yield server.url


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("stream", [keyed, loose], ids=["ordered", "unordered"])
async def test_a_backlog_of_large_events_is_handled_and_not_held_all_at_once(stream: Stream[Picture], url: str) -> None:
    app, handled = App("pictures", broker=url, streams=[stream], settings=Settings()), set[int]()
    async with app:
        for number in range(EVENTS):
            await app.publish(Picture(number=number, pixels="-" * SIZE), to=stream)

    @app.subscriber(stream, "show")
    async def show(event: Picture) -> None:
        handled.add(event.number)

    tracemalloc.reset_peak()
    async with app.worker():
        await until(lambda: len(handled) == EVENTS)
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
