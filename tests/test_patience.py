"""Publishing while the broker fails: what is tried again and for how long, in which order, and what an error then says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from millstream import App, Dedupe, Event, Settings, Stream, Unconfirmed
from millstream.brokers.base import Confirm, Policy, Position, Record
from millstream.brokers.memory.broker import MemoryBroker
from millstream.errors import BrokerDown, BrokerFull, BrokerRefused, MillstreamError
from millstream.telemetry import BROKER_ERROR
from millstream.testing.clock import START_MS, VirtualClock

DOWN = BrokerDown("away")
LOST = Unconfirmed("no answer")
START = datetime.fromtimestamp(START_MS / 1000, UTC)


class Placed(Event, type="order.placed"):
    n: int = 0


plain = Stream("plain", Placed)
told = Stream("told", Placed, dedupe="10m")
brief = Stream("brief", Placed, dedupe=Dedupe("1s"))


class Failing(MemoryBroker):
    """A memory broker in virtual time that fails as told: `LOST` after it has stored the records, all else before."""

    def __init__(self, app: App) -> None:
        super().__init__("memory://", app.settings, app.clock, app.telemetry)
        self.writes: list[list[str]] = []
        self.errors: list[Exception] = []
        self.always: Exception | None = None

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        self.writes.append([record.data.decode() for record in records])
        error = self.errors.pop(0) if self.errors else self.always
        if error is not None and error is not LOST:
            raise error
        positions = await super().append(stream, records, confirm)
        if error is LOST:
            raise Unconfirmed(str(error), results=[None] * len(records))
        return positions

    def stored(self, stream: Stream[Any]) -> list[int]:
        return [int(found.record.data[5:-1]) for found in self.logs[stream.name].behind(0, 0, 10_000)]


@asynccontextmanager
async def failing(**settings: Any) -> AsyncIterator[tuple[App, Failing, VirtualClock]]:
    app = App("shop", streams=[plain, told, brief], settings=Settings(**settings))
    clock = app.clock = VirtualClock()
    broker = Failing(app)
    async with app.opened(broker=broker):
        yield app, broker, clock


def publishing(app: App, *events: int, to: Stream[Placed] = plain) -> list[asyncio.Future[Position]]:
    return [asyncio.ensure_future(app.publish(Placed(n=n), to=to)) for n in events]


@pytest.mark.parametrize("error", [DOWN, BrokerFull("no room")])
async def test_while_nothing_was_stored_it_is_tried_again_and_the_order_stays(error: Exception) -> None:
    async with failing() as (app, broker, clock):
        broker.errors = [error] * 3
        first = publishing(app, 1)
        await clock.advance(0)
        rest = publishing(app, 2, 3)
        await clock.advance(1)
        assert all(isinstance(future.result(), Position) for future in first + rest)
        assert broker.stored(plain) == [1, 2, 3]
    assert broker.writes == [['{"n":1}']] * 4 + [['{"n":2}', '{"n":3}']]


async def test_the_pauses_grow_and_it_is_told() -> None:
    async with failing(publish_patience="1m") as (app, broker, clock):
        heard: list[Any] = []
        app.telemetry.listen(
            lambda name, said: heard.append((said["doing"], said["error"])) if name == BROKER_ERROR else None
        )
        broker.always = DOWN
        (future,) = publishing(app, 1)
        await clock.advance(59)
        assert 59 < len(broker.writes) < 90  # 10 ms, 20 ms, … 1 s
        assert heard[0] == ("publish to plain", DOWN)
        broker.always = None
        await clock.advance(1)
        assert isinstance(future.result(), Position)


async def test_when_the_patience_is_over_the_error_is_the_brokers_own() -> None:
    async with failing(publish_patience="2s") as (app, broker, clock):
        broker.always = BrokerFull("stream 'plain' is full")
        (future,) = publishing(app, 1)
        await clock.advance(1.9)
        assert not future.done()
        await clock.advance(0.2)
        assert isinstance(future.exception(), BrokerFull)
        broker.always = None
        await app.publish(Placed(n=2), to=plain)
        assert broker.stored(plain) == [2]


async def test_without_patience_it_tries_once() -> None:
    async with failing(publish_patience=0) as (app, broker, _):
        broker.errors = [DOWN]
        with pytest.raises(BrokerDown):
            await app.publish(Placed(), to=plain)
    assert len(broker.writes) == 1


async def test_what_no_second_try_mends_is_told_at_once() -> None:
    async with failing() as (app, broker, _):
        broker.errors = [BrokerRefused("wrong password")]
        with pytest.raises(BrokerRefused):
            await app.publish(Placed(), to=plain)
    assert len(broker.writes) == 1


async def test_without_dedupe_what_is_in_doubt_is_told_at_once_and_that_a_repeat_may_be_a_second_event() -> None:
    async with failing() as (app, broker, _):
        broker.errors = [LOST]
        with pytest.raises(
            Unconfirmed, match="'plain' has no dedupe, so publishing the envelopes again may store an event twice"
        ) as caught:
            await app.publish(Placed(n=1), to=plain)
        assert caught.value.retry_until is None and len(broker.writes) == 1
        await app.publish(caught.value.envelopes[0], to=plain)
        assert broker.stored(plain) == [1, 1]


async def test_with_dedupe_what_is_in_doubt_is_tried_again_and_stored_once() -> None:
    async with failing() as (app, broker, clock):
        broker.errors = [LOST, DOWN, LOST]
        (future,) = publishing(app, 1, to=told)
        await clock.advance(1)
        assert future.result() == Position(0, "1") and len(broker.writes) == 4
        assert broker.stored(told) == [1]


async def test_what_was_in_doubt_once_stays_in_doubt_whatever_the_last_error_is() -> None:
    async with failing(publish_patience="1s") as (app, broker, clock):
        broker.errors, broker.always = [LOST], DOWN
        (future,) = publishing(app, 1, to=told)
        await clock.advance(2)
        error = future.exception()
        assert isinstance(error, Unconfirmed) and "away" in str(error)
        assert error.retry_until == START + timedelta(minutes=10) - timedelta(seconds=5)
        assert "safe until 00:09:55 UTC" in str(error)


async def test_a_repeat_that_fails_as_well_may_not_be_repeated_for_longer_than_the_first_try_allows() -> None:
    async with failing(publish_patience=0) as (app, broker, clock):
        broker.errors = [LOST, LOST]
        with pytest.raises(Unconfirmed) as first:
            await app.publish(Placed(n=1), to=told)
        await clock.advance(300)
        with pytest.raises(Unconfirmed) as second:
            await app.publish(first.value.envelopes[0], to=told)
        assert second.value.retry_until == first.value.retry_until
        await clock.advance(200)
        with pytest.raises(Unconfirmed) as third:
            broker.errors = [LOST]
            await app.publish_many(second.value.envelopes, to=told)
        assert third.value.retry_until == first.value.retry_until
        assert broker.stored(told) == [1]


async def test_nothing_is_tried_again_after_the_stream_may_have_forgotten_the_id() -> None:
    async with failing(publish_patience="10s") as (app, broker, clock):
        broker.always = LOST
        (future,) = publishing(app, 1, to=brief)
        await clock.advance(1)
        assert isinstance(future.exception(), Unconfirmed)
        assert broker.stored(brief) == [1]


async def test_what_is_in_doubt_is_not_repeated_once_the_stream_remembers_no_ids_any_more() -> None:
    async with failing() as (app, broker, clock):
        broker.errors = [LOST]
        futures = publishing(app, 1, to=told)
        await broker.admin.apply("told", Policy())
        await clock.advance(2)
        error = futures[0].exception()
        assert isinstance(error, Unconfirmed) and error.retry_until is None and "has no dedupe" in str(error)
        assert broker.stored(told) == [1]


async def test_a_cancelled_call_takes_its_event_out_of_the_next_try() -> None:
    async with failing() as (app, broker, clock):
        broker.errors = [DOWN]
        one, two = publishing(app, 1, 2)
        await clock.advance(0)
        one.cancel()
        await clock.advance(1)
        assert isinstance(two.result(), Position)
        assert broker.stored(plain) == [2]


async def test_closing_the_app_ends_the_trying() -> None:
    async with failing(publish_patience="1h") as (app, broker, clock):
        broker.always = DOWN
        futures = publishing(app, 1, to=plain) + publishing(app, 2, to=told)
        await clock.advance(1)
    assert [type(future.exception()) for future in futures] == [BrokerDown, BrokerDown]


async def test_those_behind_a_write_that_fails_for_long_get_its_error_without_a_try_of_their_own() -> None:
    async with failing(publish_patience="2s") as (app, broker, clock):
        broker.always = DOWN
        first = publishing(app, 1)
        await clock.advance(0)
        behind = publishing(app, *range(2, 2_500))
        await clock.advance(1.9)
        late = publishing(app, 9_999)
        await clock.advance(0.2)
        assert all(isinstance(future.exception(), BrokerDown) for future in first + behind)
        assert {len(write) for write in broker.writes[:-1]} == {1} and not late[0].done()
        await clock.advance(2)
        assert isinstance(late[0].exception(), BrokerDown)


async def test_a_stream_that_fails_holds_up_no_other() -> None:
    async with failing() as (app, broker, clock):
        broker.errors = [BrokerFull("plain is full")]
        slow = publishing(app, 1, to=plain)
        await clock.advance(0)
        (quick,) = publishing(app, 2, to=told)
        await clock.advance(0)
        assert quick.done() and not slow[0].done()
        await clock.advance(1)
        assert slow[0].done()


async def test_past_the_buffer_publishing_waits_its_turn() -> None:
    async with failing(max_buffered=10) as (app, broker, clock):
        broker.errors = [DOWN]
        futures = publishing(app, 0)
        await clock.advance(0)
        futures += publishing(app, *range(1, 30))
        await clock.advance(1)
        assert all(isinstance(future.result(), Position) for future in futures)
        assert broker.stored(plain) == list(range(30))
    assert max(len(write) for write in broker.writes) == 10


async def test_those_who_wait_for_their_turn_are_told_when_the_app_is_closed() -> None:
    async with failing(max_buffered=1, publish_patience="1h") as (app, broker, clock):
        broker.always = DOWN
        futures = publishing(app, 1)
        await clock.advance(0)
        futures += publishing(app, 2, 3)
        await clock.advance(0)
    errors = [future.exception() for future in futures]
    assert all(isinstance(error, MillstreamError) for error in errors)


async def test_publish_many_tries_each_write_again() -> None:
    async with failing() as (app, broker, clock):
        broker.errors = [DOWN, LOST]
        many = asyncio.ensure_future(app.publish_many([Placed(n=n) for n in range(1_500)], to=told))
        await clock.advance(1)
        assert len(many.result()) == 1_500
        assert broker.stored(told) == list(range(1_500))
    assert [len(write) for write in broker.writes] == [1_000, 1_000, 1_000, 500]


async def test_publish_many_gives_up_with_exactly_what_is_not_known_to_be_stored() -> None:
    async with failing() as (app, broker, clock):
        broker.errors, broker.always = [LOST], DOWN
        many = asyncio.ensure_future(app.publish_many([Placed(n=n) for n in range(3)], to=told))
        await clock.advance(5)
        error = many.exception()
        assert isinstance(error, Unconfirmed)
        assert [envelope.event.n for envelope in error.envelopes] == [0, 1, 2]
        assert error.retry_until == START + timedelta(minutes=10) - timedelta(seconds=5)
        broker.always = None
        assert len(await app.publish_many(error.envelopes, to=told)) == 3
        assert broker.stored(told) == [0, 1, 2]


async def test_a_write_of_which_a_part_is_known_tries_the_rest_again() -> None:
    async with failing() as (app, broker, clock):
        broker.errors = [Unconfirmed("cut", results=[Position(0, "9"), None, BrokerFull("full")])]
        futures = publishing(app, 1, 2, 3, to=told)
        await clock.advance(1)
        assert futures[0].result() == Position(0, "9")
        assert broker.writes[1] == ['{"n":2}', '{"n":3}'] and broker.stored(told) == [2, 3]
