"""An event becomes a record: which stream carries it, its id, its key and partition, its bytes, when it is due.

Each class of events has a route onto its stream, and each route functions that were made for it: what does not depend
on the event is looked up once. One makes the record of an event that comes by itself, 0.65 µs where it has 200 bytes and
no key, the other those of a list, step by step for all of them: 0.45 µs each, of which 0.2 are to encode. Envelopes, and
what handlers publish, carry more and go through `Records.record`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from hashlib import blake2b
from itertools import repeat
from typing import Any, NamedTuple

import msgspec

from millstream.brokers.base import Broker, Record
from millstream.clock import Clock
from millstream.delivery import Envelope
from millstream.errors import BadEvent, NotSupported, TooLarge, Unroutable
from millstream.event import type_of
from millstream.publisher.packing import Packer
from millstream.stream import Stream
from millstream.units import (
    MAX_APPEND_BYTES,
    MAX_APPEND_RECORDS,
    MAX_DELAY_S,
    MAX_EVENT_BYTES,
    MAX_HEADERS_BYTES,
    MAX_ID_CHARS,
    MAX_KEY_BYTES,
    Duration,
    seconds,
)
from millstream.wire import codec, packs
from millstream.wire.compression import Dictionary
from millstream.wire.partition import partition_of

PAST_MS = 1_000  # a due time may be past by what passes between making an envelope and publishing it

_json = msgspec.json.Encoder().encode


class Route(NamedTuple):
    """How events of one class get onto one stream."""

    stream: Stream[Any]
    type: str
    encode: Callable[[Any], bytes]
    record: Callable[[Any], Record]
    """`Records.record` of an event or an envelope that comes by itself, the quick way."""
    records: Callable[[Sequence[Any]], list[Record]]
    """The same of the first of these events, all of this very class: of as many as one write holds."""
    packer: Packer | None
    """What makes packs of them; None where each travels alone."""
    most: int
    """Of these, what one write of many takes."""
    dictionary: Dictionary | None = None
    """What makes a small event shorter that travels alone."""


class Repeat(Envelope[Any]):
    """An event that may be stored already. Published again it is the same record: its id, and when it is due."""

    __slots__ = ("due_ms", "tried_ms")

    def __init__(self, event: Any, record: Record, tried_ms: int) -> None:
        envelope = event if isinstance(event, Envelope) else Envelope(event)
        super().__init__(envelope.event, id=record.id, key=envelope.key, headers=envelope.headers, due=envelope.due)
        self.time_ms = record.time_ms
        self.due_ms = record.due_ms
        self.tried_ms: int = event.tried_ms if isinstance(event, Repeat) else tried_ms
        """When it was published for the first time."""


class Records:
    """Makes the records of one app. Knows its streams, and those that it was given once."""

    def __init__(self, streams: Iterable[Stream[Any]], *, source: str, broker: Broker, clock: Clock) -> None:
        self.streams: dict[str, Stream[Any]] = {stream.name: stream for stream in streams}
        self._source = source
        self._broker = broker
        self._clock = clock
        self._routes: dict[tuple[type, Stream[Any] | None], Route] = {}
        self._dictionaries: dict[str, Dictionary | None] = {}

    def route(self, event: Any, to: Stream[Any] | None) -> Route:
        """Where an event goes. Raises `BadEvent`, `Unroutable`."""
        route = self._routes.get((type(event), to))
        if route is not None:
            return route
        cls = type(event.event if isinstance(event, Envelope) else event)
        return self._routes.get((cls, to)) or self._new_route(cls, to)

    def use(self, stream: str, dictionary: Dictionary | None) -> None:
        """From now on write small events of a stream that travel alone with this dictionary, or with none."""
        self._dictionaries[stream] = dictionary
        self._routes = {way: route for way, route in self._routes.items() if route.stream.name != stream}

    @property
    def used(self) -> set[str]:
        """The streams to which something went."""
        return {route.stream.name for route in self._routes.values()}

    def packer(self, stream: Stream[Any]) -> Packer | None:
        """What makes the packs of a stream; None where events travel alone."""
        if stream.pack is None:
            return None
        return Packer(stream, stream.pack, source=self._source, new_id=self._clock.new_id)

    def record(self, route: Route, event: Any, *, id_: str = "", headers: Mapping[str, str] | None = None) -> Record:
        """The record of an event, or of an envelope: then what that says comes before `id_` and `headers`.

        Raises `BadEvent`, `TooLarge`, `NotSupported`.
        """
        envelope = event if isinstance(event, Envelope) else None
        event = event if envelope is None else envelope.event
        stream = route.stream
        data = route.encode(event)
        if len(data) > MAX_EVENT_BYTES:
            raise _too_large(event, data)
        key = stream.key_of(event) if envelope is None or envelope.key is None else envelope.key
        if key is not None and len(key) * 4 > MAX_KEY_BYTES:
            _check_key(event, key)
        time_ms, due_ms = 0, None
        if envelope is not None:
            id_ = _checked_id(envelope.id) or id_
            time_ms = envelope.time_ms  # one that was read keeps its time
            due_ms = self._due_ms(envelope)
            headers = {**headers, **envelope.headers} if headers else envelope.headers
        id_ = id_ or self._clock.new_id()
        partition = partition_of(id_ if key is None else key, stream.partitions)
        written = _written(headers) if headers else b""
        record = Record(partition, id_, route.type, data, key, time_ms, written, due_ms, self._source)
        return record if route.dictionary is None else packs.one(record, route.dictionary)

    def _new_route(self, cls: type, asked: Stream[Any] | None) -> Route:
        to, mark = asked, type_of(cls)
        if mark is None:
            raise BadEvent(
                f"{cls.__name__} is no event; write class {cls.__name__}(Event, type='…') or put @event('…') on it"
            )
        if to is None:
            candidates = [stream for stream in self.streams.values() if cls in stream.types.values()]
            if len(candidates) != 1:
                names = ", ".join(stream.name for stream in candidates) or "none"
                raise Unroutable(f"which stream is {cls.__name__} for? say to=; those that carry it: {names}")
            to = candidates[0]
        if to.types.get(mark.wire) is not cls:
            carried = ", ".join(other.__name__ for other in to.types.values())
            raise Unroutable(f"stream {to.name!r} does not carry {cls.__name__}; it carries {carried}")
        known = self.streams.setdefault(to.name, to)
        if known is not to:
            raise Unroutable(f"two different Stream objects are named {to.name!r}; declare it once and import it")
        route, dictionary = self._route(cls, to, mark.wire), self._dictionaries.get(to.name)
        if dictionary is not None and route.packer is None:
            route = _short(route, dictionary)
        self._routes[cls, asked] = route
        return route

    def _route(self, cls: type, stream: Stream[Any], type_: str) -> Route:
        encode, source = codec.encoder(cls, stream.codec), self._source
        new_id, new_ids = self._clock.new_id, self._clock.new_ids
        partitions, keyed, key_of = stream.partitions, stream.key is not None, stream.key_of

        def record(event: Any) -> Record:
            if type(event) is not cls:
                return self.record(route, event)
            data = encode(event)
            if len(data) > MAX_EVENT_BYTES:
                raise _too_large(event, data)
            key = key_of(event) if keyed else None
            if key is not None and len(key) * 4 > MAX_KEY_BYTES:
                _check_key(event, key)
            id_ = new_id()
            partition = partition_of(id_ if key is None else key, partitions) if partitions > 1 else 0
            return Record(partition, id_, type_, data, key, 0, b"", None, source)

        def records(events: Sequence[Any]) -> list[Record]:
            datas = _encoded(encode, events)
            ids = new_ids(len(datas))
            keys = _keys(key_of, events[: len(datas)]) if keyed else repeat(None)
            places: Iterable[int] = repeat(0)
            if partitions > 1:
                pairs = zip(ids, keys, strict=False)
                places = [partition_of(id_ if key is None else key, partitions) for id_, key in pairs]
            each = zip(places, ids, datas, keys, strict=False)
            return [Record(place, id_, type_, data, key, 0, b"", None, source) for place, id_, data, key in each]

        packer = self.packer(stream)
        most = MAX_APPEND_RECORDS if packer is None else packer.write_events
        route = Route(stream, type_, encode, record, records, packer, most)
        return route

    def _due_ms(self, envelope: Envelope[Any]) -> int | None:
        if isinstance(envelope, Repeat):
            return envelope.due_ms
        return None if envelope.due is None else due_ms(envelope.due, self._broker, self._clock)


def _short(route: Route, dictionary: Dictionary) -> Route:
    """The same way, with a dictionary."""

    def record(event: Any) -> Record:
        return packs.one(route.record(event), dictionary)

    def records(events: Sequence[Any]) -> list[Record]:
        return [packs.one(record, dictionary) for record in route.records(events)]

    return route._replace(record=record, records=records, dictionary=dictionary)


def due_ms(due: datetime | Duration, broker: Broker, clock: Clock) -> int:
    """When an event is due, in epoch milliseconds. Raises `BadEvent`, and `NotSupported` where the broker cannot wait."""
    now_ms = clock.now_ms()
    at_ms = int(due.timestamp() * 1000) if isinstance(due, datetime) else now_ms + int(seconds(due) * 1000)
    if at_ms < now_ms - PAST_MS:
        raise BadEvent(f"due={due} is past: publish it without due")
    if at_ms > now_ms + MAX_DELAY_S * 1000:
        raise BadEvent(
            f"due={due} is over {MAX_DELAY_S / 86_400:.0f} days ahead: that is a plan, keep it in a database where it can "
            "be changed, and publish it when it is due"
        )
    if not broker.traits.delayed:
        raise NotSupported(f"{broker.url} cannot publish for later: leave out due, or use another broker")
    return at_ms


def derived_id(*words: str) -> str:
    """An id that comes out the same whenever it is made from the same words."""
    return blake2b("\0".join(words).encode(), digest_size=12).hexdigest()


def _encoded(encode: Callable[[Any], bytes], events: Iterable[Any]) -> list[bytes]:
    """The bytes of the first of these events, of as many as one write holds. Raises `TooLarge`."""
    datas: list[bytes] = []
    room = MAX_APPEND_BYTES
    for event in events:
        data = encode(event)
        if len(data) > MAX_EVENT_BYTES:
            raise _too_large(event, data)
        room -= len(data)
        if room < 0:
            break
        datas.append(data)
    return datas


def _keys(key_of: Callable[[Any], str | None], events: Sequence[Any]) -> list[str | None]:
    keys = list(map(key_of, events))
    for event, key in zip(events, keys, strict=True):
        if key is not None and len(key) * 4 > MAX_KEY_BYTES:
            _check_key(event, key)
    return keys


def _too_large(event: Any, data: bytes) -> TooLarge:
    return TooLarge(
        f"{type(event).__name__} is {len(data):,} bytes, over the limit of {MAX_EVENT_BYTES:,}; store the bulk "
        "elsewhere and publish a reference"
    )


def _check_key(event: Any, key: str) -> None:
    if len(key.encode()) > MAX_KEY_BYTES:
        raise TooLarge(f"the key of {type(event).__name__} is over {MAX_KEY_BYTES:,} bytes; use a hash of it")


def _checked_id(id_: str) -> str:
    if not isinstance(id_, str):
        raise BadEvent(f"id {id_!r} is not text: write str(…)")
    if len(id_) > MAX_ID_CHARS:
        raise TooLarge(
            f"id {id_[:20]!r}… has {len(id_)} characters, over the limit of {MAX_ID_CHARS}; use a hash of it"
        )
    if id_ and not (id_.isascii() and id_.isprintable()):
        raise BadEvent(f"id {id_!r}: only printable ASCII characters")
    return id_


def _written(headers: Mapping[str, str]) -> bytes:
    if not all(isinstance(name, str) and isinstance(value, str) for name, value in headers.items()):
        raise BadEvent(f"headers {headers!r}: names and values must be text")
    written = _json(dict(headers))
    if len(written) > MAX_HEADERS_BYTES:
        raise TooLarge(f"headers are {len(written):,} bytes, over the limit of {MAX_HEADERS_BYTES:,}")
    return written
