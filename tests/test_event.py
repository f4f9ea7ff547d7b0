"""Event classes, their names and versions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Union

import msgspec
import pydantic
import pytest

from millstream.errors import BadEvent
from millstream.event import Event, EventType, event, field_names, members, type_of


class Placed(Event, type="order.placed"):
    order_id: str
    total: int = 0


class PlacedAgain(Event, type="order.placed", version=2):
    order_id: str


class Base(Event):
    order_id: str


@event("payment.refused", version=3)
@dataclass(frozen=True)
class Refused:
    why: str


@event("parcel.sent")
class Sent(pydantic.BaseModel):
    parcel: int


@event("door.opened")
class Opened(msgspec.Struct):
    door: str


def test_an_event_is_frozen_keyword_only_and_compared_by_value() -> None:
    placed = Placed(order_id="o-1", total=2)
    assert placed == Placed(order_id="o-1", total=2) != Placed(order_id="o-1")
    with pytest.raises(AttributeError):
        placed.total = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Placed("o-1")  # type: ignore[call-arg]


def test_a_changed_copy_leaves_the_event_as_it_was() -> None:
    placed = Placed(order_id="o-1")
    assert placed.__replace__(total=5) == Placed(order_id="o-1", total=5)
    assert placed.total == 0


def test_every_field_name_is_free_for_the_user() -> None:
    class Odd(Event, type="odd"):
        id: str
        type: str
        key: str
        version: int
        data: str

    assert Odd(id="1", type="2", key="3", version=4, data="5").version == 4
    assert field_names(Odd) == ("id", "type", "key", "version", "data")


@pytest.mark.parametrize(
    ("cls", "expected", "wire"),
    [
        (Placed, EventType("order.placed", 1), "order.placed"),
        (PlacedAgain, EventType("order.placed", 2), "order.placed.v2"),
        (Refused, EventType("payment.refused", 3), "payment.refused.v3"),
        (Sent, EventType("parcel.sent", 1), "parcel.sent"),
        (Opened, EventType("door.opened", 1), "door.opened"),
    ],
)
def test_a_type_travels_under_its_name_and_version(cls: type, expected: EventType, wire: str) -> None:
    mark = type_of(cls)
    assert mark == expected
    assert mark.wire == wire


def test_a_class_without_a_name_is_a_base_class_and_inherits_none() -> None:
    class Special(Placed):
        extra: str = ""

    class Named(Base, type="named"):
        pass

    assert type_of(Base) is None
    assert type_of(Special) is None
    assert type_of(Named) == EventType("named", 1)
    assert field_names(Named) == ("order_id",)


@pytest.mark.parametrize("name", ["", "a b", "ä", "a\n", "x" * 200, "order.v2", "millstream.pack", 7])
def test_an_unusable_name_is_refused_with_the_class(name: Any) -> None:
    with pytest.raises(BadEvent, match="Broken"):

        class Broken(Event, type=name):
            pass


@pytest.mark.parametrize("version", [0, -1, "2", None])
def test_an_unusable_version_is_refused(version: Any) -> None:
    with pytest.raises(BadEvent, match="version"):

        class Broken(Event, type="broken", version=version):
            pass


def test_a_class_that_cannot_be_sent_is_no_event() -> None:
    with pytest.raises(BadEvent, match="put @event on top"):

        @event("plain")
        class Plain:
            pass


def test_a_mark_below_the_dataclass_decorator_is_told_to_go_on_top() -> None:
    with pytest.raises(BadEvent, match="put @event on top"):

        @dataclass
        @event("wrong.way.round")
        class Wrong:
            field: str


def test_the_fields_of_every_kind_are_known() -> None:
    assert [field_names(cls) for cls in (Refused, Sent, Opened, int)] == [("why",), ("parcel",), ("door",), None]
    assert dataclasses.is_dataclass(Refused)  # the class itself stays as it was


def test_unions_annotations_and_aliases_are_unwrapped_in_order_and_without_repeats() -> None:
    class Alias:  # what `type X = …` makes, on any version of Python
        __value__ = Annotated[Placed | Sent, "both"]

    assert members(Placed) == (Placed,)
    assert members(Placed | Sent | Placed) == (Placed, Sent)
    assert members(Union[Placed, Annotated[Union[Sent, Opened], "x"]]) == (Placed, Sent, Opened)  # noqa: UP007
    assert members(Alias) == (Placed, Sent)
