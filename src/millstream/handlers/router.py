"""Router: what a module declares, to be included by an app. Part: anything that an app can include."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Protocol, TypeVar

from millstream.brokers.base import Broker, Confirm
from millstream.clock import Clock
from millstream.errors import BadHandler, BadSetting, BadStream
from millstream.handlers import signature
from millstream.handlers.subscriber import NEVER, Middleware, Order, StartAt, Subscriber
from millstream.retry import Batch, Retry
from millstream.stream import Position, Stream
from millstream.telemetry import Telemetry
from millstream.units import MAX_CONCURRENCY, Duration, check_name, seconds

H = TypeVar("H", bound=Callable[..., Any])


class Runtime(Protocol):
    """What a running app offers to its parts."""

    @property
    def broker(self) -> Broker:
        """The broker, open."""
        ...

    @property
    def clock(self) -> Clock:
        """The time in which the app lives: in a test, virtual time."""
        ...

    @property
    def telemetry(self) -> Telemetry:
        """Where to tell what happens."""
        ...

    async def publish(self, event: Any, *, to: Stream[Any] | None = None, confirm: Confirm | None = None) -> Position:
        """As `App.publish`."""
        ...

    async def publish_many(
        self,
        events: Iterable[Any] | AsyncIterable[Any],
        *,
        to: Stream[Any] | None = None,
        confirm: Confirm | None = None,
    ) -> list[Position]:
        """As `App.publish_many`."""
        ...

    async def publish_slot(self, event: Any, *, to: Stream[Any], schedule: str, at_ms: int) -> bool:
        """Store the event of one slot of a schedule, once however often it is called; None passes the slot over.

        The event's time is the slot's, its id comes from schedule and slot, its header `schedule` names the schedule. False
        when this slot or a later one was there already. Raises `NotSupported` where the broker has no slots, and what
        `Broker.append_slot` raises, at once: whoever keeps the schedule tries again.
        """
        ...


class Part(Protocol):
    """Something that an app can include: a router, a schedule, a flow, a projection."""

    def subscribers(self) -> Iterable[Subscriber]:
        """Its handlers."""
        ...

    def streams(self) -> Iterable[Stream[Any]]:
        """The streams that it reads or writes."""
        ...

    def running(self, runtime: Runtime) -> AbstractAsyncContextManager[None]:
        """Its own work, while a worker runs."""
        ...


class Router:
    """Handlers that belong together, and the defaults that they share.

    `middleware` goes around each of its handlers, the first one outermost; what includes the router puts its own around
    those. `timeout` is a duration, or `"never"`.
    """

    def __init__(
        self,
        *,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        middleware: Sequence[Middleware] = (),
    ) -> None:
        self._retry = retry
        self._timeout = _checked_timeout(timeout)
        self._middleware = tuple(middleware)
        self._subscribers: list[Subscriber] = []
        self._parts: list[Part] = []

    def subscriber(
        self,
        stream: Stream[Any],
        group: str,
        *,
        batch: Batch | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        concurrency: int | None = None,
        start: StartAt | None = None,
        order: Order | None = None,
    ) -> Callable[[H], H]:
        """Bind a handler to a stream under a group; the handler stays a plain callable.

        Every group gets every event; the handlers of one group share its events by type. The group is a durable name: it
        keeps its place when the handler is renamed or moved. `start` counts at its birth only. Up to `concurrency` events
        are handled at once in each process (default 64; batches: 1; plain functions: 16 threads). With `order="key"`, the
        default where the stream has a key, these are events of different keys: those of one key come one after the other,
        and wait while one of them is retried. With `order="none"` they come in any order. Raises `BadHandler` at once.
        """
        _check_stream(stream)
        if not isinstance(group, str):
            raise BadHandler(f"group={group!r}: a group is a durable name and always written; see listener() otherwise")
        check_name("group", group)
        if concurrency is not None and not 1 <= concurrency <= MAX_CONCURRENCY:
            raise BadSetting(f"concurrency={concurrency!r}: from 1 to {MAX_CONCURRENCY:,}")
        _checked_timeout(timeout)
        _check_order(stream, order)

        def bind(handler: H) -> H:
            read = signature.read(handler, stream)
            if batch is not None and not read.batch:
                raise BadHandler(f"{read.where}: batch= needs a list; write events: list[…]")
            self._subscribers.append(
                Subscriber(stream, group, handler, read, batch, retry, timeout, concurrency, start, order)
            )
            return handler

        return bind

    def listener(self, stream: Stream[Any]) -> Callable[[H], H]:
        """Bind a handler without a group: every running process calls it, from its start on.

        Nothing is acknowledged, retried or kept: an error is logged and counted, and the event is over.
        """
        _check_stream(stream)

        def bind(handler: H) -> H:
            read = signature.read(handler, stream)
            if read.batch:
                raise BadHandler(f"{read.where}: a listener takes one event at a time")
            self._subscribers.append(Subscriber(stream, "", handler, read))
            return handler

        return bind

    def include(self, *parts: Part) -> None:
        """Add routers and other parts."""
        for part in parts:
            if part is self or not all(hasattr(part, name) for name in ("subscribers", "streams", "running")):
                raise BadHandler(f"{part!r} is not a part; include routers, or objects with the methods of Part")
            self._parts.append(part)

    def parts(self) -> Iterable[Part]:
        """All parts that are included, those of included routers too."""
        for part in self._parts:
            yield part
            if isinstance(part, Router):
                yield from part.parts()

    def subscribers(self) -> Iterable[Subscriber]:
        """All handlers, those of included parts too, with the defaults and the middleware that hold for them."""
        for subscriber in self._subscribers:
            yield subscriber.within(self._retry, self._timeout, self._middleware)
        for part in self._parts:
            for subscriber in part.subscribers():
                yield subscriber.within(self._retry, self._timeout, self._middleware)

    def streams(self) -> Iterable[Stream[Any]]:
        """All streams that the handlers and parts name; one stream may come several times."""
        for subscriber in self._subscribers:
            yield subscriber.stream
        for part in self._parts:
            yield from part.streams()

    @asynccontextmanager
    async def running(self, runtime: Runtime) -> AsyncIterator[None]:
        """The work of the included parts, while a worker runs."""
        async with AsyncExitStack() as stack:
            for part in self._parts:
                await stack.enter_async_context(part.running(runtime))
            yield


def _check_stream(stream: Any) -> None:
    if not isinstance(stream, Stream):
        raise BadStream(f"{stream!r} is not a stream; write orders = Stream('orders', OrderPlaced) and give that")


def _check_order(stream: Stream[Any], order: Order | None) -> None:
    if order not in (None, "key", "none"):
        raise BadHandler(f"order={order!r}: 'key' or 'none'")
    if order == "key" and stream.key is None:
        raise BadHandler(
            f"order='key': stream {stream.name!r} has no key; declare one with Stream({stream.name!r}, …, key=…)"
        )


def _checked_timeout(timeout: Duration | None) -> Duration | None:
    if timeout is not None and timeout != NEVER and seconds(timeout) <= 0:
        raise BadSetting(f"timeout={timeout!r}: more than zero, or 'never'")
    return timeout
