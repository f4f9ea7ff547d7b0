"""Events become JSON, and back; hostile JSON becomes a WireError."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.errors import WireError
from millstream.event import Event, event
from millstream.units import MAX_EVENT_BYTES
from millstream.wire.codec import decoder, encoder


class Placed(Event, type="order.placed"):
    order_id: str
    total: int = 0
    weight: float = 0.0
    at: datetime | None = None
    extra: Any = None


@event("refused")
@dataclass
class Refused:
    order_id: str
    total: int = 0
    weight: float = 0.0
    extra: Any = field(default_factory=dict)


@event("sent")
class Sent(pydantic.BaseModel):
    order_id: str = pydantic.Field(alias="orderId")
    total: int = 0
    weight: float = 0.0
    extra: Any = None


KINDS = [Placed, Refused, Sent]

HOSTILE = {
    "nothing": b"",
    "another value": b"null",
    "a list": b"[]",
    "no JSON": b"hello",
    "a pickle": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00K\x01.",
    "a YAML tag": b"!!python/object/apply:os.system ['true']",
    "bad UTF-8": b'{"order_id":"\xff","orderId":"\xff"}',
    "half a surrogate": b'{"order_id":"\\ud800","orderId":"\\ud800"}',
    "a raw NUL": b'{"order_id":"a\x00b","orderId":"a\x00b"}',
    "too deep": b'{"order_id":"x","orderId":"x","extra":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "an integer of 5,000 digits": b'{"order_id":"x","orderId":"x","total":' + b"9" * 5_000 + b"}",
    "a wrong type": b'{"order_id":"x","orderId":"x","total":"many"}',
    "a missing field": b'{"total":1}',
    "cut short": b'{"order_id":"x","orderId":"x"',
    "something behind": b'{"order_id":"x","orderId":"x"} {}',
    "over the limit": b'{"order_id":"' + b"x" * MAX_EVENT_BYTES + b'"}',
}


@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_an_event_of_every_kind_survives_being_encoded_and_decoded(order_id: str, total: int, weight: float) -> None:
    for original in (
        Placed(order_id=order_id, total=total, weight=weight, at=datetime(2026, 1, 1, tzinfo=UTC)),
        Refused(order_id, total, weight),
        Sent(orderId=order_id, total=total, weight=weight),
    ):
        data = encoder(type(original))(original)
        assert decoder(type(original))(data) == original


def test_a_models_alias_is_its_name_on_the_wire() -> None:
    assert b'"orderId":"o-1"' in encoder(Sent)(Sent(orderId="o-1"))


def test_fields_that_a_newer_version_added_are_passed_over_and_missing_ones_have_their_defaults() -> None:
    data = b'{"order_id":"x","orderId":"x","since":"next year"}'
    assert decoder(Placed)(data) == Placed(order_id="x")
    assert decoder(Refused)(data) == Refused("x")
    assert decoder(Sent)(data) == Sent(orderId="x")


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused_in_one_short_line(cls: type, hostile: bytes) -> None:
    with pytest.raises(WireError) as refused:
        decoder(cls)(hostile)
    text = str(refused.value)
    assert len(text) < 1_000
    assert "\n" not in text


@pytest.mark.parametrize("cls", KINDS)
def test_the_field_that_does_not_fit_is_named(cls: type) -> None:
    with pytest.raises(WireError, match=f"{cls.__name__}.*total"):
        decoder(cls)(b'{"order_id":"x","orderId":"x","total":"many"}')


@pytest.mark.parametrize("cls", KINDS)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_wire_errors(cls: type, data: bytes) -> None:
    with contextlib.suppress(WireError):
        decoder(cls)(data)


@pytest.mark.parametrize("cls", KINDS)
def test_of_a_repeated_name_the_last_counts(cls: type) -> None:
    assert decoder(cls)(b'{"order_id":"x","orderId":"x","total":1,"total":2}').total == 2


def test_whatever_a_validator_raises_the_bytes_are_refused() -> None:
    class Strict(msgspec.Struct):
        number: int

        def __post_init__(self) -> None:
            raise RuntimeError("two\nlines")

    with pytest.raises(WireError, match="Strict: two lines"):
        decoder(Strict)(b'{"number":1}')


def test_what_cannot_be_encoded_raises_at_once() -> None:
    with pytest.raises(TypeError):
        encoder(Placed)(Placed(order_id="x", extra=object()))


def test_the_codec_loads_no_pydantic() -> None:
    code = (
        "import sys, millstream.wire.codec as c; c.encoder(int), c.decoder(int); assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
