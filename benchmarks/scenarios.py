"""What is measured, how much of it, which part of the engine limits it, and which ratio to that limit is aimed at."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.limits import Limit

ONE, PUBLISH, CONSUME = Limit("publish", (1,), ahead=0), Limit("publish"), Limit("consume")
LATENCY = Limit("latency", (100,))
MAX_TOTAL_BYTES = 200_000_000  # of large events fewer are taken, so that none of the servers holds more than this
MIN_EVENTS = 20


class Scenario(NamedTuple):
    """One line of the table; `measure` is the function of ours.py, where that has another name."""

    name: str
    measure: str
    limit: Limit
    target: float | None = None
    """The least ratio to the limit that is aimed at, on Redis."""
    share: float = 1
    """Of the events that are asked for."""
    events: int = 0
    """A number of its own instead."""
    size_bytes: int = 0
    long: bool = False
    """Only when asked for: it takes minutes, and gigabytes."""

    def amount(self, events: int, size_bytes: int) -> tuple[int, int]:
        """How many events of which size, when so many of such a size are asked for."""
        size_bytes = self.size_bytes or size_bytes
        wanted = self.events or max(MIN_EVENTS, int(events * self.share))
        return (wanted if self.long else min(wanted, max(MIN_EVENTS, MAX_TOTAL_BYTES // size_bytes))), size_bytes


def _scenario(name: str, limit: Limit, target: float | None = None, *, share: float = 1) -> Scenario:
    return Scenario(name, name, limit, target, share)


def _of_size(text: str, size_bytes: int) -> list[Scenario]:
    return [
        Scenario(f"publish-many-{text}", "publish-many", PUBLISH, size_bytes=size_bytes),
        Scenario(f"handle-{text}", "handle", CONSUME, size_bytes=size_bytes),
    ]


def _backlog(text: str, events: int) -> Scenario:
    return Scenario(f"backlog-{text}", "handle", CONSUME, events=events, long=events > 100_000)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        _scenario("publish-one", ONE, share=0.05),
        _scenario("publish-many", PUBLISH, 0.6),
        _scenario("publish-concurrent", PUBLISH, 0.4),
        _scenario("handle", CONSUME, 0.6),
        _scenario("handle-ordered", CONSUME, 0.8),
        _scenario("handle-batch", CONSUME, 0.8),
        _scenario("handle-all", CONSUME, 0.25),
        _scenario("pack-publish", PUBLISH),
        _scenario("pack-handle", CONSUME),
        _scenario("one-key-fails", CONSUME),
        _scenario("both", Limit("both"), 0.6),
        _scenario("latency", LATENCY, 0.5, share=0.01),  # four seconds, of 200,000
        _scenario("ten-groups", CONSUME, share=0.1),
        _scenario("256-partitions", Limit("consume", (1_024, 4_096), streams=256)),
        *_of_size("64B", 64),
        *_of_size("1KB", 1_024),
        *_of_size("8KB", 8_192),
        *_of_size("64KB", 65_536),
        _backlog("10k", 10_000),
        _backlog("100k", 100_000),
        _backlog("1M", 1_000_000),
        _backlog("10M", 10_000_000),
    )
}

CORE = [name for name, scenario in SCENARIOS.items() if scenario.target]
"""What the gate looks at, and the chart shows."""
