"""`run`: the handlers of an app. `demo`: real flight events, live."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click

from millstream.app import App
from millstream.brokers.urls import mask
from millstream.cli import show, target
from millstream.cli.main import DONE, PART, Command, Given, Mistake, innermost
from millstream.cli.show import Column, Output
from millstream.demo.app import DEFAULT_SPEED, DemoOptions, Summary, play
from millstream.errors import MillstreamError
from millstream.handlers.router import Router
from millstream.units import seconds
from millstream.worker import collector
from millstream.worker.schedule import schedules
from millstream.worker.supervisor import is_child

MAX_WORKERS = 256  # processes of one machine
MAX_EVENTS = 1_000_000  # the demo remembers the position of each

_FIGURES = (
    Column("GROUP", "group"),
    Column("HANDLED", "handled", show.count),
    Column("RETRIED", "retried", show.count),
    Column("DIED", "died", show.count),
    Column("REPLAYED", "replayed", show.count),
    Column("DEAD", "dead", show.count),
    Column("LOST", "lost", show.count),
)


@click.command(cls=Command)
@click.argument("name", metavar="[APP]", required=False)
@click.option(
    "--workers", type=click.IntRange(1, MAX_WORKERS), metavar="N", default=1, show_default=True, help="Processes."
)
@click.option("--only", multiple=True, metavar="GROUP", help="Only this group; may be repeated.")
@click.option(
    "--grace", metavar="DURATION", help="How long handlers may take to finish after a stop signal, as in 25s."
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    metavar="LEVEL",
    default="info",
    show_default=True,
    help="Log debug, info, warning or error, on stderr.",
)
@click.pass_obj
def run(given: Given, name: str | None, workers: int, only: tuple[str, ...], grace: str | None, log_level: str) -> int:
    """Run the handlers of an app, as in `millstream run shop.main:app --workers 4`.

    SIGTERM or Ctrl-C stops it: running handlers finish, what else was fetched is handed back. A second signal cuts them
    off. Exit code 0: all work was finished; 1: some was cut off by the end of the grace.
    """
    meant = target.find(given, name, announce=not is_child())
    if meant.app is None:
        raise Mistake("Run which app? Give one, as in: millstream run shop.main:app")
    app = meant.app
    if grace is not None:
        app.configure(grace=seconds(grace))
    chosen = _chosen(app, only)
    if not is_child():
        _say_what_runs(app, chosen)
    _log(log_level, tracebacks=given.debug)
    try:
        with collector.relaxed():
            return DONE if app.run(workers=workers, only=chosen) else PART
    except Exception as error:
        if isinstance(innermost(error), MillstreamError):
            raise
        raise click.ClickException(f"{app.name} ended: {target.blame(innermost(error))}") from error


@click.command(cls=Command)
@click.option(
    "--events", type=click.IntRange(1, MAX_EVENTS), metavar="N", default=2_000, show_default=True, help="How many."
)
@click.option("--speed", default=f"{DEFAULT_SPEED:g}", metavar="X|max", show_default=True, help="Times real time.")
@click.option("--keep", is_flag=True, help="Keep everything, and say how other commands can look at it.")
@show.output_option
@click.pass_obj
def demo(given: Given, events: int, speed: str, keep: bool, output: Output) -> int:
    """Watch real flight events flow: New York, January 2013.

    Three groups handle them: departure boards, delays, and alerts, whose handler fails now and then on purpose. One event
    becomes a dead letter and is replayed. At the end a second reader says what the broker knows: published, handled,
    retried, dead, replayed, lost. Uses a new SQLite file, unless --broker names another place.
    """
    options = DemoOptions(events=events, broker=given.broker, speed=_speed(speed), keep=keep)
    click.echo(f"broker {mask(given.broker) if given.broker else 'sqlite, a new file'}", err=True)
    _log("error", tracebacks=given.debug)
    with show.Board(live=output == "table" and show.is_terminal(sys.stdout)) as board:
        summary = target.run(lambda: play(options, board.show))
    _show_summary(summary, output)
    return PART if any(figures.lost for figures in summary.groups.values()) else DONE


def _chosen(app: App, only: tuple[str, ...]) -> frozenset[str]:
    """The names of the groups to run; empty for all."""
    groups = app.groups()
    if not groups and not app.listeners() and all(isinstance(part, Router) for part in app.parts()):
        raise Mistake(f"{app.name} has no handlers: give App(…, include=[router]) a router with subscribers.")
    names = {name: group.name for group in groups for name in (group.name, f"{group.stream.name}/{group.name}")}
    wanted = [name for name in ",".join(only).split(",") if name]
    for name in wanted:
        if name not in names:
            known = ", ".join(sorted(set(names.values())))
            raise Mistake(f"{app.name} has no group {name!r}; it has: {known or 'none'}.")
    return frozenset(names[name] for name in wanted)


def _say_what_runs(app: App, chosen: frozenset[str]) -> None:
    for group in app.groups():
        if not chosen or group.name in chosen:
            show.note(f"group {group.stream.name}/{group.name}: {', '.join(group.routes)}")
    for listener in () if chosen else app.listeners():
        show.note(
            f"listener {listener.signature.name} of {listener.stream.name}: {', '.join(listener.signature.types)}"
        )
    for schedule in schedules(app.parts()):
        show.note(f"schedule {schedule.name}: {schedule.timetable.line} to {schedule.stream.name}")


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise Mistake(f"--speed {text}: a number above zero, or max.")
    return speed


class _OneLine(logging.Formatter):
    """A record on one line; an error's traceback only when it was asked for."""

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """As above."""
        if self._tracebacks:
            return super().format(record)
        error = record.exc_info[1] if record.exc_info else None
        line = f"{self.formatTime(record, self.datefmt)} {record.levelname.lower():7} {record.getMessage()}"
        return show.text(line if error is None else f"{line}: {target.blame(error)}")


def _log(level: str, *, tracebacks: bool) -> None:
    """Log to stderr, unless the app has set up logging itself."""
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine(tracebacks=tracebacks))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _show_summary(summary: Summary, output: Output) -> None:
    if output != "table":
        show.one(summary.as_json(), (), output)
        return
    figures: list[dict[str, Any]] = [
        {"group": name, **{column.field: getattr(found, column.field) for column in _FIGURES[1:]}}
        for name, found in summary.groups.items()
    ]
    show.rows(figures, _FIGURES, output)
    lost = sum(found.lost for found in summary.groups.values())
    verdict = "nothing lost" if not lost else f"{lost:,} LOST"
    click.echo(
        f"{summary.published:,} events published, {summary.alerts:,} alerts sent, {verdict}, in {summary.seconds:.1f} s"
    )
    if summary.keep_hint:
        click.echo(f"Look around with:\n  {summary.keep_hint}\n  millstream group ls")
