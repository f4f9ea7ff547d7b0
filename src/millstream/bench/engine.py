"""The engine below a broker: whether a run would do harm there, what it can do at most, and what waiting for it costs.

`redis_engine.py` measures from outside, `sqlite_engine.py` uses the same library as the broker; of other brokers,
memory among them, nobody knows a limit.
"""

from __future__ import annotations

import os
from typing import Protocol

from msgspec import Struct

from millstream.bench.scenarios import Load

OBJECT_BYTES = 1_000  # what an event takes up in memory, beside its data
MAX_SHARE = 0.8  # of the free memory, or the free disk


class Limit(Struct, frozen=True):
    """What the engine can do."""

    by: str
    """How that was measured, for people."""
    rate: float | None = None
    """Events a second."""
    p50_ms: float | None = None
    """From writing an event to the wake-up of who waits for it."""
    p99_ms: float | None = None


class Waits(Struct, frozen=True):
    """What waiting costs, however fast the processor is; None: that does not apply."""

    trip_ms: float | None = None
    """An empty command there and back."""
    store_ms: float | None = None
    """One event alone, until it is confirmed."""
    commits_s: float | None = None
    """What the commits that wait for the disk took when the limit was measured."""
    syncs: str = ""
    """The setting by which every write waits for the disk; empty where none does."""


class Engine(Protocol):
    """What a broker is built on."""

    async def objections(self, events: int, size_bytes: int) -> list[str]:
        """Why a run of so many events should not be made here."""
        ...

    async def limit(self, load: Load, events: int, data: bytes) -> Limit | None:
        """The most that it can do, with entries that hold a whole event; None where nobody knows."""
        ...

    async def waits(self) -> Waits:
        """What waiting for it costs; to be asked after the limit."""
        ...

    async def cpu_s(self) -> float | None:
        """The processor time of its server so far; None where it has none of its own."""
        ...


class NoEngine:
    """Below a broker of which we know nothing, or which is an engine itself."""

    def __init__(self, in_memory: bool) -> None:
        self._in_memory = in_memory

    async def objections(self, events: int, size_bytes: int) -> list[str]:
        """Only that memory may not suffice."""
        needed, free = events * (size_bytes + OBJECT_BYTES), _free_memory()
        if self._in_memory and free is not None and needed > MAX_SHARE * free:
            return [f"the events take about {needed:,} bytes of memory, and {free:,} are free"]
        return []

    async def limit(self, load: Load, events: int, data: bytes) -> Limit | None:
        """Unknown."""
        return None

    async def waits(self) -> Waits:
        """Unknown."""
        return Waits()

    async def cpu_s(self) -> float | None:
        """Unknown."""
        return None


def _free_memory() -> int | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return None
