"""Unpacking: who reads a stream sees events, and never the packs in which they travelled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from millstream.brokers.base import Position, Record, Stored
from millstream.errors import WireError
from millstream.wire import packs


def unpacked(page: Iterable[Stored]) -> Iterator[Stored]:
    """Each event, with its own position; a pack that cannot be read is an entry that is no event, and says why."""
    for stored in page:
        if packs.is_pack(stored.record):
            yield from _events(stored)
        else:
            yield stored


def check_readable(page: Iterable[Stored]) -> None:
    """Raise `NotSupported` for a pack that needs a library which is not installed: its events would be missing."""
    for stored in page:
        if packs.is_pack(stored.record) and (lacking := packs.lacking(stored.record)):
            raise lacking


def _events(stored: Stored) -> Iterator[Stored]:
    at, record = stored.position, stored.record
    try:
        packed = packs.read(record, at.offset)
    except WireError as error:
        yield Stored(at, Record(at.partition, record.id, "", str(error).encode(), record.key, record.time_ms))
        return
    for part, event in enumerate(packed):
        yield Stored(Position(at.partition, packed.offset_of(part)), event)
