"""What a terminal shows: tables, JSON, lines, progress. The only file that knows rich, which is loaded when it draws."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeAlias

import click
import msgspec

from millstream.brokers.base import Stored
from millstream.cli.main import NotConfirmed
from millstream.clock import Clock
from millstream.errors import WireError
from millstream.wire import packs

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

    from millstream.demo.app import Progress as DemoProgress

Output: TypeAlias = Literal["table", "json", "jsonl"]
Row: TypeAlias = Mapping[str, Any]
"""Field names are those of the public API; values are what JSON can hold."""

NOTHING = "-"  # where there is nothing to show
LINE_S = 3.0  # between two lines of progress where there is no terminal
PICTURE_S = 0.1
_MSGPACK = b"\x80"  # from here on begins what holds several values: with such a byte no JSON begins
_GAP = 2  # between two columns
_ELASTIC = 16  # the least of an elastic column
_BOARD_ROWS = 5  # of airlines and alerts: the whole board fits into 24 lines

output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "jsonl"]),
    metavar="FORMAT",
    default="table",
    show_default=True,
    help="table, json or jsonl (JSON lines).",
)


def count(value: int | None) -> str:
    """A number; one that nobody knows is not 0."""
    return "?" if value is None else f"{value:,}"


def some(value: int) -> str:
    """A number that is mostly 0, which then needs no attention."""
    return f"{value:,}" if value else NOTHING


def size(value: int | None) -> str:
    """Bytes, for people."""
    if value is None:
        return "?"
    amount, unit = float(value), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:,.0f} {unit}" if unit == "B" else f"{amount:,.1f} {unit}"


def moment(value_ms: int | None) -> str:
    """A local time, for people."""
    return NOTHING if value_ms is None else f"{datetime.fromtimestamp(value_ms / 1000):%Y-%m-%d %H:%M:%S}"


def local(value: str | None) -> str:
    """A time for machines, turned into one for people."""
    return moment(int(datetime.fromisoformat(value).timestamp() * 1000) if value else None)


def lately(value_ms: int | None) -> str:
    """A local time, for people who look at a list: shorter for today."""
    if value_ms is None or not is_terminal(sys.stdout):
        return moment(value_ms)
    then, now = datetime.fromtimestamp(value_ms / 1000), datetime.fromtimestamp(Clock().now_ms() / 1000)
    return f"{then:%H:%M:%S}" if then.date() == now.date() else f"{then:%Y-%m-%d}"


def iso(value_ms: int) -> str:
    """A time for machines, in UTC."""
    return datetime.fromtimestamp(value_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def many(number: int, noun: str) -> str:
    """`1 event`, `2,000 events`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def span(seconds: float) -> str:
    """A length of time: `8s`, `3m 05s`, `2h 10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m {rest:02}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02}m"


def text(value: Any) -> str:
    """Anything on one line; what could steer a terminal is taken out."""
    words = NOTHING if value is None or value == "" else str(value)
    return words if words.isprintable() else "".join(c if c.isprintable() else " " for c in words)


def event(stored: Stored) -> dict[str, Any]:
    """An event as it travels and lies, for machines; what stands here can be published again.

    An entry that is no event has a `fault`, the beginning of what it holds, in place of `data`. The data of a whole pack are
    those of its events.
    """
    record = stored.record
    fields: dict[str, Any] = {
        "position": str(stored.position),
        "id": record.id,
        "type": record.type,
        "source": record.source,
        "time": iso(record.time_ms) if record.time_ms else None,
        "key": record.key,
        "headers": _json(record.headers) if record.headers else {},
    }
    if packs.is_pack(record):
        return fields | _events(stored)
    return fields | ({"data": _json(record.data)} if record.type else {"fault": record.data.decode(errors="replace")})


class Column(NamedTuple):
    """A column of a table, and which field it shows."""

    title: str
    field: str
    form: Callable[[Any], str] = text
    elastic: bool = False
    """Cut when the terminal is too narrow: one column at most."""
    spare: bool = False
    """Left out when the terminal is too narrow for it."""
    rare: bool = False
    """Left out of a table in which nobody has anything there."""

    @property
    def right(self) -> bool:
        """Numbers stand right."""
        return self.form in (count, some, size)


def rows(items: Sequence[Row], columns: Sequence[Column], output: Output, *, err: bool = False) -> None:
    """A list of things, on stdout; as a table with these columns, as JSON with all fields."""
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(items), indent=2), err=err)
    elif output == "jsonl":
        for item in items:
            click.echo(msgspec.json.encode(item), err=err)
    elif items:
        _table(items, columns, err)


def one(item: Row, lines: Sequence[Column], output: Output) -> None:
    """One thing, on stdout: a line for each field."""
    if output != "table":
        encoded = msgspec.json.encode(item)
        click.echo(msgspec.json.format(encoded, indent=2) if output == "json" else encoded)
        return
    width = max(len(line.title) for line in lines)
    for line in lines:
        click.echo(f"{_dim(line.title.ljust(width))}  {line.form(item.get(line.field))}")


def block(title: str, value: Any) -> None:
    """Something longer, below a title: JSON indented, text line by line. Nothing where there is nothing."""
    if not value:
        return
    if not isinstance(value, str):
        value = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    click.echo(f"\n{_dim(title)}")
    for line in value.strip().splitlines():
        click.echo(f"  {text(line) if line else ''}")


def note(words: str) -> None:
    """Something for people, beside the results."""
    click.echo(text(words), err=True)


def confirm(question: str, *, yes: bool) -> None:
    """Ask a terminal; elsewhere somebody must have said yes. Raises `NotConfirmed`."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise NotConfirmed("nothing was changed: this is no terminal to ask; say --yes to do it, --plan to only look")
    # asyncio's handler would only cancel a task that cannot run while we wait here for an answer.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if not click.confirm(question, err=True):
            raise NotConfirmed("nothing was changed")
    except click.Abort:
        click.echo(err=True)  # the cursor stands behind the question
        raise
    finally:
        signal.signal(signal.SIGINT, handler)


def is_terminal(stream: IO[str]) -> bool:
    """True where lines can be drawn over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class EventLines:
    """Events as they come, on stdout; as lines, as a JSON array, or as JSON lines."""

    def __init__(self, output: Output, clock: Clock) -> None:
        self._output = output
        self._clock = clock
        self._shown = 0
        self._terminal = is_terminal(sys.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._output == "json" and kind is not BrokenPipeError:
            click.echo("\n]" if self._shown else "[]")

    def show(self, event: Row) -> None:
        """One event. `fault` in place of `data` where an entry is no event."""
        if self._output == "table":
            click.echo(self._line(event))
        elif self._output == "jsonl":
            click.echo(msgspec.json.encode(event))
        else:
            click.echo((b",\n  " if self._shown else b"[\n  ") + msgspec.json.encode(event), nl=False)
        self._shown += 1

    def _line(self, event: Row) -> str:
        data = text(event["fault"] if "fault" in event else msgspec.json.encode(event["data"]).decode())
        kind = event["type"] or "(no event)"
        if not self._terminal:
            return "  ".join([*map(text, (event["time"], event["position"], kind, event["key"], event["id"])), data])
        width = shutil.get_terminal_size().columns
        when = f"{datetime.fromisoformat(event['time']).astimezone():%H:%M:%S}" if event["time"] else "-"
        before = f"{when}  {event['position']}  "
        after = f"  {text(event['key'])}  {text(event['id'])}  "
        return _dim(before) + _bold(text(kind)) + _dim(after) + _cut(data, width - len(before + kind + after))


class Progress:
    """How far long work is, on stderr: a bar on a terminal, elsewhere a line every few seconds."""

    def __init__(self, doing: str, unit: str, clock: Clock, total: int | None = None) -> None:
        self._doing = doing
        self._unit = unit
        self._clock = clock
        self._total = total
        self._begun_s = self._shown_s = clock.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if is_terminal(sys.stderr):
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = TextColumn(self._doing), BarColumn(24), TextColumn("{task.fields[words]}", markup=False)
            self._bar = Bar(*columns, console=_console(err=True), auto_refresh=False, transient=True)
            self._bar.start()
            self._bar.add_task("", total=None, words="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, part: float | None = None) -> None:
        """So many are done; `part` of 1 of the whole, where the total is not known in events."""
        now_s = self._clock.monotonic()
        if now_s - self._shown_s < (PICTURE_S if self._bar is not None else LINE_S):
            return
        self._shown_s = now_s
        if part is None and self._total:
            part = done / self._total
        words = self._words(done, part, now_s - self._begun_s)
        if self._bar is not None:
            self._bar.update(0, total=None if part is None else 1.0, completed=part or 0.0, words=words)
            self._bar.refresh()
        else:
            click.echo(f"{self._doing} {words}", err=True)

    def summary(self, done: int) -> str:
        """How many in which time, at which rate."""
        elapsed_s = self._clock.monotonic() - self._begun_s
        return f"{many(done, self._unit)} in {elapsed_s:.2f} s, {done / max(elapsed_s, 0.001):,.0f}/s"

    def _words(self, done: int, part: float | None, elapsed_s: float) -> str:
        words = f"{many(done, self._unit)}  {done / elapsed_s:,.0f}/s"
        return words if not part else f"{words}  {part:.0%}  {span(elapsed_s * (1 - part) / part)} left"


class Board:
    """The demo: a live picture on a terminal, elsewhere a line every few seconds on stderr."""

    def __init__(self, *, live: bool) -> None:
        self._drawn = live
        self._live: Live | None = None
        self._said_s = 0.0

    def __enter__(self) -> Self:
        if self._drawn:
            from rich.live import Live

            self._live = Live(console=_console(), auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, at: DemoProgress) -> None:
        """The picture as it is now."""
        if self._live is not None:
            self._live.update(_picture(at), refresh=True)
        elif at.elapsed_s - self._said_s >= LINE_S:
            self._said_s = at.elapsed_s
            groups = ", ".join(f"{row.group} {row.done:,} done" for row in at.groups)
            note(f"{at.phase}: {at.published:,} of {at.events:,} events, {at.rate:,.0f}/s; {groups}")


def _picture(at: DemoProgress) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    when = f"  {at.time:%Y-%m-%d %H:%M}" if at.time else ""
    head = Text.assemble(("Flights from New York", "bold"), when, (f"  {at.phase}", "dim"))
    bar = Table.grid(padding=(0, 2))
    numbers = f"{at.published:,} of {at.events:,} events  {at.rate:,.0f}/s  {span(at.elapsed_s)}"
    bar.add_row(ProgressBar(at.events, at.published, width=24), numbers)
    airports = _grid("AIRPORT", "DEPARTED", "LATE", "LANDED", "CANCELLED", "LATEST")
    for airport in at.airports:
        counts = map(count, (airport.departed, airport.late, airport.landed, airport.cancelled))
        airports.add_row(airport.airport, *counts, Text(text(airport.latest)))
    groups = _grid("GROUP", "DONE", "LAG", "PENDING", "RETRIED", "DEAD", "REPLAYED")
    for group in at.groups:
        style = "red" if group.dead else None
        counts = map(count, (group.done, group.lag, group.pending, group.retried, group.dead, group.replayed))
        groups.add_row(group.group, *counts, style=style)
    carriers = _grid("AIRLINE", "FLIGHTS", "LATE", "MEAN")
    for carrier in at.carriers[:_BOARD_ROWS]:
        mean = f"{carrier.mean_delay_min:.1f} min"
        carriers.add_row(carrier.carrier, count(carrier.departures), count(carrier.late), mean)
    alerts = _grid("ALERTS")
    for alert in at.alerts[:_BOARD_ROWS]:
        alerts.add_row(Text(text(alert)))
    below = Table.grid(padding=(0, 4))
    below.add_row(carriers, alerts)
    return Group(head, bar, "", airports, "", groups, "", below, "")


def _grid(*titles: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="bold")
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index == 0 or title == "LATEST" else "right", no_wrap=True)
    return table


def _events(stored: Stored) -> dict[str, Any]:
    try:
        return {"data": [_json(event.data) for event in packs.read(stored.record, stored.position.offset)]}
    except WireError as error:
        return {"fault": str(error)}


def _json(data: bytes) -> Any:
    """JSON as it is, number for number; MessagePack as JSON; other bytes, which a foreign producer may write, as text."""
    try:
        if data[:1] >= _MSGPACK:
            return msgspec.Raw(msgspec.json.encode(msgspec.msgpack.decode(data)))
        msgspec.json.decode(data)
    except (ValueError, TypeError, msgspec.MsgspecError):
        return data.decode(errors="replace")
    return msgspec.Raw(data)


def _table(items: Sequence[Row], columns: Sequence[Column], err: bool) -> None:
    columns = [
        column
        for column in columns
        if not column.rare or any(column.form(item.get(column.field)) != NOTHING for item in items)
    ]
    cells = [[column.form(item.get(column.field)) for column in columns] for item in items]
    if is_terminal(sys.stderr if err else sys.stdout):
        _draw_table(cells, columns, err)
        return
    # Nothing is cut, drawn or wrapped: the reader is a program or a file.
    lines = [[column.title for column in columns], *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        click.echo("  ".join(padded).rstrip(), err=err)


def _draw_table(cells: Sequence[Sequence[str]], columns: Sequence[Column], err: bool) -> None:
    from rich.cells import cell_len
    from rich.text import Text

    console, table = _console(err=err), _grid()
    texts = list(zip([column.title for column in columns], *cells, strict=True))
    widths = [max(map(cell_len, text)) for text in texts]
    shown = list(range(len(columns)))
    room = console.width - _GAP * (len(columns) - 1)
    for index in reversed(range(len(columns))):
        wanted = sum(min(widths[i], _ELASTIC) if columns[i].elastic else widths[i] for i in shown)
        if wanted > room and columns[index].spare:
            shown.remove(index)
            room += _GAP
    for index in shown:
        column = columns[index]
        others = sum(widths[i] for i in shown if i != index)
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=True,
            max_width=max(room - others, _ELASTIC) if column.elastic else None,
        )
    for line in cells:
        table.add_row(*(Text(line[index]) for index in shown))
    console.print(table)


def _console(*, err: bool = False) -> Console:
    from rich.console import Console

    file = sys.stderr if err else sys.stdout
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(file=file, force_terminal=is_terminal(file), color_system=None if plain else "auto", highlight=False)


def _dim(words: str) -> str:
    return f"\x1b[2m{words}\x1b[0m" if _coloured() else words


def _bold(words: str) -> str:
    return f"\x1b[1m{words}\x1b[0m" if _coloured() else words


def _coloured() -> bool:
    return is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")


def _cut(words: str, width: int) -> str:
    return words if len(words) <= width else words[: max(width - 1, 0)] + "…"
