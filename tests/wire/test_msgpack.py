"""MessagePack beside JSON: events of every kind, there and back; hostile bytes become a WireError."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.errors import WireError
from millstream.event import Event, event
from millstream.units import MAX_EVENT_BYTES
from millstream.wire.codec import MSGPACK, decoder, encoder

AT = datetime(2026, 1, 1, 12, 30, tzinfo=UTC)
NUMBER = UUID("12345678123456781234567812345678")


class Placed(Event, type="order.placed"):
    order_id: str
    total: int = 0
    at: datetime | None = None
    extra: Any = None


@event("refused")
@dataclass
class Refused:
    order_id: str
    total: int = 0
    at: datetime | None = None
    extra: Any = None


@event("sent")
class Sent(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    order_id: str = pydantic.Field(alias="orderId")
    total: int = 0
    at: datetime | None = None
    day: date | None = None
    number: UUID | None = None
    extra: Any = None


KINDS = [Placed, Refused, Sent]
EVENTS = [
    Placed(order_id="o-1", total=2**63, at=AT, extra={"bytes": b"\x00\xff"}),
    Refused("o-1", -1, AT, [1.5, None]),
    Sent(orderId="o-1", total=-(2**63), at=AT, day=AT.date(), number=NUMBER, extra=[{"a": "b"}]),
]

HOSTILE = {
    "nothing": b"",
    "another value": b"\xc0",
    "a list": b"\x90",
    "JSON": b'{"order_id":"x","orderId":"x"}',
    "a pickle": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00K\x01.",
    "bad UTF-8": b"\x82\xa8order_id\xa1\xff\xa7orderId\xa1\xff",
    "too deep": b"\x83\xa8order_id\xa1x\xa7orderId\xa1x\xa5extra" + b"\x91" * 100_000 + b"\xc0",
    "a wrong type": b"\x83\xa8order_id\xa1x\xa7orderId\xa1x\xa5total\xa4many",
    "a missing field": b"\x81\xa5total\x01",
    "cut short": b"\x82\xa8order_id\xa1x\xa7orderId",
    "something behind": b"\x82\xa8order_id\xa1x\xa7orderId\xa1x\xc0",
    "four thousand million fields": b"\xdf\xff\xff\xff\xff",
    "over the limit": msgspec.msgpack.encode({"order_id": "x" * MAX_EVENT_BYTES}),
}


@pytest.mark.parametrize("original", EVENTS, ids=lambda original: type(original).__name__)
def test_an_event_of_every_kind_survives_being_encoded_and_decoded(original: Any) -> None:
    cls = type(original)
    assert decoder(cls, MSGPACK)(encoder(cls, MSGPACK)(original)) == original


def test_a_models_alias_is_its_name_on_the_wire_and_its_dates_are_text() -> None:
    found = msgspec.msgpack.decode(encoder(Sent, MSGPACK)(EVENTS[2]))
    assert found["orderId"] == "o-1"
    assert found["day"] == "2026-01-01"


def test_fields_that_a_newer_version_added_are_passed_over_and_missing_ones_have_their_defaults() -> None:
    data = msgspec.msgpack.encode({"order_id": "x", "orderId": "x", "since": "next year"})
    assert decoder(Placed, MSGPACK)(data) == Placed(order_id="x")
    assert decoder(Refused, MSGPACK)(data) == Refused("x")
    assert decoder(Sent, MSGPACK)(data) == Sent(orderId="x")


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused_in_one_short_line(cls: type, hostile: bytes) -> None:
    with pytest.raises(WireError) as refused:
        decoder(cls, MSGPACK)(hostile)
    text = str(refused.value)
    assert len(text) < 1_000
    assert "\n" not in text


@pytest.mark.parametrize("cls", KINDS)
def test_the_field_that_does_not_fit_is_named(cls: type) -> None:
    with pytest.raises(WireError, match=f"{cls.__name__}.*total"):
        decoder(cls, MSGPACK)(HOSTILE["a wrong type"])


@pytest.mark.parametrize("cls", KINDS)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_wire_errors(cls: type, data: bytes) -> None:
    with contextlib.suppress(WireError):
        decoder(cls, MSGPACK)(data)


def test_what_cannot_be_encoded_raises_at_once() -> None:
    with pytest.raises(TypeError):
        encoder(Placed, MSGPACK)(Placed(order_id="x", extra=object()))
