"""How soon an event that one process publishes is in the handler of another, which was asleep.

    python -m benchmarks.wakeup [URL] [--events 300] [--every 0.02]

Without a URL, on an SQLite file of its own. Prints one JSON object: `p50_ms` and `p99_ms` are from the call of `publish` to
the first line of the handler, `stored_p50_ms` is the part until `publish` returns, and `idle_percent` is what the worker
takes of a core while nothing happens. Both processes read the clock of the machine, so they must share one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Coroutine
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import uvloop

from millstream import App, Event, Stream

T = TypeVar("T")

IDLE_S = 2.0
WITHIN_S = 60.0


class Ping(Event, type="bench.ping"):
    number: int


pings = Stream("pings", Ping)


def handle(url: str, events: int, idle_s: float, pipe: Connection) -> None:
    """The other process: sends what it takes while idle, and then when each handler began."""
    _quiet()
    _run(_handle(url, events, idle_s, pipe))


async def _handle(url: str, events: int, idle_s: float, pipe: Connection) -> None:
    app, began_s, finished = App("bench", broker=url), dict[int, float](), asyncio.Event()

    @app.subscriber(pings, "group")
    async def pinged(event: Ping) -> None:
        began_s[event.number] = time.monotonic()
        if len(began_s) == events:
            finished.set()

    async with app.worker():
        cpu_s = time.process_time()
        await asyncio.sleep(idle_s)
        pipe.send((time.process_time() - cpu_s) / idle_s)
        async with asyncio.timeout(WITHIN_S + events):
            await finished.wait()
    pipe.send(began_s)


async def publish(url: str, events: int, every_s: float, pipe: Connection) -> dict[str, float]:
    """This process: publishes one event after the other, with silence in between."""
    called_s, stored_s = [], []
    app = App("bench", broker=url, streams=[pings])
    async with app:
        idle: float = await asyncio.to_thread(pipe.recv)
        for number in range(events):
            await asyncio.sleep(every_s)
            called_s.append(time.monotonic())
            await app.publish(Ping(number=number), to=pings)
            stored_s.append(time.monotonic() - called_s[-1])
    began_s: dict[int, float] = await asyncio.to_thread(pipe.recv)
    waits_s = sorted(began_s[number] - called_s[number] for number in range(events))
    return {
        "p50_ms": round(waits_s[events // 2] * 1e3, 3),
        "p99_ms": round(waits_s[events * 99 // 100] * 1e3, 3),
        "stored_p50_ms": round(sorted(stored_s)[events // 2] * 1e3, 3),
        "idle_percent": round(idle * 100, 2),
    }


def measured(url: str, events: int, every_s: float, idle_s: float = IDLE_S) -> dict[str, float]:
    """One measurement, against an empty broker."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=handle, args=(url, events, idle_s, theirs))
    child.start()
    theirs.close()  # so that we hear when the child dies
    try:
        return _run(publish(url, events, every_s, ours))
    finally:
        child.join()


def _run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def _quiet() -> None:
    logging.getLogger("millstream").setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--events", type=int, default=300)
    parser.add_argument("--every", type=float, default=0.02, metavar="SECONDS")
    options = parser.parse_args()
    _quiet()
    with tempfile.TemporaryDirectory() as folder:
        url = options.url or f"sqlite:///{folder}/wakeup.db"
        print(json.dumps(measured(url, options.events, options.every)))


if __name__ == "__main__":
    main()
