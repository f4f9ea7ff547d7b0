"""A lone event leaves in the step that publishes it; what comes beside it waits, and those who wait are bounded in bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from millstream import App, Event, Settings, Stream, Unconfirmed
from millstream.brokers.base import Confirm, Position, Record
from millstream.brokers.memory.broker import MemoryBroker
from millstream.brokers.preparing import Posted
from millstream.errors import BrokerDown, BrokerRefused
from millstream.testing.clock import VirtualClock


class Placed(Event, type="order.placed"):
    n: int = 0
    note: str = ""


orders = Stream("orders", Placed)


class Sent:
    """A posted record: a task stands for the way to a server and back."""

    def __init__(self, task: asyncio.Task[list[Position]]) -> None:
        self._task = task

    def then(self, call: Callable[[], object]) -> None:
        self._task.add_done_callback(lambda _: call())

    def result(self) -> Position:
        return self._task.result()[0]


class Post(MemoryBroker):
    """A memory broker that can be posted to, and answers when the gate is open. A write under way is one of `calls`."""

    def __init__(self, app: App) -> None:
        super().__init__("memory://", app.settings, app.clock, app.telemetry)
        self.calls: list[tuple[str, list[int]]] = []
        self.errors: list[Exception] = []
        self.able = True
        self.gate = asyncio.Event()
        self.gate.set()

    def post(self, stream: str, record: Record) -> Posted | None:
        if not self.able:
            return None
        self.calls.append(("post", numbers([record])))
        return Sent(asyncio.ensure_future(self._stored(stream, [record])))

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        self.calls.append(("append", numbers(records)))
        return await self._stored(stream, records)

    async def _stored(self, stream: str, records: Sequence[Record]) -> list[Position]:
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        return await super().append(stream, records)

    def stored(self) -> list[int]:
        return numbers([found.record for found in self.logs["orders"].behind(0, 0, 10_000)])


class Ids(VirtualClock):
    """Virtual time that knows how many records were made: each asks for an id."""

    made = 0

    def new_id(self) -> str:
        self.made += 1
        return super().new_id()


def numbers(records: Sequence[Record]) -> list[int]:
    return [int(record.data[5:].split(b",")[0]) for record in records]


@asynccontextmanager
async def opened(**settings: Any) -> AsyncIterator[tuple[App, Post, Ids]]:
    app = App("shop", streams=[orders], settings=Settings(**settings))
    clock = app.clock = Ids()
    broker = Post(app)
    async with app.opened(broker=broker):
        yield app, broker, clock


def publishing(app: App, *events: int, note: str = "") -> list[asyncio.Task[Position]]:
    return [asyncio.ensure_future(app.publish(Placed(n=n, note=note))) for n in events]


async def turn() -> None:
    """Let all tasks that can run now run once."""
    await asyncio.sleep(0)


async def test_a_lone_event_leaves_in_the_step_that_publishes_it() -> None:
    async with opened() as (app, broker, _):
        await app.publish(Placed(n=1))
        (call,) = publishing(app, 2)
        await turn()
        assert broker.calls == [("post", [1]), ("post", [2])] and not call.done()
        await call
        assert broker.stored() == [1, 2]


async def test_what_comes_while_it_is_under_way_waits_and_leaves_as_one_write() -> None:
    async with opened() as (app, broker, _):
        await app.publish(Placed(n=0))
        await asyncio.gather(*publishing(app, *range(1, 100)))
        assert broker.calls == [("post", [0]), ("post", [1]), ("append", list(range(2, 100)))]
        assert broker.stored() == list(range(100))


async def test_behind_a_crowd_nobody_leaves_alone_before_it_is_seen_to_be_alone() -> None:
    async with opened() as (app, broker, _):
        for _ in range(3):
            await asyncio.gather(*publishing(app, *range(50)))
        await app.publish(Placed(n=50))
        await app.publish(Placed(n=51))
    begin, *whole, after, alone = broker.calls
    assert begin == ("post", [0]) and [len(written) for _, written in whole] == [49, 50, 50]
    assert (after, alone) == (("append", [50]), ("post", [51]))


async def test_callers_stay_together_though_the_first_of_them_left_alone() -> None:
    async with opened() as (app, broker, _):
        events = iter(range(500))

        async def caller() -> None:
            for n in events:
                await app.publish(Placed(n=n))

        await asyncio.gather(*[caller() for _ in range(50)])
    assert [len(written) for _, written in broker.calls[:4]] == [1, 50, 50, 50]
    assert broker.stored() == list(range(500))


async def test_where_the_broker_would_wait_the_writer_does() -> None:
    async with opened() as (app, broker, _):
        broker.able = False
        await app.publish(Placed(n=1))
        assert broker.calls == [("append", [1])]


async def test_what_must_be_confirmed_further_is_not_posted() -> None:
    async with opened() as (app, broker, _):
        broker.traits = replace(broker.traits, confirms=frozenset({"memory", "fsync"}))
        await app.publish(Placed(n=1), confirm="fsync")
        assert broker.calls == [("append", [1])]


@pytest.mark.parametrize("error", [BrokerDown("away"), BrokerRefused("no")])
async def test_when_a_posted_event_is_refused_the_order_stays(error: Exception) -> None:
    async with opened() as (app, broker, clock):
        broker.errors = [error, error]
        calls = publishing(app, 1, 2, 3)
        await clock.advance(1)
        if isinstance(error, BrokerDown):
            assert broker.calls[:3] == [("post", [1]), ("append", [1]), ("append", [1])]
            assert broker.stored() == [1, 2, 3] and all(isinstance(call.result(), Position) for call in calls)
        else:
            assert all(isinstance(call.exception(), BrokerRefused) for call in calls)
            assert broker.calls == [("post", [1]), ("append", [2, 3])]


async def test_a_posted_event_whose_answer_is_lost_is_in_doubt() -> None:
    async with opened() as (app, broker, _):
        broker.errors = [Unconfirmed("no answer", results=[None])]
        with pytest.raises(Unconfirmed) as caught:
            await app.publish(Placed(n=1))
        assert [envelope.event for envelope in caught.value.envelopes] == [Placed(n=1)]


async def test_behind_a_posted_event_whose_caller_is_cancelled_the_others_wait_for_its_answer() -> None:
    async with opened() as (app, broker, _):
        broker.gate.clear()
        first, second = publishing(app, 1, 2)
        await turn()
        first.cancel()
        await turn()
        third = publishing(app, 3)[0]
        for _ in range(5):
            await turn()
        assert broker.calls == [("post", [1])]
        broker.gate.set()
        await asyncio.gather(second, third)
        assert broker.stored() == [1, 2, 3]


async def test_closing_the_app_waits_for_a_posted_event() -> None:
    async with opened() as (app, broker, _):
        await app.publish(Placed(n=0))
        call = publishing(app, 1)[0]
        await turn()
    assert isinstance(call.result(), Position) and broker.stored() == [0, 1]


async def test_an_app_that_ends_with_an_error_leaves_no_posted_event_without_an_answer() -> None:
    calls: list[asyncio.Task[Position]] = []
    with pytest.raises(ZeroDivisionError):
        async with opened() as (app, broker, _):
            await app.publish(Placed(n=0))
            broker.gate.clear()
            calls += publishing(app, 1)
            await turn()
            assert broker.calls[-1] == ("post", [1])
            raise ZeroDivisionError
    async with asyncio.timeout(5):
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [Unconfirmed]


# What waits, in bytes.


async def test_past_the_buffers_bytes_publishing_waits_its_turn_and_holds_no_bytes() -> None:
    async with opened(max_buffered_size="1MB") as (app, broker, clock):
        await app.publish(Placed(n=0))
        made, note = clock.made, "x" * 250_000
        broker.gate.clear()
        calls = publishing(app, *range(1, 30), note=note)
        for _ in range(100):
            await turn()
        assert clock.made - made == 1 + 5  # one is being written; the fifth goes past the limit, as one may
        broker.gate.set()
        await asyncio.gather(*calls)
        assert broker.stored() == list(range(30))


async def test_an_event_larger_than_the_buffer_is_published() -> None:
    async with opened(max_buffered_size="1KB") as (app, broker, _):
        await asyncio.gather(*publishing(app, *range(5), note="x" * 2_000))
        assert broker.stored() == list(range(5))


async def test_a_write_takes_no_more_bytes_than_its_limit() -> None:
    async with opened() as (app, broker, _):
        broker.gate.clear()
        calls = publishing(app, *range(12), note="x" * 1_000_000)
        await turn()
        broker.gate.set()
        await asyncio.gather(*calls)
        assert [len(written) for _, written in broker.calls] == [1, 4, 4, 3]
        assert broker.stored() == list(range(12))


async def test_who_comes_when_there_is_room_again_goes_behind_the_line() -> None:
    async with opened(max_buffered=1) as (app, broker, _):
        broker.gate.clear()

        async def first() -> None:
            await app.publish(Placed(n=0))
            calls.extend(publishing(app, 3))  # runs before the one in line hears that there is room

        calls: list[asyncio.Future[Any]] = [asyncio.ensure_future(first()), *publishing(app, 1, 2)]
        for _ in range(5):
            await turn()
        broker.gate.set()
        await calls[0]
        await asyncio.gather(*calls)
        assert broker.stored() == [0, 1, 2, 3]


async def test_who_is_cancelled_in_line_holds_up_nobody() -> None:
    async with opened(max_buffered=1) as (app, broker, _):
        broker.gate.clear()
        calls = publishing(app, 0, 1, 2, 3)
        for _ in range(5):
            await turn()
        calls[2].cancel()
        await turn()
        broker.gate.set()
        await asyncio.gather(*calls, return_exceptions=True)
        assert broker.stored() == [0, 1, 3]
        await app.publish(Placed(n=4))
        assert broker.stored() == [0, 1, 3, 4]
