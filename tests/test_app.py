"""The app: where its broker is, what it knows, and how it is opened, read and run inside another program."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from millstream import App, BadSetting, Envelope, Event, GroupOwned, MillstreamError, Settings, Stream
from millstream.brokers.base import Record
from millstream.brokers.memory.broker import MemoryBroker
from tests.worker.place import at_work, until


class Placed(Event, type="order.placed"):
    n: int = 0


orders = Stream("orders", Placed)


def memory(app: App) -> MemoryBroker:
    return MemoryBroker("memory://", app.settings, app.clock, app.telemetry)


def test_the_broker_is_what_is_configured_then_the_argument_then_the_environment_then_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MILLSTREAM_BROKER", raising=False)
    assert App("shop").url == "sqlite:///shop.db"
    monkeypatch.setenv("MILLSTREAM_BROKER", "redis://there")
    assert App("shop").url == "redis://there"
    app = App("shop", broker="redis://here")
    assert app.url == "redis://here"
    app.configure(broker="memory://", grace="3s")
    assert (app.url, app.settings.grace_s) == ("memory://", 3.0)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_LEASE", "1s")
    monkeypatch.setenv("MILLSTREAM_CONCURRENCY", "5")
    assert (App("shop").settings.lease_s, App("shop").settings.concurrency) == (1.0, 5)
    assert App("shop", settings=Settings(concurrency=7)).settings.concurrency == 7
    monkeypatch.setenv("MILLSTREAM_CONCURRENCY", "many")
    with pytest.raises(BadSetting, match="MILLSTREAM_CONCURRENCY='many' is not a whole number"):
        App("shop")


async def test_an_open_app_cannot_be_configured_and_opening_it_again_changes_nothing(tmp_path: Path) -> None:
    app = App("shop", broker="memory://", streams=[orders])
    async with app:
        broker = app.broker
        async with app:
            assert app.broker is broker
        await app.publish(Placed())  # still open
        with pytest.raises(MillstreamError, match="open already"):
            app.configure(broker="memory://")
    with pytest.raises(MillstreamError, match="'shop' is not open"):
        _ = app.broker


def test_two_streams_of_one_name_are_refused() -> None:
    with pytest.raises(BadSetting, match="two different Stream objects are named 'orders'; declare it once"):
        App("shop", streams=[orders, Stream("orders", Placed)]).all_streams()


def test_an_app_has_a_name_that_can_be_part_of_a_key() -> None:
    with pytest.raises(BadSetting, match="cannot name an app"):
        App("my shop")


async def test_a_group_that_the_app_does_not_have_is_named_with_those_it_has() -> None:
    app = App("shop", broker="memory://")

    @app.subscriber(orders, "billing")
    async def charge(event: Placed) -> None: ...

    with pytest.raises(BadSetting, match="this app has no group biling; it has billing"):
        async with app.worker(only=["biling"]):
            pass


async def test_a_group_of_another_app_ends_the_start_with_that_error() -> None:
    app, other = App("shop"), App("other")
    for each in (app, other):

        @each.subscriber(orders, "billing")
        async def charge(event: Placed) -> None: ...

    broker = memory(app)
    async with at_work(app, broker):
        with pytest.raises(GroupOwned, match="belongs to the app 'shop'"):
            async with at_work(other, broker):
                raise AssertionError("it started")


async def test_a_worker_inside_another_program_handles_and_publishes() -> None:
    app, seen = App("shop", broker="memory://"), list[int]()

    @app.subscriber(orders, "billing")
    async def charge(event: Placed) -> None:
        seen.append(event.n)

    async with app.worker():
        await app.publish(Placed(n=4))
        await until(lambda: seen == [4])


async def test_read_yields_envelopes_in_order_and_passes_over_what_is_no_event() -> None:
    app = App("shop", streams=[orders])
    async with app.opened(broker=memory(app)):
        await app.publish(Envelope(Placed(n=1), id="one", headers={"a": "b"}), to=orders)
        await app.broker.append(
            "orders", [Record(0, "x", "order.placed", b"?"), Record(0, "y", "order.unknown", b"{}")]
        )
        await app.publish_many([Placed(n=n) for n in range(2, 1_202)])
        found = [envelope async for envelope in app.read(orders)]
    assert [envelope.event.n for envelope in found] == list(range(1, 1_202))
    first = found[0]
    assert (first.id, first.type, first.source, dict(first.headers)) == ("one", "order.placed", "shop", {"a": "b"})
    assert abs((first.time - datetime.now(UTC)).total_seconds()) < 60


async def test_read_begins_at_a_time_or_so_long_ago() -> None:
    app = App("shop", streams=[orders])
    async with app.opened(broker=memory(app)):
        await app.publish(Placed(n=1))
        await asyncio.sleep(0.02)
        between = datetime.now(UTC)
        await asyncio.sleep(0.02)
        await app.publish(Placed(n=2))
        for since, expected in ((between, [2]), (timedelta(hours=1), [1, 2]), ("1h", [1, 2]), (None, [1, 2])):
            assert [envelope.event.n async for envelope in app.read(orders, since=since)] == expected


async def test_read_may_follow_what_comes() -> None:
    app = App("shop", streams=[orders])
    async with app.opened(broker=memory(app)), asyncio.TaskGroup() as tasks:
        seen: list[int] = []

        async def follow() -> None:
            async for envelope in app.read(orders, follow=True):
                seen.append(envelope.event.n)
                if len(seen) == 3:
                    return

        await app.publish(Placed(n=1))
        tasks.create_task(follow())
        await until(lambda: seen == [1])
        await app.publish(Placed(n=2))
        await app.publish(Placed(n=3))
    assert seen == [1, 2, 3]


async def test_an_error_in_the_block_comes_out_as_it_was_raised() -> None:
    app = App("shop", broker="memory://", streams=[orders])
    with pytest.raises(KeyError):
        async with app:
            await app.publish(Placed())
            raise KeyError
    with pytest.raises(BadSetting, match="no broker knows the scheme 'kafka'"):
        async with App("shop", broker="kafka://here"):
            pass
