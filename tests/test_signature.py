"""What a handler's annotations ask for; and what is wrong with them: file, line, parameter, remedy."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NoReturn

import pytest

from millstream import BadHandler, Delivery, Depends, Event, Stream
from millstream.handlers.signature import read


class Base(Event):
    pass


class Placed(Base, type="order.placed"):
    pass


class Cancelled(Base, type="order.cancelled"):
    pass


class Elsewhere(Event, type="elsewhere"):
    pass


orders = Stream("orders", Placed | Cancelled)

ALL = {"order.placed", "order.cancelled"}


def open_bank() -> str:
    return "bank"


async def event_only(event: Placed) -> None: ...
async def union(event: Placed | Cancelled) -> None: ...
async def base(event: Base) -> None: ...
async def delivery(delivery: Delivery) -> None: ...
async def delivery_of(delivery: Delivery[Placed]) -> None: ...
async def both(event: Placed, delivery: Delivery) -> None: ...
async def batch(events: list[Placed | Cancelled]) -> None: ...
async def batch_of_deliveries(events: list[Base], deliveries: list[Delivery]) -> None: ...
async def dependency(event: Placed, bank: Annotated[str, Depends(open_bank)]) -> None: ...
async def default(event: Placed, limit: int = 5) -> None: ...
async def returns_nothing_ever(event: Placed) -> NoReturn: ...  # type: ignore[empty-body]
def plain(event: Placed) -> None: ...
async def unmarked(event: Placed): ...  # type: ignore[no-untyped-def]


class Shop:
    async def method(self, event: Placed) -> None: ...
    async def __call__(self, event: Base) -> None: ...


@pytest.mark.parametrize(
    ("handler", "types", "batch", "sync"),
    [
        (event_only, {"order.placed"}, False, False),
        (union, ALL, False, False),
        (base, ALL, False, False),
        (delivery, ALL, False, False),
        (delivery_of, {"order.placed"}, False, False),
        (both, {"order.placed"}, False, False),
        (batch, ALL, True, False),
        (batch_of_deliveries, ALL, True, False),
        (dependency, {"order.placed"}, False, False),
        (default, {"order.placed"}, False, False),
        (returns_nothing_ever, {"order.placed"}, False, False),
        (plain, {"order.placed"}, False, True),
        (unmarked, {"order.placed"}, False, False),
        (Shop().method, {"order.placed"}, False, False),
        (Shop(), ALL, False, False),
        (partial(default, limit=3), {"order.placed"}, False, False),
    ],
    ids=lambda value: getattr(value, "__qualname__", type(value).__name__),
)
def test_the_annotation_decides(handler: Callable[..., Any], types: set[str], batch: bool, sync: bool) -> None:
    found = read(handler, orders)
    assert (set(found.types), found.batch, found.sync) == (types, batch, sync)


async def takes_nothing() -> None: ...
async def takes_text(event: str) -> None: ...
async def unannotated(event) -> None: ...  # type: ignore[no-untyped-def]
async def two_events(event: Placed, other: Cancelled) -> None: ...
async def mixed(events: list[Placed], delivery: Delivery) -> None: ...
async def bare_list(events: list) -> None: ...  # type: ignore[type-arg]
async def returns_text(event: Placed) -> str: ...  # type: ignore[empty-body]
async def many(*events: Placed) -> None: ...
async def options(event: Placed, **rest: Any) -> None: ...
async def by_place(event: Placed, /) -> None: ...
async def generator(event: Placed):  # type: ignore[no-untyped-def]
    yield event


async def not_carried(event: Elsewhere) -> None: ...
async def depends_as_default(event: Placed, bank: str = Depends(open_bank)) -> None: ...  # type: ignore[assignment]
async def unresolved(event: "Missing") -> None: ...  # type: ignore[name-defined] # noqa: F821


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (takes_nothing, "it takes no event; write a parameter such as event: Placed"),
        (takes_text, "parameter 'event' asks for <class 'str'>, which is no event"),
        (unannotated, "parameter 'event' has no annotation"),
        (two_events, "more than one parameter for the event: event, other"),
        (mixed, r"a batch handler takes lists: list\[Placed\] and list\[Delivery\]"),
        (bare_list, r"parameter 'events' is a list of what\? write list\[OrderPlaced\]"),
        (returns_text, r"a handler returns nothing; publish with delivery.publish\(event, to=…\)"),
        (many, "parameter 'events' must be an ordinary one"),
        (options, "parameter 'rest' must be an ordinary one"),
        (by_place, "parameter 'event' must be an ordinary one"),
        (generator, "it is a generator, and a handler yields nothing; use delivery.publish"),
        (not_carried, "stream 'orders' does not carry Elsewhere; it carries Placed, Cancelled"),
        (depends_as_default, r"write bank: Annotated\[T, Depends\(…\)\], not as a default value"),
        (unresolved, "cannot resolve an annotation: name 'Missing' is not defined; import it at run time"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_an_unusable_handler_is_named_with_file_line_and_remedy(handler: Callable[..., Any], words: str) -> None:
    with pytest.raises(BadHandler, match=words) as caught:
        read(handler, orders)
    line = inspect.getsourcelines(handler)[1]
    assert re.match(rf"{re.escape(__file__)}:{line}: handler {handler.__name__}: ", str(caught.value))


def test_a_class_and_what_cannot_be_called_are_no_handlers() -> None:
    with pytest.raises(BadHandler, match="it is a class; give a function, a method, or an object that can be called"):
        read(Shop, orders)
    with pytest.raises(BadHandler, match="5 is not callable"):
        read(5, orders)  # type: ignore[arg-type]
