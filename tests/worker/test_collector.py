"""Python's collector: left alone in a process that is not ours, and relaxed inside a block only."""

from __future__ import annotations

import gc

from millstream import App, Event, Stream
from millstream.worker import collector


class Seen(Event, type="seen"):
    """Something to handle."""


seen = Stream("seen", Seen)


async def test_a_worker_in_somebody_elses_program_leaves_the_collector_alone() -> None:
    app, found = App("guest", broker="memory://"), list[tuple[object, int]]()
    before = gc.get_threshold(), gc.get_freeze_count()

    @app.subscriber(seen, "watch")
    async def look(event: Seen) -> None:
        found.append((gc.get_threshold(), gc.get_freeze_count()))

    async with app.worker():
        await app.publish(Seen())
    assert found == [before]


def test_afterwards_the_collector_is_as_it_was() -> None:
    before = gc.get_threshold()
    with collector.relaxed():
        assert gc.get_threshold() == (collector.OBJECTS, *before[1:])
        assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
