"""Chunks: what one write stores, made while the write before it is under way.

A thousand events take a Redis server 2.1 ms, and us 1.8. In turns, each would wait for the other; so the next chunk is
made as soon as the bytes of one have left, as far as it can be without the server. It is sent only after the answer:
behind what was refused or lost, nothing of the call is stored. Per event the server waits for 0.4 µs of ours, in which we
read the answer. One chunk ahead is enough to keep both busy, and bounds the memory.

A list of events of one class, as nearly all are, is made into records together; where envelopes or several classes are
among them, they go one by one.

A list stays as it is when it is looked at. What was taken out of an iterator and not published would be lost to the
caller when a write fails, so of that no more is taken than the next write needs, and not before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

from millstream.brokers.base import Record
from millstream.clock import Clock
from millstream.delivery import Envelope
from millstream.publisher.packing import Bundle, Packer
from millstream.publisher.records import Records, Route
from millstream.stream import Stream
from millstream.units import MAX_APPEND_BYTES, MAX_APPEND_RECORDS

PORTION_S = 0.1  # a slow source of events does not hold up those that have come

T = TypeVar("T")


class Chunk(NamedTuple):
    """What one write stores."""

    stream: Stream[Any]
    records: Sequence[Record]
    events: Sequence[Any]
    bundle: Bundle | None = None
    """How the events became the records, where one of these may be a pack; else each is one."""
    packing: asyncio.Future[Bundle] | None = None
    """A thread makes bundle and records at this moment."""

    async def packed(self) -> Chunk:
        """The same, with its records."""
        if self.packing is None:
            return self
        bundle = await self.packing
        return Chunk(self.stream, bundle.records, self.events, bundle)


class Ahead(Generic[T]):
    """An iterator whose next item can be made before it is asked for. What goes wrong is raised when it is asked for."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._made: T | Exception | None = None

    def look(self) -> None:
        """Make the next item now, unless it is there."""
        if self._made is not None:
            return
        try:
            self._made = next(self._items)
        except Exception as error:  # StopIteration too
            self._made = error

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        self.look()
        made, self._made = self._made, None
        if isinstance(made, Exception):
            raise made
        return made  # type: ignore[return-value]  # `look` has made one


def chunks(records: Records, events: Sequence[Any], to: Stream[Any] | None) -> Iterator[Chunk]:
    """One after the other: of one stream, and of a limited size. Raises what `Records` raises."""
    start = 0
    while start < len(events):
        route = records.route(events[start], to)
        run = events[start : start + route.most]
        if isinstance(run[0], Envelope) or set(map(type, run)) != {type(run[0])}:
            yield from _one_by_one(records, run, to)
        elif route.packer is None:
            made = route.records(run)
            run = run[: len(made)]
            yield Chunk(route.stream, made, run)
        else:
            packed = _packed(route, route.packer, run, beside=len(run) < len(events))
            yield from _one_by_one(records, run, to) if packed is None else (packed,)
        start += len(run)


def _packed(route: Route, packer: Packer, run: Sequence[Any], *, beside: bool) -> Chunk | None:
    """A run of events that become packs as they are: without keys, which would sort them.

    `beside`: there are more, so a thread packs these while the next ones are encoded, and those before them written.
    """
    pack = packer.plain(route.type, list(map(route.encode, run))) if route.stream.key is None else None
    if pack is None:
        return None
    if beside:
        return Chunk(route.stream, (), run, packing=asyncio.get_running_loop().run_in_executor(None, pack))
    bundle = pack()
    return Chunk(route.stream, bundle.records, run, bundle)


def _one_by_one(records: Records, events: Iterable[Any], to: Stream[Any] | None) -> Iterator[Chunk]:
    made: list[Record] = []
    taken: list[Any] = []
    size = 0
    last: Route | None = None
    for event in events:
        route = records.route(event, to)
        record = route.record(event)
        size += len(record.data)
        if last is not None and (last.stream is not route.stream or size > MAX_APPEND_BYTES):
            yield _chunk(last, made, taken)
            made, taken, size = [], [], len(record.data)
        last = route
        made.append(record)
        taken.append(event)
        if len(made) == route.most:
            yield _chunk(route, made, taken)
            made, taken, size, last = [], [], 0, None
    if last is not None:
        yield _chunk(last, made, taken)


def _chunk(route: Route, made: list[Record], taken: list[Any]) -> Chunk:
    if route.packer is None:
        return Chunk(route.stream, made, taken)
    bundle = route.packer.bundle(made)
    return Chunk(route.stream, bundle.records, taken, bundle)


async def sources(events: Iterable[Any] | AsyncIterable[Any], clock: Clock) -> AsyncIterator[Sequence[Any]]:
    """What may be looked at at once: all of a list, of everything else as many at a time as one write takes."""
    if isinstance(events, AsyncIterable):
        portion, began = [], clock.monotonic()
        async for event in events:
            portion.append(event)
            if len(portion) == MAX_APPEND_RECORDS or clock.monotonic() - began > PORTION_S:
                yield portion
                portion, began = [], clock.monotonic()
        yield portion
    elif isinstance(events, list | tuple):  # not any sequence: a deque has no slices
        yield events
    else:
        source = iter(events)
        while portion := list(islice(source, MAX_APPEND_RECORDS)):
            yield portion
