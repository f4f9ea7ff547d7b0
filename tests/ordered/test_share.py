"""The share: members that come, go and die, each acting on what it sees, until everybody has what is due to it."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from millstream.brokers.ledger import Lease, View
from millstream.brokers.share import Share, share

NAMES = "klmnop"
SIZES = [(members, partitions) for members in range(1, 7) for partitions in range(1, 33)]


class Group:
    """Leases and who lives. What a member does to a lease happens only if that is as the member saw it."""

    def __init__(self, partitions: int, members: str = "", seed: int = 0, *, slow: bool = False) -> None:
        self.leases = [Lease(number) for number in range(partitions)]
        self.members = set(members)
        self.moves: Counter[int] = Counter()
        """How often each partition was taken since the last `balance`."""
        self._chance = random.Random(seed)
        self._draining: set[int] = set()
        self._promised: set[int] = set()
        self._slow = slow
        """What is to be given is given one round later, as if handlers were running."""

    def look(self) -> View:
        return View(frozenset(self.members), list(self.leases))

    def balance(self, *, stale: bool = False) -> int:
        """Rounds until nobody does anything more; how many. Stale: all look before the first one acts."""
        self.moves.clear()
        for rounds in range(100):
            members = self._chance.sample(sorted(self.members), len(self.members))
            before = self.look()
            acted = sum([self._turn(member, before if stale else self.look()) for member in members])
            if not acted and not self._promised:
                return rounds
            if not acted:
                self._promised.clear()  # whoever it was does not come
        raise AssertionError(f"no end: {self.leases}")

    def leave(self, member: str) -> None:
        """Give back all, to whoever asked, and go."""
        for lease in self.leases:
            if lease.owner == member:
                self._release(lease)
        self.members.remove(member)

    def owned(self) -> Counter[str]:
        return Counter(lease.owner for lease in self.leases if lease.owner)

    def check(self) -> None:
        """Everybody has its share, and nobody wants anything."""
        least, over = divmod(len(self.leases), len(self.members))
        owned = self.owned()
        assert owned.keys() <= self.members
        assert (
            sorted(owned[member] for member in self.members)
            == [least] * (len(self.members) - over) + [least + 1] * over
        )
        assert all(share(member, self.look()) == Share([], [], []) for member in self.members)

    def _turn(self, me: str, view: View) -> bool:
        steps = share(me, view, self._promised)
        drained = [lease for lease in self.leases if lease.owner == me and lease.partition in self._draining]
        for lease in drained:
            self._release(lease)
        for seen in steps.take:
            self._take(seen, me)
        for seen in steps.ask:
            if self._unchanged(seen):
                self._put(Lease(seen.partition, seen.owner, seen.epoch, me))
        for seen in steps.give:
            if not self._unchanged(seen):
                continue
            if self._slow:
                self._draining.add(seen.partition)
            else:
                self._release(seen)
        return bool(drained or steps.take or steps.ask or steps.give)

    def _take(self, seen: Lease, me: str) -> None:
        if self._unchanged(seen):
            self.moves[seen.partition] += 1
            self._promised.discard(seen.partition)
            self._put(Lease(seen.partition, me, seen.epoch + 1))

    def _release(self, lease: Lease) -> None:
        self._draining.discard(lease.partition)
        if lease.want in self.members:
            self._promised.add(lease.partition)
        self._put(Lease(lease.partition, "", lease.epoch, "", lease.want))

    def _unchanged(self, seen: Lease) -> bool:
        now = self.leases[seen.partition]
        return (now.owner, now.epoch, now.want) == (seen.owner, seen.epoch, seen.want)

    def _put(self, lease: Lease) -> None:
        self.leases[lease.partition] = lease


def view(owners: str, members: str = "kl") -> View:
    """One letter per partition: its owner, or a hyphen."""
    return View(frozenset(members), [Lease(n, owner.strip("-"), 1) for n, owner in enumerate(owners)])


def numbers(leases: list[Lease]) -> list[int]:
    return sorted(lease.partition for lease in leases)


@pytest.mark.parametrize("slow", [False, True])
def test_members_that_come_together_share_all_and_stay_with_it(slow: bool) -> None:
    for members, partitions in SIZES:
        group = Group(partitions, NAMES[:members], slow=slow)
        group.balance()
        group.check()
        assert set(group.moves.values()) == {1}
        assert group.balance() == 0


@pytest.mark.parametrize("slow", [False, True])
def test_members_that_act_on_an_old_view_end_with_the_same_shares(slow: bool) -> None:
    for members, partitions in SIZES:
        for seed in range(3):
            group = Group(partitions, NAMES[:members], seed, slow=slow)
            group.balance(stale=True)
            group.check()


@pytest.mark.parametrize("stale", [False, True])
def test_whoever_comes_or_goes_nobody_is_left_with_less_than_the_lower_bound(stale: bool) -> None:
    for partitions in range(1, 33):
        group = Group(partitions, "k", partitions, slow=True)
        group.balance()
        for member in "lmn":
            group.members.add(member)
            group.balance(stale=stale)
            assert min(map(group.owned().__getitem__, group.members)) == partitions // len(group.members)
            assert stale or set(group.moves.values()) <= {1}
        for member in "km":
            group.leave(member)
            group.balance(stale=stale)
            assert min(map(group.owned().__getitem__, group.members)) == partitions // len(group.members)
            assert stale or set(group.moves.values()) <= {1}


@pytest.mark.parametrize("slow", [False, True])
def test_with_every_member_that_comes_or_goes_a_partition_moves_once_at_most(slow: bool) -> None:
    for partitions in range(1, 33):
        group = Group(partitions, "k", partitions, slow=slow)
        group.balance()
        for member in "lmn":
            before = {lease.partition: lease.owner for lease in group.leases}
            group.members.add(member)
            group.balance()
            group.check()
            assert set(group.moves.values()) <= {1}
            moved = {lease.partition for lease in group.leases if lease.owner != before[lease.partition]}
            assert moved == group.moves.keys() and len(moved) == partitions // len(group.members)
        for member in "km":
            gone = group.owned()[member]
            group.leave(member)
            group.balance()
            group.check()
            assert set(group.moves.values()) <= {1} and len(group.moves) == gone


@pytest.mark.parametrize("slow", [False, True])
def test_members_that_join_an_owner_of_all_at_once_get_their_shares(slow: bool) -> None:
    for members, partitions in SIZES:
        for stale in (False, True):
            group = Group(partitions, "k", slow=slow)
            group.balance()
            group.members |= set(NAMES[:members])
            group.balance(stale=stale)
            group.check()
            assert stale or set(group.moves.values()) <= {1}


def test_members_come_and_go_while_others_act_on_old_views() -> None:
    for partitions in range(1, 33):
        group = Group(partitions, "k", partitions, slow=True)
        for member in "lmn":
            group.balance(stale=True)
            group.members.add(member)
        group.balance(stale=True)
        group.check()
        for member in "km":
            group.leave(member)
            group.balance(stale=True)
            group.check()


def test_what_a_dead_member_had_is_shared_and_nothing_else_moves() -> None:
    for members, partitions in SIZES:
        if members > 1:
            group = Group(partitions, NAMES[:members])
            group.balance()
            dead = {lease.partition for lease in group.leases if lease.owner == "k"}
            group.members.remove("k")
            group.balance()
            group.check()
            assert group.moves == dict.fromkeys(dead, 1)


def test_what_is_free_is_taken_up_to_the_share_and_no_more_than_needed_have_one_more() -> None:
    assert len(share("k", view("-----")).take) == 3
    assert len(share("k", view("lll--")).take) == 2  # somebody has one more already
    assert share("k", view("kkl-")).take == []
    assert numbers(share("k", view("ll--")).take) == [2, 3]


def test_what_a_dead_owner_has_is_free_whoever_asked_for_it() -> None:
    leases = [Lease(0, "dead", 1, "l", ""), Lease(1, "l", 1)]
    assert numbers(share("k", View(frozenset("kl"), leases), {0}).take) == [0]


def test_nothing_is_taken_from_the_living_it_is_asked_for_where_most_is() -> None:
    seen = share("k", view("lllllmmmm", "klm"))
    assert seen.take == [] and len(seen.ask) == 3
    assert Counter(lease.owner for lease in seen.ask) == {"l": 2, "m": 1}


def test_what_somebody_alive_asks_for_is_not_asked_for_again() -> None:
    leases = [Lease(0, "l", 1, "k"), Lease(1, "l", 1), Lease(2, "l", 1), Lease(3, "l", 1, "m")]
    assert share("k", View(frozenset("klm"), leases)).ask == []
    dead = share("k", View(frozenset("kl"), leases))
    assert len(dead.ask) == 1 and dead.ask[0].partition in (1, 2, 3)


def test_an_owner_gives_what_is_asked_for_and_keeps_its_own_share() -> None:
    leases = [Lease(n, "k", 1, "l") for n in range(4)]
    assert len(share("k", View(frozenset("kl"), leases)).give) == 2
    assert share("k", View(frozenset("k"), leases)).give == []  # whoever asked is dead
    assert share("k", view("kkll")).give == []


def test_what_was_released_to_somebody_is_left_to_it_while_it_is_promised() -> None:
    leases = [Lease(0, "", 1, "", "l"), Lease(1, "k", 1)]
    both = frozenset("kl")
    assert share("k", View(both, [leases[0], Lease(1, "l", 1)]), {0}).take == []
    assert numbers(share("k", View(both, [leases[0], Lease(1, "l", 1)])).take) == [0]
    assert numbers(share("l", View(both, leases), {0}).take) == [0]
    assert numbers(share("k", View(frozenset("k"), leases), {0}).take) == [0]  # its heir is dead


def test_what_was_released_to_us_is_taken_first() -> None:
    for number in range(6):
        leases = [Lease(n, "", 1, "", "k" if n == number else "") for n in range(6)]
        assert share("k", View(frozenset("klmnop"), leases), {number}).take == [leases[number]]


def test_what_is_barred_is_not_taken_not_even_from_the_dead() -> None:
    leases = [Lease(0, "dead", 1), Lease(1, "", 1, "", "k"), Lease(2)]
    assert numbers(share("k", View(frozenset("k"), leases), barred={0, 1}).take) == [2]


def test_members_do_not_all_reach_for_the_same_partitions() -> None:
    first = [tuple(numbers(share(member, view("-" * 32, NAMES)).take)) for member in NAMES]
    assert len(set(first)) == len(NAMES)
