"""Lanes: long-lived tasks that take claims from a queue and await the handler directly.

No task per event (2 to 4 µs), no timer per event (4 µs): a lane stamps its deadline, and one sweeper looks at all lanes a
few times per timeout. A handler that never suspends is run by one lane to the end of the queue, the others stay asleep; as
soon as it suspends, the next lane wakes.

A lane is cancelled for one of three causes, noted beside it, so that the CancelledError which then comes out of the handler
can be told from one that the handler raised itself:

    TIMEOUT   the event failed, like any other failure
    LOST      somebody else has the event by now: nothing is settled, what it published is dropped
    CUT       the grace is over: nothing is settled, the event goes back

A group that keeps the order of keys has one claim of a key in the queue or in a lane. When that one must be tried again, the
claims that wait for it are put back behind it, uncounted: nobody may overtake it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from enum import Enum

from millstream.brokers.base import Claim, Consumer, Later, Outcome, Output, Position, Settlement
from millstream.clock import Clock
from millstream.errors import BrokerError, LeaseLost
from millstream.handlers.subscriber import Group
from millstream.telemetry import TIMED_OUT, Telemetry
from millstream.units import seconds
from millstream.worker.backoff import Backoff
from millstream.worker.call import DONE, Route, unhandled
from millstream.worker.keeper import Keeper
from millstream.worker.order import KeyOrder

_FOREVER = float("inf")
_BEHIND = Later(0, "", counted=False)
_TURN_S = 0.005  # a lane that never suspends lets the heartbeat, the settler and the reader run this often
_SWEEP_S = 5.0  # a timeout is noticed within a tenth of it, and within this time


class Cause(Enum):
    """Why a lane was cancelled."""

    TIMEOUT = 0
    LOST = 1
    CUT = 2


class Gate:
    """All handlers of a process pass it: side by side, or one suspect with nothing beside it."""

    def __init__(self) -> None:
        self.running = 0
        self.passed = 0
        """Handlers that have ended."""
        self.closed = False
        self._changed = asyncio.Event()
        self._alone = asyncio.Lock()

    def leave(self) -> None:
        """A handler has ended."""
        self.running -= 1
        self.passed += 1
        if self.closed:
            self._changed.set()

    async def opened(self) -> None:
        """Wait until handlers may run side by side again."""
        async with self._alone:
            pass

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Close the gate, wait for the running handlers, and open it again at the end."""
        async with self._alone:
            self.closed = True
            try:
                while self.running:
                    self._changed.clear()
                    await self._changed.wait()
                yield
            finally:
                self.closed = False


class Lane:
    """One handler at a time."""

    __slots__ = ("cause", "claims", "deadline", "task", "waits")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.claims: Sequence[Claim] = ()
        self.deadline = _FOREVER
        self.cause: Cause | None = None
        self.waits: set[str | None] = set()
        """Of a batch: the keys of which an event must be tried again."""

    def cancel(self, cause: Cause) -> None:
        """Cancel the handler that runs now, if one does."""
        if self.claims and self.cause is None and self.task is not None:
            self.cause = cause
            self.task.cancel()

    def take_cause(self) -> Cause | None:
        """The cause of our cancellation, which is over now: the lane goes on."""
        cause, self.cause = self.cause, None
        if cause is not None and self.task is not None:
            self.task.uncancel()
        return cause

    def free(self) -> None:
        """The call is over. Raises when the worker is over too, and the handler has swallowed its cancellation."""
        self.deadline = _FOREVER
        self.claims = ()
        if self.cause is not None:
            self.take_cause()
        if self.task is not None and self.task.cancelling():
            raise asyncio.CancelledError


class Lanes:
    """The lanes of one group, and the queue before them."""

    def __init__(
        self,
        group: Group,
        routes: dict[str, Route],
        consumer: Consumer,
        keeper: Keeper,
        gate: Gate,
        clock: Clock,
        telemetry: Telemetry,
        settle: Callable[[Settlement], None],
        caught_up: Callable[[], Awaitable[None]],
        dropped: Callable[[int], None],
        concurrency: int,
    ) -> None:
        self._group = group
        self._routes = routes
        self._consumer = consumer
        self._keeper = keeper
        self._gate = gate
        self._clock = clock
        self._telemetry = telemetry
        self._settle = settle
        self._caught_up = caught_up
        self._dropped = dropped
        self._queue: deque[Claim] = deque()
        self._order = KeyOrder() if group.order == "key" else None
        self._draining: frozenset[int] = frozenset()
        self._freed: asyncio.Event | None = None
        self._lanes = [Lane() for _ in range(concurrency)]
        self._idle: list[asyncio.Future[None]] = []
        self._waking = False
        self._gathering = asyncio.Lock()
        self._more = asyncio.Event()
        self._stopping = False
        self._turn = clock.monotonic()
        self._within_s = seconds(group.batch.within) if group.batch is not None else 0.0

    def put(self, claims: Iterable[Claim]) -> None:
        """Queue claims."""
        if self._order is not None:
            claims = list(claims)
            wanted = [claim for claim in claims if claim.stored.position.partition not in self._draining]
            self._dropped(len(claims) - len(wanted))
            claims = self._order.arrive(wanted)
        self._queue.extend(claims)
        self._more.set()
        self._wake()

    def discard(self, lost: frozenset[Position]) -> None:
        """Forget what is not ours any more: queued claims go, handlers that run on one are cancelled."""
        self._forget(lambda claim: claim.stored.position in lost)
        for lane in self._lanes:
            if any(claim.stored.position in lost for claim in lane.claims):
                lane.cancel(Cause.LOST)

    @asynccontextmanager
    async def drained(self, partitions: frozenset[int]) -> AsyncIterator[None]:
        """Start nothing more of these partitions; inside the block nothing of them runs."""
        self._draining |= partitions
        self._forget(lambda claim: claim.stored.position.partition in partitions)
        self._freed = freed = self._freed or asyncio.Event()
        try:
            while any(claim.stored.position.partition in partitions for lane in self._lanes for claim in lane.claims):
                freed.clear()
                await freed.wait()
            yield
        finally:
            self._draining -= partitions

    def stop(self) -> None:
        """Start nothing more; `run` ends when the running handlers have ended."""
        self._stopping = True
        self._keeper.wake()
        self._more.set()
        for waiter in self._idle:
            if not waiter.done():
                waiter.set_result(None)
        self._idle.clear()

    def cut(self) -> bool:
        """Cancel the running handlers; True if there were any."""
        running = [lane for lane in self._lanes if lane.claims]
        for lane in running:
            lane.cancel(Cause.CUT)
        return bool(running)

    async def run(self) -> None:
        """Own the lanes and the sweeper. Ends after `stop`."""
        work = self._single if self._group.batch is None else self._batches
        async with asyncio.TaskGroup() as tasks:
            sweeper = tasks.create_task(self._sweep())
            async with asyncio.TaskGroup() as lanes:
                for lane in self._lanes:
                    lane.task = lanes.create_task(work(lane))
            sweeper.cancel()

    async def _single(self, lane: Lane) -> None:
        """One event after the other, until there are no more to come."""
        while await self._ready():
            claim = self._queue.popleft()
            if self._idle and self._queue:
                self._wake()
            route = self._routes.get(claim.stored.record.type)
            if route is None or claim.fault:
                self._end(claim, unhandled(claim, self._group, self._telemetry))
            elif claim.suspect:
                await self._suspects(lane, route, (claim,))
            else:
                await self._handle(lane, route, claim)

    async def _handle(self, lane: Lane, route: Route, claim: Claim) -> None:
        gate = self._gate
        gate.running += 1
        lane.claims = (claim,)
        lane.deadline = self._turn + route.timeout_s
        try:
            outputs = await route.call(claim)
        except BaseException as error:
            self._failed(lane, route, error)
        else:
            self._end(claim, DONE, outputs)
        finally:
            gate.leave()
            if self._freed is not None:
                self._freed.set()
            lane.free()

    async def _batches(self, lane: Lane) -> None:
        """One batch after the other. Only one lane gathers at a time, so that batches become full."""
        while True:
            async with self._gathering:
                claims = await self._gather()
            if not claims:
                return
            lane.waits.clear()
            await self._batch(lane, claims)
            if self._order is not None:
                for key in dict.fromkeys(claim.stored.record.key for claim in claims):
                    self._next(key, wait=key in lane.waits)

    async def _batch(self, lane: Lane, claims: Sequence[Claim]) -> None:
        known: list[Claim] = []
        for claim in claims:
            if claim.fault or claim.stored.record.type not in self._routes:
                self._settle(Settlement(claim.stored.position, unhandled(claim, self._group, self._telemetry)))
            else:
                known.append(claim)
        if not known:
            return
        route = self._routes[known[0].stored.record.type]
        if any(claim.suspect for claim in known):
            await self._suspects(lane, route, known)
        else:
            await self._handle_batch(lane, route, known)

    async def _gather(self) -> list[Claim]:
        """The next batch: full, or what came within the time. Empty when there will be no more."""
        assert self._group.batch is not None
        size = self._group.batch.size
        while await self._ready():
            until = self._clock.monotonic() + self._within_s
            while self._queued() < size and not self._stopping:
                left_s = until - self._clock.monotonic()
                self._more.clear()
                if left_s <= 0 or not await self._clock.wait(self._more, left_s):
                    break
            if not await self._ready():  # while we gathered, trust may have run out or the gate have closed
                break
            batch = self._take(size)
            if batch:
                return batch
        return []

    def _take(self, size: int) -> list[Claim]:
        batch: list[Claim] = []
        while len(batch) < size and self._queue and not self._stopping:
            if batch and max(self._queue[0].suspect, batch[0].suspect) > 1:
                break  # who was running in a crash is called alone
            batch.append(self._queue.popleft())
            if self._order is not None and batch[-1].suspect <= 1:
                batch += self._order.join(batch[-1].stored.record.key, size - len(batch))
        return batch

    def _queued(self) -> int:
        return len(self._queue) + (self._order.waiting if self._order is not None else 0)

    async def _handle_batch(self, lane: Lane, route: Route, claims: Sequence[Claim]) -> None:
        claims, deliveries, undecodable = route.delivered(claims)
        for settlement in undecodable:
            self._settle(settlement)
        if not claims:
            return
        self._gate.running += 1
        lane.claims = claims
        lane.deadline = self._clock.monotonic() + route.timeout_s
        try:
            for claim, settlement in zip(claims, await route.batch(claims, deliveries), strict=True):
                if not self._is_behind(lane, claim):
                    self._settle(settlement)
                    self._note(lane, claim, settlement.outcome)
        except BaseException as error:
            self._failed(lane, route, error)
        finally:
            self._gate.leave()
            if self._freed is not None:
                self._freed.set()
            lane.free()

    async def _suspects(self, lane: Lane, route: Route, claims: Sequence[Claim]) -> None:
        """Events that a crash left behind: noted as started first, and alone if they were running in one."""
        killed = route.killed(claims[0])
        if killed is not None:
            self._end_failed(lane, claims[0], killed)
        elif claims[0].suspect <= 1:
            if await self._begin(claims):
                while self._gate.closed:
                    await self._gate.opened()
                await self._handle_any(lane, route, claims)
        else:
            async with self._gate.alone():
                if await self._begin(claims):
                    await self._handle_any(lane, route, claims)
                    await self._caught_up()  # before the next one may kill us, or this one would be blamed for it

    async def _handle_any(self, lane: Lane, route: Route, claims: Sequence[Claim]) -> None:
        self._turn = self._clock.monotonic()  # it may have waited for long: its time begins now
        if self._group.batch is None:
            await self._handle(lane, route, claims[0])
        else:
            await self._handle_batch(lane, route, claims)

    async def _begin(self, claims: Sequence[Claim]) -> bool:
        """Note that these start now. False, and they are dropped, when we stop or they are not ours any more."""
        backoff = Backoff("begin", self._group.name, self._clock, self._telemetry)
        while not self._stopping:
            try:
                await self._consumer.begin([claim.stored.position for claim in claims if claim.suspect])
            except LeaseLost:
                break
            except BrokerError as error:
                await backoff.pause(error)
            else:
                return True
        self._drop(claims)
        return False

    async def _ready(self) -> bool:
        """Wait until a claim may be started: True. False when there will be no more."""
        while not self._stopping:
            if not self._queue:
                await self._sleep()
                continue
            now = self._clock.monotonic()
            if now >= self._keeper.trusted_until:
                await self._keeper.answer()
            elif self._gate.closed:
                await self._gate.opened()
            elif now - self._turn > _TURN_S:
                await self._clock.sleep(0)
                self._turn = self._clock.monotonic()
            else:
                self._turn = now
                return True
        return False

    async def _sleep(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._idle.append(waiter)
        try:
            await waiter
        finally:
            self._waking = False

    def _wake(self) -> None:
        """Wake one lane, unless one is waking already: it will wake the next when it takes a claim."""
        while self._idle and not self._waking:
            waiter = self._idle.pop()
            if not waiter.done():
                waiter.set_result(None)
                self._waking = True

    def _failed(self, lane: Lane, route: Route, error: BaseException) -> None:
        """A call raised: settle what it was for, unless that is not ours to decide. Raises what ends the worker."""
        claims, cause = lane.claims, lane.take_cause()
        if lane.task is not None and lane.task.cancelling() and isinstance(error, asyncio.CancelledError):
            raise error  # the worker itself is being cancelled
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            raise error
        if cause is Cause.LOST or cause is Cause.CUT:
            self._drop(claims)
            return
        if cause is Cause.TIMEOUT:
            self._telemetry.emit(
                TIMED_OUT, group=self._group.name, position=claims[0].stored.position, timeout_s=route.timeout_s
            )
            error = TimeoutError(f"the handler had not ended after {route.timeout_s:g} s")
        for claim in claims:
            if not self._is_behind(lane, claim):
                self._end_failed(lane, claim, route.outcome(claim, error))

    # The order of keys.

    def _end(self, claim: Claim, outcome: Outcome, outputs: Sequence[Output] = ()) -> None:
        """Settle a claim that was handled by itself, and let the next one of its key start."""
        self._settle(Settlement(claim.stored.position, outcome, outputs))
        if self._order is not None:
            self._next(claim.stored.record.key, wait=type(outcome) is Later)

    def _end_failed(self, lane: Lane, claim: Claim, outcome: Outcome) -> None:
        if self._group.batch is None:
            self._end(claim, outcome)
        else:
            self._settle(Settlement(claim.stored.position, outcome))
            self._note(lane, claim, outcome)

    def _drop(self, claims: Sequence[Claim]) -> None:
        """Forget claims without an outcome."""
        self._dropped(len(claims))
        if self._order is not None and self._group.batch is None:
            for claim in claims:
                self._next(claim.stored.record.key, wait=False)

    def _next(self, key: str | None, *, wait: bool) -> None:
        """A key's claim has ended: the next one starts; or, where that one must be tried again, all go back behind it."""
        assert self._order is not None
        claim = self._order.ended(key)
        while wait and claim is not None:
            self._settle(Settlement(claim.stored.position, _BEHIND))
            claim = self._order.ended(key)
        if claim is not None:
            self._queue.append(claim)
            self._more.set()
            self._wake()

    def _is_behind(self, lane: Lane, claim: Claim) -> bool:
        """True, and it is put back, when an event of its key before it in the batch must be tried again."""
        behind = claim.stored.record.key in lane.waits
        if behind:
            self._settle(Settlement(claim.stored.position, _BEHIND))
        return behind

    def _note(self, lane: Lane, claim: Claim, outcome: Outcome) -> None:
        key = claim.stored.record.key
        if self._order is not None and key is not None and type(outcome) is Later:
            lane.waits.add(key)

    def _forget(self, gone: Callable[[Claim], bool]) -> None:
        """Drop claims that have not started."""
        waited = self._order.discard(gone) if self._order is not None else 0
        forgotten = [claim for claim in self._queue if gone(claim)]
        if forgotten:
            self._queue = deque(claim for claim in self._queue if not gone(claim))
            if self._order is not None:
                for claim in forgotten:
                    self._next(claim.stored.record.key, wait=False)
        self._dropped(len(forgotten) + waited)

    async def _sweep(self) -> None:
        """Cancel handlers that are past their deadline. Ends by cancellation."""
        period_s = min(_SWEEP_S, min(route.timeout_s for route in self._routes.values()) / 10)
        while True:
            await self._clock.sleep(period_s)
            now = self._clock.monotonic()
            for lane in self._lanes:
                if now > lane.deadline:
                    lane.cancel(Cause.TIMEOUT)
