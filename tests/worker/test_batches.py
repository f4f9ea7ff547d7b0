"""Handlers that get many events in one call."""

from __future__ import annotations

import asyncio

import pytest

from millstream import Batch, BatchFailed, Delivery, Reject, Retry, RetryLater, Skip
from millstream.brokers.base import Record
from millstream.telemetry import DEAD, TIMED_OUT
from millstream.testing import TestApp
from tests.worker.place import Base, Cancelled, Charged, Placed, app_of, heard, orders, payments


async def test_a_batch_leaves_when_it_is_full() -> None:
    app, sizes = app_of(), list[int]()

    @app.subscriber(orders, "warehouse", batch=Batch(10, within="1m"))
    async def load(events: list[Base]) -> None:
        sizes.append(len(events))

    async with TestApp(app) as t:
        await app.publish_many([Placed(n=n) for n in range(25)])
        await t.idle()
        assert sizes == [10, 10]
        await t.advance("1m")
    assert sizes == [10, 10, 5]


async def test_a_batch_leaves_when_its_time_is_over_counted_from_its_first_event() -> None:
    app, batches = app_of(), list[list[int]]()

    @app.subscriber(orders, "warehouse", batch=Batch(10, within="10s"))
    async def load(events: list[Base]) -> None:
        batches.append([event.n for event in events])

    async with TestApp(app) as t:
        await t.advance("1m")
        await t.publish(Placed(n=1))
        await t.advance("9s")
        await t.publish(Placed(n=2))
        assert batches == []
        await t.advance("1s")
        assert batches == [[1, 2]]


async def test_without_a_time_a_batch_takes_what_is_there() -> None:
    app, sizes = app_of(), list[int]()

    @app.subscriber(orders, "warehouse", batch=Batch(10))
    async def load(events: list[Base]) -> None:
        sizes.append(len(events))

    async with TestApp(app) as t:
        await t.publish(Placed())
        await app.publish_many([Placed(), Cancelled()])
        await t.idle()
    assert sum(sizes) == 3 and len(sizes) <= 3


async def test_batch_failed_fails_the_named_events_and_the_others_are_done() -> None:
    app, calls = app_of(retry=Retry(2, first="10s")), list[list[int]]()

    @app.subscriber(orders, "warehouse", batch=Batch(10, within="1s"))
    async def load(events: list[Base], deliveries: list[Delivery]) -> None:
        calls.append([event.n for event in events])
        for delivery in deliveries:
            delivery.publish(Charged(n=delivery.event.n))
        named: dict[int, Exception] = {0: ValueError(), 1: Reject("bad"), 2: Skip("known"), 3: RetryLater("5m")}
        errors = {i: named[event.n] for i, event in enumerate(events) if event.n < 4}
        raise BatchFailed(errors)

    async with TestApp(app, raise_errors=False) as t:
        await app.publish_many([Placed(n=n) for n in range(6)])
        await t.advance("2s")
        assert [letter.reason for letter in t.dead("warehouse")] == ["rejected"]
        assert sorted(event.n for event in t.published(payments)) == [4, 5]
        await t.advance("12s")
        assert [letter.reason for letter in t.dead("warehouse")] == ["rejected", "failed"]
        (group,) = await app.broker.admin.groups("orders")
    assert [sorted(call) for call in calls] == [[0, 1, 2, 3, 4, 5], [0]]
    assert (group.done, group.scheduled, group.dead) == (3, 1, 2)


@pytest.mark.parametrize("index", [-1, 3, "first"])
async def test_a_batch_failed_that_names_what_is_not_there_fails_all(index: object) -> None:
    app = app_of(retry=Retry(1))

    @app.subscriber(orders, "warehouse", batch=Batch(3, within="1s"))
    async def load(events: list[Base]) -> None:
        raise BatchFailed({0: ValueError(), index: ValueError()})  # type: ignore[dict-item]

    async with TestApp(app, raise_errors=False) as t:
        await app.publish_many([Placed(n=n) for n in range(3)])
        await t.advance("2s")
        letters = t.dead("warehouse")
    assert len(letters) == 3 and all("the batch has 3 events" in letter.error for letter in letters)


async def test_an_error_fails_every_event_of_a_batch() -> None:
    app = app_of(retry=Retry(1))

    @app.subscriber(orders, "warehouse", batch=Batch(3, within="1s"))
    async def load(events: list[Base]) -> None:
        raise ValueError("the warehouse is closed")

    async with TestApp(app, raise_errors=False) as t:
        await app.publish_many([Placed(n=n) for n in range(3)])
        await t.advance("2s")
        assert [letter.reason for letter in t.dead("warehouse")] == ["failed"] * 3


@pytest.mark.parametrize("error", [None, ValueError("closed"), BatchFailed({0: ValueError("closed")})])
async def test_bytes_that_are_no_event_do_not_come_into_a_batch_and_die_once(error: Exception | None) -> None:
    app, calls = app_of(retry=Retry(2, first="10s")), list[list[int]]()
    dead = heard(app, DEAD)

    @app.subscriber(orders, "warehouse", batch=Batch(3, within="1s"))
    async def load(events: list[Placed]) -> None:
        calls.append([event.n for event in events])
        if error is not None and len(calls) == 1:
            raise error

    async with TestApp(app, raise_errors=False) as t:
        good = [Record(0, f"good-{n}", "order.placed", b'{"n": %d}' % n) for n in range(2)]
        await app.broker.append("orders", [Record(0, "bad", "order.placed", b"no event"), *good])
        await t.advance("2s")
        (letter,) = t.dead("warehouse")
        await t.advance("20s")
        assert len(t.dead("warehouse")) == 1
    assert calls[0] == [0, 1] and (letter.reason, letter.attempts, len(dead)) == ("undecodable", 1, 1)


async def test_a_batch_of_nothing_but_bad_bytes_calls_nobody() -> None:
    app, calls = app_of(), list[int]()

    @app.subscriber(orders, "warehouse", batch=Batch(3))
    async def load(events: list[Base]) -> None:
        calls.append(len(events))

    async with TestApp(app) as t:
        await app.broker.append("orders", [Record(0, "a", "order.placed", b"?"), Record(0, "b", "order.lost", b"{}")])
        await t.idle()
        assert sorted(letter.reason for letter in t.dead("warehouse")) == ["undecodable", "unknown type"]
    assert not calls


async def test_a_batch_that_takes_too_long_fails_as_a_whole() -> None:
    app, timed_out = app_of(retry=Retry(1)), list[object]()
    app.telemetry.listen(lambda name, _: timed_out.append(name) if name == TIMED_OUT else None)

    @app.subscriber(orders, "warehouse", batch=Batch(3), timeout="10s")
    async def load(events: list[Base]) -> None:
        await asyncio.Event().wait()

    async with TestApp(app, raise_errors=False, patience="10ms") as t:
        await app.publish_many([Placed(n=n) for n in range(3)])
        await t.advance("40s")
        assert [letter.reason for letter in t.dead("warehouse")] == ["failed"] * 3
    assert timed_out


async def test_a_group_handles_one_batch_at_a_time_unless_it_says_more() -> None:
    async def most_at_once(concurrency: int | None) -> int:
        app, gate, now, most = app_of(), asyncio.Event(), 0, 0

        @app.subscriber(orders, "warehouse", batch=Batch(5), concurrency=concurrency)
        async def load(events: list[Base]) -> None:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await gate.wait()
            now -= 1

        async with TestApp(app, patience="10ms") as t:
            await app.publish_many([Placed(n=n) for n in range(40)])
            await t.idle()
            gate.set()
            await t.idle()
        return most

    assert (await most_at_once(None), await most_at_once(3)) == (1, 3)


async def test_a_plain_function_may_take_a_batch() -> None:
    app, sizes = app_of(), list[int]()

    @app.subscriber(orders, "warehouse", batch=Batch(10, within="1s"))
    def load(events: list[Base]) -> None:
        sizes.append(len(events))

    async with TestApp(app) as t:
        await app.publish_many([Placed(n=n) for n in range(10)])
        await t.idle()
    assert sizes == [10]
