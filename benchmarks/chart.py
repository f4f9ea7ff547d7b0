"""The chart of the documentation: bars, by hand as SVG, readable on light and on dark pages.

One section for each thing that the engine can do at its limit; its bars have one scale, which begins at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from benchmarks.figures import Line

WIDTH, NAMES, FIGURES = 800, 270, 110
STEP, BAR, HEADING = 24, 15, 34

SECTIONS = {"publish": "Publish", "consume": "Handle and settle", "both": "Publish and handle at once"}

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .title { font-weight: 600 }
  .ours { fill: #0b7285 } .limit { fill: #adb5bd } .peer { fill: #c2571a }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .ours { fill: #3bc9db } .limit { fill: #5c636a } .peer { fill: #f08c4a }
  }
"""


class Bar(NamedTuple):
    """One bar: events a second, and whose they are: `ours`, `limit` or `peer`."""

    rate: float
    name: str
    kind: str


def chart(lines: Sequence[Line], ours: str = "redis") -> str:
    """Events a second of `ours`, its limit, and all others. Lines without a rate, or of a fixed one, are left out."""
    top, drawn = 0, []
    for limited_by, title in SECTIONS.items():
        section = [line for line in lines if line.limited_by == limited_by and line.rate]
        if section:
            bars = _bars(section, ours)
            drawn += [_text(0, top + 20, f"{title}, events a second", "title"), *_drawn(bars, top + HEADING)]
            top += HEADING + STEP * len(bars)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 8}" role="img">'
    title = "<title>Events a second: Millstream, the engine's limit, and others</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", *drawn, "</svg>\n"])


def _bars(section: Sequence[Line], ours: str) -> list[Bar]:
    """The fastest first. Where lines have different limits, the best one stands for the engine."""
    limits = [line.limit for line in section if line.limit]
    bars = [Bar(max(limits), "the engine's limit, in C", "limit")] if limits else []
    for line in section:
        kind = "ours" if line.who == ours else "peer"
        bars.append(Bar(line.rate or 0, f"{'millstream' if kind == 'ours' else line.who}: {line.scenario}", kind))
    return sorted(bars, reverse=True)


def _drawn(bars: Sequence[Bar], top: int) -> Iterable[str]:
    for place, bar in enumerate(bars):
        y = top + STEP * place
        width = max(1, round((WIDTH - NAMES - FIGURES) * bar.rate / bars[0].rate))
        yield _text(NAMES - 8, y + 12, bar.name, anchor="end")
        yield f'<rect class="{bar.kind}" x="{NAMES}" y="{y}" width="{width}" height="{BAR}" rx="2"/>'
        yield _text(NAMES + width + 8, y + 12, f"{bar.rate:,.0f}")


def _text(x: int, y: int, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
