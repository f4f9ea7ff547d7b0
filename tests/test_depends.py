"""Dependencies: in which order they are made and cleaned up, what reaches them, and what is wrong with them."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Annotated, Any

import pytest

from millstream import App, BadHandler, BatchFailed, Delivery, Depends, Event, Retry, Router, Stream
from millstream.testing import TestApp


class Placed(Event, type="order.placed"):
    n: int = 0


orders = Stream("orders", Placed)


class Broken(Exception):
    pass


def app_of(**options: Any) -> App:
    return App("shop", retry=Retry(1), **options)


async def test_dependencies_are_made_in_order_and_cleaned_up_in_reverse() -> None:
    app, order = app_of(), list[str]()

    def connection() -> Iterator[str]:
        order.append("connect")
        yield "connection"
        order.append("disconnect")

    async def session(on: Annotated[str, Depends(connection)]) -> AsyncIterator[str]:
        order.append(f"begin on {on}")
        yield "session"
        order.append("commit")

    def name() -> str:
        order.append("name")
        return "name"

    async def lookup(session: Annotated[str, Depends(session)], delivery: Delivery) -> str:
        return f"{session} for {delivery.event.n}"

    @app.subscriber(orders, "billing")
    async def charge(
        event: Placed,
        found: Annotated[str, Depends(lookup)],
        name: Annotated[str, Depends(name)],
        on: Annotated[str, Depends(connection)],
    ) -> None:
        order.append(f"{found}, {name}, {on}")

    async with TestApp(app) as t:
        await t.publish(Placed(n=7))
    assert order == [
        "connect",
        "begin on connection",
        "name",
        "session for 7, name, connection",
        "commit",
        "disconnect",
    ]


async def test_what_the_handler_raises_is_thrown_into_its_dependencies() -> None:
    app, seen = app_of(), list[str]()

    async def session() -> AsyncIterator[str]:
        try:
            yield "session"
        except Broken as error:
            seen.append(f"rolled back for {error}")
            raise

    @app.subscriber(orders, "billing")
    async def charge(event: Placed, session: Annotated[str, Depends(session)]) -> None:
        raise Broken("no money")

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
        (letter,) = t.dead("billing")
    assert seen == ["rolled back for no money"] and "Broken: no money" in letter.error


async def test_a_dependency_that_swallows_the_error_cannot_make_it_a_success() -> None:
    app, seen = app_of(), list[str]()

    def outer() -> Iterator[str]:
        try:
            yield "outer"
        except Broken:
            seen.append("outer saw it too")
            raise

    async def inner(outer: Annotated[str, Depends(outer)]) -> AsyncIterator[str]:
        with suppress(Broken):
            yield "inner"

    @app.subscriber(orders, "billing")
    async def charge(event: Placed, inner: Annotated[str, Depends(inner)]) -> None:
        raise Broken

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
        assert [letter.reason for letter in t.dead("billing")] == ["failed"]
    assert seen == ["outer saw it too"]


async def test_an_error_while_cleaning_up_is_a_failure_and_the_others_are_cleaned_up_all_the_same() -> None:
    app, seen = app_of(), list[str]()

    def first() -> Iterator[str]:
        try:
            yield "first"
        finally:
            seen.append("first closed")

    async def second() -> AsyncIterator[str]:
        yield "second"
        raise Broken("commit failed")

    @app.subscriber(orders, "billing")
    async def charge(
        event: Placed, one: Annotated[str, Depends(first)], two: Annotated[str, Depends(second)]
    ) -> None: ...

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
        (letter,) = t.dead("billing")
    assert "commit failed" in letter.error and seen == ["first closed"]


async def test_a_dependency_that_cannot_be_made_fails_the_event_and_closes_those_before_it() -> None:
    app, seen = app_of(), list[str]()

    def first() -> Iterator[str]:
        try:
            yield "first"
        finally:
            seen.append("first closed")

    async def second(first: Annotated[str, Depends(first)]) -> str:
        raise Broken("unreachable")

    @app.subscriber(orders, "billing")
    async def charge(event: Placed, two: Annotated[str, Depends(second)]) -> None:
        seen.append("never")

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
        assert "unreachable" in t.dead("billing")[0].error
    assert seen == ["first closed"]


async def test_a_dependency_that_yields_twice_is_a_mistake_with_its_name() -> None:
    app = app_of()

    def twice() -> Iterator[int]:
        yield 1
        yield 2

    @app.subscriber(orders, "billing")
    async def charge(event: Placed, number: Annotated[int, Depends(twice)]) -> None: ...

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
        assert "twice yields more than once" in t.dead("billing")[0].error


async def test_classes_partials_and_callables_provide_too() -> None:
    app, seen = app_of(), list[object]()

    class Bank:
        def __init__(self, name: str = "bank") -> None:
            self.name = name

        def __call__(self) -> str:
            return f"called {self.name}"

    @app.subscriber(orders, "billing")
    async def charge(
        event: Placed, bank: Annotated[Bank, Depends(Bank)], called: Annotated[str, Depends(Bank("own"))]
    ) -> None:
        seen.extend((bank.name, called))

    async with TestApp(app) as t:
        await t.publish(Placed())
    assert seen == ["bank", "called own"]


async def test_replace_puts_another_provider_in_its_place_also_below_others() -> None:
    app, seen = app_of(), list[str]()

    def real() -> str:
        raise AssertionError("the real one was called")

    def fake() -> str:
        return "fake"

    def service(url: Annotated[str, Depends(real, scope="process")]) -> str:
        return f"service at {url}"

    @app.subscriber(orders, "billing")
    async def charge(event: Placed, service: Annotated[str, Depends(service)]) -> None:
        seen.append(service)

    async with TestApp(app, replace={real: fake}) as t:
        await t.publish(Placed())
    assert seen == ["service at fake"]


async def test_a_batch_has_dependencies_once_for_all_its_events() -> None:
    app, made = app_of(), list[str]()

    def session() -> Iterator[str]:
        made.append("made")
        try:
            yield "session"
        except BatchFailed:
            made.append("rolled back")
            raise

    @app.subscriber(orders, "billing")
    async def load(events: list[Placed], session: Annotated[str, Depends(session)]) -> None:
        raise BatchFailed({0: ValueError()})

    async with TestApp(app, raise_errors=False) as t:
        await t.publish(Placed())
    assert made == ["made", "rolled back"]


async def test_what_fails_at_the_start_of_a_process_ends_the_start_and_closes_what_was_open() -> None:
    app, order = app_of(), list[str]()

    async def pool() -> AsyncIterator[str]:
        order.append("pool")
        try:
            yield "pool"
        finally:
            order.append("pool closed")

    async def cache(pool: Annotated[str, Depends(pool, scope="process")]) -> str:
        raise Broken("no cache")

    @app.subscriber(orders, "billing")
    async def charge(event: Placed, cache: Annotated[str, Depends(cache, scope="process")]) -> None: ...

    with pytest.raises(Broken, match="no cache"):
        async with TestApp(app):
            pass
    assert order == ["pool", "pool closed"]


def short() -> str:
    return "short"


def own(delivery: Delivery) -> str:
    return "own"


def lives(inner: Annotated[str, Depends(short)]) -> str:
    return inner


def asks(number: int) -> str:
    return str(number)


def endless(inner: "Annotated[str, Depends(endless)]") -> str:
    return inner


@pytest.mark.parametrize(
    ("depends", "words"),
    [
        (Depends(lives, scope="process"), "lives lives as long as the process, so its parameter 'inner' must be"),
        (Depends(own, scope="process"), "own cannot ask for the Delivery, it lives as long as the process"),
        (Depends(asks), "parameter 'number' of dependency asks must be another dependency"),
        (Depends(endless), "dependency endless needs itself"),
    ],
    ids=["shorter-lived", "delivery", "unknown-parameter", "circle"],
)
def test_a_dependency_that_cannot_work_is_found_at_registration(depends: Depends, words: str) -> None:
    async def charge(event: Placed, made: Annotated[str, depends]) -> None: ...

    with pytest.raises(BadHandler, match=words) as caught:
        Router().subscriber(orders, "billing")(charge)
    assert f"{__file__}:{charge.__code__.co_firstlineno}: handler " in str(caught.value)


def test_a_batch_handlers_dependency_cannot_ask_for_the_delivery() -> None:
    async def load(events: list[Placed], made: Annotated[str, Depends(own)]) -> None: ...

    with pytest.raises(BadHandler, match="a batch has many deliveries"):
        Router().subscriber(orders, "billing")(load)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Depends(5), "give the provider itself"),  # type: ignore[arg-type]
        (lambda: Depends(short, scope="app"), "'delivery' or 'process'"),  # type: ignore[arg-type]
    ],
)
def test_depends_itself_is_checked(make: Callable[[], object], words: str) -> None:
    with pytest.raises(BadHandler, match=words):
        make()
