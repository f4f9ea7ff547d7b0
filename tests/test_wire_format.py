"""The vectors of docs/wire-format.vectors.json: other languages test against them, and so do we."""

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from millstream.errors import WireError
from millstream.event import EventType
from millstream.units import MAX_EVENT_BYTES, MAX_HEADERS_BYTES, MAX_ID_CHARS, MAX_KEY_BYTES, MAX_TYPE_CHARS
from millstream.wire import entry
from millstream.wire.partition import partition_of

DOCS = Path(__file__).parent.parent / "docs"
VECTORS = json.loads((DOCS / "wire-format.vectors.json").read_text(encoding="utf-8"))


def about(vector: dict[str, Any]) -> str:
    return str(vector.get("about") or vector.get("key") or vector.get("wire") or "empty")


@pytest.mark.parametrize("vector", VECTORS["write"], ids=about)
def test_a_record_becomes_these_fields(vector: dict[str, Any]) -> None:
    given = vector["record"] | {
        "headers": vector["record"]["headers"].encode(),
        "data": vector["record"]["data"].encode(),
    }
    assert [field.decode() for field in entry.write(entry.Record(0, **given))] == vector["fields"]


@pytest.mark.parametrize("vector", VECTORS["read"], ids=about)
def test_these_fields_become_a_record(vector: dict[str, Any]) -> None:
    partition, offset = vector["partition"], vector["entry_id"]
    fields = [field.encode() for field in vector["fields"]]
    record = entry.read(fields, partition=partition, offset=offset, stored_ms=int(offset.partition("-")[0]))
    assert record.partition == partition
    found = {"headers": record.headers.decode(), "data": record.data.decode()}
    assert vector["record"] == found | {n: getattr(record, n) for n in ("id", "type", "source", "time_ms", "key")}


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=about)
def test_these_fields_are_no_event(vector: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        entry.read([field.encode() for field in vector["fields"]], partition=0, offset="1-0", stored_ms=1)


@pytest.mark.parametrize("vector", VECTORS["partition"], ids=about)
def test_a_key_lies_in_this_partition(vector: dict[str, Any]) -> None:
    key = vector["key"]
    assert crc32(key.encode()) == vector["crc32"]
    assert [partition_of(key, n) for n in (1, 2, 8, 1000)] == [0, vector["of_2"], vector["of_8"], vector["of_1000"]]


@pytest.mark.parametrize("vector", VECTORS["type"], ids=about)
def test_a_type_and_version_are_written_like_this(vector: dict[str, Any]) -> None:
    assert EventType(vector["name"], vector["version"]).wire == vector["wire"]


def test_the_page_states_the_limits_that_hold() -> None:
    page = (DOCS / "wire-format.md").read_text(encoding="utf-8")
    for limit in (f"{MAX_ID_CHARS} characters", f"{MAX_TYPE_CHARS} bytes", f"{MAX_KEY_BYTES:,} bytes"):
        assert limit in page
    assert f"{MAX_HEADERS_BYTES:,} bytes" in page
    assert f"{MAX_EVENT_BYTES:,} bytes" in page
