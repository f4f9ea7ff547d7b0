"""Our side: one scenario in a process of its own, which prints one JSON object.

    python -m benchmarks.ours SCENARIO URL [--events 200000] [--size 200] [--partitions 8] [--groups 1]

The scenarios are those of `millstream bench`, and some that few users would ask for. The broker must be empty.
`cpu_us` is the CPU time of this process per event, which a busy machine changes less than the rate; `start_ms` goes by
from the start of the worker until each group has handled an event, `drain_ms` from the last event until the worker is
gone, and both are part of the rate; `grown_mb` is by how much the process has grown since a tenth was done. Nothing is
printed, and the exit code is not 0, unless each event was handled exactly once (in each group), and the broker says that
nothing is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import uvloop

from millstream import Delivery, Depends, Retry, Router, Stream
from millstream.bench.scenarios import GROUP, KEYS, SCENARIOS, Result, Run, Sale, Scenario, one_by_one, publish
from millstream.handlers.subscriber import Call, Handle
from millstream.stream import Position

POISON = 7
GROUPS = 10
MB = 1 << 10  # of the kilobytes in which Linux tells memory


async def one_after_the_other(run: Run, events: list[Sale]) -> list[Position]:
    """One awaited call after the other."""
    return [await run.app.publish(event, to=run.stream) for event in events]


def with_everything(run: Run) -> None:
    """A handler with the delivery, a dependency that is a generator, a timeout, and one middleware around it."""
    router, count = Router(middleware=[tallied]), run.counted()

    @router.subscriber(run.stream, GROUP, timeout="30s")
    async def handle(event: Sale, delivery: Delivery, session: Annotated[object, Depends(a_session)]) -> None:
        count.handled(event)

    run.app.include(router)


def tallied(handle: Handle) -> Handle:
    calls = 0

    async def inner(call: Call) -> None:
        nonlocal calls
        calls += 1
        await handle(call)

    return inner


def a_session() -> Iterator[object]:
    yield None


def with_a_failing_key(run: Run) -> None:
    """The events of one key fail, and wait."""
    count = run.counted(failing=len(range(POISON, run.events, KEYS)))
    failing = f"c{POISON:03}"

    @run.app.subscriber(run.stream, GROUP, timeout="never", retry=Retry(first="1h"))
    async def handle(event: Sale) -> None:
        if event.who == failing:
            raise RuntimeError("nothing helps")
        count.handled(event)


def in_groups(groups: int, run: Run) -> None:
    """Several groups, each of which handles every event."""
    for number in range(groups):
        one_by_one(run, f"{GROUP}-{number}")


def spread(partitions: int) -> Stream[Sale]:
    return Stream("spread", Sale, key="who", partitions=partitions)


ONE_BY_ONE, ORDERED = SCENARIOS["handle"], SCENARIOS["handle-ordered"]

MEASURES: dict[str, Scenario] = SCENARIOS | {
    scenario.name: scenario
    for scenario in (
        Scenario("publish-one", "publish", partial(publish, one_after_the_other)),
        replace(ONE_BY_ONE, name="handle-all", subscribe=with_everything),
        replace(ONE_BY_ONE, name="ten-groups", subscribe=partial(in_groups, GROUPS)),
        replace(ORDERED, name="one-key-fails", subscribe=with_a_failing_key),
        replace(ORDERED, name="256-partitions", stream=spread(256)),
    )
}


class Memory:
    """What this process takes; nothing is known where /proc is missing."""

    def __init__(self, events: int) -> None:
        self._begins_at = events // 10
        self._began_mb: float | None = None

    def look(self, done: int) -> None:
        if self._began_mb is None and done >= self._begins_at:
            self._began_mb = self._mb("VmRSS")

    def found(self) -> dict[str, float | None]:
        now_mb = self._mb("VmRSS")
        grown_mb = None if self._began_mb is None or now_mb is None else now_mb - self._began_mb
        peak_mb = self._mb("VmHWM")  # ru_maxrss would count the parent's too
        return {"peak_mb": _rounded(peak_mb, 1), "grown_mb": _rounded(grown_mb, 1)}

    def _mb(self, name: str) -> float | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / MB


def found(result: Result, size_bytes: int, memory: Memory) -> dict[str, Any]:
    """What is printed: only what applies."""
    cost = result.cost
    every = {
        "events": result.events,
        "size": size_bytes,
        "seconds": round(cost.seconds, 6),
        "rate": round(result.rate),
        "cpu_us": round(cost.cpu_s / cost.seconds / result.rate * 1e6, 3),
        "start_ms": _rounded(result.start_ms, 1),
        "drain_ms": _rounded(result.drain_ms, 1),
        "p50_ms": _rounded(result.p50_ms, 4),
        "p99_ms": _rounded(result.p99_ms, 4),
        **memory.found(),
    }
    return {name: value for name, value in every.items() if value is not None}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=MEASURES)
    parser.add_argument("url")
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--partitions", type=int, help="of a stream with a key, in place of the scenario's")
    parser.add_argument("--groups", type=int, help="that handle every event one by one, in place of the scenario's")
    options = parser.parse_args()
    scenario = MEASURES[options.scenario]
    if options.partitions:
        scenario = replace(scenario, stream=spread(options.partitions))
    if options.groups:
        scenario = replace(scenario, subscribe=partial(in_groups, options.groups))
    logging.getLogger("millstream").setLevel(logging.ERROR)  # its warning that our server keeps nothing on disk
    memory = Memory(options.events)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(scenario.run(options.url, "", options.events, options.size, tell=memory.look))
    print(json.dumps(found(result, options.size, memory)))


if __name__ == "__main__":
    main()
