"""Small events that travel alone with a dictionary: everybody sees them as they were, and nobody has to know of it."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any, Literal

import pytest

from millstream import App, Batch, Delivery, Envelope, Event, Reject, Settings, Stream
from millstream.brokers.base import Broker, Policy, Position, Record, StreamSpec
from millstream.brokers.urls import broker_for
from millstream.clock import Clock
from millstream.errors import BrokerDown, NotSupported, Unconfirmed
from millstream.publisher.shortening import LOOK_S
from millstream.sql import Outbox
from millstream.telemetry import BROKER_ERROR, Telemetry
from millstream.testing import TestApp
from millstream.units import MAX_ID_CHARS
from millstream.wire import compression, packs
from millstream.wire.compression import Dictionary
from tests.servers import RedisServer
from tests.worker.place import QUICK, at_work, heard, memory, until

Order = Literal["none", "key"]


class Placed(Event, type="order.placed"):
    order_id: str
    n: int
    note: str = "to be delivered in the morning"


class Charged(Event, type="payment.charged"):
    order_id: str
    note: str = "to be delivered in the morning"


orders = Stream("orders", Placed, key="order_id", partitions=2)
payments = Stream("payments", Charged, dedupe="1h")


def data(n: int) -> bytes:
    return b'{"order_id":"o-%d","n":%d,"note":"to be delivered in the morning"}' % (n % 97, n)


CONTENT = compression.train(
    [packs.body_of(Record(0, "", "order.placed", data(n), headers=b'{"by":"%d"}' % n)) for n in range(4_000)], 2_048
)
NUMBER = Dictionary(CONTENT).id


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins as a process does that has met no dictionary."""
    monkeypatch.setattr(compression, "_known", {})


def app_of(**options: Any) -> App:
    return App("shop", streams=[orders, payments], settings=QUICK, **options)


async def trained(broker: Broker, *streams: str) -> None:
    """Declare both streams, with a dictionary for these."""
    await broker.declare(StreamSpec("orders", 2, "order_id"))
    await broker.declare(StreamSpec("payments"))
    for stream in streams or ("orders", "payments"):
        await broker.admin.train(stream, NUMBER, CONTENT)


async def learnt(app: App) -> None:
    """Let the publisher look at once: else it does within seconds of the first event that it stores."""
    assert app._opened is not None
    for stream in ("orders", "payments"):
        await app._opened.publisher._shortening.follow(stream, await app.broker.policy(stream))


def forget() -> None:
    """From here on as in another process."""
    compression._known.clear()


async def stored(app: App, stream: str = "orders") -> list[Record]:
    found = []
    for partition in range(app.all_streams()[stream].partitions):
        found += [stored.record for stored in await app.broker.read(stream, partition, None, 100)]
    return found


@asynccontextmanager
async def shop(app: App) -> AsyncIterator[TestApp]:
    """The app at work under virtual time, with a dictionary for its streams."""
    async with TestApp(app, raise_errors=False) as t:
        await trained(app.broker)
        await learnt(app)
        yield t


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/events.db"
    else:
        with RedisServer.start("7") as server:
            yield server.url


@pytest.mark.parametrize("order", ["none", "key"])
@pytest.mark.parametrize("batch", [False, True])
async def test_another_process_handles_what_was_written_with_a_dictionary_as_it_was(
    url: str, order: Order, batch: bool
) -> None:
    broker = broker_for(url, Settings(), Clock(), Telemetry())
    await broker.open()
    await trained(broker)
    events = [Envelope(Placed(order_id=f"o-{n % 7}", n=n), id=f"e-{n}", headers={"by": str(n)}) for n in range(40)]
    async with app_of(broker=url) as writer:
        positions = await writer.publish_many(events[:20], to=orders)
        positions += [await writer.publish(event, to=orders) for event in events[20:]]
    records = [stored.record for n in range(2) for stored in await broker.read("orders", n, None, 100)]
    assert {record.type for record in records} == {packs.TYPE}
    assert sum(len(record.data) for record in records) < 0.7 * sum(len(data(n)) for n in range(40))
    forget()
    reader, seen = app_of(broker=url), dict[Position, Any]()

    def note(d: Delivery[Placed]) -> None:
        seen[d.position] = d.event, d.id, d.type, d.key, d.headers["by"], d.attempt

    if batch:

        @reader.subscriber(orders, "log", order=order, batch=Batch(8, within="10ms"))
        async def log_all(deliveries: list[Delivery[Placed]]) -> None:
            for delivery in deliveries:
                note(delivery)
    else:

        @reader.subscriber(orders, "log", order=order)
        async def log(event: Placed, delivery: Delivery[Placed]) -> None:
            note(delivery)

    async with reader.worker():
        await until(lambda: len(seen) == 40)
    assert [seen[position] for position in positions] == [
        (Placed(order_id=f"o-{n % 7}", n=n), f"e-{n}", "order.placed", f"o-{n % 7}", str(n), 1) for n in range(40)
    ]
    (info,) = await broker.admin.groups("orders")
    assert (info.lag, info.pending, info.done) == (0, 0, 40)
    await broker.close()


async def test_a_dictionary_is_asked_for_once() -> None:
    app, seen, asked = app_of(), list[int](), list[int]()

    @app.subscriber(orders, "log", order="none")
    async def log(event: Placed) -> None:
        seen.append(event.n)

    async with shop(app) as t:
        await t.publish(Placed(order_id="o-1", n=0))
        find = app.broker.dictionary

        async def dictionary(stream: str, number: int) -> bytes | None:
            asked.append(number)
            return await find(stream, number)

        app.broker.dictionary = dictionary  # type: ignore[method-assign]
        await app.publish_many([Placed(order_id=f"o-{n}", n=n) for n in range(1, 20)])
        forget()
        await t.idle()
    assert sorted(seen) == list(range(20)) and asked == [NUMBER]


async def test_what_fails_is_tried_again_and_becomes_a_dead_letter_like_any_event() -> None:
    app, tries = app_of(), list[tuple[int, int, Position]]()

    @app.subscriber(orders, "log")
    async def log(event: Placed, delivery: Delivery[Placed]) -> None:
        tries.append((event.n, delivery.attempt, delivery.position))
        if event.n == 2:
            raise Reject("bad")
        if event.n == 1 and delivery.attempt < 3:
            raise ValueError("not yet")

    async with shop(app) as t:
        at = [await t.publish(Placed(order_id="o-1", n=n)) for n in range(4)]
        await t.advance("5m")
        assert [letter.event for letter in t.dead("log")] == [Placed(order_id="o-1", n=2)]
        assert t.published(orders) == [Placed(order_id="o-1", n=n) for n in range(4)]
        (letter,) = await app.broker.admin.dead("orders", "log")
        assert letter.stored.position == at[2]
        assert await app.broker.admin.replay([letter]) == [True]
        await t.advance("5m")
    assert tries[:6] == [(0, 1, at[0]), *((1, n, at[1]) for n in (1, 2, 3)), (2, 1, at[2]), (3, 1, at[3])]
    assert tries[6:] == [(2, 1, at[2])]


async def test_a_dictionary_that_is_nowhere_makes_dead_letters_and_holds_up_nobody() -> None:
    app, seen = app_of(), list[int]()

    @app.subscriber(orders, "log", order="none")
    async def log(event: Placed) -> None:
        seen.append(event.n)

    strange = packs.one(Record(0, "e-9", "order.placed", data(9), "o-9"), Dictionary(CONTENT))
    async with TestApp(app, raise_errors=False) as t:
        await app.broker.append("orders", [strange, Record(0, "e-1", "order.placed", data(1), "o-1"), strange])
        await t.idle()
        letters = await app.broker.admin.dead("orders", "log")
        await app.broker.admin.train("orders", NUMBER, CONTENT)
        assert seen == [1]
        assert {(letter.reason, f"dictionary {NUMBER}, which is not known" in letter.error) for letter in letters} == {
            ("undecodable", True)
        }
        assert await app.broker.admin.replay(letters) == [True, True]
        await t.idle()
    assert seen == [1, 9, 9]


async def test_while_the_broker_cannot_be_asked_a_group_waits_and_says_so() -> None:
    app, seen = app_of(), list[int]()
    told = heard(app, BROKER_ERROR)

    @app.subscriber(orders, "log")
    async def log(event: Placed) -> None:
        seen.append(event.n)

    async with at_work(app):
        await trained(app.broker)
        await learnt(app)
        find = app.broker.dictionary

        async def dictionary(stream: str, number: int) -> bytes | None:
            if not told:
                raise BrokerDown("no answer")
            return await find(stream, number)

        app.broker.dictionary = dictionary  # type: ignore[method-assign]
        forget()
        await app.publish(Placed(order_id="o-1", n=1))
        await until(lambda: seen)
    assert [(one["group"], str(one["error"])) for one in told] == [("log", "no answer")]


async def test_listeners_and_readers_see_events() -> None:
    app, listened = app_of(), list[int]()

    @app.listener(orders)
    async def listen(event: Placed) -> None:
        listened.append(event.n)

    async with shop(app) as t:
        await app.publish_many([Placed(order_id="o-1", n=n) for n in range(3)])
        forget()
        await t.idle()
        forget()
        read = [(envelope.event.n, envelope.type, envelope.key) async for envelope in app.read(orders)]
    assert listened == [0, 1, 2]
    assert read == [(n, "order.placed", "o-1") for n in range(3)]


async def test_what_handlers_publish_is_shortened_and_ids_are_remembered() -> None:
    app = app_of()

    @app.subscriber(orders, "log")
    async def log(event: Placed, delivery: Delivery[Placed]) -> None:
        delivery.publish(Charged(order_id=event.order_id))

    async with shop(app) as t:
        at = [await t.publish(Envelope(Charged(order_id="o-2"), id="c-1")) for _ in range(2)]
        assert at[0] == at[1]
        await t.publish(Placed(order_id="o-1", n=1))
        assert t.published(payments) == [Charged(order_id="o-2"), Charged(order_id="o-1")]
        assert {record.type for record in await stored(app, "payments")} == {packs.TYPE}


async def test_what_is_large_or_for_later_or_gains_nothing_is_written_as_it_is() -> None:
    app = app_of()
    async with shop(app) as t:
        await t.publish(Placed(order_id="o-1", n=1, note="x" * packs.MAX_ONE_BYTES))
        await t.publish(Envelope(Placed(order_id="o-1", n=1), due="1s"))
        await t.publish(Envelope(Placed(order_id="o-1", n=1), id="i" * MAX_ID_CHARS))
        await t.advance("2s")
        assert {record.type for record in await stored(app)} == {"order.placed"}
        assert len(await stored(app)) == 3


async def test_a_stream_with_packs_writes_what_travels_alone_as_it_is() -> None:
    from millstream import Pack

    packed = Stream("orders", Placed, key="order_id", partitions=2, pack=Pack())
    app = App("shop", streams=[packed, payments], settings=QUICK)
    async with TestApp(app) as t:
        await trained(app.broker)
        await learnt(app)
        await t.publish(Placed(order_id="o-1", n=1))
        assert {record.type for record in await stored(app)} == {"order.placed"}


async def test_publishers_learn_within_seconds_which_dictionary_is_in_use() -> None:
    app = app_of()
    async with TestApp(app) as t:
        await trained(app.broker, "payments")
        types = []
        for number, content in ((NUMBER, CONTENT), (0, b""), (NUMBER, b"")):
            await t.publish(Placed(order_id="o-1", n=1))
            await app.broker.admin.train("orders", number, content)
            await t.advance(LOOK_S + 1)
            await t.publish(Placed(order_id="o-1", n=1))
            types = [record.type for record in await stored(app)]
    assert [type_ == packs.TYPE for type_ in types] == [False, True, True, False, False, True]


async def test_without_the_library_events_are_written_as_they_are_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> Any:
        raise NotSupported(f"{name} compression needs a library: pip install 'millstream[{name}]'")

    app = app_of()
    async with TestApp(app) as t:
        await trained(app.broker)
        monkeypatch.setattr(compression, "imported", missing)
        for n in range(3):
            await t.publish(Placed(order_id="o-1", n=n))
            await t.advance(LOOK_S + 1)
        assert {record.type for record in await stored(app)} == {"order.placed"}
    said = [record.getMessage() for record in caplog.records if "dictionary" in record.getMessage()]
    assert len(said) == 1 and "pip install 'millstream[zstd]'" in said[0]


async def test_who_wrote_with_a_dictionary_puts_it_back_where_it_was_lost() -> None:
    app = app_of()
    async with shop(app) as t:
        await t.publish(Placed(order_id="o-1", n=1))
        await app.broker.admin.discard("orders")
        await app.broker.declare(StreamSpec("orders", 2, "order_id"))
        await app.publish(Placed(order_id="o-1", n=2))
        await t.advance(LOOK_S + 1)
        assert await app.broker.dictionary("orders", NUMBER) == CONTENT
        assert (await app.broker.policy("orders")).dictionary == NUMBER


@pytest.mark.parametrize("restarts", [True, False])
async def test_a_server_that_lost_all_gets_the_dictionary_again_or_events_as_they_are(
    monkeypatch: pytest.MonkeyPatch, restarts: bool
) -> None:
    monkeypatch.setattr("millstream.publisher.shortening.LOOK_S", 0.05)
    with RedisServer.start("7") as server:
        app = app_of(broker=server.url)
        async with app:
            await trained(app.broker)
            await app.broker.declare(StreamSpec("orders", 2, "order_id"))  # or its policy would be known, and be old
            await learnt(app)
            at = [await app.publish(Placed(order_id="o-1", n=1))]
            assert [record.type for record in await stored(app)] == [packs.TYPE]
            if restarts:
                server.restart()
            else:
                await (await app.broker.control()).call("FLUSHALL")  # type: ignore[attr-defined]

            async def last() -> str:
                while True:
                    with suppress(BrokerDown, Unconfirmed):  # the link was cut
                        at.append(await app.publish(Placed(order_id="o-1", n=2)))
                        for event in await app.broker.read("orders", at[-1].partition, at[-2], 1):
                            return event.record.type

            while await last() == packs.TYPE:
                pass
            while restarts and await last() != packs.TYPE:
                pass
            assert await app.broker.dictionary("orders", NUMBER) == (CONTENT if restarts else None)


async def test_what_comes_out_of_an_outbox_is_shortened_too(tmp_path: Path) -> None:
    outbox = Outbox(payments, source="shop")

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(tmp_path / "shop.sqlite", check_same_thread=False)

    with closing(connect()) as connection, connection:
        outbox.create(connection)
        for n in range(3):
            outbox.publish(connection, Charged(order_id=f"o-{n}"))
    seen: list[str] = []
    app = App("shop", include=[outbox.relay(connect)], streams=[payments], settings=QUICK)

    @app.subscriber(payments, "log")
    async def log(event: Charged) -> None:
        seen.append(event.order_id)

    broker = memory(app)
    await broker.declare(StreamSpec("payments"), Policy(dedupe_ms=3_600_000, dedupe_ids=1_000))
    await broker.admin.train("payments", NUMBER, CONTENT)
    async with at_work(app, broker):
        await until(lambda: len(seen) == 3)
    assert sorted(seen) == ["o-0", "o-1", "o-2"]
    assert {stored.record.type for stored in await broker.read("payments", 0, None, 10)} == {packs.TYPE}


async def test_while_dictionaries_change_under_load_nothing_is_lost(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millstream.publisher.shortening.LOOK_S", 0.01)
    monkeypatch.setattr("millstream.brokers.redis.appending.RENEW_S", 0)
    monkeypatch.setattr("millstream.brokers.redis.appending.LEARN_S", 0)

    async def learn_apart(broker: Broker, stream: str, number: int) -> Dictionary | None:
        """As a publisher does in a process of its own: what it learns the worker does not know."""
        content = await broker.dictionary(stream, number)
        return None if content is None else Dictionary(content)

    monkeypatch.setattr("millstream.publisher.shortening.learn", learn_apart)
    contents = [CONTENT, *(compression.train([data(n * k) for n in range(2_000)], 1_024) for k in (3, 7))]
    app, seen = app_of(broker=url), set[str]()

    @app.subscriber(orders, "log")
    async def log(event: Placed, delivery: Delivery[Placed]) -> None:
        seen.add(delivery.id)

    sent: set[str] = set()
    async with app.worker():
        await trained(app.broker)
        for n in range(60):
            content = contents[n % 3]
            await app.broker.admin.train("orders", Dictionary(content).id if n % 4 else 0, content)
            events = [Envelope(Placed(order_id=f"o-{k}", n=k), id=f"e-{n}-{k}") for k in range(20)]
            await app.publish_many(events, to=orders)
            sent |= {event.id for event in events}
        await until(lambda: seen == sent)
        assert await app.broker.admin.dead("orders", "log") == []
        kinds = {stored.record.type for n in range(2) for stored in await app.broker.read("orders", n, None, 10_000)}
    assert kinds == {packs.TYPE, "order.placed"}
