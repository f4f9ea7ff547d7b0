"""`bench`: how fast it is here, beside what the engine can do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

import click
import msgspec

from millstream.app import loop_factory
from millstream.bench import place
from millstream.bench.measure import Measured, measure
from millstream.bench.scenarios import LEAST_BYTES, SCENARIOS, Scenario
from millstream.cli import show, target
from millstream.cli.main import Command, Given, Mistake, Refused
from millstream.cli.show import Column, Output
from millstream.clock import Clock
from millstream.errors import BadSetting
from millstream.units import MAX_EVENT_BYTES, size_bytes

MAX_EVENTS = 100_000_000  # each is counted in a byte of its own
ALL = "all"

_FIGURES = (
    Column("SCENARIO", "scenario"),
    Column("EVENTS", "events", show.count),
    Column("SECONDS", "seconds", show.some),
    Column("EVENTS/S", "rate", show.some),
    Column("ENGINE/S", "engine_rate", show.some),
    Column("RATIO", "ratio", show.some),
    Column("P50 MS", "p50_ms", show.some),
    Column("P99 MS", "p99_ms", show.some),
    Column("B/EVENT", "bytes_per_event", show.some),
)
_DIGITS = {"seconds": 3, "ratio": 2, "p50_ms": 2, "p99_ms": 2}
"""Behind the point; of all other figures none."""


def _size(context: click.Context, option: click.Parameter, value: str) -> int:
    try:
        size = size_bytes(int(value) if value.isdecimal() else value)
    except BadSetting as error:
        raise click.BadParameter(str(error), context, option) from None
    if not LEAST_BYTES <= size <= MAX_EVENT_BYTES:
        raise click.BadParameter(f"{value}: from {LEAST_BYTES}B to 1MB.", context, option)
    return size


@click.command(cls=Command)
@click.argument("names", nargs=-1, required=True, metavar="SCENARIO…")
@click.option(
    "--events", type=click.IntRange(1, MAX_EVENTS), metavar="N", default=100_000, show_default=True, help="How many."
)
@click.option("--size", callback=_size, metavar="SIZE", default="200B", show_default=True, help="Of an event, as JSON.")
@click.option("--yes", is_flag=True, help="Run it, whatever advises against it.")
@show.output_option
@click.pass_obj
def bench(given: Given, names: tuple[str, ...], events: int, size: int, yes: bool, output: Output) -> None:
    """Measure how fast it is here, beside what the engine can do.

    \b
    Scenarios: publish-many publish-concurrent handle handle-ordered
    handle-batch both latency pack-publish pack-handle, or all.

    Each runs in a namespace of its own, on SQLite in a file of its own beside the one that is named; nothing of it
    stays, and what a killed run has left, the next one removes. There are no figures unless every event was handled
    exactly once.

    ENGINE is what the engine itself does with the same events in the same minute, and RATIO how much of it is reached.
    Refuses where memory or disk may not suffice, where the server holds keys of others, and where others work on it.
    """
    chosen = _chosen(names)
    url = target.find(given).url
    logging.getLogger("millstream").setLevel(logging.ERROR)  # a server that keeps nothing on disk is fine here
    with _Watch() as watch:
        measured = target.run(lambda: _measure(chosen, url, events, size, yes, watch), loop_factory())
    _show(measured, output)


def _chosen(names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names, in the order of the table."""
    for name in names:
        if name != ALL and name not in SCENARIOS:
            raise Mistake(f"There is no scenario {name!r}; there are: {', '.join(SCENARIOS)}, {ALL}.")
    return [scenario for name, scenario in SCENARIOS.items() if name in names or ALL in names]


async def _measure(
    scenarios: Sequence[Scenario], url: str, events: int, size: int, yes: bool, watch: _Watch
) -> list[Measured]:
    against = await place.objections(url, events, size, _say)
    if against and not yes:
        raise Refused(f"nothing was run: {'; '.join(against)}; --yes runs it all the same")
    return [await measure(scenario, url, events, size, watch.show) for scenario in scenarios]


def _say(words: str) -> None:
    click.echo(words, err=True)


class _Watch:
    """Shows how far each part of the work is."""

    def __init__(self) -> None:
        self._clock = Clock()
        self._doing = ""
        self._shown = ExitStack()
        self._progress: show.Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def show(self, doing: str, done: int, events: int) -> None:
        """So many events are done; another part of the work begins where `doing` changes."""
        if self._progress is None or doing != self._doing:
            self._shown.close()
            self._doing = doing
            self._progress = self._shown.enter_context(show.Progress(doing, "event", self._clock, events))
        self._progress.show(done)


def _show(measured: Sequence[Measured], output: Output) -> None:
    reports = [msgspec.to_builtins(found.report) for found in measured]
    if output == "table":
        show.rows([_rounded(report) for report in reports], _FIGURES, output)
        click.echo()
    elif len(reports) == 1:
        show.one(reports[0], (), output)
    else:
        show.rows(reports, (), output)
    for report, limit, explanation in measured:
        words = f"{report.scenario}: {explanation}" + (f" Engine: {limit}." if limit else "")
        click.echo(words, err=output != "table")


def _rounded(report: dict[str, Any]) -> dict[str, Any]:
    return {
        name: round(value, _DIGITS.get(name)) if isinstance(value, float) else value for name, value in report.items()
    }
