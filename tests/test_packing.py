"""Packing: which events share a pack, and what becomes of each of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream import Event, Pack, Stream
from millstream.brokers.base import Position, Record
from millstream.errors import BrokerFull
from millstream.publisher.packing import MAX_CONTENT_BYTES, Bundle, Packer
from millstream.units import MAX_EVENT_BYTES
from millstream.wire import packs
from millstream.wire.partition import partition_of


class Placed(Event, type="order.placed"):
    n: int = 0


def packer(partitions: int = 1, **pack: Any) -> Packer:
    stream = Stream("orders", Placed, partitions=partitions, pack=Pack(**pack))
    ids = count()
    return Packer(stream, Pack(**pack), source="shop", new_id=lambda: f"p{next(ids)}")


def events(*keys: str | None, due: Iterable[int] = (), size: int = 10) -> list[Record]:
    return [
        Record(0, f"e{n}", "order.placed", b"x" * size, key, 0, b"", 1 if n in due else None, "shop")
        for n, key in enumerate(keys)
    ]


def members(bundle: Bundle) -> list[list[int]]:
    return [list(numbers) for numbers in bundle.members]


def test_events_of_a_key_share_a_pack_in_their_order_and_few_of_a_key_travel_alone() -> None:
    records = events(*"abababac")
    bundle = packer(partitions=8).bundle(records)
    assert members(bundle) == [[1], [3], [5], [7], [0, 2, 4, 6]]
    *alone, pack = bundle.records
    assert packs.is_pack(pack) and pack.key == "a" and pack.partition == partition_of("a", 8)
    assert [(event.id, event.key) for event in packs.read(pack, "")] == [(f"e{n}", "a") for n in (0, 2, 4, 6)]
    assert alone == [records[n] for n in (1, 3, 5, 7)]


def test_a_pack_takes_so_many_events_and_no_more() -> None:
    assert members(packer(events=4).bundle(events(*[None] * 9))) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert members(packer(events=2).bundle(events(*[None] * 3))) == [[0, 1], [2]]


def test_what_is_due_later_travels_alone_and_what_follows_it_does_not_overtake_it() -> None:
    bundle = packer().bundle(events(*"aaaaaaaaa", due=(4,)))
    assert members(bundle) == [[0, 1, 2, 3], [4], [5, 6, 7, 8]]
    assert bundle.records[1].due_ms == 1


def test_a_pack_stays_within_what_an_entry_holds_whatever_its_compression() -> None:
    bundle = packer(codec="none").bundle(events(*[None] * 30, size=100_000))
    assert {len(numbers) for numbers in members(bundle)} == {10}
    assert all(MAX_EVENT_BYTES - 100_000 < len(record.data) <= MAX_EVENT_BYTES for record in bundle.records)


def test_an_event_too_large_to_share_travels_alone() -> None:
    records = events(*[None] * 9)
    records[4] = Record(0, "large", "order.placed", bytes(MAX_CONTENT_BYTES))
    assert members(packer().bundle(records)) == [[0, 1, 2, 3], [4], [5, 6, 7, 8]]


def test_events_of_which_there_is_nothing_else_to_say_need_no_ids() -> None:
    datas = [b'{"n":%d}' % n for n in range(9)]
    pack = packer(partitions=8, events=4).plain("order.placed", datas)
    assert pack is not None
    bundle = pack()
    assert members(bundle) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [record.partition for record in bundle.records] == [partition_of(f"p{n}", 8) for n in range(3)]
    found = bundle.events()
    assert [event.data for event in found] == datas
    assert [event.id for event in found] == [f"p{n // 4}.{n % 4}" for n in range(8)] + ["p2"]
    assert {(event.type, event.source, event.key) for event in found} == {("order.placed", "shop", None)}


@pytest.mark.parametrize(("size", "number"), [(300_000, 4), (10_000, 500)])
def test_what_is_too_large_to_be_cut_by_number_is_left_to_be_looked_at_one_by_one(size: int, number: int) -> None:
    assert packer(events=4).plain("order.placed", [bytes(size)] * number) is None


def test_each_event_learns_its_own_position_or_the_error_of_its_record() -> None:
    bundle = packer().bundle(events(*"aabaab"))
    assert members(bundle) == [[2], [5], [0, 1, 3, 4]]
    full = BrokerFull("no room")
    found = bundle.spread([full, Position(1, "18-0"), Position(3, "17-0")])
    assert list(map(str, found)) == ["3@17-0.0", "3@17-0.1", "no room", "3@17-0.2", "3@17-0.3", "1@18-0"]
    assert bundle.spread([Position(1, "1"), Position(1, "2"), full])[:2] == [full, full]


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.booleans(), st.integers(0, 400_000)), max_size=30))
def test_every_event_is_stored_once_and_those_of_a_key_in_their_order(
    drawn: list[tuple[str | None, bool, int]],
) -> None:
    records = [
        Record(0, f"e{n}", "order.placed", bytes(size), key, n, b"", 1 if due else None, "shop")
        for n, (key, due, size) in enumerate(drawn)
    ]
    bundle = packer(events=5).bundle(records)
    assert bundle.events() == records
    stored = [number for numbers in bundle.members for number in numbers]
    for key in (None, "a", "b"):
        assert [n for n in stored if drawn[n][0] == key] == [n for n, event in enumerate(drawn) if event[0] == key]
    assert all(len(record.data) <= MAX_EVENT_BYTES for record in bundle.records)
