"""Who counts as silent: the tick that an observer saw a lease ago, while it was in touch all the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from millstream.brokers.base import StreamSpec, Subscription
from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.link import Link
from millstream.brokers.redis.members import Members, Place
from millstream.clock import Clock

LEASE_S = 10.0
NOBODY = -1


class Watched(Clock):
    """A clock that is set by hand, and a server whose tick is."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.tick: int | None = 0
        self.asked: list[Any] = []

    def monotonic(self) -> float:
        return self.now

    async def calls(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        self.asked = list(commands[1])
        return [None if self.tick is None else b"%d" % self.tick, []]


class Observer:
    def __init__(self) -> None:
        self.world = Watched()
        subscription = Subscription(StreamSpec("orders"), "g", "app", lease_s=LEASE_S)
        self.members = Members(Place(Keys("", "orders", 1), subscription), self.world, LEASE_S, "ms.me.1")

    async def sees(self, now: float, tick: int | None) -> int:
        """Watch at this time, while the counter stands there. Returns up to which score members count as silent."""
        self.world.now, self.world.tick = now, tick
        await self.members.watch(cast("Link", self.world))
        assert self.world.asked[:3] == ["ZRANGEBYSCORE", Keys("", "orders", 1).live("g"), "-inf"]
        return int(self.world.asked[3])


async def test_members_are_silent_when_their_last_beat_was_seen_a_lease_ago() -> None:
    observer = Observer()
    looks = [(0.0, 5), (2.5, 7), (5.0, 7), (7.5, 8), (9.9, 9), (10.0, 9), (12.4, 9), (12.5, 9), (15.1, 12)]
    found = [await observer.sees(now, tick) for now, tick in looks]
    assert found == [NOBODY] * 5 + [5, 5, 7, 7]


async def test_an_observer_that_was_out_of_touch_for_half_a_lease_begins_anew() -> None:
    observer = Observer()
    for now in 0.0, 4.0, 8.0:
        assert await observer.sees(now, 5) == NOBODY
    assert await observer.sees(13.1, 5) == NOBODY, "perhaps nobody could beat, as we could not look"
    for now in 17.0, 21.0, 23.0:
        assert await observer.sees(now, 6) == NOBODY
    assert await observer.sees(23.2, 6) == 5


async def test_an_observer_whose_own_beat_failed_begins_anew() -> None:
    observer = Observer()
    for now in 0.0, 4.0, 8.0:
        await observer.sees(now, 5)
    observer.members.forget()
    assert await observer.sees(10.0, 5) == NOBODY and await observer.sees(14.0, 5) == NOBODY


async def test_a_counter_that_went_back_is_another_one() -> None:
    observer = Observer()
    for now in 0.0, 4.0, 8.0:
        await observer.sees(now, 500)
    assert await observer.sees(9.0, 3) == NOBODY
    assert await observer.sees(11.0, 4) == NOBODY, "or everybody with a score below 500 would be silent"
    assert await observer.sees(12.0, None) == NOBODY, "nobody ever beat here"
