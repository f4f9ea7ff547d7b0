"""Lanes: long-lived tasks that take claims from a queue and await the handler directly.

No task per event (2 to 4 µs), no timer per event (4 µs): one sweeper looks at all lanes a few times per timeout. A handler
that never suspends is run by one lane to the end of the queue, the others stay asleep; as soon as it suspends, the next lane
wakes. Each start looks at the clock: a process that was frozen must not go on as if it were still trusted. In a pack it
looks at nothing else, unless a handler has suspended: while a lane holds the loop, all the rest stays as it is.

Work goes in *turns*: whoever has waited works out how much may be started, and until when, before the others (the heartbeat,
the settler, the reader) must have the loop again; a start compares with that. An event takes 1.1 µs here and in the settler:
0.4 of them are its decoding, 0.1 the call of a handler that does nothing, 0.1 its settlement, 0.1 the clock.

A group that keeps the order of keys has one claim of a key in the queue or in a lane. When that one must be tried again, the
claims that wait for it are put back behind it, uncounted: nobody may overtake it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

from millstream.brokers.base import DONE, Claim, Consumer, Later, Outcome, Output, Position, Settlement
from millstream.clock import Clock
from millstream.errors import BrokerError, LeaseLost
from millstream.handlers.subscriber import Group
from millstream.telemetry import TIMED_OUT, Telemetry
from millstream.wire.packs import is_pack
from millstream.worker.backoff import Backoff
from millstream.worker.call import Route, unhandled
from millstream.worker.gate import Gate
from millstream.worker.keeper import Keeper
from millstream.worker.lane import Cause, Lane, sweep
from millstream.worker.order import KeyOrder
from millstream.worker.runs import Run, Runs
from millstream.worker.settler import Settler

BEHIND = Later(0, "", counted=False)
_TURN_S = 0.005  # a lane that never suspends lets all else run this often


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
        settler: Settler,
        dropped: Callable[[int], None],
        turn: Callable[[], int],
        runs: Runs,
        concurrency: int,
    ) -> None:
        self._group = group
        self._routes = routes
        self._consumer = consumer
        self._keeper = keeper
        self._gate = gate
        self._clock = clock
        self._monotonic = clock.monotonic
        self._telemetry = telemetry
        self._settler = settler
        self._settle = settler.add
        self._dropped = dropped
        self._runs = runs
        self._turn = turn
        self._queue: deque[Claim] = deque()
        self._order = KeyOrder() if group.order == "key" else None
        self._draining: frozenset[int] = frozenset()
        self._freed: asyncio.Event | None = None
        self._lanes = [Lane() for _ in range(concurrency)]
        self._idle: list[asyncio.Future[None]] = []
        self._waking = False
        self._more = asyncio.Event()
        self._stopping = False
        self._starts = 0
        self._until = 0.0

    @property
    def queued(self) -> int:
        """Events that have not started."""
        return len(self._queue) + (self._order.waiting if self._order is not None else 0)

    def put(self, claims: Iterable[Claim]) -> None:
        """Queue claims."""
        if self._order is not None:
            if self._draining:
                claims = list(claims)
                wanted = [claim for claim in claims if claim.position.partition not in self._draining]
                self._dropped(len(claims) - len(wanted))
                claims = wanted
            claims = self._order.arrive(claims)
        self._queue.extend(claims)
        self._more.set()
        self.wake()

    def wake(self) -> None:
        """Wake one lane, unless one is waking already: it will wake the next when it takes a claim."""
        while self._idle and not self._waking:
            waiter = self._idle.pop()
            if not waiter.done():
                waiter.set_result(None)
                self._waking = True

    def discard(self, lost: frozenset[Position]) -> None:
        """Forget what is not ours any more: queued claims go, handlers that run on one are cancelled."""
        self._forget(lambda claim: claim.position in lost)
        for lane in self._lanes:
            if any(claim.position in lost for claim in lane.claims):
                lane.cancel(Cause.LOST)

    @asynccontextmanager
    async def drained(self, partitions: frozenset[int]) -> AsyncIterator[None]:
        """Start nothing more of these partitions; inside the block nothing of them runs."""
        self._draining |= partitions
        self._forget(lambda claim: claim.position.partition in partitions)
        self._freed = freed = self._freed or asyncio.Event()
        try:
            while any(claim.position.partition in partitions for lane in self._lanes for claim in lane.claims):
                freed.clear()
                await freed.wait()
            yield
        finally:
            self._draining -= partitions

    def stop(self) -> None:
        """Start nothing more; `run` ends when the running handlers have ended."""
        self._stopping = True
        self._starts = 0
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
        async with asyncio.TaskGroup() as tasks:
            sweeper = tasks.create_task(sweep(self._lanes, self._routes, self._clock))
            async with asyncio.TaskGroup() as lanes:
                for lane in self._lanes:
                    lane.task = lanes.create_task(self._work(lane))
            sweeper.cancel()

    async def _work(self, lane: Lane) -> None:
        """One event after the other, until there are no more to come."""
        while await self._ready():
            claim = self._queue.popleft()
            self._starts -= 1
            if self._queue:
                self.wake()
            route = self._routes.get(claim.record.type)
            if route is None:
                await self._unrouted(lane, claim)
            elif claim.suspect:
                await self._suspects(lane, route, (claim,))
            else:
                await self._handle(lane, route, claim)

    async def _unrouted(self, lane: Lane, claim: Claim) -> None:
        """A pack, or what no handler is for."""
        pack = is_pack(claim.record)
        run = self._runs.open(claim) if pack else unhandled(claim, self._group, self._telemetry)
        if not isinstance(run, Run):
            self._end(claim, run)
            return
        route = self._routes.get(run.type)
        if route is None or route.delivers or claim.suspect or run.in_order:
            self._runs.spread(run, self._queue, self._order)
        else:
            await self._through(lane, route, run)

    async def _through(self, lane: Lane, route: Route, run: Run) -> None:
        """Handle events of a pack, which stays at the head of the queue: more lanes take of it when we suspend."""
        claim, held = run.claim, True
        decode, invoke = route.decode[run.type], route.invoke
        queue, gate, monotonic = self._queue, self._gate, self._monotonic
        assert lane.task is not None
        cancelling, call_soon = lane.task.cancelling, asyncio.get_running_loop().call_soon

        def let_go() -> None:  # called as soon as a handler suspends, and before it goes on
            nonlocal held
            held = False

        call_soon(let_go)
        self._runs.enter(run, queue)
        self.wake()
        gate.running += 1
        lane.claims, lane.type = (claim,), run.type
        try:
            for part, data in run.rest:
                lane.part = part
                try:
                    event = decode(data)
                except Exception as error:
                    self._part_failed(lane, route, run, route.undecodable(run.type, error))
                    continue
                try:
                    await invoke(event)
                except BaseException as error:
                    self._part_failed(lane, route, run, error)
                if monotonic() >= self._until:
                    break
                if not held:  # somebody else has had the loop: all may be different
                    gate.passed += 1
                    if cancelling() or self._stopping or gate.closed or not queue or queue[0] is not claim:
                        break
                    held = True
                    call_soon(let_go)
            else:
                self._runs.exhaust(run, queue)
        finally:
            self._runs.leave(run)
            gate.leave()
            self._free(lane)
        self._starts = 0  # the settler has the next turn: nobody may begin many packs before one is settled

    def _part_failed(self, lane: Lane, route: Route, run: Run, error: BaseException) -> None:
        lane.claims = (self._runs.part(run, lane.part),)
        self._failed(lane, route, error)
        lane.claims = (run.claim,)

    async def _handle(self, lane: Lane, route: Route, claim: Claim) -> None:
        """Handle a claim, and those behind it that the same handler may have without waiting, or noting, first."""
        queue, gate, finish, monotonic = self._queue, self._gate, self._settler.finish, self._monotonic
        routes, prepare, invoke, delivers = self._routes, route.prepare, route.invoke, route.delivers
        order = self._order
        assert lane.task is not None
        cancelling = lane.task.cancelling
        gate.running += 1
        try:
            while True:
                lane.claims = (claim,)
                try:
                    prepared = prepare(claim)
                    await invoke(prepared)
                except BaseException as error:
                    self._failed(lane, route, error)
                else:
                    if delivers and prepared.staged:
                        self._settle(Settlement(claim.position, DONE, prepared.staged))
                    else:
                        finish(claim.position)
                    if order is not None and (follower := order.ended(claim.record.key)) is not None:
                        self._let(follower)
                if cancelling() or self._freed is not None:
                    self._free(lane)
                over = self._starts <= 0 or not queue or gate.closed or monotonic() >= self._until
                if over or (claim := queue[0]).suspect or routes.get(claim.record.type) is not route:
                    break
                queue.popleft()
                self._starts -= 1
        finally:
            gate.leave()
            self._free(lane)

    def _free(self, lane: Lane) -> None:
        """What the lane was called for has ended."""
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
                await self._call(lane, route, claims)
        else:
            async with self._gate.alone():
                if await self._begin(claims):
                    await self._call(lane, route, claims)
                    # Before the next one may kill us, or this one would be blamed for it.
                    await self._settler.caught_up()

    async def _call(self, lane: Lane, route: Route, claims: Sequence[Claim]) -> None:
        await self._handle(lane, route, claims[0])

    async def _begin(self, claims: Sequence[Claim]) -> bool:
        """Note that these start now. False, and they are dropped, when we stop or they are not ours any more."""
        backoff = Backoff("begin", self._group.name, self._clock, self._telemetry)
        while not self._stopping:
            try:
                await self._consumer.begin(self._runs.claimed(claim for claim in claims if claim.suspect))
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
            if self._may_start():
                return True
            if not self._queue:
                await self._sleep()
            elif self._gate.closed:
                await self._gate.opened()
            elif self._monotonic() >= self._keeper.trusted_until:
                await self._keeper.answer()
            else:
                await self._clock.sleep(0)
            self._begin_turn()
        return False

    def _may_start(self) -> bool:
        if self._starts <= 0 or not self._queue or self._gate.closed:
            return False
        return self._monotonic() < self._until

    def _begin_turn(self) -> None:
        """Everybody else had the loop: so many may start now, and until then."""
        self._starts = 0 if self._stopping else self._turn()
        self._until = min(self._monotonic() + _TURN_S, self._keeper.trusted_until)

    async def _sleep(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._idle.append(waiter)
        try:
            await waiter
        finally:
            self._waking = False

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
                TIMED_OUT, group=self._group.name, position=claims[0].position, timeout_s=route.timeout_s
            )
            error = TimeoutError(f"the handler had not ended after {route.timeout_s:g} s")
        for claim in claims:
            self._end_failed(lane, claim, route.outcome(claim, error))

    # The order of keys.

    def _end(self, claim: Claim, outcome: Outcome, outputs: Sequence[Output] = ()) -> None:
        """Settle a claim that was handled by itself, and let the next one of its key start."""
        self._settle(Settlement(claim.position, outcome, outputs))
        if self._order is not None:
            self._next(claim.record.key, wait=type(outcome) is Later)

    def _end_failed(self, lane: Lane, claim: Claim, outcome: Outcome) -> None:
        self._end(claim, outcome)

    def _drop(self, claims: Sequence[Claim]) -> None:
        """Forget claims without an outcome."""
        self._dropped(len(claims))
        if self._order is not None:
            for claim in claims:
                self._next(claim.record.key, wait=False)

    def _next(self, key: str | None, *, wait: bool) -> None:
        """A key's claim has ended: the next one starts; or, where that one must be tried again, all go back behind it."""
        assert self._order is not None
        claim = self._order.ended(key)
        while wait and claim is not None:
            self._settle(Settlement(claim.position, BEHIND))
            claim = self._order.ended(key)
        if claim is not None:
            self._let(claim)

    def _let(self, claim: Claim) -> None:
        """It need not wait for others of its key any more."""
        # One pack after the other: those that are open take much more room.
        (self._queue.appendleft if self._runs.is_event(claim) else self._queue.append)(claim)
        self._more.set()
        self.wake()

    def _forget(self, gone: Callable[[Claim], bool]) -> None:
        """Drop claims that have not started."""
        waited = self._order.discard(gone) if self._order is not None else 0
        forgotten = [claim for claim in self._queue if gone(claim)]
        if forgotten:
            kept = [claim for claim in self._queue if not gone(claim)]
            self._queue.clear()
            self._queue.extend(kept)
            if self._order is not None:
                for claim in forgotten:
                    self._next(claim.record.key, wait=False)
        self._dropped(len(forgotten) + waited)
