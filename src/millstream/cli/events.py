"""`publish`: one event, or JSON lines. `tail`: the events of a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import datetime
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple, Protocol, get_args

import click

from millstream.brokers.base import Broker, Confirm, Position, Stored, StreamInfo
from millstream.brokers.dictionaries import readable
from millstream.cli import show, target
from millstream.cli.lines import Lines, Unreadable
from millstream.cli.main import DONE, INTERRUPTED, PART, Command, Given
from millstream.cli.outlet import MAX_LINE_BYTES, Draft, Outlet, Unfit, field, outlet, pair, read_line
from millstream.cli.show import Output
from millstream.cli.target import Interrupt, Target
from millstream.errors import BadSetting, BrokerError, Unconfirmed
from millstream.publisher import unpacked
from millstream.units import MAX_APPEND_RECORDS, seconds

PAGE = 200  # events that `tail` reads at once from each partition
LAST = 10  # events that `tail` shows when nothing says where to begin
WAIT_S = 1.0  # `tail --follow` asks again at least so often
# How far back the last events are looked for, before from the beginning.
BACK_MS = (1_000, 60_000, 3_600_000, 86_400_000)


def _due(context: click.Context, option: click.Parameter, value: str | None) -> datetime | str | None:
    """A time, local without a zone; or how long from now."""
    if value is None:
        return None
    with suppress(BadSetting):
        seconds(value)
        return value
    with suppress(ValueError):
        return datetime.fromisoformat(value).astimezone()
    raise click.BadParameter(f"{value!r} is not a time: write 5m (from now) or 2026-08-01T12:00Z.", context, option)


@click.command(cls=Command)
@click.argument("stream", metavar="STREAM")
@click.argument("kind", metavar="[TYPE]", required=False)
@click.argument("fields", nargs=-1, metavar="[F=V]…")
@click.option(
    "--file",
    "path",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="JSON lines; also .gz; - is stdin.",
)
@click.option("--from-line", type=click.IntRange(min=1), default=1, metavar="N", help="Go on with this line of --file.")
@click.option("--key", metavar="KEY", help="In place of the stream's own key.")
@click.option("--id", "identity", metavar="ID", help="Unique; without this, Millstream makes one.")
@click.option("--header", "headers", multiple=True, metavar="K=V", help="Travels beside the event; may be repeated.")
@click.option(
    "--due",
    metavar="TIME",
    callback=_due,
    help="Publish it in 5m, or at 2026-08-01T12:00Z; until then it is kept aside.",
)
@click.option(
    "--confirm", type=click.Choice(get_args(Confirm)), help="How far it has come when this ends; else as declared."
)
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
    due: datetime | str | None,
    confirm: Confirm | None,
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
        data = dict(field(word) for word in fields)
        draft = Draft(kind, data, identity, key, dict(pair(header, "header") for header in headers))
        return target.run(lambda: _publish_one(target.find(given), stream, draft, due, confirm))
    if kind or key or identity or headers or due:
        raise click.UsageError(
            "With --file, each line gives its own type, key, id and headers; and none is --due later."
        )
    with Lines(path) as lines:
        return target.run(lambda: _Load(lines, from_line, confirm).run(target.find(given), stream))


@click.command(cls=Command)
@click.argument("stream", metavar="STREAM")
@click.option(
    "--since",
    metavar="TIME",
    callback=target.moment,
    help=f"Begin at 5m (ago), 2026-08-01T12:00Z or today; else with the last {LAST}.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--type", "kind", metavar="TYPE", help="Only events of this type.")
@click.option("--key", metavar="KEY", help="Only events of this key.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="End after N events; without --since and --follow the last N.",
)
@show.output_option
@click.pass_obj
def tail(
    given: Given,
    stream: str,
    since: int | None,
    follow: bool,
    kind: str | None,
    key: str | None,
    limit: int | None,
    output: Output,
) -> None:
    """Show the events of a stream, the oldest first.

    Belongs to no group, so it takes no event from anybody. An entry that is no event is shown as such. What -o jsonl
    prints can be published again.
    """
    look = Look(since, follow, limit, kind, key)
    target.run(lambda: _tail(target.find(given), stream, look, output))


async def _publish_one(
    meant: Target, stream: str, draft: Draft, due: datetime | str | None, confirm: Confirm | None
) -> int:
    async with outlet(meant, stream, confirm) as out:
        event = out.fit(draft, words=True, due=due)
        position = (await out.store([event]))[0]
    click.echo(f"{position}  {event.id}")
    return DONE


class _Load:
    """Publishing the lines of a file. Whatever ends it, it says with which line to go on."""

    def __init__(self, lines: Lines, from_line: int, confirm: Confirm | None) -> None:
        self._lines = lines
        self._confirm = confirm
        self._next = from_line
        self._stored = 0
        self._trouble = ""
        self._doubt = ""
        self._interrupt = Interrupt()

    async def run(self, meant: Target, stream: str) -> int:
        """The exit code."""
        with self._interrupt.caught():
            return await self._run(meant, stream)

    async def _run(self, meant: Target, stream: str) -> int:
        async with outlet(meant, stream, self._confirm) as out:
            progress = show.Progress("publishing", "event", meant.clock)
            try:
                with progress:
                    await self._load(out, meant, progress)
            except Unconfirmed as error:
                self._say_stored()
                raise Unconfirmed(f"{error}; {self._how_to_go_on()}") from error
            except BaseException:
                self._say_stored()
                show.note(f"stopped: {self._how_to_go_on()}")
                raise
            return self._report(progress)

    async def _load(self, out: Outlet, meant: Target, progress: show.Progress) -> None:
        number = 0
        try:
            async for block in self._lines.blocks(self._interrupt.asked, meant.clock, MAX_LINE_BYTES):
                events, following = self._read(out, block, number + 1)
                number += len(block)
                await self._store(out, events, following)
                progress.show(self._stored, self._lines.part())
                if self._trouble:
                    return
        except Unreadable as error:
            self._trouble = f"behind line {number}: {error}"

    def _read(self, out: Outlet, block: Sequence[bytes], first: int) -> tuple[list[tuple[int, Any]], int]:
        """The events of a block, with the numbers of their lines, as far as they fit; and the line behind them."""
        events: list[tuple[int, Any]] = []
        for number, line in enumerate(block, first):
            if number < self._next or not line.strip():
                continue
            try:
                events.append((number, out.fit(read_line(line, out))))
            except Unfit as error:
                self._trouble = f"line {number}: {error.message}"
                return events, number
        return events, first + len(block)

    async def _store(self, out: Outlet, events: Sequence[tuple[int, Any]], following: int) -> None:
        for start in range(0, len(events), MAX_APPEND_RECORDS):
            piece = events[start : start + MAX_APPEND_RECORDS]
            self._next, self._doubt = piece[0][0], "; some events from there on may be stored already"
            try:
                self._stored += len(await out.store([event for _, event in piece]))
            except Unconfirmed as error:
                self._count_known(piece, error)
                raise
            self._doubt = ""
        self._next = max(self._next, following)

    def _count_known(self, piece: Sequence[tuple[int, Any]], error: Unconfirmed) -> None:
        """Go on with the first event that is not known to be stored."""
        doubtful = {event.id for event in error.envelopes}
        before = next((n for n, (_, event) in enumerate(piece) if event.id in doubtful), 0)
        self._next = piece[before][0]
        self._stored += len(error.results)
        behind = len(error.results) - before
        sure = isinstance(error.__cause__, BrokerError) and not isinstance(error.__cause__, Unconfirmed)
        self._doubt = (
            f"; {behind:,} of those behind it are stored already" if behind > 0 else "" if sure else self._doubt
        )

    def _report(self, progress: show.Progress) -> int:
        self._say_stored()
        if self._trouble:
            stored = show.many(self._stored, "event")
            show.note(f"{self._trouble}; {stored} stored before it; correct it and {self._how_to_go_on()}")
            return PART
        if self._interrupt.asked.is_set():
            show.note(f"stopped: {self._how_to_go_on()}")
            return INTERRUPTED
        if self._stored:
            show.note(progress.summary(self._stored))
        return DONE

    def _say_stored(self) -> None:
        click.echo(f"{self._stored:,} published")

    def _how_to_go_on(self) -> str:
        return f"go on with --from-line {self._next}{self._doubt}"


class Chosen(Protocol):
    """Which events are looked for, and how many."""

    @property
    def limit(self) -> int | None:
        """None: the usual number."""
        ...

    def shows(self, stored: Stored) -> bool:
        """This is one of them."""
        ...


class Look(NamedTuple):
    """What `tail` shows."""

    since_ms: int | None
    follow: bool
    limit: int | None
    type: str | None
    key: str | None

    def shows(self, stored: Stored) -> bool:
        """The type and the key are those that were asked for."""
        return self.type in (None, stored.record.type) and self.key in (None, stored.record.key)


async def _tail(meant: Target, stream: str, look: Look, output: Output) -> None:
    async with meant.opened() as broker:
        info = await target.find_stream(broker, stream, meant, make=True)
        with show.EventLines(output, meant.clock) as lines:
            shown = 0
            async for stored in _found(broker, info, look):
                lines.show(show.event(stored))
                shown += 1
                if shown == look.limit:
                    return
    if not shown:
        show.note("no events")


async def _found(broker: Broker, info: StreamInfo, look: Look) -> AsyncIterator[Stored]:
    name = info.spec.name
    if look.since_ms is None:
        newest, places = await last(broker, info, look)
        for stored in newest:
            yield stored
    else:
        places = dict(await broker.locate(name, look.since_ms))
    while True:
        async for stored in _in_time(broker, name, places):
            for event in unpacked((stored,)):
                if look.shows(event):
                    yield event
        if not look.follow:
            return
        await broker.wait(name, places, WAIT_S)


async def last(broker: Broker, info: StreamInfo, look: Chosen) -> tuple[deque[Stored], dict[int, Position | None]]:
    """The last events, and the places behind them. Looked for from ever further back: streams are read forward only."""
    for back_ms in (*BACK_MS, None):
        start = None if back_ms is None or info.last_ms is None else info.last_ms - back_ms
        if start is not None and info.first_ms is not None and start <= info.first_ms:
            start = None
        places = dict(await broker.locate(info.spec.name, "beginning" if start is None else start))
        newest: deque[Stored] = deque(maxlen=look.limit or LAST)
        async for stored in _in_time(broker, info.spec.name, places):
            newest.extend(filter(look.shows, unpacked((stored,))))
        if len(newest) == newest.maxlen or start is None:
            break
    return newest, places


async def _in_time(broker: Broker, name: str, places: dict[int, Position | None]) -> AsyncIterator[Stored]:
    """What there is behind these places, which move on: all partitions side by side, in the order of time."""
    pages = {partition: deque(await _page(broker, name, partition, place)) for partition, place in places.items()}
    heads = [(page[0].record.time_ms, partition) for partition, page in pages.items() if page]
    heapify(heads)
    while heads:
        _, partition = heappop(heads)
        page = pages[partition]
        stored = page.popleft()
        places[partition] = stored.position
        yield stored
        if not page:
            page.extend(await _page(broker, name, partition, stored.position))
        if page:
            heappush(heads, (page[0].record.time_ms, partition))


async def _page(broker: Broker, name: str, partition: int, place: Position | None) -> list[Stored]:
    page = await broker.read(name, partition, place, PAGE)
    await readable(broker, name, page)  # where a library is missing, packs are shown as what they are
    return page
