"""The only door to time, sleep, chance and ids: nothing else in Millstream asks the system for them.

A `Clock` is passed to whoever needs one, never read from a global, so two apps in one process can live in different
times, and `millstream.testing` can put a whole app under virtual time.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Protocol

# CLOCK_BOOTTIME goes on counting while a laptop sleeps, so a suspended process does not trust an old lease.
_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

_forks = 0  # how often this process was forked off; asking for its number would cost more than the rest of an id


def _forked() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_forked)

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


class Handle(Protocol):
    """A timer that has not fired yet."""

    def cancel(self) -> None:
        """Do not fire. Safe to repeat."""
        ...


class Clock:
    """The system's time, and asyncio's timers."""

    def __init__(self) -> None:
        self._prefix = ""
        self._issued = 0
        self._fork = -1

    def now_ms(self) -> int:
        """Wall clock time, in milliseconds since the epoch. For people and event times, never for liveness."""
        return time.time_ns() // 1_000_000

    monotonic: Callable[[], float] = staticmethod(partial(time.clock_gettime, _BOOT))
    """Seconds that never go back and count a suspended machine's sleep too. Called for each event, so without a frame."""

    def cpu_s(self) -> float:
        """Processor time of this process so far, of all its threads."""
        return time.process_time()

    async def sleep(self, seconds: float) -> None:
        """Pause the current task; 0 gives every other task one turn."""
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float) -> AbstractAsyncContextManager[Any]:
        """Raise `TimeoutError` in the block when it takes longer."""
        return asyncio.timeout(seconds)

    def call_later(self, seconds: float, callback: Callable[..., object], *args: Any) -> Handle:
        """Call back from the event loop, once."""
        return asyncio.get_running_loop().call_later(seconds, callback, *args)

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        """Wait for the event to be set; False when the time ran out first."""
        if event.is_set():
            return True
        try:
            async with self.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        return True

    def chance(self) -> float:
        """A random number in [0, 1), for jitter."""
        return random.random()  # noqa: S311 - jitter needs no secrecy

    def nonce(self) -> str:
        """Twelve characters that no other process will draw."""
        return _base36(secrets.randbits(62)).rjust(12, "0")

    def new_id(self) -> str:
        """An event id of at most 24 characters, unique across processes: a random prefix and a counter."""
        if self._fork != _forks:
            self._begin()
        self._issued += 1
        return f"{self._prefix}{self._issued:x}"

    def new_ids(self, count: int) -> list[str]:
        """So many of them, as `new_id` gives them one after the other."""
        if self._fork != _forks:
            self._begin()
        prefix, first = self._prefix, self._issued + 1
        self._issued += count
        return [f"{prefix}{number:x}" for number in range(first, first + count)]

    def _begin(self) -> None:
        """A prefix of our own: a forked child must not go on counting with its parent's."""
        self._fork, self._prefix, self._issued = _forks, self.nonce(), 0


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _ALPHABET[digit] + digits
    return digits or "0"
