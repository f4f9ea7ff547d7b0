"""What an event and a stream may ask for when it is published: later, confirmed, told apart, kept."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from millstream import (
    App,
    BadEvent,
    BadSetting,
    Dedupe,
    Delivery,
    Envelope,
    Event,
    NotSupported,
    Retention,
    Stream,
    Unconfirmed,
)
from millstream.brokers.base import LATER, Confirm, Output, Policy, Position, Record, Stored, Subscription
from millstream.brokers.memory.broker import MemoryBroker
from millstream.handlers.router import Router, Runtime
from millstream.publisher import differences, in_words, policy_of, spec_of
from millstream.testing.clock import START_MS, VirtualClock
from tests.worker.place import until

NOW = datetime.fromtimestamp(START_MS / 1000, UTC)


class Placed(Event, type="order.placed"):
    n: int = 0


orders = Stream("orders", Placed)
copies = Stream("copies", Placed)


class Able(MemoryBroker):
    """A memory broker with other powers, that remembers at which level it was asked to confirm."""

    def __init__(self, app: App, **traits: Any) -> None:
        super().__init__("memory://", app.settings, app.clock, app.telemetry)
        self.traits = replace(self.traits, **traits)
        self.levels: list[Confirm] = []

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        self.levels.append(confirm)
        return await super().append(stream, records, confirm)


@asynccontextmanager
async def opened(*streams: Stream[Any], **traits: Any) -> AsyncIterator[tuple[App, Able, VirtualClock]]:
    app = App("shop", streams=streams or [orders, copies])
    clock = app.clock = VirtualClock()
    broker = Able(app, **traits)
    async with app.opened(broker=broker):
        yield app, broker, clock


def stored(broker: MemoryBroker, stream: str = "orders") -> list[Record]:
    return [found.record for found in broker.logs[stream].behind(0, 0, 1_000)]


@pytest.mark.parametrize("due", ["5m", 300, timedelta(minutes=5), NOW + timedelta(minutes=5)])
async def test_an_event_may_be_due_at_a_time_or_after_a_while(due: Any) -> None:
    async with opened() as (app, broker, clock):
        assert await app.publish(Envelope(Placed(n=1), due=due), to=orders) == Position(0, LATER)
        await app.publish_at(Placed(n=2), due, to=orders)
        await app.publish(Placed(n=3), to=orders)
        await broker.tend("orders")
        assert [record.data for record in stored(broker)] == [b'{"n":3}']
        await clock.advance(300)
        await broker.tend("orders")
        assert [record.data for record in stored(broker)] == [b'{"n":3}', b'{"n":1}', b'{"n":2}']
        assert [envelope.due async for envelope in app.read(orders)] == [None] * 3


async def test_what_is_due_within_the_last_second_is_stored_at_once() -> None:
    async with opened() as (app, _, _):
        assert await app.publish(Envelope(Placed(), due=NOW - timedelta(seconds=0.9)), to=orders) == Position(0, "1")
        assert await app.publish(Envelope(Placed(), due=0), to=orders) == Position(0, "2")


async def test_publish_at_keeps_what_an_envelope_says() -> None:
    async with opened() as (app, broker, clock):
        await app.publish_at(Envelope(Placed(), id="mine", key="k", headers={"tenant": "a"}), "1s", to=orders)
        await clock.advance(1)
        await broker.tend("orders")
        (record,) = stored(broker)
        assert (record.id, record.key, record.headers) == ("mine", "k", b'{"tenant":"a"}')
        with pytest.raises(BadEvent, match="is due 5m already"):
            await app.publish_at(Envelope(Placed(), due="5m"), "1s", to=orders)


@pytest.mark.parametrize(
    ("due", "words"),
    [
        (NOW - timedelta(seconds=2), "is past: publish it without due"),
        (NOW.replace(year=2036), "over 366 days ahead: that is a plan, keep it in a database"),
        ("400d", "over 366 days ahead"),
    ],
)
async def test_a_due_time_in_the_past_or_years_ahead_is_refused(due: Any, words: str) -> None:
    async with opened() as (app, _, _):
        with pytest.raises(BadEvent, match=words):
            await app.publish(Envelope(Placed(), due=due), to=orders)
        with pytest.raises(BadEvent, match=words):
            await app.publish_at(Placed(), due, to=orders)
        with pytest.raises(BadEvent, match=words):
            await app.publish_many([Envelope(Placed(), due=due)], to=orders)


def test_a_due_time_without_a_zone_and_what_is_no_time_is_refused() -> None:
    with pytest.raises(BadEvent, match=r"has no time zone: write datetime\(…, tzinfo=UTC\), or due\.astimezone\(\)"):
        Envelope(Placed(), due=datetime(2026, 1, 1))
    with pytest.raises(BadSetting, match="'soon' is not a duration"):
        Envelope(Placed(), due="soon")


async def test_a_broker_that_cannot_wait_refuses_what_is_due_later() -> None:
    async with opened(delayed=False) as (app, _, _):
        with pytest.raises(NotSupported, match="memory:// cannot publish for later"):
            await app.publish_at(Placed(), "5m", to=orders)


async def test_what_is_in_doubt_keeps_its_due_time_and_may_be_repeated_after_it() -> None:
    async with opened() as (app, broker, clock):
        whole = broker.append

        async def lost(stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
            raise Unconfirmed("no answer", results=[None])

        broker.append = lost  # type: ignore[method-assign]
        with pytest.raises(Unconfirmed) as caught:
            await app.publish_at(Placed(n=1), "5m", to=orders)
        broker.append = whole  # type: ignore[method-assign]
        await clock.advance(600)
        assert await app.publish(caught.value.envelopes[0], to=orders) == Position(0, "1")


async def test_each_publish_is_confirmed_at_its_own_level_or_its_streams() -> None:
    sure = Stream("sure", Placed, confirm="fsync")
    async with opened(orders, sure, confirms=frozenset(("memory", "fsync"))) as (app, broker, _):
        await app.publish(Placed(), to=orders)
        await app.publish(Placed(), to=orders, confirm="fsync")
        await app.publish(Placed(), to=sure)
        await app.publish(Placed(), to=sure, confirm="memory")
        await app.publish_many([Placed()], to=sure)
        await app.publish_many([Placed()], to=orders, confirm="fsync")
    assert broker.levels == ["memory", "fsync", "fsync", "memory", "fsync", "fsync"]


async def test_a_level_that_the_broker_cannot_give_is_refused_when_the_app_opens_or_at_the_call() -> None:
    words = r"memory:// cannot confirm 'replicated', which needs a server with a replica .* or write confirm='memory'"
    with pytest.raises(NotSupported, match=words):
        async with opened(Stream("sure", Placed, confirm="replicated")):
            raise AssertionError("it opened")
    async with opened() as (app, broker, _):
        with pytest.raises(NotSupported, match=words):
            await app.publish(Placed(), to=orders, confirm="replicated")
        with pytest.raises(NotSupported, match=words):
            await app.publish_many([Placed()], to=orders, confirm="replicated")
        with pytest.raises(BadSetting, match="confirm='disk' must be 'memory', 'fsync' or 'replicated'"):
            await app.publish(Placed(), to=orders, confirm="disk")  # type: ignore[call-overload]
    assert broker.levels == []


@pytest.mark.parametrize(
    ("stream", "trait"),
    [
        (Stream("s", Placed, dedupe="10m"), "dedupe"),
        (Stream("s", Placed, retention=Retention(age="1d")), "retention"),
    ],
)
async def test_a_broker_without_the_power_that_a_stream_asks_for_refuses_it(stream: Stream[Any], trait: str) -> None:
    with pytest.raises(NotSupported, match=f"memory:// cannot do what stream 's' asks for with {trait}="):
        async with opened(stream, **{trait: False}):
            raise AssertionError("it opened")


async def test_what_is_recorded_for_a_stream_holds_and_a_difference_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = App("shop")
    broker = MemoryBroker("memory://", app.settings, app.clock, app.telemetry)
    for stream in (
        Stream("orders", Placed, retention=Retention(age="7d", ceiling="2GB"), dedupe="10m"),
        Stream("orders", Placed),
        Stream("orders", Placed, dedupe="10m"),
        Stream("orders", Placed, retention=Retention(age="7d", ceiling="2GB")),
    ):
        async with App("shop", streams=[stream]).opened(broker=broker):
            pass
    assert not caplog.records  # what a declaration is silent about may be anything
    async with App("shop", streams=[Stream("orders", Placed, dedupe="1h")]).opened(broker=broker):
        pass
    (warning,) = caplog.records
    assert warning.getMessage() == (
        "stream 'orders' on memory:// is recorded with dedupe 10m, 1,000,000 ids; here it is declared with dedupe 1h, "
        "1,000,000 ids. What is recorded holds; `millstream stream apply orders` changes it"
    )


async def test_dedupe_that_is_declared_and_not_recorded_is_told(caplog: pytest.LogCaptureFixture) -> None:
    app = App("shop", streams=[Stream("orders", Placed, dedupe="10m")])
    broker = MemoryBroker("memory://", app.settings, app.clock, app.telemetry)
    await broker.declare(spec_of(orders))
    async with app.opened(broker=broker):
        pass
    assert "is recorded with no dedupe; here it is declared with dedupe 10m, 1,000,000 ids. What" in caplog.text


def test_two_policies_differ_in_the_settings_that_were_declared() -> None:
    everything = Retention(age="36h", events=1_000, bytes="1536KB", unread="drop", forget="never")
    declared = policy_of(Stream("s", Placed, retention=everything, dedupe=Dedupe("90s", ids=5)))
    assert differences(declared, declared) == {}
    assert differences(Policy(), declared) == {
        "dedupe": ("-", "90s, 5 ids"),
        "age": ("-", "36h"),
        "events": ("-", "1,000"),
        "bytes": ("-", "1,536KB"),
        "unread": ("keep", "drop"),
        "forget": ("7d", "never"),
    }
    lower = policy_of(Stream("s", Placed, retention=Retention(age="1d", ceiling="2GB")))
    higher = policy_of(Stream("s", Placed, retention=Retention(age="1d", ceiling=5_000)))
    assert differences(lower, higher) == {"ceiling": ("2GB", "5,000 events")}


def test_a_policy_in_words_names_all_of_it() -> None:
    everything = Retention(age="36h", events=1_000, bytes="1536KB", unread="drop")
    assert in_words(policy_of(Stream("s", Placed, retention=everything, dedupe=Dedupe("90s", ids=5)))) == (
        "dedupe 90s (up to 5 ids per partition), retention age 36h, 1,000 events, 1,536KB, unread dropped"
    )
    kept = Retention(bytes="1GB", forget="never", ceiling=5_000)
    assert in_words(policy_of(Stream("s", Placed, retention=kept))) == (
        "no dedupe, retention 1GB, a ceiling of 5,000 events, unread kept, groups never forgotten"
    )
    assert in_words(Policy()) == "no dedupe, no retention"


def delivery(**fields: Any) -> Delivery[Placed]:
    given = {"id": "in-1", "position": Position(3, "77"), **fields}
    common = ("k", "order.placed", "shop", 0, b"")
    return Delivery(Placed(), given["id"], *common, given["position"], 1, False, None, lambda *_: None)


async def test_the_id_of_an_output_is_derived_from_its_input_unless_it_has_its_own() -> None:
    async with opened() as (app, _, _):
        stage = app._open().publisher.stage

        def output(n: int, stream: str = "orders", group: str = "billing", event: Any = None, **fields: Any) -> Output:
            given = delivery(**fields)
            given.staged = [None] * n
            return stage(stream, group, given, event or Placed(), copies)

        one = output(0)
        assert one == output(0) and one.derived and len(one.record.id) == 24
        others = [
            output(1),
            output(0, stream="returns"),
            output(0, group="shipping"),
            output(0, id="in-2"),
            output(0, position=Position(3, "78")),
        ]
        assert len({one.record.id, *(other.record.id for other in others)}) == 6
        own = output(0, event=Envelope(Placed(), id="mine"))
        assert (own.record.id, own.derived) == ("mine", False)
        assert output(0, event=Envelope(Placed(), key="k")).derived


async def test_what_handlers_publish_without_atomic_outputs_or_dedupe_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = Stream("told", Placed, dedupe="10m")
    async with opened(orders, copies, told, atomic_outputs=False) as (app, _, _):
        for stream in (copies, told, copies):
            app._open().publisher.stage("orders", "billing", delivery(), Placed(), stream)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING and "what it published to copies is there twice" in warning.getMessage()


async def test_a_handlers_outputs_may_be_due_later() -> None:
    app = App("shop", streams=[orders, copies])

    @app.subscriber(orders, "remind")
    async def remind(event: Placed, delivery: Delivery[Placed]) -> None:
        delivery.publish(Envelope(Placed(n=event.n + 1), due="1h"), to=copies)

    broker = MemoryBroker("memory://", app.settings, app.clock, app.telemetry)
    async with app.opened(broker=broker), app.worker():
        await app.publish(Placed(n=1), to=orders)
        await until(lambda: broker.logs["copies"].next_due_ms() is not None)
        assert stored(broker, "copies") == []


class Ticks:
    """A part that keeps what it was given to run with."""

    def __init__(self) -> None:
        self.runtime: Runtime | None = None

    def subscribers(self) -> list[Any]:
        return []

    def streams(self) -> list[Stream[Any]]:
        return [orders]

    @asynccontextmanager
    async def running(self, runtime: Runtime) -> AsyncIterator[None]:
        self.runtime = runtime
        yield


async def test_a_part_publishes_one_event_for_each_slot_of_its_schedule() -> None:
    ticks = Ticks()
    app = App("shop", include=[ticks])
    broker = MemoryBroker("memory://", app.settings, app.clock, app.telemetry)
    async with app.opened(broker=broker, clock=app.clock), app.worker():
        runtime = ticks.runtime
        assert runtime is not None
        assert (runtime.broker, runtime.clock, runtime.telemetry) == (broker, app.clock, app.telemetry)
        slots = [await runtime.publish_slot(Placed(n=n), to=orders, schedule="nightly", at_ms=n) for n in (1, 1, 3, 2)]
        assert slots == [True, False, True, False]
        assert await runtime.publish_slot(None, to=orders, schedule="nightly", at_ms=4)
        assert not await runtime.publish_slot(Placed(), to=orders, schedule="nightly", at_ms=4)
        assert await runtime.publish_slot(Placed(n=4), to=orders, schedule="other", at_ms=4)
        await runtime.publish(Placed(n=5), to=orders, confirm="memory")
        await runtime.publish_many([Placed(n=6)], to=orders)
    records = stored(broker)
    assert [record.data for record in records] == [b'{"n":%d}' % n for n in (1, 3, 4, 5, 6)]
    assert [record.time_ms for record in records[:3]] == [1, 3, 4]
    assert records[0].headers == b'{"schedule":"nightly"}'
    assert len({record.id for record in records}) == 5


async def test_a_broker_without_slots_says_so() -> None:
    async with opened(slots=False) as (app, _, _):
        with pytest.raises(NotSupported, match="memory:// cannot publish on a schedule"):
            await app._open().publish_slot(Placed(), to=orders, schedule="nightly", at_ms=1)


async def test_groups_on_a_stream_with_retention_exist_before_anything_is_published() -> None:
    router = Router()
    bounded, drops = Stream("bounded", Placed, retention=Retention(events=1)), Stream("free", Placed)
    for stream in (bounded, drops):

        @router.subscriber(stream, "billing", start="now")
        async def charge(event: Placed) -> None: ...

    app = App("shop", include=[router])
    broker = MemoryBroker("memory://", app.settings, app.clock, app.telemetry)
    async with app.opened(broker=broker):
        assert [group.group for group in await broker.admin.groups("bounded")] == ["billing"]
        assert await broker.admin.groups("free") == []
        await app.publish_many([Placed(n=n) for n in range(3)], to=bounded)
        await broker.tend("bounded")
        (info,) = await broker.admin.groups("bounded")
        assert (info.lag, info.consumers, info.owner) == (3, 0, "shop")
        consumer = await broker.subscribe(Subscription(spec_of(bounded), "billing", "shop"))
        claimed: list[Stored] = [claim.stored for claim in await consumer.fetch(10, 0)]
        assert [stored.record.data for stored in claimed] == [b'{"n":0}', b'{"n":1}', b'{"n":2}']
        await consumer.close()


async def test_reading_may_begin_now() -> None:
    async with opened() as (app, _, _):
        await app.publish(Placed(), to=orders)
        assert [envelope async for envelope in app.read(orders, since="now")] == []
        assert len([envelope async for envelope in app.read(orders, since="beginning")]) == 1
