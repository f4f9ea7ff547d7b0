"""Threads for handlers that are plain functions.

They are daemons, unlike those of a `ThreadPoolExecutor`, for which the interpreter waits at its end: a handler that hangs
must not keep the process from ending. Each belongs to one call at a time, and waits for the next one in between. All but
the call itself happens on the event loop, so there is no lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Self, TypeAlias

from millstream.errors import MillstreamError
from millstream.units import MAX_CONCURRENCY

_Job: TypeAlias = tuple[Callable[[], object], asyncio.Future[BaseException | None]]


class Threads:
    """As many threads as calls that run. Those of calls that nobody waits for any more are busy until they end."""

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[_Job | None]] = []
        self._count = 0
        self._ended = False

    async def run(self, work: Callable[[], object]) -> None:
        """Call it in a thread, and raise what it raises. Cancelled, it goes on to its end, unheard."""
        jobs = self._idle.pop() if self._idle else self._new()
        done: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        jobs.put((work, done))
        error = await done
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of all threads: each ends when its call has."""
        self._ended = True
        while self._idle:
            self._idle.pop().put(None)

    def _new(self) -> SimpleQueue[_Job | None]:
        if self._count >= MAX_CONCURRENCY:
            raise MillstreamError(
                f"{self._count:,} threads are busy, most with handlers that did not end within their timeout"
            )
        jobs: SimpleQueue[_Job | None] = SimpleQueue()
        Thread(target=self._live, args=(jobs, asyncio.get_running_loop()), name="millstream", daemon=True).start()
        self._count += 1
        return jobs

    def _live(self, jobs: SimpleQueue[_Job | None], loop: asyncio.AbstractEventLoop) -> None:
        """A thread's life: one job after the other. Ends with None."""
        while (job := jobs.get()) is not None:
            work, done = job
            error: BaseException | None = None
            try:
                work()
            except BaseException as raised:
                error = raised
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._finished, jobs, done, error)
            del job, work, done, error  # or the last event would live until the next one comes

    def _finished(
        self,
        jobs: SimpleQueue[_Job | None],
        done: asyncio.Future[BaseException | None],
        error: BaseException | None,
    ) -> None:
        if self._ended:
            jobs.put(None)
        else:
            self._idle.append(jobs)
        if not done.done():
            done.set_result(error)  # not as an exception: a future refuses StopIteration
