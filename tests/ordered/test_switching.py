"""A consumer that finishes the old way of a group, over consumers that do as they are told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from millstream.brokers.base import (
    Claim,
    Consumer,
    Dead,
    Done,
    Kept,
    Later,
    OtherOrder,
    Outcome,
    Position,
    Record,
    Settlement,
    Stored,
    StreamSpec,
    Subscription,
    check_mode,
    finished,
)
from millstream.brokers.ledger import HELD_MS
from millstream.brokers.switching import DRY_S, LONGEST_S, SwitchingConsumer, subscribed
from millstream.errors import BrokerDown, LeaseLost
from millstream.testing.clock import VirtualClock

WANTED = Subscription(StreamSpec("orders"), "billing", "shop", lease_s=4.0, order=True)
NOTHING_LEFT = 0.0


class Obedient:
    """A member that hands out what the test gives it."""

    def __init__(self, group: Group, subscription: Subscription) -> None:
        self.group = group
        self.subscription = subscription
        self.settled: list[Settlement] = []
        self.closed = False

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        self._check()
        if not self.group.events:
            await self.group.clock.sleep(wait_s)
        claims, self.group.events = self.group.events[:limit], self.group.events[limit:]
        return claims

    async def begin(self, positions: Sequence[Position]) -> None:
        self._check()

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        self._check()
        self.settled += settlements
        return [True] * len(settlements)

    async def finish(self, positions: Sequence[Position]) -> list[bool]:
        return await self.settle(finished(positions))

    async def keep(self) -> Kept:
        self._check()
        return Kept()

    async def release(self, partitions: frozenset[int]) -> None: ...

    async def close(self) -> None:
        assert not self.closed
        self.closed = True

    def _check(self) -> None:
        assert not self.closed
        check_mode("orders", "billing", self.group.order, self.subscription.order)


class Group:
    """A group of the old way, without order; `until_ms` is why it cannot be switched."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.order = False
        self.until_ms = NOTHING_LEFT
        self.others = 1
        self.down = False
        self.events: list[Claim] = []
        self.members: list[Obedient] = []
        self.refused_at: list[float] = []

    async def join(self, subscription: Subscription) -> Consumer:
        if self.down:
            raise BrokerDown("gone for a moment")
        if subscription.order != self.order:
            if self.until_ms or self.others:
                self.refused_at.append(self.clock.monotonic())
                check_mode("orders", "billing", self.order, subscription.order, self.until_ms)
            self.order = subscription.order
        self.members.append(Obedient(self, subscription))
        return self.members[-1]

    @property
    def member(self) -> Obedient:
        return self.members[-1]


def event(number: int) -> Claim:
    return Claim.of(Stored(Position(0, str(number)), Record(0, str(number), "order.placed", b"{}", "a")), 1)


def outcome(number: int, how: Outcome | None = None) -> Settlement:
    return Settlement(Position(0, str(number)), how or Done())


@asynccontextmanager
async def switching() -> AsyncIterator[tuple[Group, Consumer, VirtualClock]]:
    """A consumer of a group that cannot be switched yet, under virtual time."""
    clock = VirtualClock()
    group = Group(clock)
    async with asyncio.TaskGroup() as tasks:
        flow = tasks.create_task(_flow(clock))
        yield group, await subscribed(group.join, WANTED, clock), clock
        flow.cancel()


async def _flow(clock: VirtualClock) -> None:
    while True:  # until the test ends
        await clock.advance(clock.next_timer_s() or 0)


async def beats(consumer: Consumer, clock: VirtualClock, seconds: float) -> None:
    """Heartbeats for so long."""
    until_s = clock.monotonic() + seconds
    while clock.monotonic() < until_s:
        await consumer.keep()
        await clock.sleep(WANTED.lease_s / 4)


async def test_who_is_not_refused_gets_the_broker_s_own_consumer() -> None:
    clock = VirtualClock()
    group = Group(clock)
    group.order = True
    assert await subscribed(group.join, WANTED, clock) is group.member


async def test_the_old_way_is_finished_and_the_switch_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "millstream")
    async with switching() as (group, consumer, clock):
        old = group.member
        assert not old.subscription.order and old.subscription.fresh
        group.events = [event(1)]
        assert await consumer.fetch(10, 1.0) == [event(1)]
        assert await consumer.settle([outcome(1)]) == [True]
        await beats(consumer, clock, 40.0)
        group.others = 0
        await beats(consumer, clock, LONGEST_S + WANTED.lease_s)
        assert group.order and group.member.subscription == WANTED and old.closed
        group.events = [event(2)]
        assert await consumer.fetch(10, 1.0) == [event(2)]
        await consumer.begin([Position(0, "2")])
        assert await consumer.settle([outcome(2)]) == [True] and group.member.settled == [outcome(2)]
        await consumer.close()
        assert all(member.closed for member in group.members)
    begun, ended = (record.getMessage() for record in caplog.records)
    assert "consumes without order until nothing is left, then it goes on in the order of keys" in begun
    assert "goes on in the order of keys: nothing is left" in ended


async def test_a_switch_waits_for_what_is_held_and_hands_out_nothing_meanwhile() -> None:
    async with switching() as (group, consumer, clock):
        group.events, group.others = [event(1)], 0
        assert await consumer.fetch(10, 1.0) == [event(1)]
        group.events = [event(2)]
        waiting = asyncio.create_task(consumer.fetch(10, 600.0))
        assert await waiting == [event(2)], "it goes on until the moment comes"
        await clock.sleep(2.0)
        await consumer.keep()
        group.events = [event(3)]
        waiting = asyncio.create_task(consumer.fetch(10, 600.0))
        assert await consumer.settle([outcome(1)]) == [True]
        await consumer.keep()
        assert not group.order and not waiting.done()
        assert await consumer.settle([outcome(2)]) == [True]
        await consumer.keep()
        assert group.order and group.members[0].settled == [outcome(1), outcome(2)]
        assert await waiting == [event(3)]
        await consumer.close()


async def test_a_handler_that_takes_long_does_not_keep_its_process_idle() -> None:
    async with switching() as (group, consumer, clock):
        group.events, group.others = [event(1)], 0
        assert await consumer.fetch(10, 1.0) == [event(1)]
        group.events = [event(number) for number in range(2, 9)]
        waiting = asyncio.create_task(beats(consumer, clock, 120.0))
        while group.events:
            await consumer.settle([outcome(int(claim.position.offset)) for claim in await consumer.fetch(1, 5.0)])
        assert not group.order
        await consumer.settle([outcome(1)])
        await waiting
        assert group.order
        await consumer.close()


async def test_the_moments_are_far_between_and_the_same_for_all() -> None:
    async with switching() as (group, consumer, clock):
        group.until_ms = float("inf")
        await beats(consumer, clock, 300.0)
        assert 18 <= len(group.refused_at) <= 24
        assert all(
            moment % LONGEST_S < 2.0
            for moment in (clock.now_ms() / 1000 - clock.monotonic() + at for at in group.refused_at[-5:])
        )
        await consumer.close()


async def test_nothing_new_is_taken_while_what_waits_is_due_soon_and_new_events_get_their_turn() -> None:
    async with switching() as (group, consumer, clock):
        turns: list[tuple[bool, float]] = []
        for _ in range(240):
            group.until_ms = clock.now_ms() + 3_000
            await beats(consumer, clock, 1.0)
            if not group.member.closed:
                turns.append((group.member.subscription.fresh, clock.monotonic()))
        dry = sum(not fresh for fresh, _ in turns)
        assert 1 / 6 < dry / len(turns) < 1 / 2, "half a minute, one of turns, another half, and a longer turn"
        longest = most = 0
        for fresh, _ in turns:
            longest = 0 if fresh else longest + 1
            most = max(most, longest)
        assert most <= DRY_S + 10
        await consumer.close()


async def test_what_a_switched_group_took_from_a_silent_member_is_told_and_it_comes_back() -> None:
    async with switching() as (group, consumer, _):
        group.events = [event(1)]
        assert await consumer.fetch(10, 1.0) == [event(1)]
        group.order = True
        assert await consumer.fetch(10, 0.1) == []
        with pytest.raises(LeaseLost):
            await consumer.begin([Position(0, "1")])
        assert await consumer.keep() == Kept(frozenset([Position(0, "1")]))
        assert await consumer.settle([outcome(1)]) == [False]
        with pytest.raises(LeaseLost):
            await consumer.begin([Position(0, "1")])
        await consumer.keep()
        assert group.member.subscription == WANTED and not group.member.closed
        await consumer.close()


async def test_a_broker_that_is_gone_during_the_switch_ends_neither_of_the_ways() -> None:
    async with switching() as (group, consumer, clock):
        await clock.sleep(2.0)
        group.others, group.down = 0, True
        with pytest.raises(BrokerDown):
            await consumer.keep()
        assert await consumer.fetch(10, 0.1) == [] and await consumer.settle([outcome(1)]) == [False]
        await consumer.release(frozenset([0]))
        with pytest.raises(BrokerDown):
            await consumer.keep()
        group.down = False
        await consumer.keep()
        assert group.order and group.member.subscription == WANTED
        await consumer.close()


async def test_a_key_cannot_wait_for_a_person_in_a_group_without_order() -> None:
    async with switching() as (group, consumer, _):
        group.events = [event(1), event(2)]
        assert len(await consumer.fetch(10, 1.0)) == 2
        await consumer.settle([outcome(1, Later(HELD_MS, "broken")), outcome(2, Later(5, "busy"))])
        assert group.member.settled == [outcome(1, Dead("failed", "broken")), outcome(2, Later(5, "busy"))]
        await consumer.close()


async def test_a_member_that_is_closed_while_it_is_away_joins_no_more() -> None:
    async with switching() as (group, consumer, clock):
        await clock.sleep(2.0)
        beating = asyncio.create_task(consumer.keep())
        while not group.member.closed:
            await clock.sleep(0)
        await consumer.close()
        await beating
        assert all(member.closed for member in group.members) and not group.order


async def test_once_switched_a_group_that_others_switched_back_is_said_to_be_so() -> None:
    async with switching() as (group, consumer, clock):
        assert isinstance(consumer, SwitchingConsumer)
        group.others = 0
        await beats(consumer, clock, 5.0)
        assert group.order
        group.order = False
        with pytest.raises(OtherOrder):
            await consumer.keep()
        await consumer.close()
