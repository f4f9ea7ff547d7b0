"""Streams of the memory broker."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from msgspec.structs import replace

from millstream.brokers.base import LATER, Policy, Position, Record, Start, Stored, StreamInfo, StreamSpec
from millstream.brokers.memory.ids import Ids
from millstream.errors import BrokerFull, BrokerRefused
from millstream.wire.packs import part_of

if TYPE_CHECKING:
    from millstream.brokers.memory.group import Group
    from millstream.brokers.memory.ordered import OrderedGroup


class Log:
    """A stream: per partition a list of events, and when each was stored. An offset is the ordinal, from 1.

    The first ones may be gone: `gone` says how many of each partition are.
    """

    def __init__(self, spec: StreamSpec, policy: Policy) -> None:
        self.spec = spec
        self.policy = policy
        self.groups: dict[str, Group | OrderedGroup] = {}
        self.slots: dict[str, int] = {}
        """Per schedule the last slot."""
        self.dictionaries: dict[int, bytes] = {}
        self.changed = asyncio.Event()
        self.gone = [0] * spec.partitions
        self.pinned_by = ""
        """What kept the oldest events that might have gone, when that was looked at last."""
        self._events: list[list[Stored]] = [[] for _ in range(spec.partitions)]
        self._stored_ms: list[list[int]] = [[] for _ in range(spec.partitions)]
        self._bytes = [0] * spec.partitions
        self._ids = [Ids() for _ in range(spec.partitions)]
        self._later: list[tuple[int, int, Record]] = []  # a heap: due time, who came first, what
        self._delayed = 0
        self._repeats = 0

    def check(self, partition: int) -> None:
        """Raise `BrokerRefused` for a partition that there is not."""
        if not 0 <= partition < self.spec.partitions:
            raise BrokerRefused(f"stream {self.spec.name!r} has {self.spec.partitions} partitions, none is {partition}")

    def behind(self, partition: int, count: int, limit: int) -> list[Stored]:
        """Up to `limit` events behind the first so many that there ever were."""
        self.check(partition)
        begin = max(0, count - self.gone[partition])
        return self._events[partition][begin : begin + limit]

    def end(self, partition: int) -> int:
        """How many events there ever were."""
        return self.gone[partition] + len(self._events[partition])

    def size(self, partition: int) -> int:
        """How many bytes the events take up."""
        return self._bytes[partition]

    def beyond(self, partition: int, size: int) -> int:
        """Of how many events that there ever were the rest takes up no more than this."""
        count, excess = self.gone[partition], self._bytes[partition] - size
        for stored in self._events[partition]:
            if excess <= 0:
                break
            count, excess = count + 1, excess - _weight(stored.record)
        return count

    def fullness(self) -> float:
        """How near the ceiling it is."""
        policy, counts = self.policy, (sum(map(len, self._events)), sum(self._bytes))
        limits = policy.ceiling_events, policy.ceiling_bytes
        return max((count / limit for count, limit in zip(counts, limits, strict=True) if limit), default=0.0)

    def check_room(self, records: Sequence[Record], now_ms: int, derived: Sequence[Record] = ()) -> None:
        """Raise `BrokerFull` when one of these could not be stored; no id of a derived one is looked at."""
        if self.policy.dedupe_ms:
            records = self._unknown(records, now_ms)
            for partition, count in Counter(record.partition for record in records).items():
                self._check_ids(partition, count)
        limits = self.policy.ceiling_events, self.policy.ceiling_bytes
        if any(limits) and (now := [record for record in (*records, *derived) if not _is_later(record, now_ms)]):
            self._check_ceiling(sum(map(len, self._events)) + len(now), limits[0], "events")
            self._check_ceiling(sum(self._bytes) + sum(map(_weight, now)), limits[1], "bytes")

    def store(self, record: Record, now_ms: int, *, derived: bool = False) -> Position:
        """Store an event for which there is room, or keep it aside until it is due, unless its id is remembered."""
        remembers = self.policy.dedupe_ms and not derived
        ids = self._ids[record.partition]
        if remembers:
            self._forget_ids(record.partition, now_ms)
            if known := ids.find(record.id):
                self._repeats += 1
                return known
        position = self._keep_aside(record) if _is_later(record, now_ms) else self._append(record, now_ms)
        if remembers:
            ids.add(record.id, position, now_ms)
        return position

    def ripen(self, now_ms: int) -> int:
        """Publish what has fallen due, while there is room; how much."""
        count = 0
        while self._later and self._later[0][0] <= now_ms and self._has_room(self._later[0][2], now_ms):
            record = heappop(self._later)[2]
            self._ids[record.partition].came(record.id, self._append(record, now_ms))
            count += 1
        return count

    def next_due_ms(self) -> int | None:
        """When the next event that was kept aside is due, possibly in the past."""
        return self._later[0][0] if self._later else None

    def trim(self, partition: int, count: int) -> int:
        """Remove what is left of the first so many events that there ever were; how many were left."""
        dropped = self._events[partition][: max(0, count - self.gone[partition])]
        del self._events[partition][: len(dropped)]
        del self._stored_ms[partition][: len(dropped)]
        self._bytes[partition] -= sum(_weight(stored.record) for stored in dropped)
        self.gone[partition] += len(dropped)
        return len(dropped)

    def find(self, start: Start) -> list[int]:
        """How many events of each partition, gone ones too, lie before the start."""
        if isinstance(start, int):
            left = [bisect_left(stored_ms, start) for stored_ms in self._stored_ms]
        else:
            left = [len(events) if start == "now" else 0 for events in self._events]
        return [gone + count for gone, count in zip(self.gone, left, strict=True)]

    def wake(self) -> None:
        """Let all that wait look again."""
        self.changed.set()
        self.changed = asyncio.Event()

    def info(self) -> StreamInfo:
        """The stream as it is now."""
        count, trimmed = sum(map(len, self._events)), sum(self.gone)
        first_ms = min((times[0] for times in self._stored_ms if times), default=None)
        last_ms = max((times[-1] for times in self._stored_ms if times), default=None)
        now = self.spec, count, count + trimmed, sum(self._bytes), first_ms, last_ms
        return StreamInfo(*now, self.policy, len(self._later), self._repeats, trimmed)

    def _append(self, record: Record, now_ms: int) -> Position:
        partition = record.partition
        position = Position(partition, str(self.end(partition) + 1))
        self._events[partition].append(Stored(position, replace(record, time_ms=record.time_ms or now_ms, due_ms=None)))
        times = self._stored_ms[partition]
        times.append(max(now_ms, times[-1]) if times else now_ms)  # never back, so that it can be searched
        self._bytes[partition] += _weight(record)
        self.wake()
        return position

    def _keep_aside(self, record: Record) -> Position:
        self._delayed += 1
        heappush(self._later, (record.due_ms or 0, self._delayed, record))
        return Position(record.partition, LATER)

    def _unknown(self, records: Sequence[Record], now_ms: int) -> list[Record]:
        """Those whose ids are not remembered, each id once."""
        unknown: dict[tuple[int, str], Record] = {}
        for record in records:
            self._forget_ids(record.partition, now_ms)
            if self._ids[record.partition].find(record.id) is None:
                unknown.setdefault((record.partition, record.id), record)
        return list(unknown.values())

    def _forget_ids(self, partition: int, now_ms: int) -> None:
        self._ids[partition].forget(now_ms - self.policy.dedupe_ms)

    def _check_ids(self, partition: int, more: int) -> None:
        limit = self.policy.dedupe_ids
        if limit and len(self._ids[partition]) + more > limit:
            raise BrokerFull(
                f"stream {self.spec.name!r} remembers {len(self._ids[partition]):,} ids in partition {partition}, "
                f"its limit is {limit:,}: wait until the oldest are {self.policy.dedupe_ms:,} ms old, or raise the limit "
                "with `millstream stream apply`"
            )

    def _check_ceiling(self, wanted: int, ceiling: int, what: str) -> None:
        if 0 < ceiling < wanted:
            who = f"group {self.pinned_by!r} keeps the oldest" if self.pinned_by else "none of them may go yet"
            raise BrokerFull(
                f"stream {self.spec.name!r} is at its ceiling of {ceiling:,} {what}, and {who}: run or forget the group, "
                "or raise the ceiling with `millstream stream apply`"
            )

    def _has_room(self, record: Record, now_ms: int) -> bool:
        try:
            self.check_room([], now_ms, [record])  # its id was looked at when it was published
        except BrokerFull:
            return False
        return True


def _is_later(record: Record, now_ms: int) -> bool:
    return record.due_ms is not None and record.due_ms > now_ms


def _weight(record: Record) -> int:
    return len(record.data) + len(record.headers)


def ordinal(position: Position | None) -> int:
    """How many events there were up to this position; that of an event of a pack is where the pack lies."""
    return 0 if position is None else int(part_of(position.offset)[0])
