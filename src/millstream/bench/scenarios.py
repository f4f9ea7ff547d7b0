"""Our side: what Millstream does with so many events in each scenario, counted and timed.

    result = await SCENARIOS["handle"].run("redis://localhost/0", "somewhere", 100_000, 200)

Everything that is promised is paid for: full envelopes, typed decode, attempts counted, fenced settle. Events are made
before the watch starts, and so is a backlog that is to be handled. Handling is timed from the start of the worker to the
end of its drain. There is no result unless every event was handled exactly once by each group and the broker says that
none has anything left.

Nothing here knows a terminal, or the limit of the engine. `benchmarks/` of the repository adds scenarios that few users
would ask for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, TypeAlias

import msgspec

from millstream.app import App
from millstream.bench.meter import Cost, Meter
from millstream.bench.prose import texts
from millstream.brokers.base import StreamInfo
from millstream.clock import Clock
from millstream.errors import BadSetting, BrokerError, MillstreamError, NotSupported
from millstream.event import Event
from millstream.retry import Batch
from millstream.settings import Settings
from millstream.stream import Pack, Position, Stream
from millstream.units import MAX_EVENT_BYTES
from millstream.wire import compression
from millstream.wire.compression import Compression
from millstream.worker import collector

Load: TypeAlias = Literal["publish", "handle", "both", "latency"]
"""What a scenario asks of the engine: what its limit is measured with."""

Tell: TypeAlias = Callable[[int], None]
"""Told now and then how many events are done."""

GROUP = "bench"
KEYS = 1_000
BATCH = 500
CALLERS = 1_000  # tasks that publish at the same time
CHUNK = 50_000  # events that are made at once, before the watch runs
BACKLOG_CHUNK = 10_000  # of a backlog, which is not timed: it must not decide how much memory a run takes
LATENCY_RATE = 500  # events a second
LATENCY_EVENTS = 2_500  # five seconds: enough for a p99
WARM_UP = 100  # events whose latency does not count: the worker is just starting
TELL_S = 0.1
STALL_S = 30.0  # a worker that handles nothing for so long will not end by itself

_FIRST = 100_000_000  # the number of the first event: all numbers have as many digits, all events the same size


class Sale(Event, type="bench.sale"):
    """What is published: five fields, the last of which makes it as large as wanted."""

    id: int
    who: str
    what: str
    cents: int
    note: str


def _codec() -> Compression:
    """The default where its library is installed; packs as they are elsewhere."""
    try:
        compression.check("zstd")
    except NotSupported:
        return "none"
    return "zstd"


sales = Stream("sales", Sale)
keyed = Stream("keyed", Sale, key="who", partitions=8)
packed = Stream("packed", Sale, pack=Pack(codec=_codec()))


def sale(number: int, note: str) -> Sale:
    """The event of this number."""
    return Sale(id=_FIRST + number, who=f"c{number % KEYS:03}", what="a7", cents=99, note=note)


LEAST_BYTES = len(msgspec.json.encode(sale(0, "")))
"""Of an event without a note."""


class Miscounted(MillstreamError):
    """Events were lost, or handled twice: there are no figures."""


class Result(msgspec.Struct, frozen=True):
    """What was found out about our side."""

    scenario: str
    events: int
    rate: float
    """Events published, or deliveries that ended well, a second."""
    cost: Cost
    bytes_per_event: float | None
    """What the broker says that an event takes up; None where it does not know."""
    p50_ms: float | None = None
    """From the call of `publish` to the handler's first line."""
    p99_ms: float | None = None
    start_ms: float | None = None
    """From the start of the worker until each group has handled an event; part of the time that makes the rate."""
    drain_ms: float | None = None
    """From the last event handled until all is settled and the worker gone; part of it too."""


class Count:
    """How often a group handled each event, and when the first."""

    __slots__ = ("_clock", "_mark", "expected", "finished", "first_s", "left", "times")

    def __init__(self, events: int, failing: int, clock: Clock) -> None:
        self.times = bytearray(events)
        self.expected = self.left = events - failing
        self.finished = asyncio.Event()
        self.first_s = 0.0
        self._clock = clock
        self._mark = self.left - 1  # how many are left when there is something to note: after the first, then the last

    def handled(self, event: Sale) -> None:
        """One more."""
        self.times[event.id - _FIRST] += 1
        self.left -= 1
        if self.left == self._mark:
            self._note()

    def _note(self) -> None:
        self.first_s = self.first_s or self._clock.monotonic()
        self._mark = 0
        if not self.left:
            self.finished.set()


class Run:
    """One run of a scenario: an app with its stream, and what happens there."""

    def __init__(self, scenario: Scenario, url: str, namespace: str, events: int, size_bytes: int) -> None:
        if not LEAST_BYTES <= size_bytes <= MAX_EVENT_BYTES:
            raise BadSetting(f"an event of {size_bytes:,} bytes: from {LEAST_BYTES} to {MAX_EVENT_BYTES:,}")
        if events < 1:
            raise BadSetting(f"events={events!r}: at least 1")
        self.stream = scenario.stream
        self.events = events
        self.counts: dict[str, Count] = {}
        """What each group has handled."""
        self.start_ms: float | None = None
        self.drain_ms: float | None = None
        self.called_s: dict[int, float] = {}
        """When `publish` was called, by event."""
        self.delays_ms: list[float] = []
        self.app = App("bench", broker=url, streams=[self.stream], settings=Settings.load(namespace=namespace))
        self.clock = Clock()
        self._notes = texts(size_bytes - LEAST_BYTES)
        if scenario.subscribe is not None:
            scenario.subscribe(self)

    def counted(self, group: str = GROUP, failing: int = 0) -> Count:
        """What a handler of this group tells of each event; so many of all fail, and wait for their next attempt."""
        return self.counts.setdefault(group, Count(self.events, failing, self.clock))

    def made(self, at_once: int = CHUNK) -> Iterator[list[Sale]]:
        """All events, in lists."""
        events = (sale(number, self._notes[number % len(self._notes)]) for number in range(self.events))
        while chunk := list(islice(events, at_once)):
            yield chunk

    async def publish(self, chunks: Iterable[list[Sale]], send: Send, meter: Meter, tell: Tell) -> None:
        """Publish events with `send`, which returns their positions."""
        done = 0
        for chunk in chunks:
            async with meter.running():
                positions = await send(self, chunk)
            done += len(chunk)
            _check("published", [len(set(positions))], len(chunk))
            tell(done)

    async def finish(self, tell: Tell) -> None:
        """Wait until each group has handled all events."""
        handled, since_s = 0, self.clock.monotonic()
        for count in self.counts.values():
            while not await self.clock.wait(count.finished, TELL_S):
                before, handled = handled, sum(count.expected - count.left for count in self.counts.values())
                tell(handled // len(self.counts))
                if handled != before:
                    since_s = self.clock.monotonic()
                elif self.clock.monotonic() - since_s > STALL_S:
                    left = sum(count.left for count in self.counts.values())
                    raise BrokerError(f"nothing was handled for {STALL_S:g} s, and {left:,} events are left")

    async def checked(self) -> StreamInfo:
        """The stream, when the broker agrees with what we have counted. Raises `Miscounted`."""
        (info,) = (info for info in await self.app.broker.admin.streams() if info.spec.name == self.stream.name)
        entries = self.events if self.stream.pack is None else info.events or 0
        _check("stored", [info.events], entries)
        groups = {group.group: group for group in await self.app.broker.admin.groups(self.stream.name)}
        for name, count in self.counts.items():
            group = groups[name]
            failing = self.events - count.expected
            done = [group.done] if self.stream.pack is None else []
            _check("handled", [count.times.count(1), *done], count.expected)
            _check("settled", [group.done], entries - failing)
            _check("waiting", [group.pending], failing)
            _check("left", [group.lag, group.dead], 0)
        return info


Send: TypeAlias = Callable[[Run, list[Sale]], Awaitable[list[Position]]]


@dataclass(frozen=True)
class Scenario:
    """Something that Millstream does with many events."""

    name: str
    load: Load
    work: Callable[[Run, Meter, Tell], Awaitable[None]]
    subscribe: Callable[[Run], None] | None = None
    stream: Stream[Sale] = sales
    max_events: int | None = None

    def limited(self, events: int) -> int:
        """How many of so many events a run takes."""
        return min(events, self.max_events or events)

    async def run(
        self,
        url: str,
        namespace: str,
        events: int,
        size_bytes: int,
        *,
        meter: Meter | None = None,
        tell: Tell = lambda done: None,
    ) -> Result:
        """Run it in a namespace that has nothing of the kind, where it leaves its stream behind.

        Raises `Miscounted` unless every event was handled exactly once, and what the broker raises.
        """
        meter = meter or Meter()
        run = Run(self, url, namespace, self.limited(events), size_bytes)
        as_in_millstream_run = collector.relaxed() if self.subscribe else nullcontext()
        async with run.app:
            with as_in_millstream_run:
                await self.work(run, meter, tell)
            info = await run.checked()
        delays_ms = sorted(run.delays_ms)
        deliveries = sum(count.expected for count in run.counts.values())
        return Result(
            self.name,
            run.events,
            (deliveries or run.events) / meter.cost.seconds,
            meter.cost,
            None if info.bytes is None else info.bytes / run.events,
            percentile(delays_ms, 0.5),
            percentile(delays_ms, 0.99),
            run.start_ms,
            run.drain_ms,
        )


# How events are published.


async def many(run: Run, events: list[Sale]) -> list[Position]:
    """One call for all."""
    return await run.app.publish_many(events, to=run.stream)


async def concurrently(run: Run, events: list[Sale]) -> list[Position]:
    """A thousand tasks, each of which awaits one call after the other."""
    left, positions = iter(events), list[Position]()

    async def call() -> None:
        for event in left:
            positions.append(await run.app.publish(event, to=run.stream))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CALLERS):
            tasks.create_task(call())
    return positions


async def publish(send: Send, run: Run, meter: Meter, tell: Tell) -> None:
    """To the last position."""
    await run.publish(run.made(), send, meter, tell)


# How events are handled.


async def handle(run: Run, meter: Meter, tell: Tell) -> None:
    """A backlog, from the start of the worker to the end of its drain."""
    await run.publish(run.made(BACKLOG_CHUNK), many, Meter(), lambda done: None)
    async with meter.running():
        began_s = run.clock.monotonic()
        async with run.app.worker():
            await run.finish(tell)
            finished_s = run.clock.monotonic()
        run.drain_ms = (run.clock.monotonic() - finished_s) * 1_000
    run.start_ms = (max(count.first_s for count in run.counts.values()) - began_s) * 1_000


async def _both(run: Run, meter: Meter, tell: Tell) -> None:
    chunks = list(run.made())
    async with meter.running(), run.app.worker():
        await run.publish(chunks, many, Meter(), lambda done: None)
        await run.finish(tell)


def one_by_one(run: Run, group: str = GROUP) -> None:
    """A handler that takes the event alone."""
    count = run.counted(group)

    @run.app.subscriber(run.stream, group, timeout="never")
    async def handle(event: Sale) -> None:
        count.handled(event)


def _in_batches(run: Run) -> None:
    count = run.counted()

    @run.app.subscriber(run.stream, GROUP, batch=Batch(BATCH), timeout="never")
    async def handle(events: list[Sale]) -> None:
        for event in events:
            count.handled(event)


# How long an event takes.


async def _latency(run: Run, meter: Meter, tell: Tell) -> None:
    async with meter.running(), run.app.worker(), asyncio.TaskGroup() as tasks:
        began_s = run.clock.monotonic()
        for number, (event,) in enumerate(run.made(at_once=1)):
            await run.clock.sleep(max(0.0, began_s + number / LATENCY_RATE - run.clock.monotonic()))
            tasks.create_task(_publish_now(run, event))
            tell(number)
        await run.finish(tell)
    del run.delays_ms[: min(WARM_UP, run.events // 2)]


async def _publish_now(run: Run, event: Sale) -> None:
    run.called_s[event.id] = run.clock.monotonic()
    await run.app.publish(event, to=run.stream)


def _timed(run: Run) -> None:
    count = run.counted()

    @run.app.subscriber(run.stream, GROUP, timeout="never")
    async def handle(event: Sale) -> None:
        run.delays_ms.append((run.clock.monotonic() - run.called_s.pop(event.id)) * 1_000)
        count.handled(event)


def percentile(ascending: list[float], share: float) -> float | None:
    """The value below which this share of all lies; None where there are none."""
    return ascending[int(share * (len(ascending) - 1))] if ascending else None


def _check(what: str, found: list[int | None], expected: int) -> None:
    if any(number != expected for number in found):
        raise Miscounted(f"{what}: {found}, and {expected:,} each were expected: no figures")


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("publish-many", "publish", partial(publish, many)),
        Scenario("publish-concurrent", "publish", partial(publish, concurrently)),
        Scenario("handle", "handle", handle, one_by_one),
        Scenario("handle-ordered", "handle", handle, one_by_one, keyed),
        Scenario("handle-batch", "handle", handle, _in_batches),
        Scenario("both", "both", _both, one_by_one),
        Scenario("latency", "latency", _latency, _timed, max_events=LATENCY_EVENTS),
        Scenario("pack-publish", "publish", partial(publish, many), stream=packed),
        Scenario("pack-handle", "handle", handle, one_by_one, packed),
    )
}
"""Each by its name, in the order in which they are shown; `docs/commands.md` says what is timed."""
