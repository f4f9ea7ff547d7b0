"""Publishing to a stream with packs: positions, order, waiting for others, and what an error says of each event."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from millstream import App, BadEvent, Envelope, Event, NotSupported, Pack, Settings, Stream, TooLarge, Unconfirmed
from millstream.brokers.base import Confirm, Policy, Position, Record
from millstream.brokers.memory.broker import MemoryBroker
from millstream.errors import BrokerDown
from millstream.testing.clock import VirtualClock
from millstream.units import MAX_EVENT_BYTES
from millstream.wire import compression, packs
from tests.servers import RedisServer


class Placed(Event, type="order.placed"):
    n: int = 0
    customer: str = ""
    note: str = ""
    at: datetime | None = None


class Cancelled(Event, type="order.cancelled"):
    n: int = 0


packed = Stream("packed", Placed | Cancelled, pack=Pack(events=500, linger="5ms"))
keyed = Stream("keyed", Placed, key="customer", partitions=4, pack=Pack(codec="lz4"))
binary = Stream("binary", Placed, pack=Pack(codec="none"), codec="msgpack")
plain = Stream("plain", Placed)
STREAMS: Sequence[Stream[Any]] = (packed, keyed, binary, plain)


class Failing(MemoryBroker):
    """A memory broker in virtual time that waits and fails as told."""

    def __init__(self, app: App) -> None:
        super().__init__("memory://", app.settings, app.clock, app.telemetry)
        self.writes: list[list[str]] = []
        self.errors: list[Exception | None] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        self.writes.append([record.id for record in records])
        await self.gate.wait()
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        return await super().append(stream, records, confirm)

    def stored(self, stream: Stream[Any]) -> list[Record]:
        return [found.record for n in range(stream.partitions) for found in self.logs[stream.name].behind(n, 0, 10_000)]


@asynccontextmanager
async def opened(**settings: Any) -> AsyncIterator[tuple[App, Failing, VirtualClock]]:
    app = App("shop", streams=STREAMS, settings=Settings(**settings))
    clock = app.clock = VirtualClock()
    broker = Failing(app)
    async with app.opened(broker=broker):
        yield app, broker, clock


def publishing(app: App, *events: int, to: Stream[Any] = packed) -> list[asyncio.Task[Position]]:
    return [asyncio.create_task(app.publish(Placed(n=n), to=to)) for n in events]


async def read(app: App, stream: Stream[Any]) -> list[Envelope[Any]]:
    return [envelope async for envelope in app.read(stream)]


async def test_many_events_are_few_entries_and_each_has_a_position_and_an_id() -> None:
    async with opened() as (app, broker, _):
        events = [Placed(n=n) for n in range(5_000)]
        positions = await app.publish_many(events, to=packed)
        assert [len(write) for write in broker.writes] == [4, 4, 2]
        assert all(map(packs.is_pack, broker.stored(packed)))
        assert list(map(str, positions[499:502])) == ["0@1.499", "0@2.0", "0@2.1"]
        found = await read(app, packed)
        assert [envelope.event for envelope in found] == events
        assert len({envelope.id for envelope in found}) == len(set(positions)) == 5_000
        assert {(envelope.type, envelope.source, envelope.key) for envelope in found} == {
            ("order.placed", "shop", None)
        }


async def test_the_loop_goes_on_while_the_packs_of_many_events_are_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    others_went_on = threading.Event()
    compress = compression.compress

    def patient(*args: Any) -> bytes:
        assert others_went_on.wait(10)
        return compress(*args)

    monkeypatch.setattr(compression, "compress", patient)
    async with opened() as (app, broker, _):
        events = [Placed(n=n) for n in range(5_000)]
        many = asyncio.create_task(app.publish_many(events, to=packed))
        await app.publish(Placed(), to=plain)
        assert not broker.stored(packed)
        others_went_on.set()
        assert len(set(await many)) == 5_000
        assert [envelope.event for envelope in await read(app, packed)] == events


async def test_cancelling_while_packs_are_compressed_stores_nothing_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = threading.Event()
    compress = compression.compress

    def patient(*args: Any) -> bytes:
        assert cancelled.wait(10)
        return compress(*args)

    monkeypatch.setattr(compression, "compress", patient)
    async with opened() as (app, _, _):
        many = asyncio.create_task(app.publish_many([Placed(n=n) for n in range(5_000)], to=packed))
        await app.publish(Placed(), to=plain)
        many.cancel()
        with pytest.raises(asyncio.CancelledError):
            await many
        cancelled.set()
        await app.publish_many([Placed(n=n) for n in range(5)], to=packed)
        assert [envelope.event.n for envelope in await read(app, packed)] == list(range(5))


async def test_with_a_key_each_key_keeps_its_order_and_lies_in_its_partition() -> None:
    async with opened() as (app, broker, _):
        events = [Placed(n=n, customer=f"c-{n * n % 7}") for n in range(3_000)] + [Placed(n=3_000, customer="rare")]
        positions = await app.publish_many(events, to=keyed)
        found = await read(app, keyed)
        for customer in {event.customer for event in events}:
            mine = [envelope.event.n for envelope in found if envelope.key == customer]
            assert mine == [event.n for event in events if event.customer == customer]
        plain_positions = await app.publish_many([Envelope(event, key=event.customer) for event in events], to=plain)
        assert len(positions) == len(plain_positions) == 3_001
        assert [record.data for record in broker.stored(keyed) if not packs.is_pack(record)] == [
            b'{"n":3000,"customer":"rare","note":"","at":null}'
        ]


async def test_envelopes_keep_what_they_say_and_what_is_due_later_is_kept_aside() -> None:
    async with opened() as (app, broker, _):
        then = Envelope(Placed(n=1), id="mine", key="a", headers={"tenant": "x"})
        then.time_ms = 1_400_000_000_000
        others: list[Any] = [Envelope(Placed(n=n), key="a") for n in (2, 3, 4)]
        positions = await app.publish_many([then, *others, Envelope(Placed(n=9), due="1h"), Placed(n=5)], to=packed)
        assert list(map(str, positions)) == ["0@2.0", "0@2.1", "0@2.2", "0@2.3", "0@later", "0@1"]
        _, first, *_ = found = await read(app, packed)
        assert (first.id, first.key, dict(first.headers), first.time_ms) == ("mine", "a", {"tenant": "x"}, then.time_ms)
        assert [envelope.event.n for envelope in found] == [5, 1, 2, 3, 4]
        assert [packs.is_pack(record) for record in broker.stored(packed)] == [False, True]


async def test_classes_may_be_mixed_and_may_come_from_anywhere() -> None:
    async def source() -> AsyncIterator[Placed | Cancelled]:
        for n in range(600):
            yield Placed(n=n) if n % 3 else Cancelled(n=n)

    async with opened() as (app, broker, _):
        await app.publish_many(source(), to=packed)
        assert broker.stored(packed)[0].headers == b'{"pack":"1/zstd","n":"500"}'
        found = await read(app, packed)
        assert [(type(envelope.event), envelope.event.n) for envelope in found] == [
            (Placed if n % 3 else Cancelled, n) for n in range(600)
        ]


async def test_streams_with_and_without_packs_may_stand_in_one_call() -> None:
    class Noted(Event, type="order.noted"):
        n: int = 0

    notes = Stream("notes", Noted)
    app = App("shop", broker="memory://", streams=[packed, notes])
    async with app.opened(broker=MemoryBroker("memory://", app.settings, app.clock, app.telemetry)):
        events: list[Any] = [*(Placed(n=n) for n in range(5)), Noted(n=5), *(Placed(n=n) for n in range(6, 11))]
        positions = await app.publish_many(events)
        assert list(map(str, positions)) == [*(f"0@1.{n}" for n in range(5)), "0@1", *(f"0@2.{n}" for n in range(5))]


async def test_messagepack_is_written_and_read_as_the_stream_says() -> None:
    async with opened(publish_patience=0) as (app, broker, _):
        events = [Placed(n=n, at=datetime(2026, 1, 1, tzinfo=UTC)) for n in range(10)]
        await app.publish_many(events, to=binary)
        await app.publish(events[0], to=binary)
        pack, alone = broker.stored(binary)
        assert packs.is_pack(pack) and packs.read(pack, "").data(0) == alone.data and alone.data[0] == 0x84
        assert [envelope.event for envelope in await read(app, binary)] == [*events, events[0]]


async def test_an_event_over_its_limit_is_named_and_nothing_of_its_write_is_stored() -> None:
    async with opened() as (app, _, _):
        events: list[Any] = [Placed(n=n) for n in range(2_100)]
        events[2_090] = Placed(note="x" * MAX_EVENT_BYTES)
        with pytest.raises(TooLarge, match=r"Placed is 1,048,\d+ bytes") as caught:
            await app.publish_many(events, to=packed)
        assert caught.value.__notes__ == ["The first 2,000 events are stored, and no other."]
        nonsense: list[Any] = [Placed(), "nonsense"]
        with pytest.raises(BadEvent, match="no event"):
            await app.publish_many(nonsense, to=packed)


async def test_an_error_names_the_events_and_not_their_packs() -> None:
    async with opened(publish_patience=0) as (app, broker, _):
        events = [Placed(n=n) for n in range(2_500)]
        broker.errors = [None, Unconfirmed("no answer", results=[None])]
        with pytest.raises(Unconfirmed, match="no dedupe") as caught:
            await app.publish_many(events, to=packed)
        error = caught.value
        assert [envelope.event for envelope in error.envelopes] == events[2_000:]
        assert len(error.results) == 2_000 and error.retry_until is None
        await app.publish_many(error.envelopes, to=packed)
        found = await read(app, packed)
        assert [envelope.event for envelope in found] == events
        assert [envelope.id for envelope in found[2_000:]] == [envelope.id for envelope in error.envelopes]


async def test_who_publishes_at_once_shares_a_pack_and_each_has_its_own_position() -> None:
    async with opened() as (app, broker, clock):
        calls = publishing(app, *range(10))
        await clock.advance(0.004)
        assert not broker.writes
        await clock.advance(0.002)
        assert [str(await call) for call in calls] == [f"0@1.{n}" for n in range(10)]
        assert [envelope.event.n for envelope in await read(app, packed)] == list(range(10))


async def test_a_full_pack_does_not_wait_for_more() -> None:
    async with opened() as (app, broker, _):
        calls = publishing(app, *range(1_100))
        assert str((await asyncio.gather(*calls))[-1]) == "0@3.99"
        assert [len(write) for write in broker.writes] == [3]


async def test_what_comes_while_a_write_is_under_way_leaves_right_after_it() -> None:
    async with opened() as (app, broker, clock):
        broker.gate.clear()
        first = publishing(app, *range(4))
        await clock.advance(0.006)
        second = publishing(app, *range(4, 8))
        await clock.advance(0.006)
        broker.gate.set()
        assert [str(position) for position in await asyncio.gather(*first, *second)][3:5] == ["0@1.3", "0@2.0"]


async def test_a_call_that_is_cancelled_before_takes_its_event_out_of_the_pack() -> None:
    async with opened() as (app, broker, clock):
        calls = publishing(app, *range(6))
        await clock.advance(0.001)
        calls[2].cancel()
        broker.gate.clear()
        await clock.advance(0.005)
        calls[3].cancel()  # too late
        broker.gate.set()
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(done[n]) for n in (0, 1, 4, 5)] == ["0@1.0", "0@1.1", "0@1.3", "0@1.4"]
        assert all(isinstance(done[n], asyncio.CancelledError) for n in (2, 3))
        assert [envelope.event.n for envelope in await read(app, packed)] == [0, 1, 3, 4, 5]


async def test_when_all_calls_are_cancelled_nothing_is_written() -> None:
    async with opened() as (app, broker, clock):
        calls = publishing(app, *range(6))
        await clock.advance(0.001)
        for call in calls:
            call.cancel()
        await clock.advance(1)
        assert not broker.writes


async def test_closing_the_app_stores_at_once_what_waits_for_more() -> None:
    async with opened() as (app, broker, _):
        calls = publishing(app, *range(5))
        while not all(call._fut_waiter for call in calls):  # type: ignore[attr-defined]
            await asyncio.sleep(0)
    assert [str(await call) for call in calls] == [f"0@1.{n}" for n in range(5)]
    assert len(broker.stored(packed)) == 1


async def test_without_patience_nobody_waits_for_others() -> None:
    async with opened(publish_patience=0) as (app, broker, _):
        assert str(await app.publish(Placed(), to=packed)) == "0@1"
        assert [packs.is_pack(record) for record in broker.stored(packed)] == [False]


async def test_a_pack_is_tried_again_as_it_is() -> None:
    async with opened() as (app, broker, clock):
        broker.errors = [BrokerDown("away")] * 3
        calls = publishing(app, *range(5))
        await clock.advance(1)
        assert [str(await call) for call in calls] == [f"0@1.{n}" for n in range(5)]
        assert len(broker.writes) == 4 and len({tuple(write) for write in broker.writes}) == 1


async def test_each_caller_of_a_pack_in_doubt_learns_of_its_own_event() -> None:
    async with opened() as (app, broker, clock):
        broker.errors = [Unconfirmed("no answer", results=[None])]
        calls = publishing(app, *range(5))
        await clock.advance(1)
        errors = [call.exception() for call in calls]
        again = [error.envelopes for error in errors if isinstance(error, Unconfirmed)]
        assert [[envelope.event.n for envelope in envelopes] for envelopes in again] == [[n] for n in range(5)]
        await asyncio.gather(*(app.publish(envelope, to=plain) for (envelope,) in again))
        assert len({record.id for record in broker.stored(plain)} - {""}) == 5


async def test_ids_that_are_remembered_do_not_make_the_repeat_of_a_packed_event_safe() -> None:
    async with opened() as (app, broker, clock):
        await broker.admin.apply("packed", Policy(dedupe_ms=60_000, dedupe_ids=1_000))
        app._open().publisher.policies["packed"] = Policy(dedupe_ms=60_000, dedupe_ids=1_000)
        broker.errors = [Unconfirmed("no answer", results=[None])] * 1_000
        (call,) = publishing(app, 1)
        await clock.advance(120)
        error = call.exception()
        assert isinstance(error, Unconfirmed) and error.retry_until is None


async def test_past_the_buffer_publishing_waits_its_turn() -> None:
    async with opened(max_buffered=3) as (app, _, clock):
        calls = publishing(app, *range(10))
        await clock.advance(1)
        assert all(call.done() for call in calls)
        assert [envelope.event.n for envelope in await read(app, packed)] == list(range(10))


async def test_a_library_that_is_missing_is_named_when_the_app_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    compression.imported.cache_clear()
    monkeypatch.setitem(sys.modules, "lz4.frame", None)
    try:
        with pytest.raises(NotSupported, match=r"pip install 'millstream\[lz4\]'"):
            async with App("shop", broker="memory://", streams=[keyed]):
                pass
    finally:
        compression.imported.cache_clear()


async def test_a_pack_that_cannot_be_read_is_passed_over() -> None:
    async with opened() as (app, broker, _):
        await broker.append("packed", [Record(0, "broken", packs.TYPE, b"nonsense")])
        await app.publish_many([Placed(n=n) for n in range(4)], to=packed)
        assert [envelope.event.n for envelope in await read(app, packed)] == list(range(4))


async def publish_and_read(url: str) -> None:
    app = App("shop", broker=url, streams=[packed, keyed])
    events = [Placed(n=n, customer=f"c-{n % 3}") for n in range(1_500)]
    async with app:
        positions = await app.publish_many(events, to=packed)
        assert [position.offset.partition(".")[2] for position in positions[498:502]] == ["498", "499", "0", "1"]
        together = await asyncio.gather(*(app.publish(event, to=packed) for event in events[:10]))
        assert len({position.offset.partition(".")[0] for position in together}) == 1
        assert [envelope.event for envelope in await read(app, packed)] == events + events[:10]
        await app.publish_many(events, to=keyed)
        found = await read(app, keyed)
        assert sorted(envelope.event.n for envelope in found) == list(range(1_500))
        info = {info.spec.name: info for info in await app.broker.admin.streams()}
        assert (info["packed"].events, info["keyed"].events) == (4, 3)


async def test_reading_says_which_library_a_pack_needs_in_place_of_passing_it_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with opened() as (app, _, _):
        await app.publish_many([Placed(n=n) for n in range(10)], to=packed)
        monkeypatch.setitem(sys.modules, "zstandard", None)
        compression.imported.cache_clear()
        try:
            with pytest.raises(NotSupported, match=r"pip install 'millstream\[zstd\]'"):
                await read(app, packed)
        finally:
            monkeypatch.undo()
            compression.imported.cache_clear()
        assert len(await read(app, packed)) == 10


async def test_packs_on_sqlite(tmp_path: Path) -> None:
    await publish_and_read(f"sqlite:///{tmp_path}/shop.db")


async def test_packs_on_redis() -> None:
    with RedisServer.start("7") as server:
        await publish_and_read(server.url)
