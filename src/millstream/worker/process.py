"""One worker process: the workers, listeners and the janitor of an app, started, drained and cut off together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from millstream.brokers.base import Broker, Start, StreamSpec, Subscription
from millstream.clock import Clock
from millstream.errors import NotSupported
from millstream.handlers.depends import ProcessScope, Replacements
from millstream.handlers.subscriber import Group, StartAt, Subscriber
from millstream.settings import Settings
from millstream.telemetry import Telemetry, logger
from millstream.units import seconds
from millstream.worker.call import Route, Shop, Stage, routes
from millstream.worker.gate import Gate
from millstream.worker.janitor import Janitor
from millstream.worker.listener import Listener
from millstream.worker.threads import Threads
from millstream.worker.worker import Worker

_LAST_WORD_S = 1.0  # after the grace: time to settle what did finish, before everything is cancelled


class Process:
    """All that handles events in this process."""

    def __init__(self, workers: list[Worker], janitor: Janitor, gate: Gate, settings: Settings, clock: Clock) -> None:
        self.janitor = janitor
        self._workers = workers
        self._gate = gate
        self._settings = settings
        self._clock = clock
        self._running: set[asyncio.Task[None]] = set()
        self.finished = True
        """False once the grace was over before the work was."""

    @property
    def busy(self) -> bool:
        """True while a handler runs, or an event is fetched and not settled."""
        return bool(self._gate.running) or any(worker.in_flight for worker in self._workers)

    def cut(self) -> None:
        """Cancel the handlers that still run."""
        for worker in self._workers:
            worker.cut()

    @property
    def running(self) -> int:
        """Handlers that run now."""
        return self._gate.running

    def progress(self) -> tuple[int, ...]:
        """Changes whenever something happens: a handler starts or ends, an event is fetched or settled."""
        queued = (worker.queued for worker in self._workers)
        return (self._gate.passed, self._gate.running, *queued, *(worker.in_flight for worker in self._workers))

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Run the workers in a group of tasks."""
        self._running = {tasks.create_task(worker.run(), name=f"group {worker.group.name}") for worker in self._workers}

    async def drain(self) -> None:
        """Stop, and give the handlers their grace to finish; then cut them off. May be called again."""
        for worker in self._workers:
            worker.stop()
        if not await self._ended(self._settings.grace_s):
            logger.warning("the grace of %g s is over: running handlers are cut off", self._settings.grace_s)
            self.cut()
            if not await self._ended(_LAST_WORD_S):
                self.finished = False
                for task in self._running:
                    task.cancel()
        self.finished = self.finished and not any(worker.cut_off for worker in self._workers)

    async def _ended(self, seconds: float) -> bool:
        try:
            async with self._clock.timeout(seconds):
                if self._running:
                    await asyncio.wait(self._running)
        except TimeoutError:
            return False
        return True


@asynccontextmanager
async def working(
    groups: Iterable[Group],
    ears: Iterable[Subscriber],
    specs: dict[str, StreamSpec],
    *,
    owner: str,
    broker: Broker,
    stage: Stage,
    replace: Replacements,
    settings: Settings,
    clock: Clock,
    telemetry: Telemetry,
) -> AsyncIterator[Process]:
    """Handle events inside the block; leaving it drains. A worker that cannot go on ends the block with its error."""
    gate = Gate()
    scope = ProcessScope()
    with Threads() as threads:
        shop = Shop(clock, telemetry, stage, scope, replace, threads)
        tables = [(group, routes(group, shop)) for group in groups]
        heard = [(subscriber, Route(subscriber, shop)) for subscriber in ears]
        plans = [route.plan for _, table in tables for route in table.values()] + [route.plan for _, route in heard]
        workers = [
            Worker(
                group,
                table,
                Subscription(
                    specs[group.stream.name],
                    group.name,
                    owner,
                    _start(group.start, clock),
                    settings.lease_s,
                    _ordered(group, broker),
                    max_parked=settings.max_parked,
                ),
                broker=broker,
                gate=gate,
                settings=settings,
                clock=clock,
                telemetry=telemetry,
                groups=len(tables),
            )
            for group, table in tables
        ]
        janitor = Janitor(specs, broker, clock, telemetry)
        process = Process(workers, janitor, gate, settings, clock)
        async with scope.entered(plans), asyncio.TaskGroup() as tasks:
            process.start(tasks)
            listeners = [Listener(subscriber, route, broker, gate, clock, telemetry) for subscriber, route in heard]
            endless = [tasks.create_task(run()) for run in (janitor.run, *(listener.run for listener in listeners))]
            try:
                for joined in [w.joined for w in workers] + [listener.joined for listener in listeners]:
                    await joined.wait()  # what the block publishes must not lie before "now"
                yield process
            finally:
                for task in endless:
                    task.cancel()
                await process.drain()


def _ordered(group: Group, broker: Broker) -> bool:
    if group.order == "key" and not broker.traits.order:
        raise NotSupported(
            f"{broker.url} cannot consume in the order of keys, which group {group.name!r} asks for: write order='none'"
        )
    return group.order == "key"


def _start(start: StartAt, clock: Clock) -> Start:
    if isinstance(start, datetime):
        return int(start.timestamp() * 1000)
    if isinstance(start, timedelta):
        return clock.now_ms() - int(seconds(start) * 1000)
    return start
