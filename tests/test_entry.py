"""Entries: what Redis holds, against round trips and against hostile hands."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.errors import WireError
from millstream.units import MAX_EVENT_BYTES, MAX_HEADERS_BYTES, MAX_ID_CHARS, MAX_KEY_BYTES, MAX_TYPE_CHARS
from millstream.wire import entry as wire
from millstream.wire.entry import FIELDS, Record, preview, read, read_or_fault, read_page, write

printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64)
records = st.builds(
    Record,
    partition=st.integers(0, 1_023),
    id=printable,
    type=printable,
    data=st.binary(max_size=500),
    key=st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    time_ms=st.integers(1, 253_402_300_799_999),
    headers=st.binary(max_size=200),
    source=st.text(st.characters(exclude_categories=["Cs"]), max_size=64),
)


def parse(fields: Sequence[bytes], stored_ms: int = 1_693) -> Record:
    return read(fields, partition=3, offset="1693-0", stored_ms=stored_ms)


def entry(**changes: bytes) -> list[bytes]:
    fields = dict.fromkeys(FIELDS, b"") | {b"type": b"order.placed", b"data": b"{}"}
    fields |= {name.encode(): value for name, value in changes.items()}
    return [part for pair in fields.items() for part in pair]


@given(records)
def test_a_record_survives_being_written_and_read(record: Record) -> None:
    fields = write(record)
    assert fields[0::2] == FIELDS
    for form in (fields, list(fields)):
        assert read(form, partition=record.partition, offset="1-0", stored_ms=1) == record


@given(records, st.randoms(use_true_random=False))
def test_the_order_of_the_fields_does_not_matter(record: Record, dice: object) -> None:
    pairs = list(zip(write(record)[0::2], write(record)[1::2], strict=True))
    dice.shuffle(pairs)  # type: ignore[attr-defined]
    fields = [part for pair in [*pairs, (b"unknown", b"passed over")] for part in pair]
    assert read(fields, partition=record.partition, offset="1-0", stored_ms=1) == record


def test_the_shortest_entry_is_a_type_and_data() -> None:
    record = parse([b"type", b"order.placed", b"data", b"{}"])
    assert record == Record(3, "3@1693-0", "order.placed", b"{}", None, 1_693)


def test_of_a_repeated_field_the_first_counts() -> None:
    assert parse([b"type", b"a", b"data", b"1", b"type", b"b", b"data", b"2"]).type == "a"


def test_a_name_without_a_value_does_not_shift_the_others() -> None:
    assert parse([b"type", b"a", b"data", b"1", b"key"]).data == b"1"


@given(st.lists(st.binary(max_size=80) | st.sampled_from(FIELDS), max_size=20))
def test_arbitrary_fields_raise_only_wire_errors(fields: list[bytes]) -> None:
    try:
        parse(fields)
    except WireError as error:
        assert len(str(error)) < 1_000


@given(st.tuples(*[st.binary(max_size=80)] * 7), st.integers(0, 14))
def test_arbitrary_values_and_cut_entries_raise_only_wire_errors(values: tuple[bytes, ...], length: int) -> None:
    fields = [part for pair in zip(FIELDS, values, strict=True) for part in pair]
    for form in (fields, fields[:length]):
        with contextlib.suppress(WireError):
            parse(form)


@pytest.mark.parametrize(
    ("field", "longest"),
    [
        ("data", MAX_EVENT_BYTES),
        ("headers", MAX_HEADERS_BYTES),
        ("subject", MAX_KEY_BYTES),
        ("id", MAX_ID_CHARS),
        ("type", MAX_TYPE_CHARS),
    ],
)
def test_a_field_at_its_limit_is_read_and_one_byte_more_is_refused(field: str, longest: int) -> None:
    parse(entry(**{field: b"x" * longest}))
    with pytest.raises(WireError, match="limit"):
        parse(entry(**{field: b"x" * (longest + 1)}))


@pytest.mark.parametrize(
    "hostile",
    [
        [],
        [b"type"],
        [b"type", b"order.placed"],
        [b"data", b"{}"],
        entry(type=b""),
        entry(type=b"\xff\xfe"),
        entry(id=b"\xc3\x28"),
        entry(subject=b"\xed\xa0\x80"),
        entry(source=b"\x80"),
        entry(time=b"yesterday"),
        entry(time=b"-5"),
        entry(time=b" 1_0"),
        entry(time=b"9" * 5_000),
        entry(time=b"253402300800000"),
        entry(time="١٢".encode()),
        [b"job", b"\x80\x04\x95K\x01."],
        [b"yaml", b"!!python/object/apply:os.system ['true']"],
    ],
)
def test_what_is_no_event_is_refused_with_a_preview(hostile: list[bytes]) -> None:
    with pytest.raises(WireError) as refused:
        parse(hostile)
    assert preview(hostile) in str(refused.value)
    assert str(refused.value).isprintable()


def test_a_huge_entry_is_refused_without_being_copied() -> None:
    hostile = entry(data=b"x" * (32 * MAX_EVENT_BYTES))
    tracemalloc.start()
    with pytest.raises(WireError):
        parse(hostile)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < MAX_EVENT_BYTES


def test_control_characters_travel_as_they_are_and_break_no_preview() -> None:
    assert parse(entry(subject=b"a\x00b\nc")).key == "a\x00b\nc"
    assert preview([b"a\n\x00", b"<img onerror>\x1b[31m"]).isprintable()


@given(st.lists(st.binary(max_size=300), max_size=40))
def test_a_preview_is_short_printable_text(fields: list[bytes]) -> None:
    text = preview(fields)
    assert len(text) <= 256
    assert text.isprintable()


@given(
    st.lists(
        records.map(lambda record: list(write(record))) | st.lists(st.binary(max_size=80), max_size=16), max_size=6
    )
)
def test_a_page_is_what_its_entries_are_one_by_one(entries: list[list[bytes]]) -> None:
    page = read_page(3, [(b"1693-%d" % number, fields) for number, fields in enumerate(entries)])
    assert [offset for offset, _, _ in page] == [f"1693-{number}" for number in range(len(entries))]
    for (offset, record, why), fields in zip(page, entries, strict=True):
        assert (record, why) == read_or_fault(3, offset, fields)
        if why:
            assert not record.type and record.data == preview(fields).encode()
        else:
            assert record == read(fields, partition=3, offset=offset, stored_ms=1_693)


@pytest.mark.parametrize(
    "changes",
    [
        {"time": b"+1"},
        {"time": b""},
        {"id": b""},
        {"id": b"\xff"},
        {"id": b"x" * (MAX_ID_CHARS + 1)},
        {"type": b""},
        {"type": b"\xff"},
        {"type": b"x" * (MAX_TYPE_CHARS + 1)},
        {"source": b"\xff"},
        {"source": b"x" * 1_000},
        {"subject": b"\xff"},
        {"subject": b"x" * (MAX_KEY_BYTES + 1)},
        {"headers": b"x" * (MAX_HEADERS_BYTES + 1)},
        {"data": b"x" * (MAX_EVENT_BYTES + 1)},
    ],
)
def test_a_page_takes_nothing_that_is_odd_or_over_a_limit_in_one_look(changes: dict[str, bytes]) -> None:
    good, odd = entry(id=b"a", time=b"5"), entry(**({"id": b"b", "time": b"6"} | changes))
    (_, first, _), (offset, record, why), (_, last, _) = read_page(3, [(b"7-0", good), (b"7-1", odd), (b"7-2", good)])
    assert first == parse(good, 7) == last
    assert (record, why) == read_or_fault(3, offset, odd)


def test_many_names_are_not_remembered_for_ever() -> None:
    for number in range(3_000):
        ((_, record, _),) = read_page(0, [(b"1-0", entry(id=b"a", time=b"5", type=b"t-%d" % number))])
        assert record.type == f"t-{number}"
    assert len(wire._types) <= wire._MAX_TEXTS
