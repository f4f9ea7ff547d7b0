"""What a stretch of work costs: time on the wall, CPU of this process and of the server, and waiting for a core."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from msgspec import Struct

from millstream.clock import Clock

_THREADS = Path("/proc/self/task")  # Linux: `schedstat` of each has nanoseconds on a core, and waiting for one


class Cost(Struct, frozen=True):
    """What was measured; None: nobody knows."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    """Of this process, all its threads."""
    queued_s: float | None = None
    """For how long its threads could have run, and all cores were taken."""
    server_cpu_s: float | None = None


async def _unknown() -> float | None:
    return None


class Meter:
    """Adds up what the blocks under `running` cost."""

    def __init__(self, server_cpu_s: Callable[[], Awaitable[float | None]] = _unknown) -> None:
        self.cost = Cost()
        self._clock = Clock()
        self._server_cpu_s = server_cpu_s

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The block is measured."""
        server_before = await self._server_cpu_s()
        before = self._own()
        yield
        after = self._own()
        server_after = await self._server_cpu_s()
        self.cost = Cost(
            self.cost.seconds + after.seconds - before.seconds,
            self.cost.cpu_s + after.cpu_s - before.cpu_s,
            _sum(self.cost.queued_s, before.queued_s, after.queued_s),
            _sum(self.cost.server_cpu_s, server_before, server_after),
        )

    def _own(self) -> Cost:
        return Cost(self._clock.monotonic(), self._clock.cpu_s(), _queued_s())


def _queued_s() -> float | None:
    try:
        return sum(int((thread / "schedstat").read_text().split()[1]) for thread in _THREADS.iterdir()) / 1e9
    except (OSError, ValueError, IndexError):  # not Linux, a kernel without these statistics, a thread that just ended
        return None


def _sum(so_far: float | None, before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else (so_far or 0.0) + after - before
