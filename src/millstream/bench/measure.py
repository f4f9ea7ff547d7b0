"""One scenario on one broker, beside the limit of its engine, and what bounds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import msgspec

from millstream.bench import advice, place
from millstream.bench.meter import Meter
from millstream.bench.scenarios import LEAST_BYTES, Scenario, sale
from millstream.brokers.urls import mask

Watch: TypeAlias = Callable[[str, int, int], None]
"""Told now and then what is being done, with how many events it is done, and of how many."""


class Report(msgspec.Struct, frozen=True):
    """What a machine is told; None where it does not apply, or nobody knows."""

    scenario: str
    broker: str
    events: int
    seconds: float
    rate: float
    """Events a second."""
    engine_rate: float | None
    ratio: float | None
    """Our rate to the engine's."""
    p50_ms: float | None
    p99_ms: float | None
    bytes_per_event: float | None


class Measured(NamedTuple):
    """A report, and what people are told beside it."""

    report: Report
    limit: str
    """How the engine's rate was measured; empty where it was not."""
    explanation: str


async def measure(scenario: Scenario, url: str, events: int, size_bytes: int, watch: Watch) -> Measured:
    """Measure in a place of its own, which is gone afterwards.

    Raises `Miscounted` unless every event was handled exactly once, and what the broker raises.
    """
    events = scenario.limited(events)
    data = msgspec.json.encode(sale(0, "-" * (size_bytes - LEAST_BYTES)))
    async with place.found(url) as here:
        watch("the engine alone", 0, events)
        limit = await here.engine.limit(scenario.load, events, data)
        waits = await here.engine.waits()
        meter = Meter(here.engine.cpu_s)
        result = await scenario.run(
            here.url,
            here.namespace,
            events,
            size_bytes,
            meter=meter,
            tell=lambda done: watch(scenario.name, done, events),
        )
        stored_bytes = result.bytes_per_event
        if here.file is not None:  # what the broker counts are events, not the pages that they lie in
            stored_bytes = here.file.stat().st_size / events
    engine_rate = limit.rate if limit else None
    report = Report(
        scenario.name,
        mask(url),
        events,
        result.cost.seconds,
        result.rate,
        engine_rate,
        result.rate / engine_rate if engine_rate else None,
        result.p50_ms,
        result.p99_ms,
        stored_bytes,
    )
    return Measured(report, limit.by if limit else "", advice.explain(result, limit, waits))
