"""Our side: each scenario is one function, run in a process of its own that prints one JSON object.

    python -m benchmarks.ours SCENARIO URL [--events 200000] [--size 200]

The broker must be empty. `seconds` is from the first event published to the last position known, or from the start of
the worker to the last event handled; `cpu_us` is the CPU time of this process per event, which a busy machine changes
less. Nothing is printed, and the exit code is 1, unless each event was handled exactly once (in each group), and the
broker says that nothing is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import resource
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import uvloop

from millstream import App, Batch, Delivery, Depends, Event, Pack, Retry, Router, Stream
from millstream.bench.prose import VARIANTS, texts
from millstream.handlers.subscriber import Call, Handle

KEYS, POISON = 1_000, 7
TASKS = 1_000
FRAME_BYTES = len('{"number":100000,"customer":"c-000000","remark":""}')
PER_SECOND = 500  # the fixed rate at which latency is measured
WITHIN_S = 600.0
FILL_BYTES = 2 << 20  # of events that are prepared at once for a backlog: memory stays small however long it is


class Sale(Event, type="bench.sale"):
    number: int
    customer: str
    remark: str


sales = Stream("sales", Sale)
visits = Stream("visits", Sale, key="customer")
spread = Stream("spread", Sale, key="customer", partitions=256)
packed = Stream("packed", Sale, pack=Pack())


@dataclass
class Run:
    """One measurement: what is asked for, and what came out."""

    url: str
    events: int
    size_bytes: int
    deliveries: int = 0
    """How often a handler is called for these events; the number of events where it is once each."""
    seconds: float = 0
    cpu_s: float = 0
    waits_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.remarks = texts(self.size_bytes - FRAME_BYTES)

    def sale(self, number: int) -> Sale:
        """An event of the wanted size as JSON, but for a digit or two of its number."""
        return Sale(number=number, customer=f"c-{number % KEYS:06}", remark=self.remarks[number % VARIANTS])

    def sales(self, begin: int = 0) -> Iterator[Sale]:
        return map(self.sale, range(begin, self.events))

    @contextmanager
    def measured(self) -> Iterator[None]:
        cpu_s, began = time.process_time(), time.perf_counter()
        yield
        self.seconds, self.cpu_s = time.perf_counter() - began, time.process_time() - cpu_s

    def as_json(self) -> dict[str, Any]:
        count = self.deliveries or self.events
        found = {
            "events": self.events,
            "size": self.size_bytes,
            "seconds": round(self.seconds, 6),
            "rate": round(count / self.seconds),
            "cpu_us": round(self.cpu_s / count * 1e6, 3),
            "peak_mb": round(peak_mb()),
        }
        if self.waits_s:
            waits = sorted(self.waits_s)
            found["p50_ms"] = round(waits[len(waits) // 2] * 1e3, 4)
            found["p99_ms"] = round(waits[len(waits) * 99 // 100] * 1e3, 4)
        return found


def peak_mb() -> float:
    """The most memory that this process had. Linux counts the parent's in `ru_maxrss`, so it is asked elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # macOS counts bytes
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / (1 << 10)


class Count:
    """How often each event was handled; `finished` is set with the last one."""

    def __init__(self, events: int, failing: int = 0) -> None:
        self.times = bytearray(events)
        self.expected = self.left = events - failing
        self.finished = asyncio.Event()

    def handled(self, number: int) -> None:
        self.times[number] += 1
        self.left -= 1
        if not self.left:
            self.finished.set()


# --- publishing


async def publish_one(run: Run) -> None:
    """One awaited call after the other."""
    async with publishing(run) as app:
        for sale in run.sales():
            await app.publish(sale, to=sales)


async def publish_many(run: Run, stream: Stream[Sale] = sales) -> None:
    """One call for all; the events exist before it begins."""
    prepared = list(run.sales())
    async with publishing(run, stream) as app:
        positions = await app.publish_many(prepared, to=stream)
    check("published", [len(set(positions))], run.events)


async def publish_concurrent(run: Run) -> None:
    """A thousand tasks, each awaiting a call of its own for one event."""
    prepared = run.sales()

    async def publish_some(app: App) -> None:
        for sale in prepared:
            await app.publish(sale, to=sales)

    async with publishing(run) as app, asyncio.TaskGroup() as tasks:
        for _ in range(TASKS):
            tasks.create_task(publish_some(app))


@asynccontextmanager
async def publishing(run: Run, stream: Stream[Sale] = sales) -> AsyncIterator[App]:
    """Measure what publishes all events of a run, and check that they are stored."""
    app = App("bench", broker=run.url, streams=[stream])
    async with app:
        with run.measured():
            yield app
        (info,) = await app.broker.admin.streams()
        if stream.pack is None:
            check("stored", [info.events], run.events)


# --- handlers: each adds one group to an app

AddGroup = Callable[[App, Count, str], None]


def add_alone(app: App, count: Count, group: str, stream: Stream[Sale] = sales) -> None:
    """A handler that takes the event alone."""

    @app.subscriber(stream, group, timeout="never")
    async def handle(event: Sale) -> None:
        count.handled(event.number)


def add_batch(app: App, count: Count, group: str) -> None:
    """A handler that takes up to 500 events at once."""

    @app.subscriber(sales, group, batch=Batch(500), timeout="never")
    async def handle(events: list[Sale]) -> None:
        for event in events:
            count.handled(event.number)


def add_all(app: App, count: Count, group: str) -> None:
    """A handler with the delivery, a dependency that is a generator, a timeout, and one middleware around it."""
    router = Router(middleware=[counted])

    @router.subscriber(sales, group, timeout="30s")
    async def handle(event: Sale, delivery: Delivery, session: Annotated[object, Depends(a_session)]) -> None:
        count.handled(event.number)

    app.include(router)


def counted(handle: Handle) -> Handle:
    calls = 0

    async def inner(call: Call) -> None:
        nonlocal calls
        calls += 1
        await handle(call)

    return inner


def a_session() -> Iterator[object]:
    yield None


def add_failing(app: App, count: Count, group: str) -> None:
    """In the order of a thousand keys; the events of one key fail, and wait."""

    @app.subscriber(visits, group, timeout="never", retry=Retry(first="1h"))
    async def handle(event: Sale) -> None:
        if event.number % KEYS == POISON:
            raise RuntimeError("nothing helps")
        count.handled(event.number)


# --- handling


async def handle(run: Run, add: AddGroup = add_alone, *, groups: int = 1, failing_key: bool = False) -> None:
    """From the start of the worker until each group has handled all; the backlog is there before."""
    failing = len(range(POISON, run.events, KEYS)) if failing_key else 0
    app = App("bench", broker=run.url)
    counts = [Count(run.events, failing) for _ in range(groups)]
    for number, count in enumerate(counts):
        add(app, count, f"group-{number}")
    run.deliveries = (run.events - failing) * groups
    async with app:
        await fill(app, run)
        with run.measured():
            worker = app.worker()
            await worker.__aenter__()
            await all_finished(counts)
        await worker.__aexit__(None, None, None)
        await check_handled(app, counts)


async def both(run: Run) -> None:
    """A worker, and beside it one call that publishes all: until the last event is handled."""
    prepared = list(run.sales())
    app, count = App("bench", broker=run.url), Count(run.events)
    add_alone(app, count, "group")
    async with app:
        async with app.worker():
            with run.measured():
                await app.publish_many(prepared, to=sales)
                await all_finished([count])
        await check_handled(app, [count])


async def latency(run: Run) -> None:
    """Single events at a fixed rate: from the call of `publish` to the beginning of the handler."""
    app, count = App("bench", broker=run.url), Count(run.events)
    called_s = [0.0] * run.events

    @app.subscriber(sales, "group", timeout="never")
    async def handle(event: Sale) -> None:
        run.waits_s.append(time.perf_counter() - called_s[event.number])
        count.handled(event.number)

    async with app:
        async with app.worker():
            with run.measured():
                began = time.perf_counter()
                for sale in run.sales():
                    await asyncio.sleep(max(0, began + sale.number / PER_SECOND - time.perf_counter()))
                    called_s[sale.number] = time.perf_counter()
                    await app.publish(sale, to=sales)
                await all_finished([count])
        await check_handled(app, [count])


async def fill(app: App, run: Run) -> None:
    (stream,) = app.all_streams().values()
    prepared = run.sales()
    positions = 0
    while chunk := list(islice(prepared, max(1, FILL_BYTES // run.size_bytes))):
        positions += len(set(await app.publish_many(chunk, to=stream)))
    check("published", [positions], run.events)


async def all_finished(counts: list[Count]) -> None:
    async with asyncio.timeout(WITHIN_S):
        for count in counts:
            await count.finished.wait()


async def check_handled(app: App, counts: list[Count]) -> None:
    """Each event once in each group, all settled, none left but those that are to fail."""
    ((name, stream),) = app.all_streams().items()
    found = await app.broker.admin.groups(name)
    check("groups", [len(found)], len(counts))
    for count, group in zip(counts, found, strict=True):
        check("handled", [count.times.count(1)], count.expected)
        if stream.pack is None:  # a pack is settled as one
            check("done", [group.done], count.expected)
        check("left", [group.lag, group.dead], 0)
        check("waiting", [group.pending], len(count.times) - count.expected)


def check(what: str, found: list[int | None], expected: int) -> None:
    if any(number != expected for number in found):
        raise SystemExit(f"{what}: {found}, expected {expected} each: no figures")


MEASURES: dict[str, Callable[[Run], Coroutine[None, None, None]]] = {
    "publish-one": publish_one,
    "publish-many": publish_many,
    "publish-concurrent": publish_concurrent,
    "handle": handle,
    "handle-batch": partial(handle, add=add_batch),
    "handle-ordered": partial(handle, add=partial(add_alone, stream=visits)),
    "handle-all": partial(handle, add=add_all),
    "one-key-fails": partial(handle, add=add_failing, failing_key=True),
    "ten-groups": partial(handle, groups=10),
    "256-partitions": partial(handle, add=partial(add_alone, stream=spread)),
    "pack-publish": partial(publish_many, stream=packed),
    "pack-handle": partial(handle, add=partial(add_alone, stream=packed)),
    "both": both,
    "latency": latency,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=MEASURES)
    parser.add_argument("url")
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=200)
    options = parser.parse_args()
    logging.getLogger("millstream").setLevel(logging.ERROR)  # its warning that our server keeps nothing on disk
    run = Run(options.url, options.events, options.size)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(MEASURES[options.scenario](run))
    print(json.dumps(run.as_json()))


if __name__ == "__main__":
    main()
