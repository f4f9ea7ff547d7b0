"""`stream ls`, `stream show`."""

from __future__ import annotations

from typing import Any

import click

from millstream.brokers.base import StreamInfo
from millstream.cli import groups, show, target
from millstream.cli.main import Given, Group
from millstream.cli.show import Column, Output

_COLUMNS = (
    Column("STREAM", "name", elastic=True),
    Column("PARTITIONS", "partitions", show.count),
    Column("KEY", "key"),
    Column("EVENTS", "events", show.count),
    Column("SIZE", "bytes", show.size),
    Column("LAST", "last_ms", show.lately),
)
_LINES = (
    Column("stream", "name"),
    Column("partitions", "partitions", show.count),
    Column("key", "key"),
    Column("codec", "codec"),
    Column("types", "types", lambda types: show.text(", ".join(types or ()))),
    Column("events", "events", show.count),
    Column("ever added", "added", show.count),
    Column("size", "bytes", show.size),
    Column("first", "first_ms", show.moment),
    Column("last", "last_ms", show.moment),
)


@click.group(cls=Group)
def stream() -> None:
    """List streams, show one."""


@stream.command()
@show.output_option
@click.pass_obj
def ls(given: Given, output: Output) -> None:
    """List the streams of the broker."""
    target.run(lambda: _list(given, output))


@stream.command("show")
@click.argument("name", metavar="STREAM")
@show.output_option
@click.pass_obj
def show_(given: Given, name: str, output: Output) -> None:
    """Show a stream, and the groups that consume it."""
    target.run(lambda: _show(given, name, output))


async def _list(given: Given, output: Output) -> None:
    async with target.find(given).opened() as broker:
        infos = await broker.admin.streams()
    show.rows([fields(info) for info in infos], _COLUMNS, output)
    if not infos:
        show.note("There are no streams yet: the first event published makes one.")


async def _show(given: Given, name: str, output: Output) -> None:
    meant = target.find(given)
    async with meant.opened() as broker:
        info = await target.find_stream(broker, name, meant)
        consumers = await broker.admin.groups(name)
    found = fields(info)
    declared = meant.stream(name)
    if declared is not None:
        found["types"] = list(declared.types)
    if output != "table":
        found["groups"] = [groups.fields(group) for group in consumers]
    show.one(found, [line for line in _LINES if line.field in found], output)
    if output == "table" and consumers:
        click.echo()
        show.rows([groups.fields(group) for group in consumers], groups.COLUMNS, output)


def fields(info: StreamInfo) -> dict[str, Any]:
    """A stream's fields, those of its declaration among them."""
    spec = info.spec
    return {
        "name": spec.name,
        "partitions": spec.partitions,
        "key": spec.key,
        "codec": spec.codec,
        "events": info.events,
        "added": info.added,
        "bytes": info.bytes,
        "first_ms": info.first_ms,
        "last_ms": info.last_ms,
    }
