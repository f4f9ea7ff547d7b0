"""Lanes of a group that takes batches: one of them gathers, the others handle what was gathered before.

Only one gathers at a time, so that batches become full: up to their size, or what has come within their time. Events of one
key may be in one batch, in their order, and are never in two at once. When one of them must be tried again, those behind it
are put back, in this batch and behind it. Packs are opened one by one, as long as a batch is not full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from millstream.brokers.base import Claim, Later, Outcome, Settlement, finished
from millstream.units import seconds
from millstream.wire import packs
from millstream.wire.packs import is_pack
from millstream.worker.call import Route, unhandled
from millstream.worker.lane import Lane
from millstream.worker.lanes import BEHIND, Lanes
from millstream.worker.runs import Run


class BatchLanes(Lanes):
    """The lanes of a group with a batch handler."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        assert self._group.batch is not None
        self._size = self._group.batch.size
        self._within_s = seconds(self._group.batch.within)
        self._gathering = asyncio.Lock()
        self._packs = False  # whether there may be packs in the queue, or behind a key
        self._plain = False  # whether all that is queued is fresh, without order, and there are handlers for it

    def put(self, claims: Iterable[Claim]) -> None:
        """Queue claims."""
        claims = list(claims)
        types = {claim.record.type for claim in claims}
        plain = self._order is None and types <= self._routes.keys() and not any(claim.suspect for claim in claims)
        self._packs = self._packs or packs.TYPE in types
        self._plain = plain and (self._plain or not self._queue)
        super().put(claims)

    async def _work(self, lane: Lane) -> None:
        """One batch after the other."""
        while True:
            async with self._gathering:
                claims = await self._gather()
            if not claims:
                return
            lane.waits.clear()
            await self._batch(lane, claims)
            if self._order is not None:
                for key in dict.fromkeys(claim.record.key for claim in claims):
                    self._next(key, wait=key in lane.waits)

    async def _batch(self, lane: Lane, claims: Sequence[Claim]) -> None:
        routes = self._routes
        known = claims if self._plain else [claim for claim in claims if claim.record.type in routes]
        if len(known) < len(claims):
            for claim in claims:
                if claim.record.type not in routes:
                    self._settle(Settlement(claim.position, unhandled(claim, self._group, self._telemetry)))
        if not known:
            return
        route = self._routes[known[0].record.type]
        if not self._plain and any(claim.suspect for claim in known):
            await self._suspects(lane, route, known)
        else:
            await self._handle_batch(lane, route, known)

    async def _gather(self) -> list[Claim]:
        """The next batch: full, or what came within the time. Empty when there will be no more."""
        while await self._ready():
            until = self._clock.monotonic() + self._within_s
            while self.queued < self._size and not self._stopping:
                if self._unpacked():
                    continue
                left_s = until - self._clock.monotonic()
                self._more.clear()
                if left_s <= 0 or not await self._clock.wait(self._more, left_s):
                    break
            if not await self._ready():  # while we gathered, trust may have run out or the gate have closed
                break
            batch = self._take()
            if batch:
                return batch
        return []

    def _take(self) -> list[Claim]:
        queue, order = self._queue, self._order
        if self._plain and not self._stopping:
            return [queue.popleft() for _ in range(min(len(queue), self._size))]
        batch: list[Claim] = []
        while queue and len(batch) < self._size and not self._stopping:
            claim = queue[0]
            if self._packs and is_pack(claim.record):
                self._open(queue.popleft())
                continue
            if batch and (claim.suspect > 1 or batch[0].suspect > 1):
                break  # who was running in a crash is called alone
            batch.append(queue.popleft())
            if order is not None and claim.suspect <= 1:
                batch += order.join(claim.record.key, self._size - len(batch))
        return batch

    def _unpacked(self) -> bool:
        """Open the first pack of the queue; True if there was one."""
        if not self._packs:
            return False
        claim = next((claim for claim in self._queue if is_pack(claim.record)), None)
        if claim is None:
            self._packs = self._order is not None and self._order.waiting > 0
            return False
        self._queue.remove(claim)
        self._open(claim)
        return True

    def _open(self, claim: Claim) -> None:
        """Put the events of a pack to the head of the queue."""
        run = self._runs.open(claim)
        if isinstance(run, Run):
            self._runs.spread(run, self._queue, self._order)
        else:
            self._end(claim, run)

    async def _call(self, lane: Lane, route: Route, claims: Sequence[Claim]) -> None:
        await self._handle_batch(lane, route, claims)

    async def _handle_batch(self, lane: Lane, route: Route, claims: Sequence[Claim]) -> None:
        claims, prepared, undecodable = route.prepare_all(claims)
        for settlement in undecodable:
            self._settle(settlement)
        if not claims:
            return
        self._gate.running += 1
        lane.claims = claims
        try:
            self._end_batch(lane, claims, await route.batch(claims, prepared))
        except BaseException as error:
            self._failed(lane, route, error)
        finally:
            self._gate.leave()
            self._free(lane)

    def _end_batch(self, lane: Lane, claims: Sequence[Claim], settlements: Sequence[Settlement] | None) -> None:
        positions = [claim.position for claim in claims]
        if settlements is None and not lane.waits:
            self._settler.finish_all(positions)
            return
        for claim, settlement in zip(claims, settlements or finished(positions), strict=True):
            if self._order is None:
                self._settle(settlement)
            elif not self._is_behind(lane, claim):
                self._settle(settlement)
                self._note(lane, claim, settlement.outcome)

    def _end_failed(self, lane: Lane, claim: Claim, outcome: Outcome) -> None:
        if not self._is_behind(lane, claim):
            self._settle(Settlement(claim.position, outcome))
            self._note(lane, claim, outcome)

    def _drop(self, claims: Sequence[Claim]) -> None:
        self._dropped(len(claims))  # the next ones of their keys start when all of the batch has ended

    def _is_behind(self, lane: Lane, claim: Claim) -> bool:
        """True, and it is put back, when an event of its key before it in the batch must be tried again."""
        behind = claim.record.key in lane.waits
        if behind:
            self._settle(Settlement(claim.position, BEHIND))
        return behind

    def _note(self, lane: Lane, claim: Claim, outcome: Outcome) -> None:
        key = claim.record.key
        if self._order is not None and key is not None and type(outcome) is Later:
            lane.waits.add(key)
