"""Handlers without a group."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from millstream import App, Pack, Skip, Stream
from millstream.brokers.base import Record
from millstream.errors import BrokerDown
from millstream.telemetry import LISTENER_FAILED
from tests.worker.place import Base, Cancelled, Faulty, Placed, app_of, at_work, heard, memory, orders, until


def listening(app: App) -> list[Base]:
    seen: list[Base] = []

    @app.listener(orders)
    async def hear(event: Base) -> None:
        seen.append(event)

    return seen


async def test_a_listener_hears_what_is_published_from_its_start_on() -> None:
    app = app_of()
    seen, broker = listening(app), memory(app)
    async with app.opened(broker=broker):
        await app.publish(Placed(n=1))
        async with at_work(app):
            await app.publish(Placed(n=2))
            await app.publish(Cancelled(n=3))
            await until(lambda: len(seen) == 2)
    assert seen == [Placed(n=2), Cancelled(n=3)] or seen == [Cancelled(n=3), Placed(n=2)]


async def test_a_group_that_starts_now_gets_what_is_published_inside_the_block() -> None:
    app, seen = app_of(), list[Base]()

    @app.subscriber(orders, "billing", start="now")
    async def charge(event: Base) -> None:
        seen.append(event)

    @app.subscriber(orders, "hindsight", start=timedelta(hours=1))
    async def look_back(event: Base) -> None:
        seen.append(event)

    broker = memory(app)
    async with app.opened(broker=broker):
        await app.publish(Placed(n=1))
        async with at_work(app):
            await app.publish(Placed(n=2))
            await until(lambda: len(seen) == 3)
    assert sorted(event.n for event in seen) == [1, 2, 2]


async def test_every_process_calls_its_listeners() -> None:
    first, second = app_of(), app_of()
    heard_first, heard_second, broker = listening(first), listening(second), memory(first)
    async with at_work(first, broker), at_work(second, broker):
        await first.publish(Placed(n=1))
        await until(lambda: heard_first and heard_second)
    assert heard_first == heard_second == [Placed(n=1)]


@pytest.mark.parametrize(
    "error",
    [ValueError(), SystemExit(1), asyncio.CancelledError(), StopAsyncIteration(), BaseExceptionGroup("", [KeyError()])],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_does_not_stop_a_listener(error: BaseException) -> None:
    app, seen = app_of(), list[int]()
    failed = heard(app, LISTENER_FAILED)

    @app.listener(orders)
    async def hear(event: Base) -> None:
        seen.append(event.n)
        if event.n == 1:
            raise error

    async with at_work(app):
        await app.publish(Placed(n=1))
        await until(lambda: failed)
        await app.publish(Placed(n=2))
        await until(lambda: seen == [1, 2])


async def test_skip_is_no_failure_of_a_listener() -> None:
    app, seen = app_of(), list[int]()
    failed = heard(app, LISTENER_FAILED)

    @app.listener(orders)
    async def hear(event: Placed) -> None:
        seen.append(event.n)
        raise Skip

    async with at_work(app):
        await app.publish(Placed(n=1))
        await until(lambda: seen)
    assert not failed


async def test_a_listener_that_hangs_is_cut_at_its_timeout() -> None:
    app, seen = app_of(timeout="50ms"), list[int]()
    failed = heard(app, LISTENER_FAILED)

    @app.listener(orders)
    async def hear(event: Placed) -> None:
        seen.append(event.n)
        if event.n == 1:
            await asyncio.Event().wait()

    async with at_work(app):
        await app.publish(Placed(n=1))
        await app.publish(Placed(n=2))
        await until(lambda: sorted(seen) == [1, 2])
        await until(lambda: failed)
    assert isinstance(failed[0]["exception"], TimeoutError)


async def test_bad_bytes_and_other_types_do_not_stop_a_listener() -> None:
    app = app_of()
    seen = listening(app)
    async with at_work(app):
        bad = [Record(0, "a", "order.placed", b"?"), Record(0, "b", "order.lost", b"{}")]
        await app.broker.append("orders", bad)
        await app.publish(Placed(n=2))
        await until(lambda: seen == [Placed(n=2)])


async def test_a_listener_goes_on_where_it_was_after_the_broker_was_away() -> None:
    app = app_of()
    seen, broker = listening(app), Deaf(memory(app))
    async with at_work(app, broker):
        broker.down = True
        await app.publish(Placed(n=1))
        await until(lambda: broker.refused >= 2)
        broker.down = False
        await until(lambda: seen == [Placed(n=1)])


class Deaf(Faulty):
    """A broker whose `read` fails while it is down."""

    down = False
    refused = 0

    async def read(self, *words: object) -> object:
        if self.down:
            self.refused += 1
            raise BrokerDown("away")
        return await self.broker.read(*words)  # type: ignore[arg-type]


async def test_a_listener_hears_the_events_of_a_pack() -> None:
    crowd = Stream("crowd", Placed, pack=Pack(codec="none"), codec="msgpack")
    app, seen = App("choir", streams=[crowd]), list[int]()

    @app.listener(crowd)
    async def hear(event: Placed) -> None:
        seen.append(event.n)

    async with app.opened(broker=memory(app)), at_work(app):
        positions = await app.publish_many([Placed(n=n) for n in range(20)])
        assert len({position.offset.partition(".")[0] for position in positions}) == 1
        await until(lambda: len(seen) == 20)
    assert seen == list(range(20))
