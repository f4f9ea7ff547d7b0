"""The supervisor: `--workers N` processes, restarted when they crash, stopped together.

A child is the same command line again, with a variable in its environment that says which child it is: so whatever made
the app in this process makes it there too. It is spawned and never forked. A pipe tells it when its supervisor is gone,
also after a `kill -9`: then it drains and ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from millstream.clock import Clock
from millstream.telemetry import logger

CHILD = "MILLSTREAM_CHILD"
_PIPE = "MILLSTREAM_CHILD_PIPE"

_FIRST_S, _LONGEST_S = 0.5, 30.0  # between restarts
_STEADY_S = 60.0  # who lived this long starts again with the shortest pause
_MARGIN_S = 5.0  # a child that outlives its grace by this much is killed
_HOPELESS = (2, 4)  # wrong usage, not allowed: the next start would end the same way
_NO_BROKER = 3  # ends the first start, like that of a lone process; later on the broker may come back


class Supervisor:
    """Keeps `count` children running until it is told to stop."""

    def __init__(self, count: int, grace_s: float, clock: Clock) -> None:
        self._count = count
        self._grace_s = grace_s
        self._clock = clock
        self._children: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self.exit_code = 0

    async def run(self) -> int:
        """The exit code: 0 when all children have drained, else the first other one."""
        reader, writer = os.pipe()
        with catching(self._signalled):
            try:
                async with asyncio.TaskGroup() as tasks:
                    for index in range(1, self._count + 1):
                        tasks.create_task(self._keep(index, reader))
            finally:
                os.close(reader)
                os.close(writer)
        return self.exit_code

    async def _keep(self, index: int, pipe: int) -> None:
        """One child after the other. Ends after `stop`, when the child has ended."""
        pause_s = _FIRST_S
        hopeless: tuple[int, ...] = (*_HOPELESS, _NO_BROKER)
        while not self._stopping.is_set():
            started = self._clock.monotonic()
            code = await self._live(index, pipe)
            if self._stopping.is_set():
                # Ended by the signal that we passed on: it could not catch it yet, or any more, and had nothing in hand.
                drained = code in (0, -signal.SIGTERM, -signal.SIGINT)
                self.exit_code = self.exit_code or (0 if drained else max(code, 1))
                return
            if code in hopeless and self._clock.monotonic() - started < _STEADY_S:
                self.exit_code = code
                self._stop(signal.SIGTERM)
                return
            hopeless = _HOPELESS
            if self._clock.monotonic() - started > _STEADY_S:
                pause_s = _FIRST_S
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            logger.warning("worker %d %s; it starts again in %g s", index, how, pause_s)
            await self._clock.wait(self._stopping, pause_s)
            pause_s = min(pause_s * 2, _LONGEST_S)

    async def _live(self, index: int, pipe: int) -> int:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *sys.orig_argv[1:],
            env=os.environ | {CHILD: str(index), _PIPE: str(pipe)},
            pass_fds=(pipe,),
            start_new_session=True,  # a Ctrl-C reaches the children through us, once
        )
        self._children[index] = child
        if self._stopping.is_set():  # while it was being spawned: the signal was passed on without it
            child.terminate()
        logger.info("worker %d is process %d", index, child.pid)
        try:
            return await self._ended(child)
        finally:
            del self._children[index]

    async def _ended(self, child: asyncio.subprocess.Process) -> int:
        waiting = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._limit(child, waiting))
            code = await child.wait()
            waiting.set()
        return code

    async def _limit(self, child: asyncio.subprocess.Process, ended: asyncio.Event) -> None:
        """Kill a child that does not end in time after a stop. Ends when the child has."""
        while not ended.is_set() and not self._stopping.is_set():
            await self._clock.wait(ended, 1.0)
        if not await self._clock.wait(ended, self._grace_s + _MARGIN_S):
            logger.error("process %d did not end within its grace: killed", child.pid)
            with suppress(ProcessLookupError):
                child.kill()

    def _signalled(self, number: int) -> None:
        self._stop(number)

    def _stop(self, number: int) -> None:
        """Pass a signal on; a second one makes the children cut off what still runs."""
        self._stopping.set()
        for child in self._children.values():
            with suppress(ProcessLookupError):
                child.send_signal(number)


class catching:
    """Call back for SIGTERM and SIGINT inside the block, from the event loop."""

    def __init__(self, callback: Callable[[int], None]) -> None:
        self._callback = callback

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(NotImplementedError):  # Windows: the process ends at once, and leases do the rest
                loop.add_signal_handler(number, self._callback, number)

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(NotImplementedError):
                loop.remove_signal_handler(number)


def is_child() -> bool:
    """True in a process that a supervisor has started."""
    return CHILD in os.environ


def when_orphaned(callback: Callable[[], None]) -> None:
    """In a child: call back when the supervisor is gone."""
    text = os.environ.get(_PIPE)
    if text is None:
        return
    pipe, loop = int(text), asyncio.get_running_loop()

    def ended() -> None:  # nothing is ever written: readable means that the other end is closed
        loop.remove_reader(pipe)
        callback()

    loop.add_reader(pipe, ended)
