"""What a result means: by what it was bound, said from what was measured.

A process that kept a core busy for most of the time is the bound, or two that did so between them. Where none did, the
time went into waiting, and what was measured apart from the run says for what: commits that wait for the disk; one
event alone, confirmed, against an empty command there and back.
"""

from __future__ import annotations

from millstream.bench.engine import Limit, Waits
from millstream.bench.meter import Cost
from millstream.bench.scenarios import LATENCY_RATE, Result

LEAST_S = 0.2  # what is shorter is not much more than the grain of its clocks
BUSY = 0.8  # of the time: nobody gets more of a core while he talks to another process
FAR_MS = 0.25  # an empty command within one machine takes a tenth of this
START_SHARE = 0.05  # of the time: what a start takes is worth a sentence
KEPT_UP = 0.9  # of a fixed rate
SYNC_SHARE = 0.5  # of the time
SYNC_TIMES = 2.0  # storing one event against an empty command: beyond this, the disk is what is waited for


def explain(result: Result, limit: Limit | None, waits: Waits) -> str:
    """One or two sentences."""
    if result.cost.seconds < LEAST_S:
        return f"Too short to say more, at {result.cost.seconds:.3f} s: give it more --events."
    if result.p50_ms is None:
        return f"{_bound(result.cost, waits)} {_shares(result.cost, result.events)}{_start(result)}"
    if result.rate < KEPT_UP * LATENCY_RATE:
        return f"Not a latency but the length of a queue: it could not keep up with {LATENCY_RATE} events a second."
    if limit is None or limit.p50_ms is None or limit.p99_ms is None:
        return "From the call of publish() to the handler."
    alone = f"p50 {limit.p50_ms:.2f} ms, p99 {limit.p99_ms:.2f} ms from the write to the wake-up"
    return f"From the call of publish() to the handler. The engine alone: {alone}."


def _bound(cost: Cost, waits: Waits) -> str:
    queued = (cost.queued_s or 0.0) / cost.seconds
    ours, theirs = cost.cpu_s / cost.seconds, (cost.server_cpu_s or 0.0) / cost.seconds
    if max(ours, theirs) >= BUSY:
        return "Bound by this process's CPU." if ours >= theirs else "Bound by the server's CPU."
    if ours + queued >= BUSY:
        return f"Bound by this machine's CPU: for {queued:.0%} of the time this process waited for a free core."
    if ours + theirs >= BUSY:
        return "Bound by the CPU of this process and of the server in turn: one waits for the other."
    return _waiting(cost, waits)


def _shares(cost: Cost, events: int) -> str:
    words = f"This process used {cost.cpu_s / cost.seconds:.0%} of a core, {_each(cost.cpu_s, events)}"
    if cost.server_cpu_s is None:
        return f"{words}."
    return f"{words}; the server {cost.server_cpu_s / cost.seconds:.0%}, {_each(cost.server_cpu_s, events)}."


def _start(result: Result) -> str:
    if result.start_ms is None or result.start_ms < START_SHARE * result.cost.seconds * 1_000:
        return ""
    return f" It took {result.start_ms:.0f} ms to the first event: more --events make that count less."


def _waiting(cost: Cost, waits: Waits) -> str:
    trip_ms, store_ms, commits_s = waits.trip_ms or 0.0, waits.store_ms or 0.0, waits.commits_s or 0.0
    if commits_s >= SYNC_SHARE * cost.seconds:
        alone = f"the commits of a bare loop take {commits_s:.2f} s, all of this {cost.seconds:.2f} s"
        return f"Bound by fsync: {waits.syncs}, and {alone}."
    if waits.syncs and store_ms > SYNC_TIMES * trip_ms > 0:
        alone = f"storing one event takes {store_ms:.2f} ms, an empty command {trip_ms:.2f} ms"
        return f"Bound by fsync: {waits.syncs}, and {alone}."
    if trip_ms >= FAR_MS:
        return f"Bound by the round trip: {trip_ms:.2f} ms for an empty command."
    return f"Not bound by one thing{_apart(cost, trip_ms, commits_s)}."


def _apart(cost: Cost, trip_ms: float, commits_s: float) -> str:
    """What was measured, where it does not say what bounds."""
    if trip_ms:
        busy_s = cost.cpu_s + (cost.queued_s or 0.0) + (cost.server_cpu_s or 0.0)
        idle = max(0.0, 1 - busy_s / cost.seconds)
        return f": for {idle:.0%} of the time neither side worked; an empty command takes {trip_ms:.2f} ms"
    return f": the commits of a bare loop take {commits_s / cost.seconds:.0%} of the time" if commits_s else ""


def _each(seconds: float, events: int) -> str:
    return f"{seconds / events * 1e6:.1f} µs an event"
