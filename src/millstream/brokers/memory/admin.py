"""What people and monitoring look through at the memory broker."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING

from msgspec.structs import replace

from millstream.brokers.base import DeadLetter, GroupInfo, ParkedKey, PendingInfo, Policy, Start, Stored, StreamInfo
from millstream.brokers.dictionaries import refused
from millstream.brokers.memory.log import ordinal
from millstream.brokers.memory.ordered import OrderedGroup
from millstream.errors import BrokerRefused
from millstream.units import MAX_DICTIONARIES
from millstream.wire import compression

if TYPE_CHECKING:
    from millstream.brokers.memory.broker import MemoryBroker
    from millstream.brokers.memory.group import Group


class MemoryAdmin:
    """What people and monitoring look through."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    async def streams(self) -> list[StreamInfo]:
        """All declared streams, by name."""
        return [log.info() for _, log in sorted(self._broker.logs.items())]

    async def groups(self, stream: str) -> list[GroupInfo]:
        """All groups of a stream, by name. Empty for an unknown stream."""
        groups = self._broker.logs[stream].groups if stream in self._broker.logs else {}
        return [group.info(self._broker.clock) for _, group in sorted(groups.items())]

    async def pending(self, stream: str, group: str, limit: int) -> list[PendingInfo]:
        """The oldest pending events of each partition."""
        found = self._group(stream, group)
        infos = found.pending_infos() if found else []
        infos.sort(key=lambda info: (info.position.partition, ordinal(info.position)))
        partitions = groupby(infos, key=lambda info: info.position.partition)
        return [info for _, oldest in partitions for info in islice(oldest, limit)]

    async def dead(self, stream: str, group: str, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Dead letters in the order of their references, behind `after`."""
        found = self._group(stream, group)
        letters = found.dead.values() if found else ()
        return list(islice((letter for letter in letters if letter.ref > after), limit))

    async def replay(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Give dead letters back to their own group, attempts counted anew."""
        return [self._take(letter, replay=True) for letter in letters]

    async def give(self, stream: str, group: str, events: Sequence[Stored]) -> int:
        """Let a group handle events once more, those that it has settled; how many."""
        return self._known(stream, group).give(events, self._broker.clock.now_ms())

    async def drop(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Discard dead letters for ever."""
        return [self._take(letter, replay=False) for letter in letters]

    async def adopt(self, stream: str, group: str, owner: str) -> None:
        """Make another app the owner of a group."""
        self._known(stream, group).owner = owner

    async def keys(self, stream: str, group: str, limit: int = 100) -> list[ParkedKey]:
        """The keys that wait, those that were parked first first."""
        found = self._ordered(stream, group)
        return found.keys()[:limit] if found else []

    async def parked(self, key: ParkedKey, limit: int = 100) -> list[Stored]:
        """The events that wait of a key, in order."""
        found = self._ordered(key.stream, key.group)
        return found.parked(key, limit) if found else []

    async def release_keys(self, keys: Sequence[ParkedKey]) -> list[bool]:
        """Let keys be tried at once, attempts counted anew."""
        groups = [self._ordered(key.stream, key.group) for key in keys]
        return [group is not None and group.release_key(key) for group, key in zip(groups, keys, strict=True)]

    async def drop_keys(self, keys: Sequence[ParkedKey]) -> list[int]:
        """Discard all that is parked of these keys, for ever."""
        groups = [self._ordered(key.stream, key.group) for key in keys]
        return [group.drop_key(key) if group else 0 for group, key in zip(groups, keys, strict=True)]

    async def seek(self, stream: str, group: str, start: Start, *, live: bool = False) -> None:
        """Move a group to another place."""
        found = self._known(stream, group)
        if not live:
            self._check_no_members(found)
        found.seek(found.log.find(start))

    async def forget(self, stream: str, group: str) -> None:
        """Delete a group with all that it has."""
        found = self._known(stream, group)
        self._check_no_members(found)
        del found.log.groups[group]
        found.evict()

    async def apply(self, stream: str, policy: Policy) -> None:
        """Change what holds for a stream."""
        self._broker.log(stream).policy = policy

    async def train(self, stream: str, number: int, content: bytes = b"") -> None:
        """Store a dictionary, and have publishers use it from now on."""
        compression.check_size(content)
        log = self._broker.log(stream)
        there = log.dictionaries.get(number)
        if number and there is None:
            if not content:
                raise refused(stream, number, "UNKNOWN")
            if len(log.dictionaries) >= MAX_DICTIONARIES:
                raise refused(stream, number, "FULL")
            log.dictionaries[number] = content
        elif number and content not in (b"", there):
            raise refused(stream, number, "TAKEN")
        log.policy = replace(log.policy, dictionary=number)

    async def discard(self, stream: str) -> None:
        """Delete a stream with all that it has."""
        log = self._broker.log(stream)
        for group in log.groups.values():
            self._check_no_members(group)
        del self._broker.logs[stream]
        for group in log.groups.values():
            group.evict()
        log.groups.clear()
        log.wake()

    async def slots(self, stream: str) -> dict[str, int]:
        """The schedules that have published to a stream, and the last slot of each."""
        log = self._broker.logs.get(stream)
        return dict(log.slots) if log else {}

    def _take(self, letter: DeadLetter, replay: bool) -> bool:
        group = self._group(letter.stream, letter.group)
        return group is not None and group.take_letter(letter.ref, self._broker.clock.now_ms(), replay=replay)

    def _check_no_members(self, group: Group | OrderedGroup) -> None:
        count = group.info(self._broker.clock).consumers
        if count:
            raise BrokerRefused(
                f"group {group.name!r} of stream {group.log.spec.name!r} has {count} members: stop them"
            )

    def _known(self, stream: str, group: str) -> Group | OrderedGroup:
        found = self._group(stream, group)
        if found is None:
            raise BrokerRefused(f"stream {stream!r} has no group {group!r}")
        return found

    def _ordered(self, stream: str, group: str) -> OrderedGroup | None:
        found = self._group(stream, group)
        return found if isinstance(found, OrderedGroup) else None

    def _group(self, stream: str, group: str) -> Group | OrderedGroup | None:
        log = self._broker.logs.get(stream)
        return log.groups.get(group) if log else None
