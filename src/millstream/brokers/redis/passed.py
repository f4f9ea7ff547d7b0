"""Events that a group without order passes over, since they are gone when it reads on.

Whoever looks between the removal and the next read counts them, see `lua/lib/losses.lua`. A read that comes first passes
over them, and some servers then forget that there was anything (Redis 8.2; 7.0 does not). So who reads looks at the group
right before, in the same write: nothing comes between the two. If the group had read nothing of what the log had left, and
the read brought something, that is compared with what was ever added.

The look costs the server 1 to 3 µs a partition, and is sent to those servers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from hiredis import ReplyError

from millstream.brokers.redis.link import Link, pack
from millstream.brokers.redis.members import Place
from millstream.brokers.redis.scripts import scripts
from millstream.errors import BrokerRefused
from millstream.telemetry import logger


class Passage(NamedTuple):
    """A read that may have passed over something."""

    partition: int
    first: bytes
    """The first id that it brought."""
    brought: int
    read: int
    """How many entries the group had read before."""


class Passed:
    """What one consumer sees when it reads."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._forgets = True
        self._looked: Sequence[int] = ()

    async def begin(self, link: Link) -> None:
        """Learn whether it is needed here; where that is forbidden, it may be."""
        with suppress(BrokerRefused):
            self._forgets = bool(await link.run(scripts["forgets"], (self._place.probe,), ()))

    def look(self, partitions: Sequence[int]) -> list[bytes]:
        """Commands to be sent right before a read of these partitions."""
        self._looked = partitions if self._forgets else ()
        logs = [self._place.at[partition].log for partition in self._looked]
        return [command for log in logs for command in (pack("XINFO", "GROUPS", log), pack("XLEN", log))]

    def passages(self, answers: Sequence[Any], found: Sequence[Any]) -> list[Passage]:
        """What has to be looked at more closely, by the answers to these commands and to the read."""
        if not self._looked:
            return []
        brought = {log: entries for log, entries in found if entries}
        passages: list[Passage] = []
        for partition, groups, length in zip(self._looked, answers[::2], answers[1::2], strict=True):
            entries: Sequence[Any] = brought.get(self._place.at[partition].log, ())
            read = None if not entries or isinstance(groups, ReplyError) else self._behind(groups, length)
            if read is not None:
                passages.append(Passage(partition, entries[0][0], len(entries), read))
        return passages

    async def count(self, link: Link, passages: Sequence[Passage]) -> None:
        """Count what these have passed over."""
        for passage in passages:
            at = self._place.at[passage.partition]
            args = self._place.group, passage.first, passage.brought, passage.read
            if lost := await link.run(scripts["passed"], (at.log, at.stats), args):
                where = self._place.group, self._place.stream, lost, passage.partition
                logger.error(
                    "group %s of %s: %d events of partition %d were trimmed away before they were read", *where
                )

    def _behind(self, groups: Sequence[Sequence[Any]], length: int) -> int | None:
        # How many entries the group had read, if none of those that are left.
        name = self._place.group.encode()
        for group in groups:
            if group[1] == name:
                fields = dict(zip(group[::2], group[1::2], strict=True))
                read: int | None = fields.get(b"entries-read")
                return read if fields.get(b"lag") == length else None
        return None
