"""Streams of the memory broker."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from typing import TYPE_CHECKING

from msgspec.structs import replace

from millstream.brokers.base import Position, Record, Start, Stored, StreamInfo, StreamSpec
from millstream.errors import BrokerRefused

if TYPE_CHECKING:
    from millstream.brokers.memory.group import Group
    from millstream.brokers.memory.ordered import OrderedGroup


class Log:
    """A stream: per partition a list of events, and when each was stored. An offset is the ordinal, from 1."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.groups: dict[str, Group | OrderedGroup] = {}
        self.changed = asyncio.Event()
        self._events: list[list[Stored]] = [[] for _ in range(spec.partitions)]
        self._stored_ms: list[list[int]] = [[] for _ in range(spec.partitions)]
        self._bytes = 0

    def partition(self, number: int) -> list[Stored]:
        """The events of a partition. Raises `BrokerRefused` for one that there is not."""
        if not 0 <= number < self.spec.partitions:
            raise BrokerRefused(f"stream {self.spec.name!r} has {self.spec.partitions} partitions, none is {number}")
        return self._events[number]

    def append(self, record: Record, now_ms: int) -> Position:
        """Store an event."""
        events, stored_ms = self._events[record.partition], self._stored_ms[record.partition]
        position = Position(record.partition, str(len(events) + 1))
        events.append(Stored(position, replace(record, time_ms=record.time_ms or now_ms)))
        stored_ms.append(max(now_ms, stored_ms[-1]) if stored_ms else now_ms)  # never back, so that it can be searched
        self._bytes += len(record.data) + len(record.headers)
        self.wake()
        return position

    def find(self, start: Start) -> list[int]:
        """How many events of each partition lie before the start."""
        if isinstance(start, int):
            return [bisect_left(stored_ms, start) for stored_ms in self._stored_ms]
        return [len(events) if start == "now" else 0 for events in self._events]

    def wake(self) -> None:
        """Let all that wait look again."""
        self.changed.set()
        self.changed = asyncio.Event()

    def info(self) -> StreamInfo:
        """The stream as it is now."""
        count = sum(map(len, self._events))
        first_ms = min((times[0] for times in self._stored_ms if times), default=None)
        last_ms = max((times[-1] for times in self._stored_ms if times), default=None)
        return StreamInfo(self.spec, count, count, self._bytes, first_ms, last_ms)
