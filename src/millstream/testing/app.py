"""TestApp: the real worker on the memory broker, under virtual time.

    async with TestApp(app, replace={open_bank: fake_bank}) as t:
        await t.publish(OrderPlaced(order_id="o-1", customer="c-9", total=1999))
        await t.advance("1h")                         # retries that fall due run now
        assert t.published(payments) == [Charged(order_id="o-1")] and not t.dead("billing")

What a handler raises is raised here too, out of `publish`, `advance` or `idle`, so that an `assert` in a handler fails the
test instead of becoming a retry. A user's own `asyncio.sleep` takes real time: only Millstream's time is virtual.

With `broker=` a URL, the same test runs on a real broker (give it one that is empty). Time is real there, and `advance`
says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import msgspec

from millstream.app import App
from millstream.brokers.dictionaries import readable
from millstream.brokers.memory.broker import MemoryBroker
from millstream.clock import Clock
from millstream.delivery import Delivery, Envelope
from millstream.errors import MillstreamError, WireError
from millstream.publisher import opened, unpacked
from millstream.stream import Position, Stream
from millstream.telemetry import DEAD, HELD, LISTENER_FAILED, RETRIED, SLOT_FAILED
from millstream.testing.clock import VirtualClock
from millstream.units import Duration, seconds
from millstream.wire import codec
from millstream.worker.process import Process

E = TypeVar("E")

MEMORY = "memory://"

_QUIET_TURNS = 20  # of the loop, without anything having moved: then nothing will before time passes
_LEASE = "1h"  # nobody falls silent in one process; a short lease would only mean many heartbeats to advance through
_POLL_S = 0.005
_PAGE = 500
_IDLE_LIMIT_S = 60.0  # on a real broker: a test that is not idle by then is stuck


@dataclass(frozen=True)
class DeadLetter:
    """An event that was given up."""

    event: Any
    """None when it could not be decoded."""
    reason: str
    error: str
    attempts: int


class TestApp:
    """An app under test, with its handlers running. Use it as an async context manager.

    `replace` puts other providers in the place of those that `Depends` names. `raise_errors=False` leaves what handlers
    raise to retries and dead letters, as in production. `patience` is how long, in real time, a running handler is waited
    for before it counts as one that hangs until virtual time moves on.
    """

    __test__ = False  # pytest would collect it, for its name

    def __init__(
        self,
        app: App,
        *,
        replace: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
        broker: str = MEMORY,
        raise_errors: bool = True,
        patience: Duration = "5s",
    ) -> None:
        self._app = app
        self._replace = replace or {}
        self._url = broker
        self._raise_errors = raise_errors
        self._patience_s = seconds(patience)
        self._errors: list[BaseException] = []
        self._stack = AsyncExitStack()
        self._process: Process | None = None
        self._clock: Clock = Clock()
        self._stuck = 0
        self._tended: tuple[int, ...] = ()
        self._places: dict[str, dict[int, Position | None]] = {}
        self._published: dict[str, list[Any]] = {}
        self._dead: dict[str, list[DeadLetter]] = {}

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            app, broker = self._app, None
            if self._url == MEMORY:
                stack.callback(setattr, app, "settings", app.settings)
                app.settings = replace(app.settings, lease=_LEASE)
                self._clock = VirtualClock(self._settled)
                broker = MemoryBroker(MEMORY, app.settings, self._clock, app.telemetry)
            else:
                app.configure(broker=self._url)
            stack.callback(app.telemetry.listen(self._heard))
            await stack.enter_async_context(app.opened(broker=broker, clock=self._clock))
            self._process = await stack.enter_async_context(app._working(replacements=self._replace))
            if isinstance(self._clock, VirtualClock):
                self._process.janitor.only_when_asked()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._clock, VirtualClock) and self._process is not None:
            self._process.cut()  # nobody moves the time on for a handler that waits for its grace
        await self._stack.__aexit__(kind, error, trace)

    @overload
    async def publish(self, event: Envelope[Any], *, to: None = None) -> Position: ...
    @overload
    async def publish(self, event: E | Envelope[E], *, to: Stream[E] | None = None) -> Position: ...
    async def publish(self, event: Any, *, to: Stream[Any] | None = None) -> Position:
        """Publish an event, and return when everything that is due has been done. Raises what a handler raised."""
        position = await self._app.publish(event, to=to)
        await self.idle()
        return position

    async def advance(self, by: Duration) -> None:
        """Let virtual time pass: retries, batches, timeouts, delayed events and schedules come in their order.

        Raises what a handler raised, and `MillstreamError` on a real broker, whose time nobody can move.
        """
        if not isinstance(self._clock, VirtualClock):
            raise MillstreamError(f"time is real on {self._url}: advance() works with {MEMORY!r} only")
        self._tended = ()
        await self._clock.advance(seconds(by))
        await self.idle()

    async def idle(self) -> None:
        """Return when everything that is due has been done. Raises what a handler raised."""
        if isinstance(self._clock, VirtualClock):
            self._tended = ()
            await self._settled()
        else:
            await self._really_idle()
        await self._look()
        if self._errors and self._raise_errors:
            first, self._errors = self._errors[0], []
            raise first

    def published(self, stream: Stream[E]) -> list[E]:
        """All events of a stream, in the order of their partitions: the test's own and those of handlers."""
        return list(self._published.get(stream.name, []))

    def dead(self, group: str) -> list[DeadLetter]:
        """The dead letters of a group, on all its streams. Raises `MillstreamError` for a group that the app lacks."""
        if group not in self._dead:
            known = ", ".join(sorted(self._dead)) or "none"
            raise MillstreamError(f"the app has no group {group!r}; it has {known}")
        return list(self._dead[group])

    async def _settled(self) -> None:
        """Wait until nothing more happens without time passing; the janitor has seen what was published for later."""
        await self._quiet()
        while self._process is not None and self._progress() != self._tended:
            self._tended = self._progress()
            self._process.janitor.ask()
            await self._quiet()

    async def _quiet(self) -> None:
        """Wait until handlers rest, or hang."""
        before, quiet, waited_s = self._progress(), 0, 0.0
        while quiet < _QUIET_TURNS:
            await asyncio.sleep(0)  # noqa: TID251 - a turn of the loop takes no time
            now = self._progress()
            if now != before:
                before, quiet, waited_s, self._stuck = now, 0, 0.0, 0
                continue
            quiet += 1
            if quiet == _QUIET_TURNS and self._running() > self._stuck and waited_s < self._patience_s:
                await asyncio.sleep(_POLL_S)  # noqa: TID251 - a handler is busy in real time: in a thread, or with I/O
                waited_s += _POLL_S
                quiet = 0
        self._stuck = self._running()

    def _progress(self) -> tuple[int, ...]:
        return () if self._process is None else self._process.progress()

    def _running(self) -> int:
        return 0 if self._process is None else self._process.running

    async def _really_idle(self) -> None:
        async with self._clock.timeout(_IDLE_LIMIT_S):
            quiet = 0
            while quiet < 2:  # twice, since an outcome may have published something for another group
                await self._clock.sleep(_POLL_S)
                busy = self._process is not None and self._process.busy
                quiet = 0 if busy or not await self._all_waiting() else quiet + 1

    async def _all_waiting(self) -> bool:
        admin = self._app.broker.admin
        for stream in self._app.all_streams():
            for group in await admin.groups(stream):
                if group.lag or group.pending > group.scheduled:
                    return False
        return True

    async def _look(self) -> None:
        """Read what has come, so that `published` and `dead` can answer without waiting."""
        broker = self._app.broker
        self._dead = {group.name: [] for group in self._app.groups()}
        for name, stream in self._app.all_streams().items():
            places = self._places.setdefault(name, dict.fromkeys(range(stream.partitions)))
            for partition, place in places.items():
                while page := await broker.read(name, partition, place, _PAGE):
                    await readable(broker, name, page)
                    place = places[partition] = page[-1].position
                    events = (_decoded(stream, event.record.type, event.record.data) for event in unpacked(page))
                    self._published.setdefault(name, []).extend(event for event in events if event is not None)
            for group in await broker.admin.groups(name):
                if group.group in self._dead:
                    self._dead[group.group] += await self._letters(stream, group.group)

    async def _letters(self, stream: Stream[Any], group: str) -> list[DeadLetter]:
        broker = self._app.broker
        letters: list[DeadLetter] = []
        after = ""
        while page := await broker.admin.dead(stream.name, group, after, _PAGE):
            after = page[-1].ref
            events = await opened(broker, stream.name, [letter.stored for letter in page])
            for letter, stored in zip(page, events, strict=True):
                event = _decoded(stream, stored.record.type, stored.record.data)
                letters.append(DeadLetter(event, letter.reason, letter.error, letter.attempts))
        return letters

    def _heard(self, name: str, measurements: Mapping[str, Any]) -> None:
        if name in (RETRIED, LISTENER_FAILED, DEAD, HELD, SLOT_FAILED):
            error = measurements.get("exception")
            if isinstance(error, BaseException):
                self._errors.append(error)


def deliver(
    event: E, *, attempt: int = 1, key: str | None = None, headers: Mapping[str, str] | None = None, token: int = 0
) -> Delivery[E]:
    """A delivery for calling a handler directly. What the handler publishes is in `delivery.staged`, as it gave it."""
    return Delivery(
        event,
        "test-event",
        key,
        "",
        "test",
        Clock().now_ms(),
        msgspec.json.encode(dict(headers or {})),
        Position(0, "0"),
        attempt,
        False,
        None,
        lambda _delivery, published, _to: published,
        token,
    )


def _decoded(stream: Stream[Any], name: str, data: bytes) -> Any:
    cls = stream.types.get(name)
    if cls is None:
        return None
    try:
        return codec.decoder(cls, stream.codec)(data)
    except WireError:
        return None
