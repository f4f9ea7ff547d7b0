"""Sight: what a member sees of its group, who lives and who has what.

Everybody looks twice a second, and fifty members on 256 partitions would ask for 50,000 keys a second all together. But
where each partition has a living owner, and nobody has more than its share or gives any away, nothing changes unless
somebody comes or goes. So a member that has seen this looks at its own leases alone, and at all of them again as soon as
they, or those who live, are others; and every few seconds in any case, since people may have intervened.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from millstream.brokers.ledger import Lease, View
from millstream.brokers.redis.link import Link, ReplyError
from millstream.brokers.redis.members import MAX_DEAD_AT_ONCE, SWEEP_S, Place, Ticks
from millstream.brokers.redis.scripts import scripts
from millstream.clock import Clock

_NEVER = float("inf")


class Sight:
    """That of one life of a member."""

    def __init__(
        self, place: Place, name: str, clock: Clock, ticks: Ticks, lease_s: float, ours: Callable[[bytes], float]
    ) -> None:
        self._place = place
        self._name = name
        self._clock = clock
        self._ticks = ticks
        self._lease_s = lease_s
        self._ours = ours
        self._settled: View | None = None
        self._sweep_at = 0.0
        self.silent: Mapping[str, bytes] = {}
        """Members that have not beaten for a lease, and when they last did, in ticks."""

    def changed(self) -> None:
        """We have taken or given a lease."""
        self._settled = None

    async def look(self, writer: Link, now_ms: float) -> View:
        """See who lives, and who has what, at this time of the server; forget those who are silent and own nothing."""
        known, sweeps = self._settled, self._clock.monotonic() >= self._sweep_at
        if known is not None and not sweeps:
            ours = [lease.partition for lease in known.leases if lease.owner == self._name]
            members, seen, _ = await self._see(writer, ours)
            leases = list(known.leases)
            for lease in seen:
                leases[lease.partition] = lease
            view = View(members, leases)
            if members == known.members and _is_settled(view):
                return view
        view = await self._look_at_all(writer, self._sweep(now_ms) if sweeps else ())
        self._settled = view if _is_settled(view) else None
        return view

    async def _look_at_all(self, writer: Link, sweep: Sequence[tuple[Any, ...]]) -> View:
        members, leases, answers = await self._see(writer, self._place.partitions, sweep)
        gone = self._gone(answers[1:])
        leases = [replace(lease, epoch=0) if lease.partition in gone else lease for lease in leases]
        idle = self.silent.keys() - {lease.owner for lease in leases}
        for name in sorted(idle)[:MAX_DEAD_AT_ONCE]:
            keys = self._place.fence(name), self._place.live
            await writer.run(scripts["bury"], keys, (name, self.silent[name]))
        return View(members, leases)

    async def _see(
        self, writer: Link, partitions: Sequence[int], more: Iterable[tuple[Any, ...]] = ()
    ) -> tuple[frozenset[str], list[Lease], list[Any]]:
        """Who lives, the leases of these partitions, and the answers to more commands."""
        silent_since, at = self._ticks.silent_since(), [self._place.at[partition] for partition in partitions]
        asked: list[tuple[Any, ...]] = [("GET", self._place.tick), ("ZRANGE", self._place.live, 0, -1, "WITHSCORES")]
        asked += [("HMGET", keys.lease, "owner", "epoch", "want", "next") for keys in at]
        asked += [("ZRANGE", keys.parked, 0, 0, "WITHSCORES") for keys in at]
        replies = await writer.calls([*asked, *more])
        for reply in replies[: len(asked)]:
            if isinstance(reply, ReplyError):
                raise writer.failure(reply, "look")
        tick, live, *found = replies[: len(asked)]
        self._ticks.remember(int(tick or 0))
        scores = {name.decode(): score for name, score in zip(live[::2], live[1::2], strict=True)}
        scores.pop(self._name, None)
        self.silent = {name: score for name, score in scores.items() if float(score) <= silent_since}
        members = frozenset(scores.keys() - self.silent.keys() | {self._name})
        rows = zip(partitions, found[: len(at)], found[len(at) :], strict=True)
        return members, [self._lease(*row) for row in rows], replies[len(asked) :]

    def _lease(self, partition: int, fields: Sequence[bytes | None], first: Sequence[bytes]) -> Lease:
        owner, epoch, want, heir = [field.decode() if field else "" for field in fields]
        return Lease(partition, owner, int(epoch or 0), want, heir, self._ours(first[1]) if first else _NEVER)

    def _sweep(self, now_ms: float) -> Sequence[tuple[Any, ...]]:
        # Say for people that somebody looked, and see whether the group is still there.
        self._sweep_at = self._clock.monotonic() + min(self._lease_s / 2, SWEEP_S)
        seen = "HSET", self._place.at[0].meta, f"seen:{self._place.group}", math.ceil(now_ms)
        return [seen, *(("XINFO", "GROUPS", at.log) for at in self._place.at)]

    def _gone(self, groups: Sequence[Any]) -> set[int]:
        # Where log or group is gone, what was read tells nothing about what will come: acquire anew.
        name, gone = self._place.group.encode(), set()
        for partition, reply in enumerate(groups):
            missing = str(reply).startswith("ERR no such key") if isinstance(reply, ReplyError) else None
            if missing or (missing is None and name not in {info[1] for info in reply}):
                gone.add(partition)
        return gone


def _is_settled(view: View) -> bool:
    owned = Counter(lease.owner for lease in view.leases if lease.epoch)
    shares = [owned[member] for member in view.members]
    least, over = divmod(len(view.leases), len(view.members))
    if sum(shares) < len(view.leases) or min(shares) < least or max(shares) > least + (over > 0):
        return False
    # Whoever has no more than the least gives none, though it was asked for one.
    return not any(lease.want in view.members and owned[lease.owner] > least for lease in view.leases)
