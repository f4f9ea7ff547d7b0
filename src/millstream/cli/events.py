"""`publish`: one event, or JSON lines. `tail`: the events of a stream."""

from __future__ import annotations

import asyncio
import gzip
import io
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any, NamedTuple, NoReturn, Protocol

import click
import msgspec

from millstream.app import App
from millstream.brokers.base import Broker, Position, Record, Stored, StreamInfo, StreamSpec
from millstream.cli import show, target
from millstream.cli.main import DONE, INTERRUPTED, PART, Command, Given, exit_code
from millstream.cli.show import Output
from millstream.cli.target import Target
from millstream.clock import Clock
from millstream.delivery import Envelope
from millstream.errors import BrokerError, MillstreamError, Unconfirmed, WireError
from millstream.event import field_names
from millstream.stream import Stream
from millstream.units import (
    MAX_APPEND_RECORDS,
    MAX_EVENT_BYTES,
    MAX_HEADERS_BYTES,
    MAX_ID_CHARS,
    MAX_KEY_BYTES,
    MAX_TYPE_CHARS,
)
from millstream.wire import codec
from millstream.wire.partition import partition_of

BLOCK_BYTES = 262_144  # read at once; a thousand events of the usual size
MAX_LINE_BYTES = 4 * MAX_EVENT_BYTES  # an event at its limit, with escapes and its envelope
PAGE = 200  # events that `tail` reads at once from each partition
LAST = 10  # events that `tail` shows when nothing says where to begin
WAIT_S = 1.0  # `tail --follow` looks for new partitions' ends at least so often
IDLE_S = 0.2  # how soon Ctrl-C is noticed while nothing comes in


@click.command(cls=Command)
@click.argument("stream", metavar="STREAM")
@click.argument("kind", metavar="[TYPE]", required=False)
@click.argument("fields", nargs=-1, metavar="[F=V]…")
@click.option("--file", "path", type=click.Path(exists=True, dir_okay=False, allow_dash=True), metavar="FILE", help="JSON lines; also .gz; - is stdin.")
@click.option("--from-line", type=click.IntRange(min=1), default=1, metavar="N", help="Go on with this line of --file.")
@click.option("--key", metavar="KEY", help="In place of the stream's own key.")
@click.option("--id", "identity", metavar="ID", help="Unique; without this, Millstream makes one.")
@click.option("--header", "headers", multiple=True, metavar="K=V", help="Travels beside the event; may be repeated.")
@click.pass_obj
def publish(
    given: Given,
    stream: str,
    kind: str | None,
    fields: tuple[str, ...],
    path: str | None,
    from_line: int,
    key: str | None,
    identity: str | None,
    headers: tuple[str, ...],
) -> int:
    """Publish one event, or JSON lines.

    One event: `publish orders order.placed order_id=o-1 total=1999 tags:='["new"]'`. F=V gives text, which becomes a
    number where the type wants one; F:=V gives JSON. Prints the position and the id.

    JSON lines: {"type": "order.placed", "order_id": "o-1", …}, or what `tail -o jsonl` prints. Stops at the first line
    that does not fit its type, and says how to go on.

    With an app that declares the stream, events are checked against their types; with a broker alone they are stored as
    they are.
    """
    if path is None:
        if kind is None:
            raise click.UsageError("Publish what? Give TYPE and fields, or --file.")
        data = dict(_field(word) for word in fields)
        draft = Draft(kind, data, identity, key, dict(_pair(header, "header") for header in headers))
        return target.run(lambda: _publish_one(target.find(given), stream, draft))
    if kind or key or identity or headers:
        raise click.UsageError("With --file, each line gives its own type, key, id and headers.")
    with Lines(path) as lines:
        return target.run(lambda: _Load(lines, from_line).run(target.find(given), stream))


@click.command(cls=Command)
@click.argument("stream", metavar="STREAM")
@click.option("--since", type=target.Moment(), help=f"Begin at 5m (ago), 2026-08-01T12:00Z or today; else with the last {LAST}.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--type", "kind", metavar="TYPE", help="Only events of this type.")
@click.option("--key", metavar="KEY", help="Only events of this key.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="End after N events; without --since and --follow the last N.")
@show.output_option
@click.pass_obj
def tail(
    given: Given, stream: str, since: int | None, follow: bool, kind: str | None, key: str | None, limit: int | None, output: Output
) -> None:
    """Show the events of a stream, the oldest first.

    Belongs to no group, and changes nothing. An entry that is no event is shown as such. What -o jsonl prints can be
    published again.
    """
    look = Look(since, follow, limit, kind, key)
    target.run(lambda: _tail(target.find(given), stream, look, output))


async def _publish_one(meant: Target, stream: str, draft: Draft) -> int:
    async with _outlet(meant, stream) as outlet:
        event = outlet.fit(draft, words=True)
        position = (await outlet.store([event]))[0]
    click.echo(f"{position}  {event.id}")
    return DONE


