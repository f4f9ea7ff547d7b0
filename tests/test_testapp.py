"""The kit that users test with: its promises, on the memory broker and on a real one."""

import asyncio
import threading
from pathlib import Path

import pytest

from millstream import (
    App,
    Batch,
    BatchFailed,
    Delivery,
    Event,
    MillstreamError,
    Pack,
    Position,
    Reject,
    Retry,
    RetryLater,
    Stream,
    event,
)
from millstream.testing import TestApp, deliver


class Placed(Event, type="order.placed"):
    order_id: str
    total: int = 0


class Charged(Event, type="payment.charged"):
    order_id: str


orders = Stream("orders", Placed, key="order_id")
payments = Stream("payments", Charged)


def shop() -> App:
    return App("shop", streams=[orders, payments])


async def test_publish_returns_when_everything_that_is_due_is_done() -> None:
    app = shop()

    @app.subscriber(orders, "billing")
    async def charge(event: Placed, delivery: Delivery) -> None:
        delivery.publish(Charged(order_id=event.order_id))

    async with TestApp(app) as t:
        await t.publish(Placed(order_id="o-1"))
        assert t.published(payments) == [Charged(order_id="o-1")]
        assert t.published(orders) == [Placed(order_id="o-1")]
        assert t.dead("billing") == []


async def test_an_assertion_in_a_handler_fails_the_test() -> None:
    app = shop()

    @app.subscriber(orders, "billing")
    async def charge(event: Placed) -> None:
        assert event.total > 0, "nothing to charge"

    async with TestApp(app) as t:
        with pytest.raises(AssertionError, match="nothing to charge"):
            await t.publish(Placed(order_id="o-1"))


async def test_time_passes_only_by_advance() -> None:
    app, attempts = shop(), []

    @app.subscriber(orders, "billing", retry=Retry(4, first="1m", factor=2))
    async def charge(event: Placed, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise ConnectionError("the bank does not answer")

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed(order_id="o-1"))
        assert attempts == [1]
        await t.advance("40s")
        assert attempts == [1]
        await t.advance("20s")
        assert attempts == [1, 2]
        await t.advance("1h")
        assert attempts == [1, 2, 3, 4]
        (letter,) = t.dead("billing")
        assert letter.event == Placed(order_id="o-1")
        assert (letter.reason, letter.attempts) == ("failed", 4)
        assert "the bank does not answer" in letter.error


async def test_an_hour_of_advance_takes_no_hour() -> None:
    app, calls = shop(), []

    @app.subscriber(orders, "billing")
    async def charge(event: Placed) -> None:
        calls.append(event)
        if len(calls) < 5:
            raise RetryLater("10m")

    async with TestApp(app) as t:
        await t.publish(Placed(order_id="o-1"))
        await t.advance("1h")
        assert len(calls) == 5


async def test_a_handler_that_hangs_times_out_in_virtual_time() -> None:
    app = shop()

    @app.subscriber(orders, "billing", timeout="30s", retry=Retry(2))
    async def charge(event: Placed) -> None:
        await asyncio.Event().wait()

    async with TestApp(app, raise_errors=False, patience="20ms") as t:
        await t.publish(Placed(order_id="o-1"))
        await t.advance("2m")
        (letter,) = t.dead("billing")
        assert "30 s" in letter.error


async def test_a_test_ends_while_a_handler_hangs() -> None:
    app = shop()

    @app.subscriber(orders, "billing", timeout="never")
    async def charge(event: Placed) -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(10):
        async with TestApp(app, patience="20ms") as t:
            await t.publish(Placed(order_id="o-1"))


async def test_plain_functions_in_threads_are_waited_for() -> None:
    app, threads = shop(), []

    @app.subscriber(orders, "billing")
    def charge(event: Placed) -> None:
        threads.append(threading.current_thread())

    async with TestApp(app) as t:
        await t.publish(Placed(order_id="o-1"))
        assert threads and threads[0] is not threading.main_thread()


async def test_a_batch_is_handled_when_its_time_is_over() -> None:
    app, batches = shop(), []

    @app.subscriber(orders, "warehouse", batch=Batch(3, within="2s"))
    async def load(events: list[Placed]) -> None:
        batches.append([event.order_id for event in events])
        if "o-2" in batches[-1] and len(batches) == 2:
            raise BatchFailed({1: ValueError("the second")})

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed(order_id="o-1"))
        assert batches == []
        await t.advance("2s")
        assert batches == [["o-1"]]
        for n in (0, 2, 3):
            await t.publish(Placed(order_id=f"o-{n}"))
        assert sorted(batches[1]) == ["o-0", "o-2", "o-3"], "a full batch does not wait"
        failed = batches[1][1]
        await t.advance("10s")
        assert batches[2:] == [[failed]]


async def test_providers_are_replaced_and_two_tests_share_nothing() -> None:
    from typing import Annotated

    from millstream import Depends

    def real() -> str:
        raise AssertionError("the real one was called")

    app, got = shop(), []

    @app.subscriber(orders, "billing")
    async def charge(event: Placed, who: Annotated[str, Depends(real)]) -> None:
        got.append(who)

    for name in ("first", "second"):
        async with TestApp(app, replace={real: lambda name=name: name}) as t:
            await t.publish(Placed(order_id="o-1"))
            assert t.published(orders) == [Placed(order_id="o-1")]
    assert got == ["first", "second"]


async def test_listeners_hear_what_handlers_publish() -> None:
    app, heard = shop(), []

    @app.subscriber(orders, "billing")
    async def charge(event: Placed, delivery: Delivery) -> None:
        delivery.publish(Charged(order_id=event.order_id))

    @app.listener(payments)
    async def hear(event: Charged) -> None:
        heard.append(event)

    async with TestApp(app) as t:
        await t.publish(Placed(order_id="o-1"))
        assert heard == [Charged(order_id="o-1")]


async def test_a_verdict_is_no_error() -> None:
    app = shop()

    @app.subscriber(orders, "billing")
    async def charge(event: Placed) -> None:
        raise Reject("no such customer")

    async with TestApp(app) as t:
        await t.publish(Placed(order_id="o-1"))
        (letter,) = t.dead("billing")
        assert (letter.reason, letter.error) == ("rejected", "no such customer")


async def test_a_group_that_the_app_lacks_is_named() -> None:
    app = shop()

    @app.subscriber(orders, "billing")
    async def charge(event: Placed) -> None: ...

    async with TestApp(app) as t:
        await t.idle()
        with pytest.raises(MillstreamError, match="no group 'biling'; it has billing"):
            t.dead("biling")


async def test_on_a_real_broker_time_is_real(tmp_path: Path) -> None:
    app = shop()

    @app.subscriber(orders, "billing")
    async def charge(event: Placed, delivery: Delivery) -> None:
        delivery.publish(Charged(order_id=event.order_id))

    async with TestApp(app, broker=f"sqlite:///{tmp_path}/shop.db") as t:
        await t.publish(Placed(order_id="o-1"))
        assert t.published(payments) == [Charged(order_id="o-1")]
        with pytest.raises(MillstreamError, match="time is real"):
            await t.advance("1h")


async def test_deliver_calls_one_handler_alone() -> None:
    async def charge(event: Placed, delivery: Delivery[Placed]) -> None:
        delivery.publish(Charged(order_id=f"{event.order_id} attempt {delivery.attempt}"))

    delivery = deliver(Placed(order_id="o-1"), attempt=2, key="k", headers={"tenant": "a"}, token=3)
    await charge(delivery.event, delivery)
    assert delivery.staged == [Charged(order_id="o-1 attempt 2")]
    assert (delivery.key, delivery.headers, delivery.token) == ("k", {"tenant": "a"}, 3)
    assert deliver(Placed(order_id="o-1")).token == 0


async def test_dataclasses_and_models_are_events_too() -> None:
    from dataclasses import dataclass

    from pydantic import BaseModel

    @event("a.dataclass")
    @dataclass(frozen=True)
    class A:
        n: int

    @event("a.model", version=2)
    class B(BaseModel):
        n: int

    stream = Stream("both", A | B)
    app, got = App("both"), []

    @app.subscriber(stream, "all")
    async def handle(event: A | B) -> None:
        got.append(event)

    async with TestApp(app) as t:
        await t.publish(A(1), to=stream)
        await t.publish(B(n=2), to=stream)
    assert got == [A(1), B(n=2)]


def test_headers_that_cannot_be_read_count_as_none() -> None:
    delivery = Delivery(Placed(order_id="o"), "i", None, "", "", 0, b"{broken", Position(0, "0"), 1, False, None, print)
    assert delivery.headers == {}


async def test_what_travels_in_packs_and_as_messagepack_is_told_event_by_event() -> None:
    parcels = Stream("parcels", Placed, pack=Pack(codec="none"), codec="msgpack")
    app = App("shop", streams=[parcels])

    @app.subscriber(parcels, "billing", retry=Retry(1))
    async def charge(event: Placed) -> None:
        if event.total == 3:
            raise ConnectionError("the bank does not answer")

    async with TestApp(app, raise_errors=False) as t:
        sent = [Placed(order_id="o", total=total) for total in range(9)]
        await app.publish_many(sent)
        await t.idle()
        assert t.published(parcels) == sent
        assert [letter.event for letter in t.dead("billing")] == [sent[3]]
