"""Figures: the medians of several runs, their ratio to the limit of the same run, and how they are shown.

A ratio says how near to the limit we are, 1 being as good: our rate to its rate, or its p50 to ours where latency is
what counts. A figure that could not be had is a line with the reason, never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

Found = dict[str, Any]
"""What one run printed: `rate` in events a second, `p50_ms` and `p99_ms` where the rate is fixed, and more."""

OURS = ("redis", "sqlite", "memory")
"""Who is Millstream, by its broker; everybody else is a peer."""


@dataclass(frozen=True)
class Line:
    """One line of the table: who did what how fast. None where something does not apply."""

    who: str
    scenario: str
    events: int = 0
    size: int = 0
    rate: float | None = None
    least: float | None = None
    most: float | None = None
    limited_by: str = ""
    """What the engine does at its limit: publish, consume, both, latency."""
    limit: float | None = None
    ratio: float | None = None
    target: float | None = None
    cpu_us: float | None = None
    start_ms: float | None = None
    """From the start of the worker until each group has handled an event."""
    drain_ms: float | None = None
    """From the last event handled until all is settled and the worker gone."""
    peak_mb: float | None = None
    grown_mb: float | None = None
    """By how much our process has grown since a tenth was done."""
    stored_bytes: float | None = None
    """What the server keeps of one event."""
    p50_ms: float | None = None
    p99_ms: float | None = None
    limit_p50_ms: float | None = None
    limit_p99_ms: float | None = None
    best: float | None = None
    """The ratio of our best run to the limit's best one: other work on the machine only ever takes time."""
    limit_swing: float | None = None
    """How many times as fast as its slowest run the limit was in its fastest: how restless the machine is."""
    missing: str = ""
    """Why there is no figure."""


def line(
    who: str,
    scenario: str,
    limited_by: str,
    runs: Sequence[Found],
    limits: Sequence[Found],
    target: float | None = None,
) -> Line:
    """The line of what was run several times, and of its limit in the same rounds."""
    fixed_rate = "p50_ms" in runs[0]
    rate, limit = middle(runs, "rate"), middle(limits, "rate")
    p50, limit_p50 = middle(runs, "p50_ms"), middle(limits, "p50_ms")
    above, below = (limit_p50, p50) if fixed_rate else (rate, limit)
    ours_at, limit_at = _speeds(runs), _speeds(limits)
    rates = [run["rate"] for run in runs]
    return Line(
        who,
        scenario,
        runs[0]["events"],
        runs[0]["size"],
        rate,
        min(rates),
        max(rates),
        limited_by,
        limit,
        above / below if above and below else None,
        target,
        middle(runs, "cpu_us"),
        middle(runs, "start_ms"),
        middle(runs, "drain_ms"),
        middle(runs, "peak_mb"),
        middle(runs, "grown_mb"),
        middle(runs, "stored_bytes"),
        p50,
        middle(runs, "p99_ms"),
        limit_p50,
        middle(limits, "p99_ms"),
        max(ours_at) / max(limit_at) if limit_at else None,
        max(limit_at) / min(limit_at) if limit_at else None,
    )


def middle(runs: Sequence[Found], name: str) -> float | None:
    """The median of what each run has under a name; None where they have nothing."""
    found = [run[name] for run in runs if name in run]
    return median(found) if found else None


def _speeds(runs: Sequence[Found]) -> list[float]:
    return [1 / run["p50_ms"] if "p50_ms" in run else run["rate"] for run in runs]


def _number(value: float | None) -> str:
    return f"{value:,.0f}" if value else ""


def _short(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _limit(line: Line) -> str:
    return _number(line.limit) if line.limit_p50_ms is None else f"{line.limit_p50_ms:.3f} ms"


COLUMNS: dict[str, Callable[[Line], str]] = {
    "": lambda line: line.who,
    "scenario": lambda line: line.scenario,
    "bytes": lambda line: _number(line.size),
    "events/s": lambda line: _number(line.rate),
    "least": lambda line: _number(line.least),
    "most": lambda line: _number(line.most),
    "limit": _limit,
    "ratio": lambda line: _short(line.ratio, 3),
    "target": lambda line: _short(line.target, 2),
    "CPU µs": lambda line: _short(line.cpu_us, 2),
    "start ms": lambda line: _number(line.start_ms),
    "drain ms": lambda line: _number(line.drain_ms),
    "MB": lambda line: _number(line.peak_mb),
    "stored B": lambda line: _number(line.stored_bytes),
    "p50 ms": lambda line: _short(line.p50_ms, 3),
    "p99 ms": lambda line: _short(line.p99_ms, 3),
}


def _cells(line: Line) -> list[str]:
    return [cell(line) for cell in COLUMNS.values()]


def table(lines: Iterable[Line]) -> str:
    """For a terminal: names to the left, numbers to the right; what is missing beneath."""
    lines = list(lines)
    rows = [list(COLUMNS), *(_cells(line) for line in lines if not line.missing)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in pairs).rstrip()
        for row in rows
        for pairs in [list(enumerate(zip(row, widths, strict=True)))]
    ]
    return "\n".join([*aligned, *_beneath(lines)])


def markdown(lines: Iterable[Line]) -> str:
    """For the documentation."""
    lines = list(lines)
    rule = ["---", "---", *["---:"] * (len(COLUMNS) - 2)]
    rows = [list(COLUMNS), rule, *(_cells(line) for line in lines if not line.missing)]
    return "\n".join(
        [*(f"| {' | '.join(row)} |" for row in rows), "", *(f"- {text}" for text in _beneath(lines))]
    ).rstrip()


def factors(lines: Sequence[Line], ours: str = "redis") -> list[str]:
    """How many times as fast as each of the others we are, where both did the same."""
    rates = {line.scenario: line.rate for line in lines if line.who == ours and line.rate}
    return [
        f"{line.scenario}: {rates[line.scenario] / line.rate:,.1f} × {line.who}"
        for line in lines
        if line.rate and line.who not in OURS and line.scenario in rates
    ]


def as_json(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Each line without what does not apply; rates as whole numbers, the rest to four digits."""
    return [
        {name: _rounded(value) for name, value in asdict(line).items() if value not in (None, "")} for line in lines
    ]


def _beneath(lines: Sequence[Line]) -> list[str]:
    missing = [f"no figure for {line.who} {line.scenario}: {line.missing}" for line in lines if line.missing]
    return [*factors(lines), *missing]


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value) if value >= 1_000 else round(value, 4)
