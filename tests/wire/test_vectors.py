"""The vectors of docs/wire-format.packs.json: other languages test against them, and so do we."""

from __future__ import annotations

import json
from base64 import b64decode
from typing import Any

import pytest

from millstream.errors import WireError
from millstream.units import MAX_EVENT_BYTES, MAX_PACK_BYTES, MAX_PACK_EVENTS
from millstream.wire import packs
from millstream.wire.compression import decompress, learn
from tests.wire.vectors import DICTIONARY, FILE, KEPT, OFFSET, shown, stored, vectors


def about(vector: dict[str, Any]) -> str:
    return str(vector["about"])


def _how(vector: dict[str, Any]) -> str:
    """A pack of one is always compressed so, and has no headers to say it."""
    return str(json.loads(vector["headers"])["pack"].partition("/")[2]) if vector["headers"] else "zstd"


def test_the_vectors_are_what_is_written_today_apart_from_how_it_is_compressed() -> None:
    def steady(found: dict[str, Any]) -> dict[str, Any]:
        compressed = [{**vector, "data": ""} if _how(vector) != "none" else vector for vector in found["packs"]]
        refused = [vector for vector in found["refused"] if vector["headers"]]
        return {**found, "packs": compressed, "refused": refused}

    assert steady(vectors()) == steady(KEPT)


@pytest.mark.parametrize("vector", KEPT["packs"], ids=about)
def test_a_pack_holds_these_events(vector: dict[str, Any]) -> None:
    learn(DICTIONARY)
    record = stored(vector)
    assert packs.is_pack(record)
    assert decompress(record.data, _how(vector), MAX_PACK_BYTES) == b64decode(vector["body"])
    pack = packs.read(record, OFFSET)
    assert [shown(record, pack.offset_of(k)) for k, record in enumerate(pack)] == vector["events"]


@pytest.mark.parametrize("vector", KEPT["refused"], ids=about)
def test_this_is_no_pack(vector: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        packs.read(stored(vector), OFFSET)


def test_the_page_states_the_limits_that_hold() -> None:
    page = (FILE.parent / "wire-format.md").read_text(encoding="utf-8")
    for limit in (MAX_PACK_EVENTS, MAX_PACK_BYTES, MAX_EVENT_BYTES):
        assert f"{limit:,}" in page
    assert f"at most {packs.MAX_PREFIX_CHARS} characters" in page
