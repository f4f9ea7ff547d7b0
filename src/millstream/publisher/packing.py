"""Packing: the events of one write become packs, and what became of a pack is told for each of its events.

    events, in their order     a1  b1  a2  c1 (due)  a3  b2  a4        keys a, b, c
    records                    b1  c1  b2  [a1 a2 a3 a4]               a pack in brackets

A pack holds events of one key, in their order, so each key keeps its order; across keys there is none to keep. An event
that is too large or for later is a record of its own, and so are the few of a key that has not more in this write. Where
events have no key nothing needs to be sorted; and of one class that comes without envelopes not even records are made,
since their bytes are all that the pack has to hold: their ids and positions follow from those of the pack.

An event of 200 bytes takes 0.75 µs before the broker so: 0.2 to encode, 0.35 for zstd, 0.1 for its position. Where a call
publishes more than one write takes, a thread compresses while the next events are encoded, so that of 1.1 µs on a busy
machine, all the way to the broker, the event loop has 0.5. One with an envelope takes 2.7, nearly all of it for the
envelope; one of 5,000 keys, of which most travel alone, 1.3 more than it would without packs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import repeat
from typing import Any, NamedTuple

from msgspec import Struct

from millstream.brokers.base import Position, Record
from millstream.stream import Pack, Stream
from millstream.units import MAX_APPEND_BYTES, MAX_APPEND_RECORDS, MAX_EVENT_BYTES, MAX_PACK_EVENTS, seconds
from millstream.wire import packs
from millstream.wire.packs import Columns
from millstream.wire.partition import partition_of

MAX_CONTENT_BYTES = MAX_EVENT_BYTES - 1_024  # of a pack: it fits into an entry even where it cannot be compressed
WRITE_EVENTS = 2_000  # of one write, about: it costs a server no more than 1,000 events that travel alone
LEAST_EVENTS = 4  # fewer take longer to compress, 8 µs each, than they and a server need when they travel alone
_FRAME_BYTES = 32  # of an event in a pack, beside its data, headers, type and id; at most


class Bundle(NamedTuple):
    """The records of a number of events."""

    records: Sequence[Record]
    members: Sequence[Sequence[int]]
    """Of each record, which of the events it holds: several if it is a pack."""

    def spread(self, results: Sequence[Position | Exception]) -> list[Position | Exception]:
        """What became of each event, from what became of each record."""
        found: list[Any] = [None] * sum(map(len, self.members))
        for members, result in zip(self.members, results, strict=True):
            parts: Iterable[Any] = repeat(result, len(members))
            if len(members) > 1 and isinstance(result, Position):
                offsets = map(result.offset.__add__, _suffixes()[: len(members)])
                parts = map(Position, repeat(result.partition), offsets)
            if isinstance(members, range):
                found[members.start : members.stop] = parts
            else:
                for event, part in zip(members, parts, strict=True):
                    found[event] = part
        return found

    def events(self) -> list[Record]:
        """Each event as a record of its own."""
        found: list[Any] = [None] * sum(map(len, self.members))
        for members, record in zip(self.members, self.records, strict=True):
            parts = packs.read(record, "") if packs.is_pack(record) else (record,)
            for event, part in zip(members, parts, strict=True):
                found[event] = part
        return found


class Packer:
    """Makes the packs of one stream."""

    def __init__(self, stream: Stream[Any], pack: Pack, *, source: str, new_id: Callable[[], str]) -> None:
        self.linger_s = seconds(pack.linger)
        self.events = pack.events
        """Events in a pack, at most."""
        self._least = min(LEAST_EVENTS, pack.events)
        self.write_events = pack.events * min(max(WRITE_EVENTS // pack.events, 1), MAX_APPEND_RECORDS)
        """Events of one write, at most."""
        self._codec = pack.codec
        self._partitions = stream.partitions
        self._source = source
        self._new_id = new_id

    def plain(self, type_: str, datas: list[bytes]) -> Callable[[], Bundle] | None:
        """Events of one type, of which there is nothing else to say; None where they are too large to be cut by number.

        What is left to be called is nearly all compression, which may run beside the event loop in a thread.
        """
        members = [range(len(datas))[start : start + self.events] for start in range(0, len(datas), self.events)]
        columns = [datas[numbers.start : numbers.stop] for numbers in members]
        sizes = [sum(map(len, column)) + _FRAME_BYTES * len(column) for column in columns]
        if max(sizes) > MAX_CONTENT_BYTES or sum(sizes) > MAX_APPEND_BYTES:
            return None
        ids = [self._new_id() for _ in columns]  # here, since a clock belongs to the thread of its loop
        return lambda: Bundle(list(map(self._plain, repeat(type_), columns, ids)), members)

    def bundle(self, records: Sequence[Record]) -> Bundle:
        """Any events, each with its id."""
        bundled: list[Record] = []
        members: list[Sequence[int]] = []
        groups: list[_Group] = []
        open_: dict[str | None, _Group] = {}
        counts = Counter([record.key for record in records])
        for number, record in enumerate(records):
            if counts[record.key] < self._least:  # the usual case where there are many keys, so it is to cost little
                bundled.append(record)
                members.append((number,))
                continue
            size = len(record.data) + len(record.headers) + len(record.type) + len(record.id) + _FRAME_BYTES
            group = open_.get(record.key)
            if group is None or group.room < size or record.due_ms is not None or len(group.members) == self.events:
                group = open_[record.key] = _Group()
                groups.append(group)
            group.members.append(number)
            group.room = group.room - size if record.due_ms is None else 0
        for group in groups:
            events = [records[number] for number in group.members]
            if len(events) < self._least:
                bundled += events
                members += ((number,) for number in group.members)
            else:
                bundled.append(self._pack(Columns.of(events), self._new_id(), events[0].key))
                members.append(group.members)
        return Bundle(bundled, members)

    def _plain(self, type_: str, datas: list[bytes], id_: str) -> Record:
        if len(datas) > 1:
            return self._pack(Columns(datas, type_), id_)
        return Record(partition_of(id_, self._partitions), id_, type_, datas[0], source=self._source)

    def _pack(self, columns: Columns, id_: str, key: str | None = None) -> Record:
        partition = partition_of(id_ if key is None else key, self._partitions)
        return packs.write(columns, self._codec, partition=partition, id_=id_, key=key, source=self._source)


class _Group(Struct):
    """Events of one key that follow each other."""

    members: list[int] = []  # msgspec gives each its own
    room: int = MAX_CONTENT_BYTES


@cache
def _suffixes() -> list[str]:
    """What makes of a pack's offset that of its event k."""
    return [packs.part_offset("", k) for k in range(MAX_PACK_EVENTS)]
