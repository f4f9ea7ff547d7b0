"""Streams and positions."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.errors import BadEvent, BadSetting, BadStream
from millstream.event import Event, event
from millstream.stream import Dedupe, Pack, Position, Retention, Stream
from millstream.units import MAX_PARTITIONS


class Placed(Event, type="order.placed"):
    order_id: str
    number: int = 0


class Cancelled(Event, type="order.cancelled"):
    order_id: str


class Nameless(Event):
    order_id: str


@event("order.placed")
@dataclass
class Impostor:
    order_id: str


def test_a_stream_knows_its_types_by_their_names_on_the_wire() -> None:
    orders = Stream("orders", Placed | Cancelled)
    assert orders.types == {"order.placed": Placed, "order.cancelled": Cancelled}
    assert repr(orders) == "Stream('orders', Placed | Cancelled)"


def test_a_stream_with_a_key_has_eight_partitions_and_one_without_has_one() -> None:
    assert Stream("orders", Placed).partitions == 1
    assert Stream("orders", Placed, key="order_id").partitions == 8
    assert Stream("orders", Placed, key="order_id", partitions=3).partitions == 3


def test_a_key_is_recorded_by_its_name() -> None:
    assert Stream("orders", Placed).key_name == ""
    assert Stream("orders", Placed, key="order_id").key_name == "order_id"
    assert Stream("orders", Placed, key=lambda placed: placed.order_id).key_name == "()"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("o-1", "o-1"), ("", ""), (7, "7"), (UUID(int=1), "00000000-0000-0000-0000-000000000001")],
)
def test_text_integers_and_uuids_are_keys(value: str | int | UUID, expected: str) -> None:
    assert Stream("orders", Placed, key=lambda _: value).key_of(Placed(order_id="x")) == expected


@pytest.mark.parametrize("value", [None, 1.5, True, b"x", ["x"]])
def test_nothing_else_is_a_key(value: Any) -> None:
    with pytest.raises(BadEvent, match=r"the key of Placed is .*; it must be"):
        Stream("orders", Placed, key=lambda _: value).key_of(Placed(order_id="x"))


def test_without_a_key_there_is_none() -> None:
    assert Stream("orders", Placed).key_of(Placed(order_id="x")) is None


def test_a_key_must_be_a_field_of_every_type() -> None:
    with pytest.raises(BadStream, match="'number' is not a field of Cancelled"):
        Stream("orders", Placed | Cancelled, key="number")


def test_two_classes_of_one_name_do_not_share_a_stream() -> None:
    with pytest.raises(BadStream, match=r"Placed and Impostor are both named 'order\.placed'"):
        Stream("orders", Placed | Impostor)


@pytest.mark.parametrize("events", [Nameless, Placed | Nameless, int, "Placed", None, list[Placed]])
def test_what_has_no_name_is_not_carried(events: Any) -> None:
    with pytest.raises(BadStream, match="stream 'orders'"):
        Stream("orders", events)


@pytest.mark.parametrize("partitions", [0, -1, MAX_PARTITIONS + 1, 1.5, "8"])
def test_an_unusable_number_of_partitions_is_refused(partitions: Any) -> None:
    with pytest.raises(BadStream, match="partitions"):
        Stream("orders", Placed, partitions=partitions)


def test_other_unusable_declarations_are_refused() -> None:
    with pytest.raises(BadStream, match="others"):
        Stream("orders", Placed, others="keep")  # type: ignore[arg-type]
    with pytest.raises(BadSetting, match="stream"):
        Stream("or/ders", Placed)


def test_dedupe_is_a_window_or_a_window_and_a_number_of_ids() -> None:
    assert Stream("orders", Placed).dedupe is None
    assert Stream("orders", Placed, dedupe="10m").dedupe == Dedupe("10m", ids=1_000_000)
    assert Stream("orders", Placed, dedupe=Dedupe(timedelta(hours=1), ids=5)).dedupe == Dedupe(timedelta(hours=1), 5)


@pytest.mark.parametrize(
    ("window", "ids", "words"),
    [
        (
            "25h",
            1,
            "up to 24h. What must be told apart for longer belongs into your database: see millstream.sql.Inbox",
        ),
        (0, 1, "from 1ms up to 24h"),
        (0.0001, 1, "from 1ms up to 24h"),
        ("soon", 1, "'soon' is not a duration"),
        ("1m", 0, "from 1 to 10,000,000 per partition"),
        ("1m", 10_000_001, "from 1 to 10,000,000 per partition"),
        ("1m", True, "from 1 to 10,000,000 per partition"),
        ("1m", 1.5, "from 1 to 10,000,000 per partition"),
    ],
)
def test_an_unusable_window_or_number_of_ids_is_refused(window: Any, ids: Any, words: str) -> None:
    with pytest.raises(BadSetting, match=words):
        Dedupe(window, ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"Retention\(\) keeps everything: say age=, events= or bytes="),
        ({"age": "500ms"}, "at least 1s"),
        ({"age": "a week"}, "is not a duration"),
        ({"events": True}, "a whole number, at least 1"),
        ({"events": 0}, "a whole number, at least 1"),
        ({"events": 1e6}, "a whole number, at least 1"),
        ({"bytes": 0}, "at least 1 byte"),
        ({"bytes": "2 gigs"}, "is not a size"),
        ({"age": "1d", "unread": "trim"}, "'keep' or 'drop'"),
        ({"age": "1d", "forget": "10s"}, "at least 1m, or 'never'"),
        ({"age": "1d", "ceiling": True}, "a number of events, or a size such as '2GB'"),
        ({"age": "1d", "ceiling": 0}, "a number of events, or a size such as '2GB'"),
        ({"age": "1d", "ceiling": "2 gigs"}, "is not a size"),
        ({"events": 10, "ceiling": 20, "unread": "drop"}, "is for unread='keep'"),
        ({"events": 10, "ceiling": 5}, "is not above events=10"),
        ({"events": 10, "ceiling": 10}, "is not above events=10"),
        ({"bytes": "1GB", "ceiling": "1MB"}, "is not above bytes='1GB'"),
        ({"bytes": "1GB", "ceiling": "1GB"}, "is not above bytes='1GB'"),
        ({"ceiling": 5}, "is full for ever at its ceiling=5: say age=, events= or bytes="),
    ],
)
def test_an_unusable_retention_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSetting, match=words):
        Retention(**options)


def test_retention_in_the_units_of_a_policy() -> None:
    assert (Retention(age="1d").forget_ms, Retention(age="1d", forget="never").forget_ms) == (7 * 86_400_000, 0)
    assert (Retention(age="1d", ceiling=5).ceiling_events, Retention(age="1d", ceiling=5).ceiling_bytes) == (5, 0)
    assert (Retention(age="1d", ceiling="1KB").ceiling_events, Retention(age="1d", ceiling="1KB").ceiling_bytes) == (
        0,
        1_024,
    )


def test_retention_and_confirm_are_checked_when_the_stream_is_declared() -> None:
    with pytest.raises(BadStream, match=r"retention='7d'; write Retention\(age='7d'\)"):
        Stream("orders", Placed, retention="7d")  # type: ignore[arg-type]
    with pytest.raises(BadStream, match="confirm='disk' must be 'memory', 'fsync' or 'replicated'"):
        Stream("orders", Placed, confirm="disk")  # type: ignore[arg-type]


def test_a_stream_is_written_as_json_and_one_by_one_unless_it_says_otherwise() -> None:
    assert (Stream("orders", Placed).codec, Stream("orders", Placed).pack) == ("json", None)
    packed = Stream("orders", Placed, codec="msgpack", pack=Pack(events=100))
    assert (packed.codec, packed.pack) == ("msgpack", Pack(events=100, linger="5ms", codec="zstd"))
    with pytest.raises(BadStream, match="codec='avro' must be 'json' or 'msgpack'"):
        Stream("orders", Placed, codec="avro")  # type: ignore[arg-type]
    with pytest.raises(BadStream, match=r"pack=512; write Pack\(events=500\)"):
        Stream("orders", Placed, pack=512)  # type: ignore[arg-type]


def test_a_pack_is_refused_where_repeats_are_told_apart_by_entry() -> None:
    with pytest.raises(BadStream, match="Leave one of them out"):
        Stream("orders", Placed, dedupe="10m", pack=Pack())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"events": 1}, "from 2 to 4,096"),
        ({"events": 4_097}, "from 2 to 4,096"),
        ({"events": True}, "from 2 to 4,096"),
        ({"events": 2.5}, "from 2 to 4,096"),
        ({"linger": "2s"}, "up to 1s, since `publish` waits for it"),
        ({"linger": "soon"}, "is not a duration"),
        ({"codec": "gzip"}, "'zstd', 'lz4' or 'none'"),
    ],
)
def test_an_unusable_pack_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSetting, match=words):
        Pack(**options)


@given(st.integers(min_value=0, max_value=MAX_PARTITIONS), st.text(min_size=1))
def test_a_position_survives_being_written_and_read(partition: int, offset: str) -> None:
    position = Position(partition, offset)
    assert Position.parse(str(position)) == position


@given(st.text())
def test_reading_a_position_raises_only_value_errors(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert Position.parse(text).offset


@pytest.mark.parametrize("text", ["", "3", "3@", "@1", "-1@1", "x@1", "1.5@1", " 1@1", "1 @1"])
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a position"):
        Position.parse(text)
