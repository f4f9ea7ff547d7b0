"""What the end of a handler means for its event."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from millstream import App, BatchFailed, Delivery, Envelope, Event, Reject, Retry, RetryLater, Skip, Stream
from millstream.brokers.base import Record
from millstream.telemetry import DEAD, POSTPONED, RETRIED, SKIPPED, TIMED_OUT
from millstream.testing import TestApp
from tests.worker.place import (
    Base,
    Cancelled,
    Charged,
    Placed,
    app_of,
    at_work,
    heard,
    memory,
    orders,
    payments,
    settled,
)


class Refused(Exception):
    pass


class Shipped(Event, type="order.shipped"):
    n: int


def raising(error: BaseException, **options: object) -> tuple[App, list[int]]:
    """An app whose one handler raises this, and the attempts that it saw."""
    app, attempts = app_of(), list[int]()

    @app.subscriber(orders, "billing", retry=Retry(3, first="10s", factor=2, **options))  # type: ignore[arg-type]
    async def charge(event: Base, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise error

    return app, attempts


async def test_a_failed_event_is_tried_again_after_growing_pauses_and_then_dead() -> None:
    app, attempts = raising(ValueError("no such card"))
    retried = heard(app, RETRIED)
    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed(n=1))
        assert attempts == [1]
        await t.advance("7s")
        assert attempts == [1]  # 10 s less up to a quarter
        await t.advance("3s")
        assert attempts == [1, 2]
        await t.advance("20s")
        assert attempts == [1, 2, 3]
        (letter,) = t.dead("billing")
    assert (letter.event, letter.reason, letter.attempts) == (Placed(n=1), "failed", 3)
    assert "no such card" in letter.error and "Traceback" in letter.error
    first, second = (told["delay_s"] for told in retried)
    assert 7.5 <= first <= 10 and 15 <= second <= 20


async def test_the_jitter_parts_events_that_failed_together() -> None:
    app, _ = raising(ValueError())
    retried = heard(app, RETRIED)
    async with TestApp(app, raise_errors=False) as t:
        for n in range(20):
            await t.publish(Placed(n=n))
    assert len({told["delay_s"] for told in retried}) > 15


async def test_the_last_attempt_knows_that_it_is_the_last() -> None:
    app, seen = app_of(retry=Retry(2)), list[tuple[int, bool]]()

    @app.subscriber(orders, "billing")
    async def charge(delivery: Delivery) -> None:
        seen.append((delivery.attempt, delivery.last_attempt))
        raise Refused

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
        await t.advance("1h")
    assert seen == [(1, False), (2, True)]


async def test_an_error_named_in_never_is_not_tried_again() -> None:
    app, attempts = raising(Refused("stolen"), never=[Refused])
    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
        await t.advance("1h")
        (letter,) = t.dead("billing")
    assert (attempts, letter.reason) == ([1], "never") and "stolen" in letter.error


async def test_skip_settles_the_event_as_done_and_tells_why() -> None:
    app, attempts = raising(Skip("already charged"))
    skipped = heard(app, SKIPPED)
    async with TestApp(app) as t:
        await t.publish(Placed())
        await t.advance("1h")
        assert not t.dead("billing")
        (group,) = await app.broker.admin.groups("orders")
    assert (attempts, group.done, group.pending) == ([1], 1, 0)
    assert [told["reason"] for told in skipped] == ["already charged"]


async def test_reject_makes_a_dead_letter_at_once() -> None:
    app, attempts = raising(Reject("no such customer"))
    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
        (letter,) = t.dead("billing")
    assert (attempts, letter.reason, letter.error) == ([1], "rejected", "no such customer")


async def test_retry_later_uses_up_no_attempt() -> None:
    app, attempts = raising(RetryLater("5m"))
    postponed = heard(app, POSTPONED)
    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
        await t.advance("51m")
        assert not t.dead("billing")
    assert attempts == [1] * 11 and {told["delay_s"] for told in postponed} == {300.0}


async def test_retry_later_ends_after_a_thousand_times() -> None:
    app, attempts = raising(RetryLater(timedelta(seconds=1)))
    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
        await t.advance("1020s")
        (letter,) = t.dead("billing")
    assert len(attempts) == 1_001 and letter.reason == "failed" and "1,000 times" in letter.error


class Mute(Exception):
    def __str__(self) -> str:
        raise TypeError("no text")


@pytest.mark.parametrize(
    "error",
    [
        RetryLater("soon"),
        RetryLater(float("nan")),
        RetryLater(1e300),
        Reject(None),  # type: ignore[arg-type]
        Skip(5),  # type: ignore[arg-type]
        Mute(),
        ValueError("half a pair: \ud800"),
        Reject("half a pair: \ud800"),
        BatchFailed({0: ValueError()}),
        BatchFailed({7: ValueError()}),
        RecursionError("x" * 100_000),
        SystemExit(1),
        asyncio.CancelledError(),
        StopIteration(),
        BaseExceptionGroup("two", [KeyError(1), SystemExit(2)]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_whatever_a_handler_raises_ends_its_event_and_not_the_worker(error: BaseException) -> None:
    app, _ = raising(error)
    charged: list[int] = []

    @app.subscriber(orders, "warehouse")
    async def pack(event: Base) -> None:
        charged.append(event.n)

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed(n=1))
        await t.advance("1h")
        await t.publish(Placed(n=2))
        await t.advance("1h")
        letters = t.dead("billing")
        for letter in letters:
            letter.error.encode()
        groups = {group.group: group for group in await app.broker.admin.groups("orders")}
    assert charged == [1, 2]
    assert (groups["billing"].done or 0) + groups["billing"].scheduled + len(letters) == 2


async def test_a_type_that_the_stream_does_not_name_becomes_a_dead_letter() -> None:
    app, handled = app_of(), list[Base]()

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        handled.append(event)

    dead = heard(app, DEAD)
    async with TestApp(app) as t:
        await app.broker.append("orders", [Record(0, "a", "order.returned", b"{}")])
        await t.idle()
        (letter,) = t.dead("billing")
    assert (letter.reason, letter.event, handled) == ("unknown type", None, [])
    assert "order.returned" in letter.error and "replay" in letter.error and len(dead) == 1


async def test_a_stream_may_say_that_other_types_are_skipped() -> None:
    lenient = Stream("orders", Placed, others="skip")
    app, handled = App("shop"), list[Base]()

    @app.subscriber(lenient, "billing")
    async def charge(event: Placed) -> None:
        handled.append(event)

    async with TestApp(app) as t:
        await app.broker.append("orders", [Record(0, "a", "order.returned", b"{}")])
        await t.idle()
        assert not t.dead("billing")
        (group,) = await app.broker.admin.groups("orders")
    assert (group.done, handled) == (1, [])


async def test_a_declared_type_that_no_handler_is_for_is_settled_unseen() -> None:
    app, handled = app_of(), list[Base]()

    @app.subscriber(orders, "billing")
    async def charge(event: Placed) -> None:
        handled.append(event)

    async with TestApp(app) as t:
        await t.publish(Cancelled())
        await t.publish(Placed())
        assert not t.dead("billing")
        (group,) = await app.broker.admin.groups("orders")
    assert (group.done, group.pending, handled) == (2, 0, [Placed()])


async def test_handlers_of_one_group_share_its_events_by_type() -> None:
    app, seen = app_of(), list[tuple[str, int]]()

    @app.subscriber(orders, "billing")
    async def charge(event: Placed) -> None:
        seen.append(("charge", event.n))

    @app.subscriber(orders, "billing")
    def refund(delivery: Delivery[Cancelled]) -> None:
        seen.append(("refund", delivery.event.n))

    async with TestApp(app) as t:
        await t.publish(Placed(n=1))
        await t.publish(Cancelled(n=2))
    assert sorted(seen) == [("charge", 1), ("refund", 2)]


async def test_bytes_that_are_not_their_event_become_a_dead_letter() -> None:
    app, handled = app_of(), list[Base]()

    @app.subscriber(orders, "billing")
    async def charge(event: Placed) -> None:
        handled.append(event)

    async with TestApp(app, raise_errors=False) as t:
        for data in (b'{"n": "one"}', b"", b"\xff", b"[" * 100_000):
            await app.broker.append("orders", [Record(0, "a", "order.placed", data)])
        await t.idle()
        letters = t.dead("billing")
    assert [letter.reason for letter in letters] == ["undecodable"] * 4 and not handled
    assert "`$.n`" in letters[0].error  # names the field


async def test_a_handler_that_takes_too_long_is_cancelled_and_has_failed() -> None:
    app, ends = app_of(retry=Retry(1)), list[str]()
    timed_out = heard(app, TIMED_OUT)

    @app.subscriber(orders, "billing", timeout="10s", concurrency=1)
    async def charge(event: Placed) -> None:
        try:
            if event.n == 1:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise
        ends.append("finished")

    async with TestApp(app, raise_errors=False, patience="10ms") as t:
        await t.publish(Placed(n=1))
        await t.advance("9s")
        assert ends == []
        await t.advance("3s")
        (letter,) = t.dead("billing")
        await t.publish(Placed(n=2))
    assert ends == ["cancelled", "finished"] and letter.reason == "failed" and "after 10 s" in letter.error
    assert [told["timeout_s"] for told in timed_out] == [10.0]


@pytest.mark.parametrize(("how", "done"), [("returns", 1), ("raises", 0)])
async def test_a_handler_that_swallows_its_timeout_decides_by_how_it_ends(how: str, done: int) -> None:
    app, handled = app_of(retry=Retry(1)), list[int]()

    @app.subscriber(orders, "billing", timeout="10s", concurrency=1)
    async def charge(event: Placed) -> None:
        try:
            if event.n == 1:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            if how == "raises":
                raise ValueError("too slow") from None
        handled.append(event.n)

    async with TestApp(app, raise_errors=False, patience="10ms") as t:
        await t.publish(Placed(n=1))
        await t.advance("12s")
        await t.publish(Placed(n=2))  # the lane goes on
        (group,) = await app.broker.admin.groups("orders")
        assert len(t.dead("billing")) == 1 - done
    assert (group.done, group.pending) == (1 + done, 0) and handled[-1] == 2


async def test_a_timeout_of_never_lets_a_handler_run() -> None:
    app, gate, handled = app_of(timeout="never"), asyncio.Event(), list[int]()

    @app.subscriber(orders, "billing")
    async def charge(delivery: Delivery[Placed]) -> None:
        assert delivery.deadline is None
        await gate.wait()
        handled.append(delivery.event.n)

    async with TestApp(app, patience="10ms") as t:
        await t.publish(Placed(n=1))
        await t.advance("3h")
        gate.set()
        await t.idle()
    assert handled == [1]


async def test_what_a_handler_publishes_is_stored_only_when_it_ends_well() -> None:
    app = app_of()

    @app.subscriber(orders, "billing", retry=Retry(3, first="1s"))
    async def charge(delivery: Delivery[Placed]) -> None:
        delivery.publish(Charged(n=delivery.attempt))
        if delivery.attempt < 3:
            raise Refused

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
        await t.advance("1h")
        assert t.published(payments) == [Charged(n=3)]


async def test_an_output_names_its_cause_and_carries_the_correlation_on() -> None:
    shipments = Stream("shipments", Shipped)
    app = App("shop", streams=[orders, payments, shipments])
    seen: list[Delivery] = []

    @app.subscriber(orders, "billing")
    async def charge(delivery: Delivery[Placed]) -> None:
        delivery.publish(Charged(n=1))

    @app.subscriber(payments, "shipping")
    async def ship(delivery: Delivery[Charged]) -> None:
        seen.append(delivery)
        delivery.publish(Envelope(Shipped(n=1), headers={"lane": "fast"}), to=shipments)

    @app.subscriber(shipments, "mail")
    async def tell(delivery: Delivery[Shipped]) -> None:
        seen.append(delivery)

    broker = memory(app)
    async with at_work(app, broker):
        await app.publish(Envelope(Placed(), id="o-1", headers={"traceparent": "00-1"}), to=orders)
        for group, stream in (("billing", "orders"), ("shipping", "payments"), ("mail", "shipments")):
            await settled(broker, group, stream)
    charged, shipped = seen
    assert charged.headers == {"causation": "o-1", "correlation": "o-1"}
    assert shipped.headers == {"causation": charged.id, "correlation": "o-1", "lane": "fast"}


async def test_a_handler_may_take_its_event_by_keyword_only() -> None:
    app, handled = app_of(), list[int]()

    @app.subscriber(orders, "billing")
    async def charge(*, event: Placed) -> None:
        handled.append(event.n)

    @app.subscriber(orders, "mail")
    async def tell(*, events: list[Placed]) -> None:
        handled.extend(event.n for event in events)

    async with at_work(app):
        await app.publish(Placed(n=7))
        await settled(app.broker)
        await settled(app.broker, "mail")
    assert handled == [7, 7]
