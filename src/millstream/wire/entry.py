"""Entry format, version 1: a record becomes the fields of an entry, and back. `docs/wire-format.md` describes it.

An entry is a flat list of names and values, CloudEvents 1.0 in binary mode. The order is constant, since Redis stores
the names of successive entries once as long as they are the same.

Reading is half of what a consumer does. What Millstream itself wrote is taken in one look, and what repeats from entry to
entry is decoded once: 0.6 µs an entry, where one by one it takes 1.1. Of these the layout costs 0.2, the record 0.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from millstream.errors import WireError
from millstream.units import (
    MAX_EVENT_BYTES,
    MAX_HEADERS_BYTES,
    MAX_ID_CHARS,
    MAX_KEY_BYTES,
    MAX_TIME_MS,
    MAX_TYPE_CHARS,
)

FIELDS = (b"id", b"type", b"source", b"time", b"subject", b"headers", b"data")
_LAYOUT = list(FIELDS)
_PREVIEW_BYTES = 256
_TIME_DIGITS = len(str(MAX_TIME_MS))
_MAX_TEXTS = 1_000  # names that are remembered; there are as many as types and apps


class Record(Struct, frozen=True, gc=False):
    """What is appended: the event as bytes, and what travels with it. The partition is already chosen."""

    partition: int
    id: str
    type: str
    data: bytes
    key: str | None = None
    time_ms: int = 0
    """Milliseconds since the epoch. 0 when appending: the time at which the broker stores it."""
    headers: bytes = b""
    """A JSON object, text to text, or empty."""
    due_ms: int | None = None
    """Not visible before (trait `delayed`)."""
    source: str = ""
    """The app that published it."""


def write(record: Record) -> tuple[bytes, ...]:
    """The fields of an entry: name, value, name, value, …"""
    return (
        b"id",
        record.id.encode(),
        b"type",
        record.type.encode(),
        b"source",
        record.source.encode(),
        b"time",
        b"%d" % record.time_ms if record.time_ms else b"",
        b"subject",
        b"" if record.key is None else record.key.encode(),
        b"headers",
        record.headers,
        b"data",
        record.data,
    )


def read(fields: Sequence[bytes], *, partition: int, offset: str, stored_ms: int) -> Record:
    """The record of an entry, in any order of fields; only `type` and `data` must be there.

    A missing id is the entry's position, a missing time the one at which it was stored. Unknown fields are passed over.
    Raises `WireError` for anything else, and for what is over a limit; looks at sizes before it decodes.
    """
    if fields[0::2] == _LAYOUT and len(fields) == 14:  # what Millstream itself writes
        _, id_, _, type_, _, source, _, time, _, subject, _, headers, _, data = fields
    else:
        pairs = list(zip(fields[0::2], fields[1::2], strict=False))
        found = dict(reversed(pairs))  # of a repeated name, the first
        if b"type" not in found or b"data" not in found:
            raise WireError(f"not an event, it lacks type or data: {preview(fields)}")
        id_, type_, source, time, subject, headers, data = (found.get(name, b"") for name in FIELDS)
    if len(data) > MAX_EVENT_BYTES or len(headers) > MAX_HEADERS_BYTES:
        raise WireError(f"over the limit: data {len(data):,} bytes, headers {len(headers):,}: {preview(fields)}")
    if not 0 < len(type_) <= MAX_TYPE_CHARS or len(id_) > MAX_ID_CHARS or len(subject) > MAX_KEY_BYTES:
        raise WireError(f"type, id or subject is empty or over its limit: {preview(fields)}")
    try:
        return Record(
            partition,
            id_.decode() if id_ else f"{partition}@{offset}",
            type_.decode(),
            data,
            subject.decode() if subject else None,
            _milliseconds(time) if time else stored_ms,
            headers,
            None,
            source.decode(),
        )
    except ValueError as error:
        raise WireError(f"{error}: {preview(fields)}") from None


def read_page(partition: int, entries: Iterable[tuple[bytes, Sequence[bytes]]]) -> list[tuple[str, Record, str]]:
    """Of each entry of a log, by id and fields: its offset, and what `read_or_fault` answers."""
    page: list[tuple[str, Record, str]] = []
    add = page.append
    last_type: bytes | None = None
    last_source: bytes | None = None
    last_stamp: bytes | None = None
    name, app, time_ms = "", "", 0
    for entry_id, fields in entries:
        offset = entry_id.decode()
        try:
            n1, id_, n2, type_, n3, source, n4, time, n5, subject, n6, headers, n7, data = fields
            small = len(data) <= MAX_EVENT_BYTES and len(headers) <= MAX_HEADERS_BYTES and len(subject) <= MAX_KEY_BYTES
            if small and (n1, n2, n3, n4, n5, n6, n7) == FIELDS and id_ and len(id_) <= MAX_ID_CHARS:
                if type_ != last_type:
                    name, last_type = _types[type_], type_
                if source != last_source:
                    app, last_source = _sources[source], source
                stamp = time or entry_id.partition(b"-")[0]
                if stamp != last_stamp:  # the events of one write have one time
                    time_ms, last_stamp = _milliseconds(stamp), stamp
                key = subject.decode() if subject else None
                add((offset, Record(partition, id_.decode(), name, data, key, time_ms, headers, None, app), ""))
                continue
        except ValueError:  # the closer look below says why
            pass
        add((offset, *read_or_fault(partition, offset, fields)))
    return page


def read_or_fault(partition: int, offset: str, fields: Sequence[bytes]) -> tuple[Record, str]:
    """The record of the entry with this id, and ""; of one that is no event a record without type, and why."""
    stored_ms = int(offset.partition("-")[0])
    try:
        return read(fields, partition=partition, offset=offset, stored_ms=stored_ms), ""
    except WireError as error:
        return Record(partition, f"{partition}@{offset}", "", preview(fields).encode(), None, stored_ms), str(error)


class _Texts(dict[bytes, str]):
    """Names as text; a short one is remembered. Raises `ValueError` for one that is too long, or is no text."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self._least, self._most = least, most

    def __missing__(self, name: bytes) -> str:
        if not self._least <= len(name) <= self._most:
            raise ValueError(name)
        if len(self) >= _MAX_TEXTS:
            self.clear()
        text = self[name] = name.decode()
        return text


_types = _Texts(1, MAX_TYPE_CHARS)
_sources = _Texts(0, MAX_TYPE_CHARS)


def _milliseconds(text: bytes) -> int:
    # Digits alone: int() would take signs, blanks and underscores too, and other languages would not.
    value = int(text) if text.isdigit() and len(text) <= _TIME_DIGITS else -1
    if not 0 <= value <= MAX_TIME_MS:
        raise ValueError("time is not a number of milliseconds since the epoch")
    return value


def preview(fields: Sequence[bytes]) -> str:
    """The beginning of an entry that is not an event, as printable text."""
    pairs = zip(fields[0:16:2], fields[1:16:2], strict=False)
    return ", ".join(f"{bytes(name[:64])!r}: {bytes(value[:64])!r}" for name, value in pairs)[:_PREVIEW_BYTES]
