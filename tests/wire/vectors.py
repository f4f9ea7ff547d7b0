"""The vectors of docs/wire-format.packs.json. To write them anew: `python -m tests.wire.vectors`.

Compressed bytes differ between versions of a library: such a body is kept as it is, and compared by what it holds. The
dictionary is kept too, for the same reason.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

from msgspec import msgpack

from millstream.wire import entry, packs
from millstream.wire.compression import Compression, Dictionary, compress, learn
from millstream.wire.entry import Record
from millstream.wire.packs import Columns

FILE = Path(__file__).parent.parent.parent / "docs" / "wire-format.packs.json"
KEPT: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
DICTIONARY = b64decode(KEPT["dictionary"]["content"])

PARTITION, OFFSET, STORED_MS = 3, "1693000000123-0", 1_693_000_000_123

EQUAL = Columns([b'{"total":%d}' % total for total in range(3)], "order.placed")
DIFFERENT = Columns(
    [b'{"order_id":"o-1"}', b"{}", '{"name":"Žofie"}'.encode()],
    ["order.placed", "order.cancelled.v2", "customer.moved"],
    ["id-a", "", "id-c"],
    [1_692_999_999_999, 0, 1_693_000_000_000],
    [b'{"correlation":"a1"}', b"", b""],
)
ORDERS = [
    b'{"order_id":"o-%d","status":"placed","total":%d}' % (number, number * 1_999 % 7_919) for number in range(2_000)
]


def vectors() -> dict[str, Any]:
    words = learn(DICTIONARY)
    return {
        "layout": 1,
        "about": "data, content, body and the headers of an event are base64; a key of null is no key",
        "dictionary": {"id": words.id, "content": text(DICTIONARY)},
        "packs": [
            pack("equal columns", EQUAL, "none"),
            pack("every column differs", DIFFERENT, "none", key="kůň"),
            pack("the shortest body", Columns([b"{}", b"1"], "order.placed"), "none", id_="", source=""),
            pack("many events, zstd", Columns(ORDERS[:12], "order.placed"), "zstd"),
            pack("many events, lz4", Columns(ORDERS[:12], "order.placed"), "lz4"),
            pack("a dictionary", Columns(ORDERS[:3], "order.placed"), "zstd", dictionary=words),
            one("one event", Record(PARTITION, "e-7", "order.placed", ORDERS[7], "o-7", 0, b"", None, "shop"), words),
            one(
                "one event with a time and headers of its own",
                Record(
                    PARTITION, "e-8", "order.placed", ORDERS[8], None, 1_692_999_999_999, b'{"by":"a1"}', None, "shop"
                ),
                words,
            ),
        ],
        "refused": [
            refused("an unknown version", "2/none", 1, [[b"{}"], "order.placed"]),
            refused("an unknown compression", "1/snappy", 1, [[b"{}"], "order.placed"]),
            refused("more than it says", "1/none", 1, [[b"{}", b"{}"], "order.placed"]),
            refused("fewer than it says", "1/none", 2, [[b"{}"], "order.placed"]),
            refused("none at all", "1/none", 0, [[], "order.placed"]),
            refused("a column of another length", "1/none", 2, [[b"{}", b"{}"], ["order.placed"]]),
            refused("no type", "1/none", 1, [[b"{}"], ""]),
            refused("data as text", "1/none", 1, [["{}"], "order.placed"]),
            refused("an id of 60 characters", "1/none", 1, [[b"{}"], "order.placed"], id_="x" * 60),
            refused("an id of an event of 65 characters", "1/none", 1, [[b"{}"], "order.placed", ["x" * 65]]),
            refused("a negative time", "1/none", 1, [[b"{}"], "order.placed", None, -1]),
            refused_one("one event, not compressed", msgpack.encode([[b"{}"], "order.placed"])),
            refused_one("one event that is two", compress(msgpack.encode([[b"{}", b"{}"], "order.placed"]), "zstd")),
            refused_one(
                "one event with a list of types", compress(msgpack.encode([[b"{}"], ["order.placed"]]), "zstd")
            ),
            refused_one("one event without a type", compress(msgpack.encode([[b"{}"], ""]), "zstd")),
        ],
    }


def pack(
    about: str,
    columns: Columns,
    how: Compression,
    *,
    id_: str = "b7k2m9",
    key: str | None = None,
    source: str = "shop",
    dictionary: Dictionary | None = None,
) -> dict[str, Any]:
    record = packs.write(columns, how, partition=PARTITION, id_=id_, key=key, source=source, dictionary=dictionary)
    vector = {
        "about": about,
        "id": id_,
        "source": source,
        "key": key,
        "headers": record.headers.decode(),
        "data": text(record.data),
        "body": text(msgpack.encode(columns)),
    }
    return with_events(vector)


def one(about: str, event: Record, dictionary: Dictionary) -> dict[str, Any]:
    record = packs.one(event, dictionary)
    assert packs.is_one(record)
    vector = {
        "about": about,
        "id": record.id,
        "source": record.source,
        "key": record.key,
        "headers": "",
        "data": text(record.data),
        "body": text(packs.body_of(event)),
    }
    return with_events(vector | ({"time_ms": event.time_ms} if event.time_ms else {}))


def with_events(vector: dict[str, Any]) -> dict[str, Any]:
    read = packs.read(stored(vector), OFFSET)
    return {**vector, "events": [shown(record, read.offset_of(k)) for k, record in enumerate(read)]}


def refused(about: str, form: str, n: int, columns: list[Any], *, id_: str = "b7k2m9") -> dict[str, Any]:
    headers = f'{{"pack":"{form}","n":"{n}"}}'
    body = text(msgpack.encode(columns))
    return {"about": about, "id": id_, "source": "shop", "key": None, "headers": headers, "data": body}


def refused_one(about: str, data: bytes) -> dict[str, Any]:
    return {"about": about, "id": "b7k2m9", "source": "shop", "key": None, "headers": "", "data": text(data)}


def stored(vector: dict[str, Any]) -> Record:
    """The entry of a vector, as a broker reads it."""
    named = Record(
        PARTITION,
        vector["id"],
        packs.TYPE,
        b64decode(vector["data"]),
        vector["key"],
        vector.get("time_ms", 0),
        vector["headers"].encode(),
        None,
        vector["source"],
    )
    return entry.read(entry.write(named), partition=PARTITION, offset=OFFSET, stored_ms=STORED_MS)


def shown(record: Record, offset: str) -> dict[str, Any]:
    return {
        "position": f"{record.partition}@{offset}",
        "id": record.id,
        "type": record.type,
        "source": record.source,
        "time_ms": record.time_ms,
        "key": record.key,
        "headers": text(record.headers),
        "data": text(record.data),
    }


def text(value: bytes) -> str:
    return b64encode(value).decode()


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
