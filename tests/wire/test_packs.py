"""Packs: many events in one entry, against round trips and against hostile hands."""

from __future__ import annotations

import contextlib
import re
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import json, msgpack
from msgspec.structs import replace

from millstream.errors import TooLarge, WireError
from millstream.units import (
    MAX_EVENT_BYTES,
    MAX_HEADERS_BYTES,
    MAX_ID_CHARS,
    MAX_PACK_BYTES,
    MAX_PACK_EVENTS,
    MAX_TIME_MS,
    MAX_TYPE_CHARS,
)
from millstream.wire import compression, entry
from millstream.wire.compression import NAMES, Compression, Dictionary, UnknownDictionary, learn, train
from millstream.wire.entry import Record
from millstream.wire.packs import (
    MAX_ONE_BYTES,
    MAX_PREFIX_CHARS,
    TYPE,
    Columns,
    Packed,
    body_of,
    events_in,
    is_one,
    is_pack,
    lacking,
    one,
    part_of,
    part_offset,
    read,
    write,
)

COMPRESSIONS = st.sampled_from(NAMES)
PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
RECORDS = st.lists(
    st.builds(
        Record,
        partition=st.just(3),
        id=st.just("") | PRINTABLE,
        type=st.sampled_from(["order.placed", "order.paid"]),
        data=st.binary(max_size=60),
        key=st.just("Žofie"),
        time_ms=st.sampled_from([0, 1, MAX_TIME_MS]),
        headers=st.sampled_from([b"", b'{"a":"b"}']),
        source=st.just("shop"),
    ),
    min_size=1,
    max_size=40,
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=9)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
SHOP = Columns([b"{}"] * 50, "order.placed")
PACK = Record(3, "b7k2m9", TYPE, b"", "o-1", 1_693, b"", None, "shop")


def parse(pack: Record, **options: Any) -> Packed:
    return read(replace(pack, time_ms=1_693), "1693-0", **options)


def made(columns: Columns, how: Compression = "none", **options: Any) -> Record:
    return write(columns, how, partition=3, id_="b7k2m9", key="Žofie", source="shop", **options)


def body(*columns: Any, n: int | str | None = None, form: str = "1/none", id_: str = "b7k2m9") -> Record:
    """A pack that was put together by hand."""
    return raw(msgpack.encode(columns), len(columns[0]) if n is None else n, form, id_)


def raw(data: bytes, n: int | str = 1, form: str = "1/none", id_: str = "b7k2m9") -> Record:
    headers = json.encode({"pack": form, "n": str(n)})
    return replace(PACK, id=id_, data=data, headers=headers)


@given(RECORDS, COMPRESSIONS)
def test_records_survive_being_packed(records: list[Record], how: Compression) -> None:
    record = made(Columns.of(records), how)
    assert is_pack(record)
    pack = parse(record)
    expected = [
        replace(record, id=record.id or f"b7k2m9.{k}", time_ms=record.time_ms or 1_693)
        for k, record in enumerate(records)
    ]
    assert list(pack) == expected
    assert [pack.record(k) for k in range(len(pack))] == expected
    assert [pack.data(k) for k in range(len(pack))] == [record.data for record in records]


@given(RECORDS, COMPRESSIONS)
def test_a_pack_lies_in_an_entry_as_any_event_does(records: list[Record], how: Compression) -> None:
    pack = made(Columns.of(records), how)
    found = entry.read(entry.write(pack), partition=3, offset="1693-0", stored_ms=1_693)
    assert found == replace(pack, time_ms=1_693)


def test_every_event_of_a_pack_has_an_offset_and_an_id_of_its_own() -> None:
    pack = parse(made(SHOP, "zstd"))
    assert pack.offset_of(0) == "1693-0.0"
    assert pack.offset_of(49) == "1693-0.49"
    assert len({record.id for record in pack}) == len(pack) == 50


def test_an_offset_tells_its_entry_and_its_part() -> None:
    assert part_of("1693-0.17") == ("1693-0", 17)
    assert part_of("1693-0") == ("1693-0", None)
    assert part_of(part_offset("5", 0)) == ("5", 0)
    for wrong in ("1693-0.", "1693-0.x", "1693-0.1.2", "1693-0.-1", "1693-0.١"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            part_of(wrong)


def test_the_shortest_body_is_data_and_a_type() -> None:
    pack = parse(body([b"{}", b"[]"], "order.placed"))
    assert list(pack) == [
        Record(3, "b7k2m9.0", "order.placed", b"{}", "o-1", 1_693, b"", None, "shop"),
        Record(3, "b7k2m9.1", "order.placed", b"[]", "o-1", 1_693, b"", None, "shop"),
    ]


def test_columns_and_headers_that_a_newer_version_added_are_passed_over() -> None:
    pack = body([b"{}"], "order.placed", None, 0, b"", ["later"])
    more = replace(pack, headers=b'{"traceparent":"00-1","pack":"1/none","more":{},"n":"1"}')
    assert list(parse(more)) == list(parse(pack))


def test_what_is_the_same_for_all_events_is_written_once() -> None:
    records = [Record(0, "", "order.placed", b"%d" % k, "o-1", 7, b"{}", None, "shop") for k in range(3)]
    assert Columns.of(records) == Columns([b"0", b"1", b"2"], "order.placed", None, 7, b"{}")


def test_ids_of_their_own_may_be_equal() -> None:
    records = [Record(0, "same", "order.placed", b"") for _ in range(2)]
    assert [record.id for record in parse(made(Columns.of(records)))] == ["same", "same"]


def test_what_is_to_stay_in_the_order_of_two_keys_is_not_one_pack() -> None:
    with pytest.raises(AssertionError):
        Columns.of([Record(0, "", "order.placed", b"", key) for key in ("o-1", "o-2")])


def test_an_event_for_later_is_not_packed() -> None:
    with pytest.raises(AssertionError):
        Columns.of([Record(0, "", "order.placed", b"", due_ms=1)])


def test_a_pack_that_compression_does_not_make_smaller_is_not_compressed() -> None:
    assert made(Columns([b"\x00\xff"], "t"), "zstd").headers == b'{"pack":"1/none","n":"1"}'


def test_a_dictionary_helps_packs_of_few_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_known", {})
    events = [b'{"order_id":"o-%d","status":"placed","total":%d}' % (k, k * 7_919 % 9_999) for k in range(2_000)]
    words = Dictionary(train(events, 1_024))
    few = Columns(events[:4], "order.placed")
    pack = made(few, "zstd", dictionary=words)
    assert len(pack.data) < len(made(few, "zstd").data) * 0.8
    with pytest.raises(WireError, match=f"dictionary {words.id}"):
        parse(pack)
    found = lacking(pack)
    assert isinstance(found, UnknownDictionary) and found.number == words.id
    learn(words.content)
    assert parse(pack).columns == few and lacking(pack) is None


EVENT = Record(
    3, "e-7", "order.placed", b'{"order_id":"o-7","status":"placed","total":77}', "o-7", 0, b"", None, "shop"
)
SHORT = Dictionary(
    train(
        [
            body_of(replace(EVENT, data=b'{"order_id":"o-%d","status":"placed","total":%d}' % (k, k * 7_919 % 9_999)))
            for k in range(2_000)
        ],
        1_024,
    )
)


@given(
    st.sampled_from([b"", b'{"causation":"e-6"}']),
    st.sampled_from([0, 1, MAX_TIME_MS]),
    st.none() | st.just("Žofie"),
    st.sampled_from([EVENT.id, "i" * MAX_PREFIX_CHARS]),
)
def test_a_pack_of_one_is_its_event_with_the_same_id_and_position(
    headers: bytes, time_ms: int, key: str | None, id_: str
) -> None:
    learn(SHORT.content)
    event = replace(EVENT, headers=headers, time_ms=time_ms, key=key, id=id_)
    pack = one(event, SHORT)
    assert is_pack(pack) and is_one(pack) and events_in(pack) == 1
    assert (pack.id, pack.key, pack.time_ms, pack.partition, pack.source) == (id_, key, time_ms, 3, "shop")
    assert len(pack.data) < len(event.data) + len(headers)
    found = read(pack, "1693-0")
    assert list(found) == [event] == [found.record(0)]
    assert (len(found), found.offset_of(0)) == (1, "1693-0")


@pytest.mark.parametrize(
    "event",
    [
        replace(EVENT, due_ms=1_693),
        replace(EVENT, data=b"x" * (MAX_ONE_BYTES + 1)),
        replace(EVENT, id="i" * (MAX_PREFIX_CHARS + 1)),
        replace(EVENT, data=b"\x00\xff\x01"),
    ],
    ids=["for later", "large", "a long id", "no gain"],
)
def test_an_event_is_no_pack_of_one_where_that_cannot_be_or_gains_nothing(event: Record) -> None:
    assert one(event, SHORT) is event
    assert not is_one(event)


def test_a_pack_of_one_at_the_limits_of_an_event_is_read_and_beyond_them_refused() -> None:
    def of(data: bytes, type_: Any, headers: Any, time_ms: Any = 0) -> Record:
        content = msgpack.encode([[data], type_, None, time_ms, headers])
        return replace(PACK, data=compression.compress(content, "zstd"))

    at = of(b"x" * MAX_EVENT_BYTES, "é" * (MAX_TYPE_CHARS // 2), b"h" * MAX_HEADERS_BYTES)
    assert len(parse(at)) == 1
    for beyond in (
        of(b"x" * (MAX_EVENT_BYTES + 1), "t", b""),
        of(b"", "é" * (MAX_TYPE_CHARS // 2 + 1), b""),
        of(b"", "", b""),
        of(b"", "t", b"h" * (MAX_HEADERS_BYTES + 1)),
        of(b"", "t", []),
        of(b"", "t", b"", []),
        of(b"", ["t"], b""),
    ):
        with pytest.raises(WireError):
            parse(beyond)


@pytest.mark.parametrize(
    "headers", [b"", b"{}", b"[]", b'{"pack":"1/none"}', b'{"pack":1,"n":1}', b'{"pack":', b"\xff"]
)
def test_a_pack_that_does_not_say_how_it_is_read_is_refused(headers: bytes) -> None:
    assert not is_pack(replace(PACK, type="parcel.packed"))
    with pytest.raises(WireError):
        parse(replace(body([b""], "t"), headers=headers))


AT_LIMIT = {
    "data": body([b"x" * MAX_EVENT_BYTES], "t"),
    "type": body([b""], "t" * MAX_TYPE_CHARS),
    "types of other letters": body([b"", b""], ["t", "é" * (MAX_TYPE_CHARS // 2)]),
    "prefix": body([b""], "t", id_="i" * MAX_PREFIX_CHARS),
    "id": body([b""], "t", ["i" * MAX_ID_CHARS]),
    "time": body([b""], "t", None, MAX_TIME_MS),
    "headers": body([b""], "t", None, 0, b"h" * MAX_HEADERS_BYTES),
    "events": body([b""] * MAX_PACK_EVENTS, "t"),
}

OVER_LIMIT = {
    "data": body([b"x" * (MAX_EVENT_BYTES + 1)], "t"),
    "type": body([b""], "t" * (MAX_TYPE_CHARS + 1)),
    "one type": body([b"", b""], ["t", "t" * (MAX_TYPE_CHARS + 1)]),
    "types of other letters": body([b"", b""], ["t", "é" * (MAX_TYPE_CHARS // 2 + 1)]),
    "prefix": body([b""], "t", id_="i" * (MAX_PREFIX_CHARS + 1)),
    "id": body([b""], "t", ["i" * (MAX_ID_CHARS + 1)]),
    "time": body([b""], "t", None, MAX_TIME_MS + 1),
    "headers": body([b""], "t", None, 0, b"h" * (MAX_HEADERS_BYTES + 1)),
    "events": body([b""] * (MAX_PACK_EVENTS + 1), "t"),
    "many bytes": body([b"x" * MAX_EVENT_BYTES] * 4, "t"),
}


@pytest.mark.parametrize("pack", AT_LIMIT.values(), ids=AT_LIMIT)
def test_a_pack_at_a_limit_is_read(pack: Record) -> None:
    assert len(list(parse(pack))) in (1, 2, MAX_PACK_EVENTS)


@pytest.mark.parametrize("pack", OVER_LIMIT.values(), ids=OVER_LIMIT)
def test_a_pack_over_a_limit_is_refused(pack: Record) -> None:
    with pytest.raises(WireError):
        parse(pack)


HOSTILE = {
    "n is no number": body([b""], "t", n="-1"),
    "n has 5,000 digits": body([b""], "t", n="9" * 5_000),
    "n in other digits": body([b""], "t", n="١"),
    "no version": body([b""], "t", form="none"),
    "no compression": body([b""], "t", form="1"),
    "a compression that is not printable": body([b""], "t", form="1/\n\x00"),
    "a type that is no text": raw(b"\x92\x91\xc4\x00\xa1\xff"),
    "a type that is empty": body([b"", b""], ["t", ""]),
    "nothing": raw(b""),
    "no array": raw(b"\x80"),
    "no columns": raw(b"\x90"),
    "something behind": raw(msgpack.encode([[b""], "t"]) + b"\x90"),
    "four thousand million elements": raw(b"\x92\xdd\xff\xff\xff\xff\xc4\x00"),
    "four thousand million bytes": raw(b"\x92\x91\xc6\xff\xff\xff\xff"),
    "too deep": raw(b"\x98\x91\xc4\x00\xa1t\xc0\x00\xc4\x00" + b"\x91" * 100_000),
    "headers too deep": replace(body([b""], "t"), headers=b'{"a":' + b"[" * 10_000),
    "a time as text": body([b""], "t", None, "7"),
    "true as time": body([b""], "t", None, True),
    "headers as text": body([b""], "t", None, 0, "{}"),
    "one id for all": body([b"", b""], "t", "b7k2m9"),
}


@pytest.mark.parametrize("pack", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_pack_is_refused_in_words(pack: Record) -> None:
    with pytest.raises(WireError) as refused:
        parse(pack)
    assert len(str(refused.value)) < 500
    assert str(refused.value).isprintable()


@given(st.integers(0, MAX_PACK_EVENTS + 1), st.binary(max_size=200), st.sampled_from(["1/none", "1/zstd", "1/lz4"]))
def test_arbitrary_bytes_raise_only_wire_errors(n: int, data: bytes, form: str) -> None:
    with contextlib.suppress(WireError):
        list(parse(raw(data, n, form)))


@given(st.binary(max_size=200))
def test_arbitrary_headers_raise_only_wire_errors(headers: bytes) -> None:
    with contextlib.suppress(WireError):
        parse(replace(PACK, headers=headers))


@given(st.lists(st.lists(VALUES, max_size=3) | VALUES, max_size=9), st.integers(0, 4))
def test_arbitrary_columns_raise_only_wire_errors(columns: list[Any], n: int) -> None:
    with contextlib.suppress(WireError):
        list(parse(raw(msgpack.encode(columns), n)))


@given(COMPRESSIONS, st.data())
def test_a_broken_pack_raises_only_wire_errors(how: Compression, data: st.DataObject) -> None:
    pack = made(SHOP, how)
    whole = bytearray(pack.data)
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        whole[at] ^= data.draw(st.integers(1, 255))
    else:
        del whole[at:]
    with contextlib.suppress(WireError):
        list(parse(replace(pack, data=bytes(whole))))


def test_elements_are_counted_before_they_are_read() -> None:
    hostile = body([b""] * 1_000_000, "t", n=1)
    tracemalloc.start()
    with pytest.raises(WireError):
        parse(hostile)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000


def test_what_no_reader_would_take_is_not_written() -> None:
    with pytest.raises(TooLarge, match="put fewer events"):
        made(Columns([b"x" * MAX_EVENT_BYTES] * 4, "t"), "zstd")
    with pytest.raises(TooLarge, match=f"{MAX_PACK_EVENTS:,}"):
        made(Columns([b""] * (MAX_PACK_EVENTS + 1), "t"), "zstd")
    with pytest.raises(TooLarge, match=f"{MAX_EVENT_BYTES:,}"):
        made(Columns([b"x" * (MAX_EVENT_BYTES // 2)] * 2, "t"))
    assert len(made(Columns([b"x" * (MAX_PACK_BYTES // 8)] * 7, "t"), "zstd").data) < 10_000
