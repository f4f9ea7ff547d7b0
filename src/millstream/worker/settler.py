"""Settler: gathers outcomes and gives them to the broker in few large calls.

There is no timer. While one call is under way, outcomes gather and leave with the next; a lone one leaves at once. So the
batch grows with the load by itself: one outcome a call when little happens, hundreds when much does. What most events come
to, done and nothing to store, is told by their positions alone.

A full broker may still settle what needs no room. Dead letters and outputs step aside, and are tried again after a pause,
beside which all others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from millstream.brokers.base import DONE, Consumer, Dead, Position, Settlement, finished
from millstream.clock import Clock
from millstream.errors import BrokerError, BrokerFull
from millstream.telemetry import STALE, Telemetry
from millstream.worker.backoff import Backoff

MAX_SETTLE = 1_000  # what one call carries; more would hold up the heartbeat on a slow server


class Settler:
    """Settles what the lanes hand over, and tells how many events have left our hands."""

    def __init__(
        self,
        consumer: Consumer,
        group: str,
        clock: Clock,
        telemetry: Telemetry,
        settled: Callable[[int], None],
        gathered: Callable[[list[Position], list[Settlement]], tuple[list[Position], list[Settlement]]],
    ) -> None:
        self._consumer = consumer
        self._group = group
        self._telemetry = telemetry
        self._clock = clock
        self._backoff = Backoff("settle", group, clock, telemetry)
        self._room = Backoff("store dead letters and outputs", group, clock, telemetry)
        self._settled = settled
        self._gathered = gathered
        self._finished: list[Position] = []  # as long as nothing waits; else all does, in its order
        self._waiting: list[Settlement] = []
        self._aside: list[Settlement] = []
        self._aside_until = 0.0
        self._repeated: set[Position] = set()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False

    def finish(self, position: Position) -> None:
        """Hand over an event that is done, and with which nothing is stored."""
        if self._waiting:
            self._waiting.append(Settlement(position, DONE))
            return
        if not self._finished:
            self._begin()
        self._finished.append(position)

    def finish_all(self, positions: Sequence[Position]) -> None:
        """The same for all of a batch."""
        if self._waiting:
            self._waiting += finished(positions)
            return
        self._begin()
        self._finished += positions

    def add(self, settlement: Settlement) -> None:
        """Hand over one outcome."""
        if not self._waiting:
            self._begin()
            self._put_back([])
        self._waiting.append(settlement)

    async def caught_up(self) -> None:
        """Wait until all outcomes are settled, but for those that the broker has no room for."""
        await self._idle.wait()

    def stop(self) -> None:
        """Settle what there is, then end."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Ends after `stop`, when all is settled. Cancelled, it drops the rest: those events come again."""
        while self._finished or self._waiting or self._aside or not self._stopping:
            pause_s = self._aside_until - self._clock.monotonic()
            if self._aside and pause_s <= 0:
                aside, self._aside = self._aside, []
                self._put_back(aside)
            if self._finished or self._waiting:
                done, waiting = self._gathered(self._finished, self._waiting)
                self._finished, self._waiting = done[MAX_SETTLE:], waiting[MAX_SETTLE:]
                if done:
                    await self._finish(done[:MAX_SETTLE])
                elif waiting:
                    await self._settle(waiting[:MAX_SETTLE])
                if not (self._finished or self._waiting):
                    self._idle.set()
                continue
            self._wake.clear()
            if self._aside:
                await self._clock.wait(self._wake, pause_s)
            else:
                await self._wake.wait()

    def _begin(self) -> None:
        self._wake.set()
        self._idle.clear()

    def _put_back(self, settlements: list[Settlement]) -> None:
        """These come first, and all in its order: what follows of a key is not to be settled before them."""
        self._waiting = [*settlements, *self._waiting, *finished(self._finished)]
        self._finished = []

    async def _finish(self, positions: list[Position]) -> None:
        try:
            answers = await self._consumer.finish(positions)
        except BrokerError as error:  # nothing is known: the same again
            self._repeated.update(positions)
            self._put_back(finished(positions))
            await self._backoff.pause(error)
        else:
            self._answered(positions, answers)

    async def _settle(self, batch: list[Settlement]) -> None:
        try:
            answers = await self._consumer.settle(batch)
        except BrokerError as error:  # nothing is known: the same again, until it is answered or refused
            self._repeated.update(settlement.position for settlement in batch)
            large = [settlement for settlement in batch if _needs_room(settlement)]
            if isinstance(error, BrokerFull) and large:
                self._put_back([settlement for settlement in batch if not _needs_room(settlement)])
                self._aside += large
                self._aside_until = self._clock.monotonic() + self._room.delay_s(error)
            else:
                self._put_back(batch)
                await self._backoff.pause(error)
        else:
            if not self._aside:
                self._room.reset()
            self._answered([settlement.position for settlement in batch], answers)

    def _answered(self, positions: Sequence[Position], answers: Sequence[bool]) -> None:
        self._backoff.reset()
        self._settled(len(positions))
        if not all(answers):
            self._tell_refused(positions, answers)
        if self._repeated:
            self._repeated.difference_update(positions)

    def _tell_refused(self, positions: Sequence[Position], answers: Sequence[bool]) -> None:
        """Of what was sent twice nobody can tell: the first answer, which we never got, may have been a yes."""
        refused = [position for position, ours in zip(positions, answers, strict=True) if not ours]
        refused = [position for position in refused if position not in self._repeated]
        if refused:
            self._telemetry.emit(STALE, group=self._group, positions=refused)


def _needs_room(settlement: Settlement) -> bool:
    return bool(settlement.outputs or settlement.letters) or isinstance(settlement.outcome, Dead)
