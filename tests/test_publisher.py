"""Publishing: ids, keys, limits, few large writes, and what an error says about what is stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from millstream import (
    App,
    BadEvent,
    Envelope,
    Event,
    MillstreamError,
    Settings,
    Stream,
    TooLarge,
    Unconfirmed,
    Unroutable,
)
from millstream.brokers.base import Confirm, Policy, Position, Record, StreamSpec
from millstream.brokers.memory.broker import MemoryBroker
from millstream.errors import BrokerDown, BrokerFull, BrokerRefused
from millstream.wire.partition import partition_of


class Placed(Event, type="order.placed"):
    order_id: str = "o"
    note: str = ""


class Cancelled(Event, type="order.cancelled"):
    order_id: str = "o"


class Base(Event):
    pass


orders = Stream("orders", Placed | Cancelled, key="order_id", partitions=4)
returns = Stream("returns", Cancelled)


class Counted(MemoryBroker):
    """A memory broker that remembers each write, and fails as told."""

    def __init__(self, app: App) -> None:
        super().__init__("memory://", app.settings, app.clock, app.telemetry)
        self.writes: list[int] = []
        self.errors: list[Exception] = []
        self.gate: asyncio.Event | None = None

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        self.writes.append(len(records))
        await asyncio.sleep(0)  # as a real one: others run while it writes
        if self.gate is not None:
            await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        return await super().append(stream, records, confirm)


@asynccontextmanager
async def opened(**settings: Any) -> AsyncIterator[tuple[App, Counted]]:
    app = App("shop", streams=[orders, returns], settings=Settings(**settings))
    broker = Counted(app)
    async with app.opened(broker=broker):
        yield app, broker


async def stored(broker: MemoryBroker, stream: str = "orders") -> list[Record]:
    pages = [await broker.read(stream, p, None, 10_000) for p in range(broker.logs[stream].spec.partitions)]
    return [found.record for page in pages for found in page]


async def test_a_thousand_publishes_at_once_are_a_few_writes() -> None:
    async with opened() as (app, broker):
        async with asyncio.TaskGroup() as tasks:
            for n in range(1_000):
                tasks.create_task(app.publish(Placed(order_id=str(n))))
        assert len(await stored(broker)) == 1_000
    assert len(broker.writes) <= 3


async def test_publishes_of_one_key_are_stored_in_the_order_of_their_calls() -> None:
    async with opened() as (app, broker):
        async with asyncio.TaskGroup() as tasks:
            for n in range(100):
                tasks.create_task(app.publish(Placed(note=str(n))))
        notes = [record.data for record in await stored(broker)]
    assert notes == [b'{"order_id":"o","note":"%d"}' % n for n in range(100)]


async def test_the_key_is_stored_and_chooses_the_partition() -> None:
    async with opened() as (app, _):
        positions = [await app.publish(Placed(order_id=str(n))) for n in range(20)]
        own = await app.publish(Envelope(Placed(order_id="1"), key="another"), to=orders)
    assert [position.partition for position in positions] == [partition_of(str(n), 4) for n in range(20)]
    assert own.partition == partition_of("another", 4)


async def test_an_envelope_keeps_its_id_and_headers_and_others_get_an_id() -> None:
    async with opened() as (app, broker):
        await app.publish(Envelope(Placed(), id="mine", headers={"tenant": "a"}), to=orders)
        await app.publish(Placed())
        first, second = await stored(broker)
    assert (first.id, first.headers, first.source) == ("mine", b'{"tenant":"a"}', "shop")
    assert 0 < len(second.id) <= 24 and second.headers == b""


@pytest.mark.parametrize(
    ("event", "error", "words"),
    [
        (Placed(note="x" * 1_048_576), TooLarge, "over the limit of 1,048,576; store the bulk elsewhere"),
        (Placed(order_id="é" * 600), TooLarge, "the key of Placed is over 1,024 bytes; use a hash of it"),
        (Envelope(Placed(), id="i" * 65), TooLarge, "has 65 characters, over the limit of 64"),
        (Envelope(Placed(), id="naïve"), BadEvent, "only printable ASCII"),
        (Envelope(Placed(), id=7), BadEvent, "id 7 is not text"),  # type: ignore[arg-type]
        (Envelope(Placed(), headers={"h": "x" * 20_000}), TooLarge, "headers are 20,008 bytes"),
        (Envelope(Placed(), headers={"n": 5}), BadEvent, "names and values must be text"),  # type: ignore[dict-item]
        (Base(), BadEvent, r"write class Base\(Event, type='…'\)"),
        ({"order_id": "1"}, BadEvent, "dict is no event"),
        (Cancelled(), Unroutable, "say to=; those that carry it: orders, returns"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
async def test_what_cannot_be_published_is_refused_and_says_why(event: Any, error: type[Exception], words: str) -> None:
    async with opened() as (app, broker):
        with pytest.raises(error, match=words):
            await app.publish(event)
        assert await stored(broker) == []


async def test_a_stream_that_does_not_carry_the_type_is_named() -> None:
    async with opened() as (app, _):
        with pytest.raises(Unroutable, match="'returns' does not carry Placed; it carries Cancelled"):
            await app.publish(Placed(), to=returns)  # type: ignore[misc]
        with pytest.raises(Unroutable, match="two different Stream objects are named 'orders'"):
            await app.publish(Placed(), to=Stream("orders", Placed | Cancelled, key="order_id", partitions=4))


async def test_a_stream_that_the_app_does_not_know_is_declared_when_it_is_first_named() -> None:
    async with opened() as (app, broker):
        await app.publish(Placed(), to=Stream("elsewhere", Placed))
        assert [record.type for record in await stored(broker, "elsewhere")] == ["order.placed"]


@pytest.mark.parametrize("error", [BrokerDown("away"), BrokerFull("no room"), BrokerRefused("no")])
async def test_an_error_of_the_broker_reaches_every_publisher_of_that_write(error: Exception) -> None:
    async with opened(publish_patience=0) as (app, broker):
        broker.gate = asyncio.Event()
        first = asyncio.ensure_future(app.publish(Placed()))
        await asyncio.sleep(0.01)
        rest = [asyncio.ensure_future(app.publish(Placed(note=str(n)))) for n in range(10)]
        await asyncio.sleep(0)
        broker.errors = [error, error]
        broker.gate.set()
        results = await asyncio.gather(first, *rest, return_exceptions=True)
        assert [type(result) for result in results] == [type(error)] * 11
        assert len({id(result) for result in results}) == 11  # each with a traceback of its own
        await app.publish(Placed())  # and the next one is stored


async def test_unconfirmed_carries_what_to_publish_again_with_the_same_id_and_place() -> None:
    async with opened() as (app, broker):
        broker.errors = [Unconfirmed("no answer", results=[None])]
        with pytest.raises(Unconfirmed) as caught:
            await app.publish(Placed(order_id="7"))
        (envelope,) = caught.value.envelopes
        assert caught.value.retryable and envelope.event == Placed(order_id="7")
        position = await app.publish(envelope)
        (record,) = await stored(broker)
    assert record.id == envelope.id != "" and position.partition == partition_of("7", 4)


async def test_each_publisher_of_a_write_in_doubt_learns_what_became_of_its_own_event() -> None:
    async with opened(publish_patience=0) as (app, broker):
        broker.gate = asyncio.Event()
        first = asyncio.ensure_future(app.publish(Placed()))
        await asyncio.sleep(0.01)
        rest = [asyncio.ensure_future(app.publish(Placed(note=str(n)))) for n in range(3)]
        await asyncio.sleep(0)
        broker.errors = [BrokerDown("1"), Unconfirmed("cut", results=[Position(0, "5"), None, BrokerFull("full")])]
        broker.gate.set()
        stored_one, doubtful, full = (await asyncio.gather(first, *rest, return_exceptions=True))[1:]
    assert stored_one == Position(0, "5") and isinstance(full, BrokerFull)
    assert isinstance(doubtful, Unconfirmed) and [e.event.note for e in doubtful.envelopes] == ["1"]


async def test_a_cancelled_publish_does_not_take_the_others_of_its_write_along() -> None:
    async with opened() as (app, broker):
        broker.gate = asyncio.Event()
        publishes = [asyncio.ensure_future(app.publish(Placed(note=str(n)))) for n in range(3)]
        await asyncio.sleep(0.01)
        publishes[1].cancel()
        broker.gate.set()
        results = await asyncio.gather(*publishes, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert isinstance(results[0], Position) and isinstance(results[2], Position)


async def test_publish_says_when_the_app_is_not_open() -> None:
    app = App("shop", streams=[orders])
    with pytest.raises(MillstreamError, match=r"'shop' is not open: use it inside `async with app:`"):
        await app.publish(Placed())
    async with app.opened(broker=Counted(app)):
        await app.publish(Placed())
    with pytest.raises(MillstreamError, match="is not open"):
        await app.publish(Placed())


async def test_an_app_that_is_closed_while_a_stream_is_declared_publishes_nothing_to_it() -> None:
    async with opened() as (app, broker):
        asked, answer, declare = asyncio.Event(), asyncio.Event(), broker.declare

        async def slow(stream: StreamSpec, policy: Policy | None = None) -> Policy:
            asked.set()
            await answer.wait()
            return await declare(stream, policy)

        broker.declare = slow  # type: ignore[method-assign]
        publishing = asyncio.create_task(app.publish(Cancelled(), to=Stream("others", Cancelled)))
        await asked.wait()
    answer.set()
    with pytest.raises(MillstreamError, match="the app is not open"):
        await publishing


async def test_leaving_the_app_waits_for_writes_that_are_under_way() -> None:
    async with opened() as (app, broker):
        broker.gate = asyncio.Event()
        publishing = asyncio.ensure_future(app.publish(Placed()))
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.05, broker.gate.set)
    assert isinstance(await publishing, Position)


async def test_an_app_that_ends_with_an_error_leaves_no_publisher_waiting() -> None:
    waiting: list[asyncio.Future[Position]] = []
    with pytest.raises(ZeroDivisionError):
        async with opened() as (app, broker):
            broker.gate = asyncio.Event()
            for n in range(3):
                waiting.append(asyncio.ensure_future(app.publish(Placed(note=str(n)))))
                await asyncio.sleep(0.01)
            raise ZeroDivisionError
    async with asyncio.timeout(5):
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, Unconfirmed) for result in results)
    assert [result.envelopes[0].event.note for result in results] == ["0", "1", "2"]  # type: ignore[union-attr]


async def test_publish_many_stores_in_order_in_writes_of_a_thousand() -> None:
    async with opened() as (app, broker):
        positions = await app.publish_many(Placed(note=str(n)) for n in range(2_500))
        assert [record.data for record in await stored(broker)][-1] == b'{"order_id":"o","note":"2499"}'
    assert broker.writes == [1_000, 1_000, 500]
    assert [int(position.offset) for position in positions] == list(range(1, 2_501))


async def test_publish_many_takes_several_streams_and_an_asynchronous_source() -> None:
    shipped = Stream("shipped", Placed)

    async def source() -> AsyncIterator[Placed]:
        yield Placed(order_id="1")
        yield Placed(order_id="2")

    async with opened() as (app, broker):
        assert len(await app.publish_many(source(), to=shipped)) == 2
        assert len(await stored(broker, "shipped")) == 2


async def test_a_write_never_grows_past_its_limit_of_bytes() -> None:
    async with opened() as (app, broker):
        await app.publish_many([Placed(note="x" * 1_000_000) for _ in range(10)])
    assert broker.writes == [4, 4, 2]


async def test_publish_many_tells_what_is_stored_what_is_in_doubt_and_where_it_stopped() -> None:
    looked: list[int] = []

    def source() -> Iterator[Placed]:
        for n in range(5_000):
            looked.append(n)
            yield Placed(note=str(n))

    async with opened() as (app, broker):
        append, broker.errors = broker.append, []

        async def second_fails(stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
            if broker.writes:
                broker.errors = [Unconfirmed("cut", results=[Position(0, "9"), *[None] * (len(records) - 1)])]
            return await append(stream, records, confirm)

        broker.append = second_fails  # type: ignore[method-assign]
        with pytest.raises(Unconfirmed) as caught:
            await app.publish_many(source())
    assert len(caught.value.results) == 1_001 and len(caught.value.envelopes) == 999
    assert caught.value.envelopes[0].event.note == "1001" and len(looked) <= 2_001


async def test_publish_many_on_a_full_broker_carries_what_was_not_stored() -> None:
    async with opened(publish_patience=0) as (app, broker):
        broker.errors = [BrokerFull("no room")]
        with pytest.raises(Unconfirmed, match="none of these was stored") as caught:
            await app.publish_many([Placed(note="1"), Placed(note="2")])
    assert [envelope.event.note for envelope in caught.value.envelopes] == ["1", "2"] and not caught.value.results


async def test_publish_many_says_how_many_are_stored_before_one_that_cannot_be_published() -> None:
    async with opened() as (app, broker):
        events = [Placed(order_id=str(n)) for n in range(1_500)]
        events[1_200] = Placed(note="x" * 2_000_000)
        with pytest.raises(TooLarge) as refused:
            await app.publish_many(events, to=orders)
        assert refused.value.__notes__ == ["The first 1,000 events are stored, and no other."]
        assert len(await stored(broker)) == 1_000
