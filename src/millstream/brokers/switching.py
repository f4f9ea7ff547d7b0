"""Switching a group between its two ways to consume: whoever asks for the new way finishes the old one first.

What waits in one way is unknown to the other, and members of both ways would take events from each other. So a group is
switched only while nothing is left of the old way and nobody lives in it, which the broker sees to. Until then,
who was refused is an ordinary member of the **old** way, and tries again at moments that double their distance:

    refused ──► a member of the old way ──pause: hand out nothing, let what runs end──► nobody ──► a member of the new way
                        ▲                                                                │
                        └────── refused: something waits, or others were not away ───────┘

Two who try in turns would find each other living for ever. Therefore the moments are the same for all processes, by the
wall clock, and who finds only members in the way stays away for a little, so that all are away at once. Where clocks differ
by more than that, it takes until one of them ends or a moment fits.

A busy group always has something that waits for its next attempt. So while the last of it is due soon, those who are to
switch take nothing new: for half a minute at most. Then new events have their turn, each time for twice as long: somebody
of the old way may go on living, and no partition of ours is to stand still for him every other minute.

Nothing that is held is carried over: the switch happens with empty hands. What waits for a person in the new way becomes a
dead letter in the old one, which has no keys that could wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from msgspec.structs import replace

from millstream.brokers.base import (
    WAYS,
    Claim,
    Consumer,
    Dead,
    Done,
    Kept,
    Later,
    Letter,
    OtherOrder,
    Position,
    Settlement,
    Subscription,
    finished,
)
from millstream.brokers.ledger import HELD_MS
from millstream.clock import Clock
from millstream.errors import LeaseLost
from millstream.telemetry import logger
from millstream.wire.packs import is_one, is_pack, read

DRY_S = 30.0  # so long nothing new is taken, at most, while all that waits falls due
LONGEST_TURN_S = 3_600.0  # of new events after that: each turn is twice as long as the one before
FIRST_S, LONGEST_S = 1.0, 16.0  # between two tries
LONGEST_PAUSE_S = 64.0  # while handlers take so long that nothing ever ends together
GLANCE_S = 0.25  # one wait of a fetch, which must end before the switch
ASK_S = 0.1  # between two questions while we are away

Join = Callable[[Subscription], Awaitable[Consumer]]
"""Become a member in the way that the subscription says. Raises `OtherOrder`."""


async def subscribed(join: Join, subscription: Subscription, clock: Clock) -> Consumer:
    """A member in the way that was asked for; where the other one must be finished first, one that switches later."""
    try:
        return await join(subscription)
    except OtherOrder as refusal:
        consumer = SwitchingConsumer(join, subscription, clock)
        await consumer.enter(refusal)
        return consumer


class SwitchingConsumer:
    """A member of the old way that becomes one of the new way; see `brokers.base.Consumer` for its promises."""

    def __init__(self, join: Join, subscription: Subscription, clock: Clock) -> None:
        self._join = join
        self._wanted = subscription
        self._old = replace(subscription, order=not subscription.order)
        self._clock = clock
        self._consumer: Consumer | None = None  # None: we are away, or were switched by others
        self._finishing = True
        self._closed = False
        self._held: dict[Position, Claim] = {}
        self._fetching = 0
        self._paused = False
        self._paused_at = 0.0
        self._pause_s = self._every_s = FIRST_S
        self._try_at = 0.0
        self._turn_s = DRY_S
        self._dry_until = -DRY_S
        self._changed = asyncio.Event()

    async def enter(self, refusal: OtherOrder) -> None:
        """Become a member in the old way, after the new one was refused."""
        subscription = self._wanted
        logger.info(
            "group %s of %s consumes %s until nothing is left, then it goes on %s",
            *(subscription.group, subscription.stream.name, WAYS[self._old.order], WAYS[subscription.order]),
        )
        await self._go_back(refusal)

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        """Claim up to `limit` events; nothing while a switch is tried."""
        until_s = self._clock.monotonic() + wait_s
        while True:
            changed, consumer = self._changed, self._consumer
            left_s = max(0.0, until_s - self._clock.monotonic())
            claims: list[Claim] = []
            if consumer is None or self._paused:
                await self._clock.wait(changed, left_s)
            elif self._finishing:
                claims = await self._fetch(consumer, limit, min(left_s, GLANCE_S))
            else:
                return await consumer.fetch(limit, left_s)
            if claims or self._closed or self._clock.monotonic() >= until_s:
                return claims

    async def begin(self, positions: Sequence[Position]) -> None:
        """Note that the handlers of these suspects start now."""
        if self._consumer is None:
            raise LeaseLost(f"group {self._wanted.group!r} was switched: nothing is held")
        try:
            await self._consumer.begin(positions)
        except OtherOrder as error:
            raise LeaseLost(f"{error}; nothing is held any more") from error

    async def finish(self, positions: Sequence[Position]) -> list[bool]:
        """`settle` for events that are done, and with which nothing is stored."""
        if self._consumer is None or self._finishing:
            return await self.settle(finished(positions))
        return await self._consumer.finish(positions)

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Store outcomes and outputs; False where an event was not ours any more."""
        if self._consumer is None:
            return [False] * len(settlements)
        if not self._finishing:
            return await self._consumer.settle(settlements)
        if not self._old.order:
            settlements = [_without_keys(settlement, self._held.get(settlement.position)) for settlement in settlements]
        try:
            results = await self._consumer.settle(settlements)
        except OtherOrder:  # `keep` finds it out too
            results = [False] * len(settlements)
        self._let_go(settlement.position for settlement in settlements)
        return results

    async def keep(self) -> Kept:
        """Heartbeat; and when nothing is held at one of the moments, the switch."""
        consumer = self._consumer
        if consumer is not None:
            try:
                kept = await consumer.keep()
            except OtherOrder:
                if not self._finishing:
                    raise
                return await self._ousted(consumer)
            self._let_go(kept.lost)
            if not self._finishing or kept.lost or kept.drain or not self._has_empty_hands():
                return kept
            self._consumer = None
            await consumer.close()
        await self._switch()
        return Kept()

    async def release(self, partitions: frozenset[int]) -> None:
        """Hand back all that is held of these partitions."""
        if self._consumer is not None:
            await self._consumer.release(partitions)
        self._let_go([position for position in self._held if position.partition in partitions])

    async def close(self) -> None:
        """Hand back all that is held, and leave the group."""
        self._closed = True
        consumer, self._consumer = self._consumer, None
        self._go_on()
        if consumer is not None:
            await consumer.close()

    # Below: how.

    async def _fetch(self, consumer: Consumer, limit: int, wait_s: float) -> list[Claim]:
        self._fetching += 1
        try:
            claims = await consumer.fetch(limit, wait_s)
        except OtherOrder:  # we were taken for dead, and others have switched the group: `keep` tells what we lost
            self._pause()
            return []
        finally:
            self._fetching -= 1
        self._held.update((claim.position, claim) for claim in claims)
        return claims

    def _let_go(self, positions: Iterable[Position]) -> None:
        for position in positions:
            self._held.pop(position, None)

    async def _ousted(self, consumer: Consumer) -> Kept:
        self._consumer = None
        lost, self._held = frozenset(self._held), {}
        await consumer.close()
        return Kept(lost)

    def _has_empty_hands(self) -> bool:
        """True once, at one of the moments, what was handed out before it has ended; or soon after, or we go on."""
        now_s = self._clock.monotonic()
        if now_s < self._try_at:
            return False
        if not self._paused:
            self._pause()
        if not (self._held or self._fetching):
            return True
        if now_s >= self._paused_at + self._pause_s:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._put_off()
            self._go_on()
        return False

    def _pause(self) -> None:
        self._paused, self._paused_at = True, self._clock.monotonic()

    def _go_on(self) -> None:
        self._paused = False
        self._changed.set()
        self._changed = asyncio.Event()

    def _put_off(self) -> None:
        """Try again at the next moment: a multiple of the distance, by the wall clock, so that others try as well."""
        wait_s = self._every_s - self._clock.now_ms() / 1000 % self._every_s
        self._try_at = self._clock.monotonic() + wait_s
        self._every_s = min(2 * self._every_s, LONGEST_S)

    async def _switch(self) -> None:
        """Become a member again: in the new way, or for now in the old one. Raises `BrokerError`: then we stay away."""
        until_s = self._clock.monotonic() + self._wanted.lease_s / 4 + GLANCE_S  # all have beaten once by then
        while self._consumer is None and not self._closed:
            try:
                await self._become(self._wanted)
            except OtherOrder as refusal:
                if refusal.until_ms or self._clock.monotonic() >= until_s:
                    await self._go_back(refusal)
                    break
                await self._clock.sleep(ASK_S * (0.5 + self._clock.chance()))
            else:
                self._finishing = False
                subscription = self._wanted
                where = subscription.group, subscription.stream.name, WAYS[subscription.order]
                logger.info("group %s of %s goes on %s: nothing is left of the other way", *where)
        self._go_on()

    async def _go_back(self, refusal: OtherOrder) -> None:
        self._put_off()
        now_s = self._clock.monotonic()
        due_s = now_s + max(0.0, (refusal.until_ms - self._clock.now_ms()) / 1000)
        if refusal.until_ms and due_s < now_s + DRY_S and now_s >= self._dry_until + self._turn_s:
            self._dry_until = now_s + DRY_S
            self._turn_s = min(2 * self._turn_s, LONGEST_TURN_S)
        dry = due_s < self._dry_until
        if dry and refusal.until_ms:
            self._try_at = due_s + FIRST_S
        try:
            await self._become(replace(self._old, fresh=not dry))
        except OtherOrder:
            self._try_at = 0.0  # others have switched it just now: the next beat follows

    async def _become(self, subscription: Subscription) -> None:
        consumer = await self._join(subscription)
        if self._closed:
            await consumer.close()
        else:
            self._consumer = consumer


def _without_keys(settlement: Settlement, claim: Claim | None) -> Settlement:
    """Nothing can wait for a person in a group without order."""
    outcome = settlement.outcome
    if not isinstance(outcome, Later) or outcome.at_ms < HELD_MS:
        return settlement
    if claim is None or not is_pack(claim.record) or is_one(claim.record):
        return replace(settlement, outcome=Dead("failed", outcome.error))
    pack = read(claim.record, claim.position.offset)
    left = outcome.left or claim.left or range(len(pack))
    letters = [Letter(part, pack.record(part), "failed", outcome.error) for part in left]
    return replace(settlement, outcome=Done(), letters=[*settlement.letters, *letters])
