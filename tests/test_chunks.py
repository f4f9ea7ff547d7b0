"""Publishing many: the next chunk is made while one is under way, and nothing is looked at that could be lost."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from millstream import App, Envelope, Event, Stream, TooLarge, Unconfirmed
from millstream.brokers.base import Confirm, Position, Record
from millstream.brokers.memory.broker import MemoryBroker
from millstream.clock import Clock
from millstream.errors import BrokerFull
from millstream.publisher.chunks import Ahead, chunks
from millstream.publisher.records import Records
from millstream.settings import Settings


class Placed(Event, type="order.placed"):
    n: int = 0
    note: str = ""


class Noted(Event, type="order.noted"):
    n: int = 0


plain = Stream("plain", Placed)
noted = Stream("noted", Noted)


class Slow(MemoryBroker):
    """A broker that writes when it is let, remembers what it was given ready, and fails as told."""

    def __init__(self, app: App) -> None:
        super().__init__("memory://", app.settings, app.clock, app.telemetry)
        self.made: list[int] = []
        self.written: list[int] = []
        self.under_way = asyncio.Event()
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    def prepared(self, stream: str, records: Sequence[Record]) -> Sequence[Record]:
        self.made.append(len(records))
        return tuple(records)

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        assert isinstance(records, tuple | list)
        self.written.append(len(records))
        self.under_way.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return await super().append(stream, records, confirm)


@asynccontextmanager
async def opened(**settings: Any) -> AsyncIterator[tuple[App, Slow]]:
    app = App("shop", streams=[plain, noted], settings=Settings(**settings))
    broker = Slow(app)
    async with app.opened(broker=broker):
        yield app, broker


async def first_write(app: App, broker: Slow, events: Any) -> asyncio.Task[list[Position]]:
    """Publish them, until the first write is under way and the loop has had the turn in which its bytes would leave."""
    publishing = asyncio.create_task(app.publish_many(events))
    await broker.under_way.wait()
    await asyncio.sleep(0)
    return publishing


async def test_the_next_chunk_of_a_list_is_made_while_one_is_under_way_and_sent_after_it() -> None:
    async with opened() as (app, broker):
        publishing = await first_write(app, broker, [Placed(n=n) for n in range(3_500)])
        assert (broker.made, broker.written) == ([1_000, 1_000], [1_000])
        broker.gate.set()
        positions = await publishing
        assert [int(position.offset) for position in positions] == list(range(1, 3_501))
        assert broker.made == broker.written == [1_000, 1_000, 1_000, 500]


async def test_nothing_is_taken_out_of_an_iterator_before_it_can_be_sent() -> None:
    looked: list[int] = []

    def source() -> Iterator[Placed]:
        for n in range(3_000):
            looked.append(n)
            yield Placed(n=n)

    async with opened() as (app, broker):
        publishing = await first_write(app, broker, source())
        assert len(looked) == 1_000
        broker.gate.set()
        assert len(await publishing) == 3_000


@pytest.mark.parametrize("kind", [list, tuple, deque, iter])
async def test_events_come_in_anything_that_can_be_looked_through(kind: Callable[[list[Placed]], Any]) -> None:
    async with opened() as (app, broker):
        broker.gate.set()
        positions = await app.publish_many(kind([Placed(n=n) for n in range(1_500)]))
        assert [int(position.offset) for position in positions] == list(range(1, 1_501))
        assert broker.written == [1_000, 500]


async def test_an_event_that_cannot_be_published_waits_for_what_is_under_way_before_it_is_refused() -> None:
    events = [Placed(n=n) for n in range(2_000)]
    events[1_000] = Placed(note="x" * 2_000_000)
    async with opened() as (app, broker):
        publishing = await first_write(app, broker, events)
        assert not publishing.done()
        broker.gate.set()
        with pytest.raises(TooLarge) as refused:
            await publishing
        assert refused.value.__notes__ == ["The first 1,000 events are stored, and no other."]


async def test_a_write_that_fails_is_told_before_an_event_behind_it() -> None:
    events = [Placed(n=n) for n in range(2_000)]
    events[1_000] = Placed(note="x" * 2_000_000)
    async with opened(publish_patience=0) as (app, broker):
        publishing = await first_write(app, broker, events)
        broker.error = BrokerFull("no room")
        broker.gate.set()
        with pytest.raises(Unconfirmed, match="none of these was stored") as failed:
            await publishing
        assert [envelope.event.n for envelope in failed.value.envelopes] == list(range(1_000))
        assert broker.written == [1_000]


async def test_cancelling_sends_nothing_of_what_was_made() -> None:
    async with opened() as (app, broker):
        publishing = await first_write(app, broker, [Placed(n=n) for n in range(3_000)])
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing
        broker.gate.set()
        assert len(await app.publish_many([Placed()])) == 1
        assert broker.written == [1_000, 1]


async def test_callers_take_turns_so_that_one_half_calls_again_while_the_other_is_written() -> None:
    async with opened() as (app, broker):
        calls = [asyncio.ensure_future(app.publish(Placed(n=n))) for n in range(1_000)]
        await broker.under_way.wait()
        broker.gate.set()
        positions = await asyncio.gather(*calls)
        assert [int(position.offset) for position in positions] == list(range(1, 1_001))
        assert broker.written == [500, 500]


def test_what_goes_wrong_ahead_is_raised_when_it_is_asked_for() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("two")

    ahead = Ahead(items())
    assert next(ahead) == 1
    ahead.look()
    with pytest.raises(ValueError, match="two"):
        next(ahead)
    ahead.look()
    assert list(ahead) == []


def made() -> Records:
    app = App("shop", streams=[plain, noted])
    broker = MemoryBroker("memory://", app.settings, app.clock, app.telemetry)
    return Records([plain, noted], source="shop", broker=broker, clock=Clock())


def test_a_chunk_holds_events_of_one_stream() -> None:
    events = [Placed(n=1), Placed(n=2), Noted(n=3), Placed(n=4)]
    found = list(chunks(made(), events, None))
    assert [(chunk.stream, chunk.events) for chunk in found] == [
        (plain, events[:2]),
        (noted, events[2:3]),
        (plain, events[3:]),
    ]
    assert all(len(chunk.records) == len(chunk.events) for chunk in found)
    assert list(chunks(made(), [], None)) == []


@pytest.mark.parametrize("key", [None, "n", lambda event: f"k{event.n}"])
@pytest.mark.parametrize("partitions", [1, 8])
def test_an_event_alone_gives_the_record_that_its_envelope_gives(key: Any, partitions: int) -> None:
    stream = Stream("keyed", Placed, key=key, partitions=partitions)
    records = made()
    route = records.route(Placed(), stream)
    for n in range(50):
        record = route.record(Placed(n=n))
        assert route.record(Envelope(Placed(n=n), id=record.id)) == record
        assert records.record(route, Placed(n=n), id_=record.id) == record
    events = [Placed(n=n) for n in range(50)]
    together = route.records(events)
    assert together == [records.record(route, event, id_=r.id) for event, r in zip(events, together, strict=True)]
    assert len({record.id for record in together}) == 50


def test_an_empty_key_is_a_key() -> None:
    stream = Stream("keyed", Placed, key="note", partitions=64)
    route = made().route(Placed(), stream)
    assert {(record.key, record.partition) for record in route.records([Placed()] * 50)} == {("", 0)}


def test_a_list_is_cut_where_a_write_is_full() -> None:
    large = [Placed(n=n, note="x" * 900_000) for n in range(10)]
    events = [*large, *(Placed(n=n) for n in range(10, 2_000))]
    found = list(chunks(made(), events, None))
    assert [len(chunk.records) for chunk in found] == [4, 4, 1_000, 992]
    assert [event for chunk in found for event in chunk.events] == events


@pytest.mark.parametrize("place", [0, 3, 999])
def test_of_a_write_with_an_event_that_cannot_be_published_nothing_is_made(place: int) -> None:
    stream = Stream("keyed", Placed, key="note")
    for note in ("x" * 2_000_000, "x" * 2_000):  # too large an event, too long a key
        events = [Placed(n=n) for n in range(2_000)]
        events[1_000 + place] = Placed(note=note)
        found = chunks(made(), events, stream)
        assert len(next(found).records) == 1_000
        with pytest.raises(TooLarge):
            next(found)


def test_envelopes_and_other_classes_in_a_list_keep_their_places() -> None:
    both = Stream("both", Placed | Noted)
    events = [Placed(n=0), Envelope(Placed(n=1), id="one"), Noted(n=2), *(Placed(n=n) for n in range(3, 1_500))]
    found = list(chunks(made(), events, both))
    assert [event for chunk in found for event in chunk.events] == events
    assert [record.type for record in found[0].records[:4]] == ["order.placed"] * 2 + ["order.noted", "order.placed"]
    assert found[0].records[1].id == "one"
