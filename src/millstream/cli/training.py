"""`stream train`: a dictionary of what the events of a stream have in common, what it would save, and its use.

Half of the events are learnt from and the other half is measured, so what is told holds for events to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click

from millstream.brokers.base import Broker, Record, Stored, StreamInfo
from millstream.cli import events, show, target
from millstream.cli.main import Given, Mistake
from millstream.cli.show import Column
from millstream.stream import Pack
from millstream.wire import compression, packs
from millstream.wire.compression import Dictionary

MAX_SAMPLES = 100_000

_COLUMNS = (
    Column("AN EVENT", "way"),
    Column("BYTES", "bytes", show.count),
    Column("OF PLAIN", "part", lambda part: f"{part:.0%}"),
)


class Wish(NamedTuple):
    """What is to become of a dictionary."""

    stream: str
    size: int
    events: int
    path: str | None
    use: bool
    none: bool
    yes: bool


class _Small(NamedTuple):
    """What is learnt from: events, unless they are large."""

    limit: int

    def shows(self, stored: Stored) -> bool:
        return bool(stored.record.type) and len(stored.record.data) <= packs.MAX_ONE_BYTES


async def run(given: Given, wish: Wish) -> None:
    """Train a dictionary and show what it saves; write it to a file, or put it into use. Raises `BadSetting`."""
    if wish.none and (wish.use or wish.path):
        raise Mistake("--none says to use no dictionary, so there is none to train.")
    meant = target.find(given)
    async with meant.opened() as broker:
        info = await target.find_stream(broker, wish.stream, meant)
        if (wish.use or wish.none) and not broker.traits.dictionaries:
            raise Mistake(f"{broker.url} keeps no dictionaries.")
        if wish.none:
            await _stop(broker, info)
            return
        found, _ = await events.last(broker, info, _Small(wish.events))
        dictionary = _trained([stored.record for stored in found], wish.size)
        _write(dictionary, wish.path)
        made = f"a dictionary of {show.size(len(dictionary.content))}, out of {show.many(len(found), 'event')}"
        click.echo(f"{wish.path or dictionary.id}: {made}")
        if wish.use:
            await _use(broker, info, dictionary, yes=wish.yes)


def _trained(records: Sequence[Record], size_bytes: int) -> Dictionary:
    dictionary = Dictionary(compression.train(list(map(packs.body_of, records[::2])), size_bytes))
    show.rows(_savings(records[1::2], dictionary), _COLUMNS, "table")
    return dictionary


def _write(dictionary: Dictionary, path: str | None) -> None:
    if path is not None:
        Path(path).write_bytes(dictionary.content)


async def _use(broker: Broker, info: StreamInfo, dictionary: Dictionary, *, yes: bool) -> None:
    name = info.spec.name
    show.note(
        f"plan: who publishes to {name} writes small events with this dictionary from now on. Who reads them needs the "
        "extra millstream[zstd] and waits without it; a Millstream before this version makes dead letters of them"
    )
    show.confirm(f"Use it for {name}?", yes=yes)
    await broker.admin.train(name, dictionary.id, dictionary.content)
    click.echo(f"{name} uses dictionary {dictionary.id} now")


async def _stop(broker: Broker, info: StreamInfo) -> None:
    await broker.admin.train(info.spec.name, 0)
    used = info.policy.dictionary
    click.echo(
        f"{info.spec.name} uses no dictionary now" + (f"; {used} stays for the events that need it" if used else "")
    )


def _savings(records: Sequence[Record], dictionary: Dictionary) -> list[dict[str, object]]:
    count = Pack().events
    datas = [record.data for record in records]
    batches = [b"".join(datas[start : start + count]) for start in range(0, len(datas), count)]
    totals = {
        "alone": sum(map(_bytes, records)),
        "alone, with the dictionary": sum(_bytes(packs.one(record, dictionary)) for record in records),
        f"in a pack of {count}": sum(len(compression.compress(batch, "zstd")) for batch in batches),
    }
    plain = totals["alone"] or 1
    return [{"way": way, "bytes": round(total / len(records)), "part": total / plain} for way, total in totals.items()]


def _bytes(record: Record) -> int:
    return len(record.data) + len(record.headers)
