"""Client: what an open app can do. Its own verbs, those of threads and what its parts are given all come down to this."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterable, Sequence
from datetime import datetime
from typing import Any

from millstream.brokers.base import Broker, Confirm, Position, Record, Slot, Start
from millstream.brokers.dictionaries import readable
from millstream.clock import Clock
from millstream.delivery import Envelope
from millstream.errors import BadEvent, WireError
from millstream.publisher.publisher import Publisher
from millstream.publisher.unpacking import unpacked
from millstream.stream import Stream
from millstream.telemetry import Telemetry
from millstream.units import Duration, seconds
from millstream.wire import codec

_PAGE = 500  # events that `pages` fetches at once
_WAIT_S = 5.0


class Client:
    """An app's broker and publisher, open on one event loop."""

    def __init__(self, broker: Broker, publisher: Publisher, clock: Clock, telemetry: Telemetry) -> None:
        self.broker = broker
        self.publisher = publisher
        self.clock = clock
        self.telemetry = telemetry
        self.loop = asyncio.get_running_loop()
        self._process = os.getpid()

    @property
    def answers(self) -> bool:
        """True while the loop runs in this process; in a forked child, it does not."""
        return self._process == os.getpid() and self.loop.is_running()

    def publish(
        self, event: Any, *, to: Stream[Any] | None = None, confirm: Confirm | None = None
    ) -> Coroutine[Any, Any, Position]:
        """As `App.publish`."""
        return self.publisher.publish(event, to, confirm)

    async def publish_many(
        self,
        events: Iterable[Any] | AsyncIterable[Any],
        *,
        to: Stream[Any] | None = None,
        confirm: Confirm | None = None,
        stored: Sequence[Position] = (),
    ) -> list[Position]:
        """As `App.publish_many`; `stored` are the positions of those that were published before these."""
        return await self.publisher.publish_many(events, to, confirm, stored)

    async def publish_slot(self, event: Any, *, to: Stream[Any], schedule: str, at_ms: int) -> bool:
        """As `Runtime.publish_slot`."""
        return await self.publisher.publish_slot(event, to, Slot(schedule, at_ms))

    async def pages(
        self, stream: Stream[Any], since: datetime | Duration | None, follow: bool
    ) -> AsyncGenerator[list[Envelope[Any]], None]:
        """What `App.read` yields, as many at once as one read of the broker gave."""
        await self.publisher.declare(stream)
        decoders = {name: codec.decoder(cls, stream.codec) for name, cls in stream.types.items()}
        places = dict(await self.broker.locate(stream.name, start_at(since, self.clock)))
        while True:
            for partition, place in places.items():
                while page := await self.broker.read(stream.name, partition, place, _PAGE):
                    if lacking := await readable(self.broker, stream.name, page):
                        raise lacking
                    found = (_envelope(stored.record, decoders) for stored in unpacked(page))
                    if envelopes := [envelope for envelope in found if envelope is not None]:
                        yield envelopes
                    place = places[partition] = page[-1].position
            if not follow:
                return
            await self.broker.wait(stream.name, places, _WAIT_S)


def delayed(event: Any, when: datetime | Duration) -> Envelope[Any]:
    """The event, or what an envelope says of it, due at this time or after so long."""
    if not isinstance(event, Envelope):
        return Envelope(event, due=when)
    if event.due is not None:
        raise BadEvent(f"the envelope is due {event.due} already: publish() it, or leave out due")
    return _copy(event, event.id, when)


def named(event: Any, clock: Clock) -> Envelope[Any]:
    """The event with an id."""
    if not isinstance(event, Envelope):
        return Envelope(event, id=clock.new_id())
    return event if event.id else _copy(event, clock.new_id(), event.due)


def _copy(envelope: Envelope[Any], id_: str, due: datetime | Duration | None) -> Envelope[Any]:
    copy = Envelope(envelope.event, id=id_, key=envelope.key, headers=envelope.headers, due=due)
    copy.time_ms = envelope.time_ms
    return copy


def _envelope(record: Record, decoders: dict[str, Callable[[bytes], Any]]) -> Envelope[Any] | None:
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


def start_at(since: datetime | Duration | None, clock: Clock) -> Start:
    """`beginning`, `now`, a time, or how long ago, as the broker knows it."""
    if since is None or since == "beginning":
        return "beginning"
    if since == "now":
        return "now"
    if isinstance(since, datetime):
        return int(since.timestamp() * 1000)
    return clock.now_ms() - int(seconds(since) * 1000)
