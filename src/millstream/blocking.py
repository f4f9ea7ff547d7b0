"""Blocking: an app's verbs for threads, for programs that have no event loop: Django, Flask, scripts.

    caller's thread                            the loop's thread
    publish(event) ── a coroutine ───────────► app, broker, writers
                   ◄── position, or error ────

One thread per app and process runs an event loop with the app open on it. It starts with the first call, or with `with`,
and lives until the outermost `with` is left or the process ends; both wait for what is being written. What many threads
publish at the same time leaves as one write. While the app is open on a loop of its own in this process, calls go there.

A forked child has none of its parent's threads, and must not touch its connections: it forgets them and starts its own with
its first call. So servers that load the program and then fork work as they are.
"""

from __future__ import annotations

import asyncio
import atexit
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from datetime import datetime
from functools import partial
from itertools import islice
from threading import Condition, Thread
from types import TracebackType
from typing import Any, Self, TypeVar, overload
from weakref import WeakSet

from millstream.brokers.base import Confirm
from millstream.clock import Clock
from millstream.delivery import Envelope
from millstream.errors import BrokerDown, MillstreamError, Unconfirmed
from millstream.publisher import Client, delayed, named
from millstream.stream import Position, Stream
from millstream.telemetry import logger
from millstream.units import MAX_APPEND_RECORDS, Duration, seconds

E = TypeVar("E")
T = TypeVar("T")

TIMEOUT = "30s"  # above all that a broker waits for by itself: when it is over, something is stuck
_CLOSE_S = 10.0  # at the end of the process somebody waits for it: what is not written by then is given up

_all: WeakSet[Blocking] = WeakSet()
_inherited: list[_Loop] = []  # kept for ever: a loop that is deleted in a child would end what the parent waits for


class Blocking:
    """An app's verbs for threads. Safe to be used by many at once.

    As a context manager it connects at once, and leaving the outermost block disconnects; a call outside of a block starts
    it for the life of the process. `timeout` bounds each write, connecting included: when it is over, `Unconfirmed` tells
    what may be stored, or `BrokerDown` that nothing is.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Client]],
        elsewhere: Callable[[], Client | None],
        loop_factory: Callable[[], Callable[[], asyncio.AbstractEventLoop] | None],
    ) -> None:
        self._connect = connect
        self._elsewhere = elsewhere
        self._loop_factory = loop_factory
        self._changed = Condition()
        self._clock = Clock()
        self._own: _Loop | None = None
        self._entered = 0
        self._ending = False
        _all.add(self)

    def __enter__(self) -> Self:
        with self._used():
            pass
        with self._changed:
            self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._entered -= 1
            last = self._entered == 0
        if last:
            self.close()

    # Two shapes each, as in App: without `to`, mypy takes an Envelope for one of nothing.
    @overload
    def publish(
        self, event: Envelope[Any], *, to: None = None, confirm: Confirm | None = None, timeout: Duration = TIMEOUT
    ) -> Position: ...
    @overload
    def publish(
        self,
        event: E | Envelope[E],
        *,
        to: Stream[E] | None = None,
        confirm: Confirm | None = None,
        timeout: Duration = TIMEOUT,
    ) -> Position: ...
    def publish(
        self,
        event: Any,
        *,
        to: Stream[Any] | None = None,
        confirm: Confirm | None = None,
        timeout: Duration = TIMEOUT,
    ) -> Position:
        """Store an event and return its position; see `App.publish`."""
        envelope = self._named(event)
        return self._written(lambda client: client.publish(envelope, to=to, confirm=confirm), timeout, [envelope])

    @overload
    def publish_at(
        self,
        event: Envelope[Any],
        when: datetime | Duration,
        *,
        to: None = None,
        confirm: Confirm | None = None,
        timeout: Duration = TIMEOUT,
    ) -> None: ...
    @overload
    def publish_at(
        self,
        event: E | Envelope[E],
        when: datetime | Duration,
        *,
        to: Stream[E] | None = None,
        confirm: Confirm | None = None,
        timeout: Duration = TIMEOUT,
    ) -> None: ...
    def publish_at(
        self,
        event: Any,
        when: datetime | Duration,
        *,
        to: Stream[Any] | None = None,
        confirm: Confirm | None = None,
        timeout: Duration = TIMEOUT,
    ) -> None:
        """Publish an event at a time, or after a while; see `App.publish_at`."""
        self.publish(delayed(event, when), to=to, confirm=confirm, timeout=timeout)

    @overload
    def publish_many(
        self,
        events: Iterable[Envelope[Any]],
        *,
        to: None = None,
        confirm: Confirm | None = None,
        timeout: Duration = TIMEOUT,
    ) -> list[Position]: ...
    @overload
    def publish_many(
        self,
        events: Iterable[E | Envelope[E]],
        *,
        to: Stream[E] | None = None,
        confirm: Confirm | None = None,
        timeout: Duration = TIMEOUT,
    ) -> list[Position]: ...
    def publish_many(
        self,
        events: Iterable[Any],
        *,
        to: Stream[Any] | None = None,
        confirm: Confirm | None = None,
        timeout: Duration = TIMEOUT,
    ) -> list[Position]:
        """Store many events in their order; see `App.publish_many`. The iterable runs in the caller's thread."""
        positions: list[Position] = []
        source = iter(events)
        while portion := [self._named(event) for event in islice(source, MAX_APPEND_RECORDS)]:
            positions = self._written(partial(_store, portion, positions, to, confirm), timeout, portion, positions)
        return positions

    def read(
        self, stream: Stream[E], *, since: datetime | Duration | None = None, follow: bool = False
    ) -> Iterator[Envelope[E]]:
        """The events of a stream, without a group; see `App.read`."""
        with self._used() as client:
            pages = client.pages(stream, since, follow)
        try:
            while page := _result(_submit(_next(pages), client)):
                yield from page
        except CancelledError:
            raise MillstreamError("the app was closed in the middle of reading") from None
        except GeneratorExit:
            with suppress(MillstreamError):
                _submit(_ended(pages), client)  # not waited for: the collector may run this on the loop's own thread
            raise

    def close(self) -> None:
        """Disconnect when all is written that is being written. A later call connects anew."""
        with self._changed:
            own, self._own = self._own, None
            if own is None:
                return
            self._changed.wait_for(lambda: not own.users, _CLOSE_S)
        own.close()
        atexit.unregister(self._end)

    def _named(self, event: Any) -> Envelope[Any]:
        """With an id: when the answer does not come, a repeat must be told from a second event."""
        with self._changed:
            return named(event, self._clock)

    def _written(
        self,
        work: Callable[[Client], Coroutine[Any, Any, T]],
        timeout: Duration,
        events: list[Envelope[Any]],
        stored: list[Position] | None = None,
    ) -> T:
        timeout_s = seconds(timeout)
        until_s = self._clock.monotonic() + timeout_s
        try:
            with self._used(timeout_s) as client:
                return _result(_submit(work(client), client), max(0.0, until_s - self._clock.monotonic()))
        except TimeoutError:
            reason = f"no answer within {timeout_s:g} s"
        except CancelledError:
            reason = "the app was closed in the middle of this"
        raise Unconfirmed(
            f"{reason}; the events may or may not be stored", envelopes=events, results=stored or []
        ) from None

    @contextmanager
    def _used(self, timeout_s: float | None = None) -> Iterator[Client]:
        """The app, open for as long as the block: where the program has opened it, else on the loop of our own thread."""
        with suppress(RuntimeError):
            asyncio.get_running_loop()
            raise MillstreamError(
                "app.blocking() would stop the event loop that runs in this thread: write `await app.publish(…)` here"
            )
        client = self._elsewhere()
        if client is not None:
            yield client
            return
        with self._changed:
            if self._ending:
                raise MillstreamError("the process is ending; nothing was stored")
            if self._own is None or self._own.ended:
                self._own = _Loop(self._connect, self._loop_factory())
                atexit.register(self._end)
            own = self._own
            own.users += 1
        try:
            yield own.opened(timeout_s)
        finally:
            with self._changed:
                own.users -= 1
                self._changed.notify_all()

    def _end(self) -> None:
        """At the end of the process: threads that still run are not served any more, since no new loop can be started."""
        self._ending = True
        self.close()

    def _forget(self) -> None:
        """In a forked child: the thread is not there, and the lock may be held by one that is not there either."""
        self._changed = Condition()
        if self._own is not None:
            _inherited.append(self._own)
            self._own = None


class _Loop:
    """A thread with an event loop, and the app open on it."""

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Client]],
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None,
    ) -> None:
        self._connect = connect
        self._loop_factory = loop_factory
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self.users = 0
        """Calls that have not ended."""
        self.client: Future[Client] = Future()
        """The app, once it is open; or why it cannot be opened."""
        # A daemon, since the process would wait for any other before it calls `close` at its end.
        self._thread = Thread(target=self._run, name="millstream blocking", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """True when the app could not be opened, or has ended by itself."""
        return self.client.done() and (self.client.exception() is not None or not self._thread.is_alive())

    def opened(self, timeout_s: float | None) -> Client:
        """The app, once it is open. Raises what keeps it from that."""
        try:
            return self.client.result(timeout_s)
        except TimeoutError:
            if self.client.done():
                raise
            raise BrokerDown(f"the app could not be opened within {timeout_s:g} s; nothing was stored") from None

    def close(self) -> None:
        """Disconnect, and wait for it. Safe to repeat."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._loop_factory) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if self.client.done():
                logger.exception("the app ended on its own thread; the next call opens it again")
            else:
                self.client.set_exception(error)

    async def _serve(self) -> None:
        """Keep the app open until `close`. Ends with the app's own error where it cannot be opened."""
        self._loop = asyncio.get_running_loop()
        async with self._connect() as client:
            self.client.set_result(client)
            await self._stopping.wait()


async def _store(
    events: list[Envelope[Any]],
    stored: list[Position],
    to: Stream[Any] | None,
    confirm: Confirm | None,
    client: Client,
) -> list[Position]:
    return await client.publish_many(events, to=to, confirm=confirm, stored=stored)


async def _next(pages: AsyncGenerator[list[Envelope[Any]], None]) -> list[Envelope[Any]]:
    return await anext(pages, [])


async def _ended(pages: AsyncGenerator[list[Envelope[Any]], None]) -> None:
    await pages.aclose()


def _submit(work: Coroutine[Any, Any, T], client: Client) -> Future[T]:
    """Begin something on the loop on which the app is open."""
    try:
        return asyncio.run_coroutine_threadsafe(work, client.loop)
    except RuntimeError:
        work.close()
        raise MillstreamError("the app was closed meanwhile; nothing was stored") from None


def _result(future: Future[T], timeout_s: float | None = None) -> T:
    """Wait for it. Whatever ends the waiting, Ctrl-C too, ends the work."""
    try:
        return future.result(timeout_s)
    except BaseException:
        future.cancel()
        raise


def _forked() -> None:
    for blocking in list(_all):
        blocking._forget()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_forked)
