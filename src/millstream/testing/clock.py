"""Virtual time: a clock that stands still until a test lets time pass.

    clock = VirtualClock()
    app = App("shop", include=[billing], clock=clock)
    …
    await clock.advance(3_600)        # an hour's retries, heartbeats and timeouts, in milliseconds

Timers fire in the order of their times, and between two of them everything that the first one set off runs until it
waits again. Chance and ids come from a seed, so the same test takes the same way every time.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - seeded: this is the other side of the door
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil
from types import TracebackType
from typing import Any

from millstream.clock import Clock, Handle

START_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z: in the years that tests are about, and a date one recognises
BOOT_S = 1_000.0  # what `monotonic` shows at the start: not 0, so that nobody takes it for "never"
# Turns of the loop that settle what no thread or socket is needed for; a chain of awaits takes one each.
QUIET_TURNS = 50


class VirtualClock(Clock):
    """A clock that moves only by `advance`, in whole milliseconds.

    `settle` returns when nothing more happens without time passing; it is awaited between any two timers, and may be
    set later. Without one, the loop gets fifty turns, which is enough for what waits for nothing but this clock.
    """

    def __init__(self, settle: Callable[[], Awaitable[None]] | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.settle = settle or _turns
        self._random = random.Random(seed)  # noqa: S311 - repeatable on purpose
        self._passed_ms = 0
        self._timers: list[_Timer] = []
        self._made = 0
        self._advancing = False

    async def advance(self, seconds: float) -> None:
        """Let time pass: fire what falls due, in order, and let the loop become quiet before, between and after.

        What a timer starts is awaited by `settle` only: a callback's error is raised here. Raises `RuntimeError` when
        called from two tasks at once, since time would pass twice.
        """
        if self._advancing:
            raise RuntimeError("advance() is already running: let only one task of a test move the time")
        self._advancing = True
        try:
            await self._advance_to(self._passed_ms + _whole_ms(seconds))
        finally:
            self._advancing = False

    def next_timer_s(self) -> float | None:
        """How far the next timer is away; None when there is none, and time passing would change nothing."""
        while self._timers and self._timers[0].cancelled:
            heappop(self._timers)
        return (self._timers[0].at_ms - self._passed_ms) / 1000 if self._timers else None

    def now_ms(self) -> int:
        """Virtual wall clock time, in milliseconds since the epoch."""
        return START_MS + self._passed_ms

    def monotonic(self) -> float:
        """Virtual seconds."""
        return BOOT_S + self._passed_ms / 1000

    async def sleep(self, seconds: float) -> None:
        """Pause until so much virtual time has passed; 0 gives every other task one turn."""
        if seconds <= 0:
            await asyncio.sleep(0)  # noqa: TID251 - a turn of the loop takes no time
            return
        over = asyncio.Event()
        timer = self.call_later(seconds, over.set)
        try:
            await over.wait()
        finally:
            timer.cancel()

    def timeout(self, seconds: float) -> AbstractAsyncContextManager[Any]:
        """Raise `TimeoutError` in the block when it takes longer, in virtual time."""
        return _Timeout(self, seconds)

    def call_later(self, seconds: float, callback: Callable[..., object], *args: Any) -> Handle:
        """Call back from `advance`, once; at once from the event loop when there is nothing to wait for."""
        if seconds <= 0:
            return asyncio.get_running_loop().call_soon(callback, *args)
        self._made += 1
        timer = _Timer(self._passed_ms + max(1, _whole_ms(seconds)), self._made, callback, args)
        heappush(self._timers, timer)
        return timer

    def chance(self) -> float:
        """A number in [0, 1) out of the seed."""
        return self._random.random()

    def nonce(self) -> str:
        """Twelve characters out of the seed."""
        return f"{self._random.getrandbits(48):012x}"

    async def _advance_to(self, until_ms: int) -> None:
        await self.settle()
        while (away_s := self.next_timer_s()) is not None and self._passed_ms + _whole_ms(away_s) <= until_ms:
            timer = heappop(self._timers)
            self._passed_ms = timer.at_ms
            timer.fire()
            await self.settle()
        self._passed_ms = until_ms
        await self.settle()


@dataclass(order=True, slots=True)
class _Timer:
    at_ms: int
    made: int  # of two at the same moment, the older fires first
    callback: Callable[..., object] = field(compare=False)
    args: tuple[Any, ...] = field(compare=False)
    context: Context = field(compare=False, default_factory=copy_context)
    cancelled: bool = field(compare=False, default=False)

    def cancel(self) -> None:
        self.cancelled = True

    def fire(self) -> None:
        self.context.run(self.callback, *self.args)


class _Timeout:
    """asyncio's own timeout, whose moment is told by a virtual clock: so it cancels and counts exactly as the real one."""

    def __init__(self, clock: VirtualClock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)  # noqa: TID251 - it has no time of its own

    async def __aenter__(self) -> _Timeout:
        await self._timeout.__aenter__()
        self._timer = self._clock.call_later(self._seconds, self._expire)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def expired(self) -> bool:
        """True once the time was up inside the block."""
        return self._timeout.expired()

    def _expire(self) -> None:
        self._timeout.reschedule(asyncio.get_running_loop().time())


def _whole_ms(seconds: float) -> int:
    # Differences of floats are off by a hair: 0.29999999999995 s is meant to be 300 ms, not 299 and not 301.
    return ceil(round(seconds * 1000, 6))


async def _turns() -> None:
    for _ in range(QUIET_TURNS):
        await asyncio.sleep(0)  # noqa: TID251 - a turn of the loop takes no time
