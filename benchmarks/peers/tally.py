"""What all peers share: the events, and a tally of what was handled, that several processes can write to.

A peer's `bench.py` runs in its own virtual environment, which knows nothing of Millstream: `bench.py URL EVENTS SIZE
[WAY]`. It prints one JSON object, `{"version": …, "events": …, "rates": {"publish-one": …, "publish-many": …,
"handle": …}}`, or exits with 1 and says why. Handling is from the first event handled to the last, so that nobody's
start counts. Standard library only.
"""

from __future__ import annotations

import json
import mmap
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

WITHIN_S = 300.0
POLL_S = 0.02
TIME_BYTES = 8


class Tally:
    """When each event was handled, and how often: memory that `Tally.open(path)` in another process shares."""

    def __init__(self, path: Path, events: int) -> None:
        self.path, self.events = path, events
        with path.open("r+b") as file:
            file.truncate(events * (TIME_BYTES + 1))
            memory = memoryview(mmap.mmap(file.fileno(), 0))
        self._at = memory[: events * TIME_BYTES].cast("d")
        self._times = memory[events * TIME_BYTES :]

    @classmethod
    def new(cls, events: int) -> Tally:
        with tempfile.NamedTemporaryFile(prefix="tally-", delete=False) as file:
            return cls(Path(file.name), events)

    @classmethod
    def open(cls, path: str) -> Tally:
        return cls(Path(path), Path(path).stat().st_size // (TIME_BYTES + 1))

    def handled(self, number: int) -> None:
        self._at[number] = time.monotonic()
        self._times[number] += 1

    @property
    def complete(self) -> bool:
        return 0 not in self._times.tobytes()

    def wait(self, alive: Callable[[], bool] = lambda: True) -> None:
        """Return when all were handled. Exits when the worker has ended before, or when it takes too long."""
        until = time.monotonic() + WITHIN_S
        while not self.complete:
            if time.monotonic() > until or not alive():
                self.path.unlink()
                raise SystemExit(f"{self._times.tobytes().count(0):,} of {self.events:,} events were not handled")
            time.sleep(POLL_S)

    def rate(self) -> float:
        """Events a second between the first and the last. Exits when one was handled twice or never."""
        self.path.unlink()
        if self._times.tobytes() != b"\x01" * self.events:
            raise SystemExit("not every event was handled exactly once")
        return (self.events - 1) / (max(self._at) - min(self._at))


def event(number: int, size: int) -> dict[str, Any]:
    """An event of about so many bytes as JSON."""
    bare = {"number": number, "customer": f"c-{number % 1000:06}", "remark": ""}
    return bare | {"remark": "-" * (size - len(json.dumps(bare, separators=(",", ":"))))}


def timed(call: Callable[[], object]) -> float:
    """How many seconds a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


async def timed_async(call: Callable[[], Awaitable[object]]) -> float:
    """How many seconds an awaited call takes."""
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


def arguments() -> tuple[str, int, int, str]:
    """URL, number and size of the events, and the way where there are several."""
    url, events, size, *way = sys.argv[1:]
    return url, int(events), int(size), way[0] if way else ""


def report(package: str, events: int, **rates: float) -> None:
    """Print the object; `publish_one=` becomes `publish-one`."""
    named = {name.replace("_", "-"): round(rate) for name, rate in rates.items()}
    print(json.dumps({"version": version(package), "events": events, "rates": named}))
