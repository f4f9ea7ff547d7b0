"""The share: which partitions a member takes, asks for and gives away, from what it sees. Pure.

With `P` partitions and `n` members, everybody has at least ⌊P/n⌋, and P mod n of them one more. What is free is taken up to
that bound. Who has less than the lower bound asks for the difference, where most is. Nobody takes from a living owner: it
gives, after it has finished what it had begun, and never so much that it falls below the lower bound itself.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from millstream.brokers.ledger import Lease, View

LOOK_S = 0.5  # at most between two looks


class Share(NamedTuple):
    """What a member does next."""

    take: list[Lease]
    ask: list[Lease]
    give: list[Lease]
    """Each to its `want`."""


class Sharing:
    """What a member remembers from look to look: since when a lease waits for somebody."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._promised: dict[tuple[int, int], float] = {}
        self._ownerless: dict[tuple[int, int], float] = {}

    def steps(self, me: str, view: View, barred: Collection[int], now: float) -> Share:
        """The member's next steps; `barred` partitions are left alone."""
        return share(me, view, self._reserved(view, now), barred, self._overdue(view, now))

    def _reserved(self, view: View, now: float) -> set[int]:
        """Partitions that were released to somebody else a moment ago."""
        promised = {
            (lease.partition, lease.epoch): now
            for lease in view.leases
            if not lease.owner and lease.next in view.members
        }
        self._promised = promised | {key: since for key, since in self._promised.items() if key in promised}
        patience_s = self._lease_s / 2
        return {partition for (partition, _), since in self._promised.items() if now - since < patience_s}

    def _overdue(self, view: View, now: float) -> set[int]:
        """Partitions that have been nobody's since an earlier look: those who might have taken them have not."""
        owners = [(lease.partition, lease.epoch) for lease in view.leases if lease.owner not in view.members]
        self._ownerless = {owner: self._ownerless.get(owner, now) for owner in owners}
        patience_s = look_s(self._lease_s)
        return {partition for (partition, _), since in self._ownerless.items() if now - since >= patience_s}


def look_s(lease_s: float) -> float:
    """How often the others are looked at: a takeover follows within a second of the lease."""
    return min(LOOK_S, lease_s / 4)


def share(
    me: str, view: View, promised: Collection[int] = (), barred: Collection[int] = (), overdue: Collection[int] = ()
) -> Share:
    """A member's next steps.

    `promised` partitions are left for those whom they were released to, `barred` ones are left alone. `overdue` ones have
    been nobody's for a while, since somebody who counts as a member has died meanwhile: whoever sees them takes them.
    """
    members, leases = view.members, view.leases
    least, over = divmod(len(leases), len(members))
    owned = Counter(lease.owner for lease in leases if lease.owner in members)
    will = _will(view, owned, least, promised)
    above = sum(count > least for member, count in will.items() if member != me)
    most = least + (above < over)  # no more of us than needed have one more, or one would have to move again
    free = [
        lease
        for lease in leases
        if lease.owner not in members
        and lease.partition not in barred
        and (lease.owner or lease.next in ("", me) or lease.next not in members or lease.partition not in promised)
    ]
    free.sort(key=lambda lease: (lease.next != me, _rank(me, lease.partition)))
    take = free[: max(0, most - owned[me])]
    take += [lease for lease in free[len(take) :] if lease.partition in overdue]
    will[me] = max(will[me], owned[me] + len(take))
    others = [lease for lease in leases if lease.owner in members - {me} and lease.want not in members]
    ask: list[Lease] = []
    while others and will[me] < most:
        lease = min(others, key=lambda lease: (-will[lease.owner], _rank(me, lease.partition)))
        if will[lease.owner] < will[me] + 2:
            break
        others.remove(lease)
        will[lease.owner] -= 1
        will[me] += 1
        ask.append(lease)
    wanted = [lease for lease in leases if lease.owner == me and lease.want in members and lease.want != me]
    return Share(take, ask, wanted[: max(0, owned[me] - least)])


def _will(view: View, owned: Counter[str], least: int, promised: Collection[int]) -> Counter[str]:
    """Who will have how many, once all is given that is asked for and spare, and all is taken that is promised."""
    will = owned.copy()
    spare = {owner: count - least for owner, count in owned.items()}
    for lease in view.leases:
        if not lease.owner and lease.next in view.members and lease.partition in promised:
            will[lease.next] += 1
        elif lease.owner in view.members and lease.want in view.members - {lease.owner} and spare[lease.owner] > 0:
            spare[lease.owner] -= 1
            will[lease.owner] -= 1
            will[lease.want] += 1
    return will


def _rank(name: str, partition: int) -> bytes:
    """An order of the partitions that differs from member to member, so that they do not all reach for the same one."""
    return hashlib.blake2b(f"{name} {partition}".encode(), digest_size=8).digest()
