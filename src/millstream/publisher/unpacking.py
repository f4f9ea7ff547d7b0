"""Unpacking: who reads a stream sees events, and never the packs in which they travelled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from millstream.brokers.base import Broker, Position, Record, Stored
from millstream.brokers.dictionaries import readable
from millstream.errors import WireError
from millstream.wire import packs


def unpacked(page: Iterable[Stored]) -> Iterator[Stored]:
    """Each event, with its own position; a pack that cannot be read is an entry that is no event, and says why."""
    for stored in page:
        if packs.is_pack(stored.record):
            yield from _events(stored)
        else:
            yield stored


async def opened(broker: Broker, stream: str, kept: Sequence[Stored]) -> list[Stored]:
    """What a group keeps, each pack of one as the event that it is; a pack of many, or one that cannot be read, as it is."""
    await readable(broker, stream, kept)
    return [_opened(stored) if packs.is_one(stored.record) else stored for stored in kept]


def _opened(stored: Stored) -> Stored:
    try:
        return Stored(stored.position, packs.read(stored.record, stored.position.offset).record(0))
    except WireError:
        return stored


def _events(stored: Stored) -> Iterator[Stored]:
    at, record = stored.position, stored.record
    try:
        packed = packs.read(record, at.offset)
    except WireError as error:
        yield Stored(at, Record(at.partition, record.id, "", str(error).encode(), record.key, record.time_ms))
        return
    for part, event in enumerate(packed):
        yield Stored(Position(at.partition, packed.offset_of(part)), event)
