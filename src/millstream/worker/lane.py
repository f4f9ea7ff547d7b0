"""Lane: a long-lived task that calls one handler at a time.

Starting a call notes no time, which would cost every event what only a hung one needs: who looks at the lane for the first
time during a call begins to count. So a timeout is never early, and late by two looks at most.

A lane is cancelled for one of three causes, noted beside it, so that the CancelledError which then comes out of the handler
can be told from one that the handler raised itself:

    TIMEOUT   the event failed, like any other failure
    LOST      somebody else has the event by now: nothing is settled, what it published is dropped
    CUT       the grace is over: nothing is settled, the event goes back
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from enum import Enum

from millstream.brokers.base import Claim, Position
from millstream.clock import Clock
from millstream.wire.packs import is_pack
from millstream.worker.call import Route

_SWEEP_S = 2.5  # a handler is first seen, and its timeout noticed, within this time,
_SWEEPS = 20  # and within this part of its timeout


class Cause(Enum):
    """Why a lane was cancelled."""

    TIMEOUT = 0
    LOST = 1
    CUT = 2


class Lane:
    """One handler at a time."""

    __slots__ = ("_deadline", "_part", "_seen", "cause", "claims", "part", "task", "type", "waits")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.claims: Sequence[Claim] = ()
        self.cause: Cause | None = None
        self.waits: set[str | None] = set()
        """Of a batch: the keys of which an event must be tried again."""
        self.part = 0
        """Which event, where the claim is a pack,"""
        self.type = ""
        """and its type."""
        self._part = 0
        self._seen: Position | None = None
        self._deadline = 0.0

    def cancel(self, cause: Cause) -> None:
        """Cancel the handler that runs now, if one does."""
        if self.claims and self.cause is None and self.task is not None:
            self.cause = cause
            self.task.cancel()

    def look(self, now: float, timeouts_s: Mapping[str, float]) -> None:
        """Cancel a handler that is past its deadline. The time of one that is seen for the first time begins now."""
        first = self.claims[0] if self.claims else None
        if first is None:
            self._seen = None
        elif self._seen is not first.position or self._part != self.part:
            self._seen, self._part = first.position, self.part
            self._deadline = now + timeouts_s[self.type if is_pack(first.record) else first.record.type]
        elif now > self._deadline:
            self.cancel(Cause.TIMEOUT)

    def take_cause(self) -> Cause | None:
        """The cause of our cancellation, which is over now: the lane goes on."""
        cause, self.cause = self.cause, None
        if cause is not None and self.task is not None:
            self.task.uncancel()
        return cause

    def free(self) -> None:
        """The calls are over. Raises when the worker is over too, and the handler has swallowed its cancellation."""
        self.claims = ()
        if self.cause is not None:
            self.take_cause()
        if self.task is not None and self.task.cancelling():
            raise asyncio.CancelledError


async def sweep(lanes: Sequence[Lane], routes: Mapping[str, Route], clock: Clock) -> None:
    """Cancel handlers that are past their deadline, which begins when they are first seen. Ends by cancellation."""
    timeouts_s = {name: route.timeout_s for name, route in routes.items()}
    period_s = min(_SWEEP_S, min(timeouts_s.values()) / _SWEEPS)
    while True:
        await clock.sleep(period_s)
        now = clock.monotonic()
        for lane in lanes:
            lane.look(now, timeouts_s)
