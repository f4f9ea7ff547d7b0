"""App: a name, a broker, and what it includes. A client, a worker inside another program, or a program of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from millstream.blocking import Blocking
from millstream.brokers.base import Broker, Confirm, Subscription
from millstream.brokers.urls import broker_for, mask
from millstream.clock import Clock
from millstream.delivery import Envelope
from millstream.errors import BadSetting, MillstreamError
from millstream.handlers.depends import Replacements
from millstream.handlers.router import Part, Router
from millstream.handlers.subscriber import Group, Middleware, Subscriber, groups
from millstream.publisher import Client, Publisher, delayed, spec_of, start_at
from millstream.retry import Retry
from millstream.settings import Settings
from millstream.stream import Position, Stream
from millstream.telemetry import Telemetry, logger
from millstream.units import Duration, check_name
from millstream.worker.process import Process, working
from millstream.worker.schedule import schedules
from millstream.worker.supervisor import Supervisor, catching, is_child, when_orphaned

E = TypeVar("E")


class App(Router):
    """A service: its handlers, its streams, and the broker on which they live.

    The broker is what the command line says, then `broker=`, then `MILLSTREAM_BROKER`, then `sqlite:///<name>.db` in the
    working directory. `lifespan` is entered in each process that runs handlers, before the first one.
    """

    def __init__(
        self,
        name: str,
        *,
        broker: str | None = None,
        streams: Sequence[Stream[Any]] = (),
        include: Sequence[Part] = (),
        lifespan: Callable[[App], AbstractAsyncContextManager[None]] | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        middleware: Sequence[Middleware] = (),
        settings: Settings | None = None,
    ) -> None:
        super().__init__(retry=retry, timeout=timeout, middleware=middleware)
        self.name = check_name("app", name)
        self.settings = settings if settings is not None else Settings.load()
        self.clock = Clock()
        self.telemetry = Telemetry()
        self._url = broker
        self._streams = tuple(streams)
        self._lifespan = lifespan
        self._opened: Client | None = None
        self._entered: list[AbstractAsyncContextManager[Any]] = []
        self._blocking = Blocking(
            lambda: self._client(None, Clock(), self.settings),  # a clock of its own: two threads may not share ids
            lambda: self._opened if self._opened is not None and self._opened.answers else None,
            loop_factory,
        )
        self.include(*include)

    @property
    def url(self) -> str:
        """The broker's URL, password included."""
        return self._url or os.environ.get("MILLSTREAM_BROKER") or f"sqlite:///{self.name}.db"

    @property
    def broker(self) -> Broker:
        """The broker, while the app is open."""
        return self._open().broker

    def configure(self, *, broker: str | None = None, grace: Duration | None = None) -> None:
        """Change what the constructor set, before the app is opened: how a command line has the last word."""
        if self._opened is not None:
            raise MillstreamError("the app is open already; configure it before")
        self._url = broker or self._url
        if grace is not None:
            self.settings = replace(self.settings, grace=grace)

    def groups(self) -> list[Group]:
        """The groups of all handlers. Raises `BadHandler` where handlers clash."""
        return groups(self.subscribers())

    def listeners(self) -> list[Subscriber]:
        """The handlers without a group."""
        return [subscriber for subscriber in self.subscribers() if not subscriber.group]

    def all_streams(self) -> dict[str, Stream[Any]]:
        """Every stream that the app names, by name. Raises `BadSetting` where two objects share a name."""
        found: dict[str, Stream[Any]] = {}
        for stream in (*self._streams, *self.streams()):
            if found.setdefault(stream.name, stream) is not stream:
                raise BadSetting(
                    f"two different Stream objects are named {stream.name!r}; declare it once and import it"
                )
        return found

    async def __aenter__(self) -> Self:
        opening = self.opened()
        await opening.__aenter__()
        self._entered.append(opening)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._entered.pop().__aexit__(kind, error, trace)

    # Two shapes each: without `to`, mypy takes an Envelope for one of nothing.
    @overload
    async def publish(self, event: Envelope[Any], *, to: None = None, confirm: Confirm | None = None) -> Position: ...
    @overload
    async def publish(
        self, event: E | Envelope[E], *, to: Stream[E] | None = None, confirm: Confirm | None = None
    ) -> Position: ...
    async def publish(self, event: Any, *, to: Stream[Any] | None = None, confirm: Confirm | None = None) -> Position:
        """Store an event and return its position.

        On return it survives a crash of this process and, at the stream's confirmation level or `confirm`, of the server.
        Raises `Unconfirmed` when it may or may not be stored: publish `Unconfirmed.envelopes` again, they keep their ids;
        on a stream with dedupe that is safe until `retry_until`. Cancelling has the same effect. Other errors mean that it
        is not stored. While nothing was stored, or a repeat is safe, it is tried again for `Settings.publish_patience`.

        `to` may be left out while exactly one known stream carries the type. Calls that are made at the same time leave as
        one write. An envelope with `due` is published then; until then its position has the offset `later`.
        """
        return await self._open().publisher.publish(event, to, confirm)

    @overload
    async def publish_at(
        self, event: Envelope[Any], when: datetime | Duration, *, to: None = None, confirm: Confirm | None = None
    ) -> None: ...
    @overload
    async def publish_at(
        self,
        event: E | Envelope[E],
        when: datetime | Duration,
        *,
        to: Stream[E] | None = None,
        confirm: Confirm | None = None,
    ) -> None: ...
    async def publish_at(
        self,
        event: Any,
        when: datetime | Duration,
        *,
        to: Stream[Any] | None = None,
        confirm: Confirm | None = None,
    ) -> None:
        """Publish an event at a time, or after a while: it is stored now, and nobody sees it before.

        It takes its place in the stream when it is due, a moment late at most while a worker of any app on the stream runs.
        Raises as `publish`; `BadEvent` for a time that is past, without a zone, or over a year ahead.
        """
        await self._open().publish(delayed(event, when), to=to, confirm=confirm)

    @overload
    async def publish_many(
        self,
        events: Iterable[Envelope[Any]] | AsyncIterable[Envelope[Any]],
        *,
        to: None = None,
        confirm: Confirm | None = None,
    ) -> list[Position]: ...
    @overload
    async def publish_many(
        self,
        events: Iterable[E | Envelope[E]] | AsyncIterable[E | Envelope[E]],
        *,
        to: Stream[E] | None = None,
        confirm: Confirm | None = None,
    ) -> list[Position]: ...
    async def publish_many(
        self,
        events: Iterable[Any] | AsyncIterable[Any],
        *,
        to: Stream[Any] | None = None,
        confirm: Confirm | None = None,
    ) -> list[Position]:
        """Store many events in their order, in writes of up to 1,000, and return their positions.

        Not all or nothing: it stops at the first write that fails with `Unconfirmed`, whose `envelopes` are what to
        publish again and whose `results` are the positions stored until then; what follows in the iterable has not been
        looked at. An event that cannot be published raises what `publish` would, with a note that says how many are stored.
        Each write is tried again as `publish` tries.
        """
        return await self._open().publish_many(events, to=to, confirm=confirm)

    async def read(
        self, stream: Stream[E], *, since: datetime | Duration | None = None, follow: bool = False
    ) -> AsyncIterator[Envelope[E]]:
        """The events of a stream, without a group: for scripts, exports and notebooks.

        In the order of each partition, one partition after the other; `follow` goes on with what comes. `since` is a time,
        or how long ago. Entries that are no events, and types that the stream does not name, are passed over. Raises
        `NotSupported` for a pack that cannot be read without a library, with the way to install it.
        """
        async for page in self._open().pages(stream, since, follow):
            for envelope in page:
                yield envelope

    def blocking(self) -> Blocking:
        """The same verbs for threads, for programs without an event loop: Django, Flask, scripts.

        `app.blocking().publish(event)` in any thread; or `with app.blocking() as client:` to connect and disconnect. Always
        the same object, whose one thread serves all threads of the process.
        """
        return self._blocking

    @asynccontextmanager
    async def worker(self, *, only: Collection[str] = ()) -> AsyncIterator[None]:
        """Open the app and handle its events inside the block, in any program. Leaving the block drains.

        `only` names the groups to handle; without it all of them, and the listeners.
        """
        async with self._working(only):
            yield

    def run(self, *, workers: int = 1, only: Collection[str] = ()) -> bool:
        """Handle events until SIGTERM or SIGINT, then drain; True when all work was finished within the grace.

        A second signal cuts off what still runs. With `workers` above 1, that many processes, started by running the same
        command line again.
        """
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            if workers > 1 and not is_child():
                code = runner.run(Supervisor(workers, self.settings.grace_s, self.clock).run())
                if code > 1:
                    raise SystemExit(code)
                return code == 0
            return runner.run(self._serve(only))

    @asynccontextmanager
    async def opened(self, *, broker: Broker | None = None, clock: Clock | None = None) -> AsyncIterator[None]:
        """Open the app as a client: what `async with app:` does, with another broker and clock where given (tests).

        An app that is open already stays as it is.
        """
        if self._opened is not None:
            yield
            return
        # In a time that a test moves, nobody would move it while something is published: it is tried once.
        settings = self.settings if clock is None else replace(self.settings, publish_patience=0)
        try:
            async with self._client(broker, clock or self.clock, settings) as self._opened:
                yield
        finally:
            self._opened = None

    @asynccontextmanager
    async def _client(self, broker: Broker | None, clock: Clock, settings: Settings) -> AsyncIterator[Client]:
        broker = broker or broker_for(self.url, self.settings, clock, self.telemetry)
        streams = self.all_streams().values()
        publisher = Publisher(
            broker, streams, source=self.name, settings=settings, clock=clock, telemetry=self.telemetry
        )
        try:
            await broker.open()
            async with _unwrapped(), publisher.running():
                await self._make_groups(broker, publisher, clock)
                yield Client(broker, publisher, clock, self.telemetry)
        finally:
            await broker.close()

    async def _make_groups(self, broker: Broker, publisher: Publisher, clock: Clock) -> None:
        """Our groups exist before anything that they have not seen may be trimmed."""
        bounded = {
            name for name, policy in publisher.policies.items() if policy.age_ms or policy.events or policy.bytes
        }
        for group in self.groups() if bounded else []:
            if group.stream.name in bounded:
                start, ordered = start_at(group.start, clock), group.order == "key"
                await broker.create(
                    Subscription(spec_of(group.stream), group.name, self.name, start, self.settings.lease_s, ordered)
                )

    async def _serve(self, only: Collection[str]) -> bool:
        stopping = asyncio.Event()
        process: Process | None = None

        def stop(_: int = 0) -> None:
            if stopping.is_set() and process is not None:
                logger.warning("second signal: running handlers are cut off")
                process.cut()
            stopping.set()

        with catching(stop):  # before anything is opened: a stop during the start is a stop
            when_orphaned(stop)
            async with self._working(only) as process:
                logger.info("%s handles events on %s", self.name, mask(self.url))
                await stopping.wait()
                await process.drain()
        return process.finished

    @asynccontextmanager
    async def _working(
        self, only: Collection[str] = (), replacements: Replacements | None = None
    ) -> AsyncIterator[Process]:
        chosen = self._chosen(only)
        schedules(self.parts())  # raises where two of them have one name
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.opened())
            opened = self._open()
            if self._lifespan is not None:
                await stack.enter_async_context(self._lifespan(self))
            await stack.enter_async_context(self.running(opened))
            await stack.enter_async_context(_unwrapped())
            process = await stack.enter_async_context(
                working(
                    chosen,
                    [] if only else self.listeners(),
                    {name: spec_of(stream) for name, stream in self.all_streams().items()},
                    owner=self.name,
                    broker=opened.broker,
                    stage=opened.publisher.stage,
                    replace=replacements or {},
                    settings=self.settings,
                    clock=opened.clock,
                    telemetry=self.telemetry,
                )
            )
            yield process

    def _chosen(self, only: Collection[str]) -> list[Group]:
        every = self.groups()
        unknown = set(only) - {group.name for group in every}
        if unknown:
            known = ", ".join(sorted({group.name for group in every})) or "none"
            raise BadSetting(f"this app has no group {', '.join(sorted(unknown))}; it has {known}")
        return [group for group in every if not only or group.name in only]

    def _open(self) -> Client:
        if self._opened is None:
            raise MillstreamError(
                f"app {self.name!r} is not open: use it inside `async with app:` or `async with app.worker():`"
            )
        return self._opened


@asynccontextmanager
async def _unwrapped() -> AsyncIterator[None]:
    """A group of errors of one kind becomes the first of them: what a user catches is what was raised."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors = list(_leaves(group))
        if len({type(error) for error in errors}) > 1:
            raise
        raise errors[0] from None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop of a program that handles events."""
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    return uvloop.new_event_loop
