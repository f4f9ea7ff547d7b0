"""App: a name, a broker, and what it includes. A client, a worker inside another program, or a program of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from millstream.brokers.base import Broker, Start, Stored
from millstream.brokers.urls import broker_for, mask
from millstream.clock import Clock
from millstream.delivery import Envelope
from millstream.errors import BadSetting, MillstreamError, WireError
from millstream.handlers.depends import Replacements
from millstream.handlers.router import Part, Router
from millstream.handlers.subscriber import Group, Middleware, Subscriber, groups
from millstream.publisher import Publisher, spec_of
from millstream.retry import Retry
from millstream.settings import Settings
from millstream.stream import Position, Stream
from millstream.telemetry import Telemetry, logger
from millstream.units import Duration, check_name, seconds
from millstream.wire import codec
from millstream.worker.process import Process, working
from millstream.worker.supervisor import Supervisor, catching, is_child, when_orphaned

E = TypeVar("E")

_PAGE = 500  # events that `read` fetches at once
_WAIT_S = 5.0


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
        self._opened: _Opened | None = None
        self._entered: list[AbstractAsyncContextManager[Any]] = []
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
    async def publish(self, event: Envelope[Any], *, to: None = None) -> Position: ...
    @overload
    async def publish(self, event: E | Envelope[E], *, to: Stream[E] | None = None) -> Position: ...
    async def publish(self, event: Any, *, to: Stream[Any] | None = None) -> Position:
        """Store an event and return its position.

        On return it survives a crash of this process and, at the stream's confirmation level, of the server. Raises
        `Unconfirmed` when it may or may not be stored: publish `Unconfirmed.envelopes` again, they keep their ids.
        Cancelling has the same effect. Other errors mean that it is not stored. `to` may be left out while exactly one
        known stream carries the type. Calls that are made at the same time leave as one write.
        """
        return await self._open().publisher.publish(event, to)

    @overload
    async def publish_many(
        self, events: Iterable[Envelope[Any]] | AsyncIterable[Envelope[Any]], *, to: None = None
    ) -> list[Position]: ...
    @overload
    async def publish_many(
        self, events: Iterable[E | Envelope[E]] | AsyncIterable[E | Envelope[E]], *, to: Stream[E] | None = None
    ) -> list[Position]: ...
    async def publish_many(
        self, events: Iterable[Any] | AsyncIterable[Any], *, to: Stream[Any] | None = None
    ) -> list[Position]:
        """Store many events in their order, in writes of up to 1,000, and return their positions.

        Not all or nothing: it stops at the first write that fails with `Unconfirmed`, whose `envelopes` are what to
        publish again and whose `results` are the positions stored until then; what follows in the iterable has not been
        looked at. An event that cannot be published raises what `publish` would, with a note that says how many are stored.
        """
        return await self._open().publisher.publish_many(events, to)

    async def read(
        self, stream: Stream[E], *, since: datetime | Duration | None = None, follow: bool = False
    ) -> AsyncIterator[Envelope[E]]:
        """The events of a stream, without a group: for scripts, exports and notebooks.

        In the order of each partition, one partition after the other; `follow` goes on with what comes. `since` is a time,
        or how long ago. Entries that are no events, and types that the stream does not name, are passed over.
        """
        broker = self._open().broker
        await broker.declare(spec_of(stream))
        decoders = {name: codec.decoder(cls) for name, cls in stream.types.items()}
        places = dict(await broker.locate(stream.name, _start(since, self.clock)))
        while True:
            for partition, place in places.items():
                while page := await broker.read(stream.name, partition, place, _PAGE):
                    for stored in page:
                        envelope = _envelope(stored, decoders)
                        if envelope is not None:
                            yield envelope
                    place = places[partition] = page[-1].position
            if not follow:
                return
            await broker.wait(stream.name, places, _WAIT_S)

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
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
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
        clock = clock or self.clock
        broker = broker or broker_for(self.url, self.settings, clock, self.telemetry)
        try:
            await broker.open()
            publisher = Publisher(broker, self.all_streams().values(), source=self.name, clock=clock)
            async with _unwrapped(), publisher.running():
                self._opened = _Opened(broker, publisher, clock)
                yield
        finally:
            self._opened = None
            await broker.close()

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
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.opened())
            opened = self._open()
            if self._lifespan is not None:
                await stack.enter_async_context(self._lifespan(self))
            await stack.enter_async_context(self.running(self))
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

    def _open(self) -> _Opened:
        if self._opened is None:
            raise MillstreamError(
                f"app {self.name!r} is not open: use it inside `async with app:` or `async with app.worker():`"
            )
        return self._opened


class _Opened:
    """What an open app has."""

    def __init__(self, broker: Broker, publisher: Publisher, clock: Clock) -> None:
        self.broker = broker
        self.publisher = publisher
        self.clock = clock


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


def _envelope(stored: Stored, decoders: dict[str, Callable[[bytes], Any]]) -> Envelope[Any] | None:
    record = stored.record
    decode = decoders.get(record.type)
    if decode is None:
        return None
    try:
        envelope: Envelope[Any] = Envelope(decode(record.data), id=record.id, key=record.key)
    except WireError:
        return None
    envelope.type, envelope.source, envelope.time_ms = record.type, record.source, record.time_ms
    envelope._headers = record.headers
    return envelope


def _start(since: datetime | Duration | None, clock: Clock) -> Start:
    if since is None:
        return "beginning"
    if isinstance(since, datetime):
        return int(since.timestamp() * 1000)
    ago = since.total_seconds() if isinstance(since, timedelta) else seconds(since)
    return clock.now_ms() - int(ago * 1000)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    return uvloop.new_event_loop
