"""Publisher: an envelope becomes a record (id, key, partition, bytes), and records become few large writes.

Each stream has one writer. While a write of its is under way, everything that others publish waits in a list and leaves as
the next one: a thousand `await publish()` at once cost two writes, a lone one goes out at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from millstream.brokers.base import Broker, Output, Position, Record, StreamSpec
from millstream.clock import Clock
from millstream.delivery import Delivery, Envelope
from millstream.errors import BadEvent, BrokerError, MillstreamError, TooLarge, Unconfirmed, Unroutable
from millstream.event import type_of
from millstream.stream import Stream
from millstream.units import (
    MAX_APPEND_BYTES,
    MAX_APPEND_RECORDS,
    MAX_EVENT_BYTES,
    MAX_HEADERS_BYTES,
    MAX_ID_CHARS,
    MAX_KEY_BYTES,
)
from millstream.wire import codec
from millstream.wire.partition import partition_of

MAX_WAITING = 100_000  # records waiting for a write; past it `publish` waits its turn instead of filling the memory

PORTION_S = 0.1  # a slow source of events does not hold up those that have come

CAUSATION = "causation"  # id of the event whose handler published this one
CORRELATION = "correlation"  # id of the event with which it all began

_json = msgspec.json.Encoder().encode


class _Route(NamedTuple):
    """How events of one class get onto one stream."""

    stream: Stream[Any]
    type: str
    encode: Callable[[Any], bytes]


class _Chunk(NamedTuple):
    """What one write stores."""

    stream: Stream[Any]
    records: list[Record]
    events: Sequence[Any]


class Publisher:
    """Publishes for one app. Knows its streams; others are declared on first use."""

    def __init__(self, broker: Broker, streams: Iterable[Stream[Any]], *, source: str, clock: Clock) -> None:
        self._broker = broker
        self._source = source
        self._clock = clock
        self._streams: dict[str, Stream[Any]] = {stream.name: stream for stream in streams}
        self._declared: set[str] = set()
        self._routes: dict[tuple[type, str | None], _Route] = {}
        self._writers: dict[str, _Writer] = {}
        self._tasks: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Declares the streams, owns the writers, and lets them finish at the end."""
        for stream in self._streams.values():
            await self._declare(stream)
        async with asyncio.TaskGroup() as self._tasks:
            try:
                yield
            finally:
                for writer in self._writers.values():
                    writer.stop()
                self._writers.clear()
                self._tasks = None

    async def publish(self, event: Any, to: Stream[Any] | None) -> Position:
        """Store one event; see `App.publish`."""
        route = self._route(event, to)
        if route.stream.name not in self._declared:
            await self._declare(route.stream)
        envelope = event if isinstance(event, Envelope) else None
        record = self._record(route, event if envelope is None else envelope.event, envelope, b"")
        writer = self._writer(route.stream.name)
        while writer.waiting >= MAX_WAITING:
            await writer.room()
        try:
            return await writer.append(record)
        except Unconfirmed as error:
            error.envelopes = [_envelope(event, record)]
            raise

    async def publish_many(self, events: Iterable[Any] | AsyncIterable[Any], to: Stream[Any] | None) -> list[Position]:
        """Store many events, in chunks; see `App.publish_many`."""
        positions: list[Position] = []
        try:
            async for portion in _portions(events, self._clock):
                for chunk in self._chunks(portion, to):
                    positions += await self._append(chunk, positions)
        except (BadEvent, TooLarge, Unroutable) as error:
            error.add_note(f"The first {len(positions):,} events are stored, and no other.")
            raise
        return positions

    def stage(self, delivery: Delivery[Any], event: Any, to: Stream[Any] | None) -> Output:
        """The output for `delivery.publish()`: carries on the correlation, names its cause, does no I/O."""
        route = self._route(event, to)
        if route.stream.name not in self._declared:
            raise Unroutable(f"this app does not know {route.stream!r}; add it: App(…, streams=[{route.stream.name}])")
        envelope = event if isinstance(event, Envelope) else None
        own = envelope.headers if envelope is not None else {}
        correlation = delivery.headers.get(CORRELATION, delivery.id)
        headers = _headers({CAUSATION: delivery.id, CORRELATION: correlation, **own})
        record = self._record(route, event if envelope is None else envelope.event, envelope, headers)
        return Output(route.stream.name, record)

    def _route(self, event: Any, to: Stream[Any] | None) -> _Route:
        cls = type(event.event if isinstance(event, Envelope) else event)
        key = (cls, None if to is None else to.name)
        route = self._routes.get(key)
        if route is None or (to is not None and route.stream is not to):
            route = self._routes[key] = self._new_route(cls, to)
        return route

    def _new_route(self, cls: type, to: Stream[Any] | None) -> _Route:
        mark = type_of(cls)
        if mark is None:
            raise BadEvent(
                f"{cls.__name__} is no event; write class {cls.__name__}(Event, type='…') or put @event('…') on it"
            )
        if to is None:
            candidates = [stream for stream in self._streams.values() if cls in stream.types.values()]
            if len(candidates) != 1:
                names = ", ".join(stream.name for stream in candidates) or "none"
                raise Unroutable(f"which stream is {cls.__name__} for? say to=; those that carry it: {names}")
            to = candidates[0]
        if to.types.get(mark.wire) is not cls:
            carried = ", ".join(other.__name__ for other in to.types.values())
            raise Unroutable(f"stream {to.name!r} does not carry {cls.__name__}; it carries {carried}")
        known = self._streams.setdefault(to.name, to)
        if known is not to:
            raise Unroutable(f"two different Stream objects are named {to.name!r}; declare it once and import it")
        return _Route(to, mark.wire, codec.encoder(cls))

    def _record(self, route: _Route, event: Any, envelope: Envelope[Any] | None, headers: bytes) -> Record:
        stream = route.stream
        data = route.encode(event)
        if len(data) > MAX_EVENT_BYTES:
            raise TooLarge(
                f"{type(event).__name__} is {len(data):,} bytes, over the limit of {MAX_EVENT_BYTES:,}; store the bulk "
                "elsewhere and publish a reference"
            )
        key = stream.key_of(event) if envelope is None or envelope.key is None else envelope.key
        if key is not None and len(key) * 4 > MAX_KEY_BYTES and len(key.encode()) > MAX_KEY_BYTES:
            raise TooLarge(f"the key of {type(event).__name__} is over {MAX_KEY_BYTES:,} bytes; use a hash of it")
        id_, time_ms = self._clock.new_id(), 0
        if envelope is not None:
            id_ = _checked_id(envelope.id) or id_
            time_ms = envelope.time_ms  # one that was read keeps its time
            headers = headers or _headers(envelope.headers)
        if len(headers) > MAX_HEADERS_BYTES:
            raise TooLarge(f"headers are {len(headers):,} bytes, over the limit of {MAX_HEADERS_BYTES:,}")
        partition = partition_of(id_ if key is None else key, stream.partitions)
        return Record(partition, id_, route.type, data, key, time_ms, headers, None, self._source)

    def _chunks(self, events: Sequence[Any], to: Stream[Any] | None) -> Iterator[_Chunk]:
        """One write after the other: of one stream, and of a limited size."""
        records: list[Record] = []
        begin = size = 0
        stream: Stream[Any] | None = None
        for index, event in enumerate(events):
            route = self._route(event, to)
            envelope = event if isinstance(event, Envelope) else None
            record = self._record(route, event if envelope is None else envelope.event, envelope, b"")
            size += len(record.data)
            if stream is not None and (stream is not route.stream or size > MAX_APPEND_BYTES):
                yield _Chunk(stream, records, events[begin:index])
                records, begin, size = [], index, len(record.data)
            stream = route.stream
            records.append(record)
        if stream is not None:
            yield _Chunk(stream, records, events[begin:])

    async def _append(self, chunk: _Chunk, stored: list[Position]) -> list[Position]:
        if chunk.stream.name not in self._declared:
            await self._declare(chunk.stream)
        try:
            return await self._broker.append(chunk.stream.name, chunk.records)
        except Unconfirmed as error:
            results: Sequence[Any] = error.results
            reason = str(error)
            cause: Exception = error
        except BrokerError as error:
            results = [None] * len(chunk.records)
            reason = f"{error}; none of these was stored"
            cause = error
        again = [
            _envelope(event, record)
            for event, record, result in zip(chunk.events, chunk.records, results, strict=True)
            if not isinstance(result, Position)
        ]
        positions = stored + [result for result in results if isinstance(result, Position)]
        raise Unconfirmed(reason, envelopes=again, results=positions) from cause

    def _writer(self, stream: str) -> _Writer:
        writer = self._writers.get(stream)
        if writer is None:
            if self._tasks is None:
                raise MillstreamError(
                    "the app is not open: publish inside `async with app:` or `async with app.worker():`"
                )
            writer = self._writers[stream] = _Writer(lambda records: self._broker.append(stream, records))
            self._tasks.create_task(writer.run(), name=f"millstream writer of {stream}")
        return writer

    async def _declare(self, stream: Stream[Any]) -> None:
        await self._broker.declare(spec_of(stream))
        self._declared.add(stream.name)


class _Writer:
    """Writes the records of one stream, one write at a time. `run` ends after `stop`, when all are written."""

    def __init__(self, append: Callable[[Sequence[Record]], Awaitable[list[Position]]]) -> None:
        self._append = append
        self._queue: list[tuple[Record, asyncio.Future[Position]]] = []
        self._taken: list[tuple[Record, asyncio.Future[Position]]] = []
        self._wake = asyncio.Event()
        self._written = asyncio.Event()
        self._stopping = self._ended = False

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def append(self, record: Record) -> Position:
        if self._ended:
            raise MillstreamError("the app is closed; nothing was stored")
        future: asyncio.Future[Position] = asyncio.get_running_loop().create_future()
        self._queue.append((record, future))
        self._wake.set()
        return await future

    async def room(self) -> None:
        self._written.clear()
        await self._written.wait()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        try:
            while self._queue or not self._stopping:
                if self._queue:
                    await self._write()
                else:
                    await self._wake.wait()
                    self._wake.clear()
        finally:  # also when the app ends with an error: nobody may wait for an answer that will not come
            self._ended = True
            unanswered, self._queue = self._taken + self._queue, []
            self._written.set()
            for _, future in unanswered:
                _answer(
                    future, Unconfirmed("the app has ended in the middle of this; the event may or may not be stored")
                )

    async def _write(self) -> None:
        taken = self._taken = self._queue[:MAX_APPEND_RECORDS]
        self._queue = self._queue[MAX_APPEND_RECORDS:]
        self._written.set()
        try:
            results: Sequence[Any] = await self._append([record for record, _ in taken])
        except Unconfirmed as error:
            results = [result if result is not None else Unconfirmed(str(error)) for result in error.results]
        except Exception as error:
            results = [error] * len(taken)
        for (_, future), result in zip(taken, results, strict=True):
            _answer(future, result)


def spec_of(stream: Stream[Any]) -> StreamSpec:
    """What a broker records of a stream."""
    return StreamSpec(stream.name, stream.partitions, stream.key_name, codec.JSON)


def _answer(future: asyncio.Future[Position], result: Any) -> None:
    if future.done():  # the caller was cancelled: the event is stored all the same
        return
    if not isinstance(result, Exception):
        future.set_result(result)
    elif isinstance(result, BrokerError):  # each caller gets an object of its own, for its traceback
        future.set_exception(type(result)(*result.args))
    else:
        future.set_exception(result)


def _envelope(event: Any, record: Record) -> Envelope[Any]:
    """The event as it was to be stored, id included: publishing it again is a repeat and not a second event."""
    if isinstance(event, Envelope):
        return Envelope(event.event, id=record.id, key=event.key, headers=event.headers)
    return Envelope(event, id=record.id)


def _checked_id(id_: str) -> str:
    if len(id_) > MAX_ID_CHARS:
        raise TooLarge(
            f"id {id_[:20]!r}… has {len(id_)} characters, over the limit of {MAX_ID_CHARS}; use a hash of it"
        )
    if id_ and not (id_.isascii() and id_.isprintable()):
        raise BadEvent(f"id {id_!r}: only printable ASCII characters")
    return id_


def _headers(headers: Mapping[str, str]) -> bytes:
    if not headers:
        return b""
    if not all(isinstance(name, str) and isinstance(value, str) for name, value in headers.items()):
        raise BadEvent(f"headers {headers!r}: names and values must be text")
    return _json(dict(headers))


async def _portions(events: Iterable[Any] | AsyncIterable[Any], clock: Clock) -> AsyncIterator[list[Any]]:
    """As many events at a time as one write takes: so that what is done for each is not done through an async iterator."""
    if not isinstance(events, AsyncIterable):
        source = iter(events)
        while portion := list(islice(source, MAX_APPEND_RECORDS)):
            yield portion
        return
    portion, began = [], clock.monotonic()
    async for event in events:
        portion.append(event)
        if len(portion) == MAX_APPEND_RECORDS or clock.monotonic() - began > PORTION_S:
            yield portion
            portion, began = [], clock.monotonic()
    yield portion
