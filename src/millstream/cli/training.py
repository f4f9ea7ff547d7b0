"""`stream train`: a dictionary of what the events of a stream have in common, and what it would save.

Half of the events are learnt from and the other half is measured, so what is told holds for events to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click

from millstream.brokers.base import Stored
from millstream.cli import events, show, target
from millstream.cli.main import Given
from millstream.cli.show import Column
from millstream.stream import Pack
from millstream.wire import compression
from millstream.wire.compression import Dictionary

MAX_SAMPLES = 100_000
MAX_SAMPLE_BYTES = 4_096  # what is larger has much in common with itself, and is compressed without a dictionary

_COLUMNS = (
    Column("AN EVENT", "way"),
    Column("BYTES", "bytes", show.count),
    Column("OF PLAIN", "part", lambda part: f"{part:.0%}"),
)


class _Small(NamedTuple):
    """What is learnt from: events, unless they are large."""

    limit: int

    def shows(self, stored: Stored) -> bool:
        return bool(stored.record.type) and len(stored.record.data) <= MAX_SAMPLE_BYTES


def train(datas: Sequence[bytes], size_bytes: int, path: str) -> None:
    """Write a dictionary to a file, and say what it would save. Raises `BadSetting` for too few events."""
    content = compression.train(datas[::2], size_bytes)
    Path(path).write_bytes(content)
    show.rows(_savings(datas[1::2], Dictionary(content)), _COLUMNS, "table")
    click.echo(f"{path}: a dictionary of {show.size(len(content))}, out of {show.many(len(datas), 'event')}")


async def samples(given: Given, name: str, most: int) -> list[bytes]:
    """The newest events of a stream, but for large ones."""
    meant = target.find(given)
    async with meant.opened() as broker:
        info = await target.find_stream(broker, name, meant)
        found, _ = await events.last(broker, info, _Small(most))
    return [stored.record.data for stored in found]


def _savings(datas: Sequence[bytes], dictionary: Dictionary) -> list[dict[str, object]]:
    count = Pack().events
    packs = [b"".join(datas[start : start + count]) for start in range(0, len(datas), count)]
    totals = {
        "alone": sum(map(len, datas)),
        "alone, with the dictionary": sum(len(compression.shorter(data, dictionary)) for data in datas),
        f"in a pack of {count}": sum(len(compression.compress(pack, "zstd")) for pack in packs),
    }
    plain = totals["alone"] or 1
    return [{"way": way, "bytes": round(total / len(datas)), "part": total / plain} for way, total in totals.items()]
