"""Who is alive in a group, and what becomes of those who are not.

A beat raises one counter, `tick`, and writes it as the beater's score in `live`. On every watch an observer remembers the
tick and its own monotonic time; whose score is not above a tick that it saw at least a lease ago has been silent for a
lease. No wall clock takes part: a step of the server's time, or a failover to a master whose clock is ahead, kills
nobody. The memory is worth something only while it has no hole, so it is emptied whenever the observer itself was out of
touch: its beat failed, half a lease passed between two answers, the counter went back.

Who is found silent loses its fence first and then what it holds, one partition after the other; each step can be
repeated by anybody. The sweep looks for what fell through: names without a fence, foreign clients, lost due times.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from typing import NamedTuple

from millstream.brokers.base import Start, Subscription
from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.link import Link, ReplyError
from millstream.brokers.redis.scripts import scripts
from millstream.clock import Clock
from millstream.errors import GroupVanished
from millstream.telemetry import logger

PREFIX = "ms."  # of every consumer of ours
WAITING = b"~due"  # the pseudo-consumer that owns what waits

MAX_ITEMS = 200  # entries per call of a script: about 2 ms of the server's time
MAX_DEAD_AT_ONCE = 8  # silent members per watch; the rest at the next
WATCH_S = 0.5  # at most this often, so that takeover follows within a second of the lease
SWEEP_S = 5.0  # how long a lost due time, or an entry of a name without fence, may go unseen
CLAIM_AFTER_S = 60.0  # a foreign client beats for nobody; idle for so long, it is taken for dead

_LAST_SEQUENCE = 18_446_744_073_709_551_615


class Spot(NamedTuple):
    """The keys of a group in one partition."""

    log: bytes
    due: bytes
    note: bytes
    dead: bytes
    stats: bytes
    meta: bytes
    lease: bytes
    parked: bytes
    parkinfo: bytes


class Place:
    """Where a group consumes: the keys of its unit, and of each partition."""

    def __init__(self, keys: Keys, subscription: Subscription) -> None:
        group = subscription.group
        self.group = group
        self.stream = subscription.stream.name
        self.partitions = range(subscription.stream.partitions)
        self.at = [
            Spot(
                keys.log(p),
                keys.due(p, group),
                keys.note(p, group),
                keys.dead(p, group),
                keys.stats(p, group),
                keys.meta(p),
                keys.lease(p, group),
                keys.parked(p, group),
                keys.parkinfo(p, group),
            )
            for p in self.partitions
        ]
        self.live, self.tick = keys.live(group), keys.tick(group)
        self.probe = keys.probe
        self._keys = keys

    def fence(self, consumer: str) -> bytes:
        """A consumer's right to settle."""
        return self._keys.fence(self.group, consumer)

    def park(self, partition: int, key: str) -> bytes:
        """The parked events of an event key."""
        return self._keys.park(partition, self.group, key)


class Ticks:
    """What an observer remembers of the counter of beats."""

    def __init__(self, clock: Clock, lease_s: float) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._seen: deque[tuple[float, int]] = deque()

    def forget(self) -> None:
        """Begin anew: we were out of touch."""
        self._seen.clear()

    def silent_since(self) -> int:
        """The newest tick that was seen at least a lease ago; -1, before all, while there is none."""
        now, seen, found = self._clock.monotonic(), self._seen, None
        if seen and now - seen[-1][0] > self._lease_s / 2:
            seen.clear()
        while seen and seen[0][0] <= now - self._lease_s:
            found = seen.popleft()
        if found is None:
            return -1
        seen.appendleft(found)  # it stays the newest that is old enough, until another one is
        return found[1]

    def remember(self, tick: int) -> None:
        """The counter stands here now."""
        if self._seen and tick < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((self._clock.monotonic(), tick))


class Members:
    """The members of a unit as one of them sees them. All methods raise `BrokerError`, and can be called again.

    They answer with the partitions in which something was set free, and can be taken now.
    """

    def __init__(self, place: Place, clock: Clock, lease_s: float, name: str) -> None:
        self._place = place
        self._name = name
        self._ticks = Ticks(clock, lease_s)
        self.watch_s = min(lease_s / 4, WATCH_S)
        self.sweep_s = min(lease_s / 2, SWEEP_S)
        self.claim_after_s = max(CLAIM_AFTER_S, lease_s)

    def forget(self) -> None:
        """Begin to observe anew: we were out of touch."""
        self._ticks.forget()

    async def watch(self, link: Link) -> set[int]:
        """Look who has been silent for a lease, and take over what they hold."""
        members = ("ZRANGEBYSCORE", self._place.live, "-inf", self._ticks.silent_since())
        replies = await link.calls([("GET", self._place.tick), (*members, "WITHSCORES", "LIMIT", 0, MAX_DEAD_AT_ONCE)])
        for reply in replies:
            if isinstance(reply, ReplyError):
                raise link.failure(reply, "watch")
        tick, found = replies
        self._ticks.remember(int(tick or 0))
        free: set[int] = set()
        for name, score in zip(found[::2], found[1::2], strict=True):
            if name.decode() != self._name:
                free |= await self.evict(link, name.decode(), score, crashed=True)
        return free

    async def evict(self, link: Link, name: str, score: bytes, *, crashed: bool) -> set[int]:
        """Take over all that a consumer holds, unless it has beaten since it was seen with this score."""
        place, fence = self._place, self._place.fence(name)
        free: set[int] = set()
        for partition, at in enumerate(place.at):
            keys = at.log, fence, place.live, at.due, at.note, at.stats
            lone = len(place.partitions) == 1
            state = b"more"
            while state == b"more":
                args = (place.group, name, score, MAX_ITEMS, int(crashed), int(lone))
                state, *moved = await link.run(scripts["evict"], keys, args)
                lone = False
                if moved and moved[0]:
                    free.add(partition)
            if state == b"ALIVE":
                return free
        await link.run(scripts["bury"], (fence, place.live), (name, score))
        return free

    async def score(self, link: Link, name: str) -> bytes:
        """A member's last tick; empty when it is no member."""
        return await link.call("ZSCORE", self._place.live, name) or b""

    async def sweep(self, link: Link) -> set[int]:
        """Repair what nobody else looks at, unless another process just did. Raises `GroupVanished`."""
        free: set[int] = set()
        seen: dict[bytes, list[int]] = {}
        for partition in self._place.partitions:
            names = await self._sweep(link, partition, free)
            if names is None:
                return free
            for name in names:
                seen.setdefault(name, []).append(partition)
        ours = [name.decode() for name in seen if name.startswith(PREFIX.encode())]
        for without_fence in await self._without_fence(link, ours):
            score = await self.score(link, without_fence)
            free |= await self.evict(link, without_fence, score, crashed=bool(score))
        for name, partitions in seen.items():
            if not name.startswith(PREFIX.encode()):
                free |= await self._adopt(link, name, partitions)
        return free

    async def _sweep(self, link: Link, partition: int, free: set[int]) -> list[bytes] | None:
        # The consumers of a partition; None when somebody else has swept it just now.
        place = self._place
        at = place.at[partition]
        keys = at.log, at.meta, at.due, at.note, at.stats, at.lease
        often_ms = int(self.sweep_s * 800)  # a little less than our own period, or two processes would skip in turns
        cursor = b"-"
        names: list[bytes] = []
        while cursor:
            state, *answer = await link.run(scripts["sweep"], keys, (place.group, cursor, often_ms, MAX_ITEMS))
            if state == b"RECENT":
                return None
            if state == b"NOGROUP":
                raise GroupVanished(f"group {place.group!r} of {place.stream!r} is gone")
            missing, cursor, lost, *names = answer
            if lost:
                where = place.group, place.stream, lost, partition
                logger.error("group %s of %s: %d events of partition %d are gone that were never settled", *where)
            if missing:
                free.add(partition)
        return names

    async def _without_fence(self, link: Link, names: list[str]) -> list[str]:
        fences = await link.calls([("EXISTS", self._place.fence(name)) for name in names]) if names else []
        return [name for name, exists in zip(names, fences, strict=True) if exists == 0]

    async def _adopt(self, link: Link, name: bytes, partitions: list[int]) -> set[int]:
        place, idle_ms = self._place, int(self.claim_after_s * 1000)
        free = set()
        for partition in partitions:
            at = place.at[partition]
            keys = at.log, at.due, at.stats
            if await link.run(scripts["adopt"], keys, (place.group, name, idle_ms, MAX_ITEMS)):
                free.add(partition)
        return free


def new_name(clock: Clock) -> str:
    """A consumer's name, for people who look at the server; each of its lives adds a number."""
    host = socket.gethostname().partition(".")[0][:32]
    host = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in host) or "host"
    return f"{PREFIX}{host}.{os.getpid()}.{clock.nonce()}"


def behind(start: Start) -> str:
    """The id behind which a new group begins; `$` is the end."""
    if isinstance(start, int):
        return f"{start - 1}-{_LAST_SEQUENCE}" if start > 0 else "0-0"
    return "$" if start == "now" else "0-0"
