"""Routers: defaults and middleware of what includes them, groups, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from millstream import (
    App,
    BadEvent,
    BadHandler,
    BadSetting,
    BadStream,
    Batch,
    Call,
    Event,
    Handle,
    Middleware,
    Retry,
    Router,
    Stream,
    event,
)
from millstream.handlers.router import Runtime
from millstream.handlers.subscriber import Subscriber, groups
from millstream.testing import TestApp


class Placed(Event, type="order.placed"):
    n: int = 0


class Cancelled(Event, type="order.cancelled"):
    n: int = 0


orders = Stream("orders", Placed | Cancelled)
payments = Stream("payments", Placed)


async def charge(event: Placed) -> None: ...
async def refund(event: Cancelled) -> None: ...
async def load(events: list[Placed]) -> None: ...


def only(router: Router) -> Subscriber:
    (subscriber,) = router.subscribers()
    return subscriber


def named(name: str, order: list[str]) -> Middleware:
    def middleware(handle: Handle) -> Handle:
        order.append(f"compose {name}")

        async def inner(call: Call) -> None:
            order.append(f"{name} {call.subscriber.group} {len(call.deliveries)}")
            try:
                await handle(call)
            finally:
                order.append(f"{name} over")

        return inner

    return middleware


async def test_the_apps_middleware_goes_around_the_routers_and_is_composed_once() -> None:
    order: list[str] = []
    router = Router(middleware=[named("router 1", order), named("router 2", order)])
    app = App("shop", include=[router], middleware=[named("app", order)])
    router.subscriber(orders, "billing")(charge)
    async with TestApp(app) as t:
        composed, order[:] = list(order), []
        await t.publish(Placed())
        once, order[:] = list(order), []
        await t.publish(Placed())
    assert sorted(composed) == ["compose app", "compose router 1", "compose router 2"]
    assert once == order
    assert once == [
        "app billing 1",
        "router 1 billing 1",
        "router 2 billing 1",
        "router 2 over",
        "router 1 over",
        "app over",
    ]


async def test_exceptions_travel_through_middleware_which_may_turn_them_into_others_or_into_nothing() -> None:
    def softened(handle: Handle) -> Handle:
        async def inner(call: Call) -> None:
            try:
                await handle(call)
            except ValueError as error:
                if call.deliveries[0].event.n == 1:
                    return
                raise KeyError("hard") from error

        return inner

    app = App("shop", middleware=[softened], retry=Retry(1))

    @app.subscriber(orders, "billing")
    async def fail(event: Placed) -> None:
        raise ValueError("soft")

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed(n=1))
        await t.publish(Placed(n=2))
        (letter,) = t.dead("billing")
    assert letter.event == Placed(n=2) and "hard" in letter.error and "soft" in letter.error


def test_the_nearest_default_holds() -> None:
    inner, outer = Router(retry=Retry(2), timeout="2s"), Router(retry=Retry(3), timeout="3s")
    inner.subscriber(orders, "billing", retry=Retry(1))(charge)
    outer.include(inner)
    app = App("shop", include=[outer], timeout="4s")
    assert only(inner).retry == Retry(1) and only(inner).timeout == "2s"
    assert only(app).retry == Retry(1) and only(app).timeout == "2s"
    bare = Router()
    bare.subscriber(orders, "billing")(charge)
    assert only(App("shop", include=[bare], timeout="4s", retry=Retry(4))).timeout == "4s"
    assert (only(bare).retry, only(bare).timeout) == (None, None)


def test_a_handler_stays_the_callable_that_it_was() -> None:
    assert Router().subscriber(orders, "billing")(charge) is charge
    assert Router().listener(orders)(charge) is charge


async def test_a_part_of_any_kind_may_bring_handlers_streams_and_work_of_its_own() -> None:
    order: list[str] = []

    class Schedule:
        def subscribers(self) -> Iterable[Subscriber]:
            return ()

        def streams(self) -> Iterable[Stream[Any]]:
            return (payments,)

        @asynccontextmanager
        async def running(self, runtime: Runtime) -> AsyncIterator[None]:
            await runtime.publish(Placed(n=9), to=payments)
            order.append("runs")
            yield
            order.append("over")

    app = App("shop", include=[Schedule()])
    async with TestApp(app) as t:
        await t.idle()
        assert t.published(payments) == [Placed(n=9)] and order == ["runs"]
    assert order == ["runs", "over"]


def bound(*handlers: tuple[Stream[Any], Callable[..., Any], dict[str, Any]]) -> Iterable[Subscriber]:
    router = Router()
    for stream, handler, options in handlers:
        router.subscriber(stream, "billing", **options)(handler)
    return router.subscribers()


@pytest.mark.parametrize(
    ("handlers", "words"),
    [
        (
            [(orders, charge, {}), (orders, charge, {})],
            "'order.placed' is handled by charge in group 'billing' already",
        ),
        ([(orders, load, {}), (orders, refund, {})], "a batch handler must be the only one of its group"),
        (
            [(orders, charge, {"concurrency": 1}), (orders, refund, {"concurrency": 2})],
            "concurrency= belongs to the group, so only one of them may say it",
        ),
        (
            [(orders, charge, {}), (Stream("orders", Cancelled), refund, {})],
            "two different Stream objects are named 'orders'; declare the stream once",
        ),
    ],
)
def test_handlers_that_clash_in_a_group_are_refused(handlers: list[Any], words: str) -> None:
    with pytest.raises(BadHandler, match=words):
        groups(bound(*handlers))


@pytest.mark.parametrize(
    ("declare", "error", "words"),
    [
        (lambda r: r.subscriber(orders, "bil ling"), BadSetting, "'bil ling' cannot name a group"),
        (lambda r: r.subscriber(orders, charge), BadHandler, "a group is a durable name and always written"),
        (lambda r: r.subscriber("orders", "billing"), BadStream, "'orders' is not a stream; write orders = Stream"),
        (lambda r: r.subscriber(orders, "b", concurrency=0), BadSetting, "concurrency=0: from 1 to 10,000"),
        (lambda r: r.subscriber(orders, "b", timeout=0), BadSetting, "timeout=0: more than zero, or 'never'"),
        (lambda r: r.subscriber(orders, "b", timeout="soon"), BadSetting, "'soon' is not a duration"),
        (lambda r: r.subscriber(orders, "b", batch=Batch(5))(charge), BadHandler, r"batch= needs a list; write events"),
        (lambda r: r.listener(orders)(load), BadHandler, "a listener takes one event at a time"),
        (lambda r: r.include(r), BadHandler, "is not a part; include routers"),
        (lambda r: r.include(charge), BadHandler, "is not a part; include routers"),
        (lambda _: Router(timeout="-1s"), BadSetting, "is not a duration"),
        (lambda _: Retry(0), BadSetting, r"Retry\(attempts=0\): at least 1"),
        (lambda _: Retry(never=ValueError), BadSetting, "a list of exception classes"),  # type: ignore[arg-type]
        (lambda _: Batch(0), BadSetting, r"Batch\(size=0\): from 1 to 10,000"),
        (lambda _: Stream("or ders", Placed), BadSetting, "'or ders' cannot name a stream"),
        (lambda _: Stream("orders", Event), BadStream, r"Event has no type name; write class Event\(Event, type='…'\)"),
        (lambda _: Stream("orders", Placed, key="id"), BadStream, "key='id' is not a field of Placed"),
        (lambda _: Stream("orders", Placed, partitions=0), BadStream, "partitions=0 must be from 1 to 1,024"),
        (lambda _: Stream("orders", 5), BadStream, "5 is not an event class; write Stream"),  # type: ignore[arg-type]
        (lambda _: event("a.b")(int), BadEvent, "int is not a dataclass, a pydantic v2 model or a Struct"),
        (lambda _: event("a b")(type("X", (Event,), {})), BadEvent, "X: 'a b' cannot name a type; use letters"),
        (lambda _: event("a.v2")(type("X", (Event,), {})), BadEvent, "write the version of 'a.v2' as version=N"),
    ],
)
def test_what_is_declared_wrongly_is_refused_at_once(
    declare: Callable[[Router], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        declare(Router())
