"""A member of a group in an SQLite file.

    undelivered ─take─► held by a member ─done─► gone          pending.consumer = the member, while it is held
                           │  └─dead─► dead letter             pending.consumer = 0 and due_ms, while it waits
      later, release, evict│
                           ▼
                        waiting ─take, when due─► held, attempt + 1

Each arrow is one transaction, in which the member's own row in `member`, its *fence*, is looked for first. Evicting a
silent member deletes that row and moves all it held, so whoever comes back finds no fence and settles nothing. Member
numbers are never given twice.

`watch.py` says who is silent.

A member that finds its fence gone claims nothing before it has told what it lost: the worker might else take an old
handler's end for that of the new claim.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from millstream.brokers.base import Claim, Dead, Kept, Position, Settlement, Subscription
from millstream.brokers.sqlite import group, member
from millstream.brokers.sqlite.member import Life, Member
from millstream.brokers.sqlite.watch import Watch
from millstream.errors import BrokerError, BrokerFull, LeaseLost
from millstream.telemetry import logger

if TYPE_CHECKING:
    from millstream.brokers.sqlite.broker import SQLiteBroker

MAX_CLAIMS = 1_000  # in one transaction
WATCH_S = 0.5  # how often somebody is looked for who fell silent, at least
PAUSE_S = 0.01  # after others were faster
LEAST_PAUSE_S = 0.001  # due times are whole milliseconds


class SQLiteConsumer:
    """One running member of a group."""

    def __init__(self, broker: SQLiteBroker, subscription: Subscription) -> None:
        self._broker = broker
        self._clock = broker.clock
        self._subscription = subscription
        self._name = f"ms.{socket.gethostname()}.{os.getpid()}.{self._clock.nonce()}"
        self._lives = 0
        self._me: Member | None = None  # None: fenced, or closed
        self._closed = False
        self._entering = asyncio.Lock()
        self._held: dict[Position, int] = {}  # attempt by position, until its settlement is answered
        self._unsure = False  # a fetch failed or was cancelled, and may have claimed what we do not know of
        self._watch = Watch(subscription.lease_s)
        self._turn = 0

    async def enter(self) -> None:
        """Begin a life under a new name; makes stream and group where they are missing."""
        self._lives += 1
        life = Life(f"{self._name}.{self._lives}", self._clock.nonce(), self._clock.monotonic(), self._clock.now_ms())
        subscription, inside = self._subscription, self._broker.inside(self._subscription.stream.name)
        self._me = await self._broker.writer.ask(
            lambda db: member.enter(db, inside, subscription, life), durable=True, rings=True
        )
        self._watch.forget()
        self._watch.beat(life.beat_s, self._clock.monotonic())

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        """Claim up to `limit` events; waits up to `wait_s` for the first one."""
        until_s = self._clock.monotonic() + wait_s
        claims = await self._take(limit)
        while not claims and not self._closed and (left_s := until_s - self._clock.monotonic()) > 0:
            bell = self._broker.writer.bell
            ready, pause_s = await self._look()
            if ready:
                claims = await self._take(limit)
            if not claims:
                await self._broker.writer.listen(bell, min(left_s, pause_s))
        return claims

    async def begin(self, positions: Sequence[Position]) -> None:
        """Note that the handlers of these suspects start now; all of them, or `LeaseLost`."""
        me = self._me if self._held.keys() >= set(positions) else None
        if me is None or not await self._broker.writer.ask(lambda db: group.begin(db, me, positions)):
            raise LeaseLost(f"group {self._subscription.group!r}: somebody else has taken over what we held")

    async def finish(self, positions: Sequence[Position]) -> list[bool]:
        """`settle` for events that are done, and with which nothing is stored."""
        me, attempts = self._me, [self._held.get(position, 0) for position in positions]
        if me is None or not any(attempts):
            return [False] * len(attempts)
        results = await self._broker.writer.ask(lambda db: group.finish(db, me, positions, attempts), durable=True)
        return self._answered(me, positions, attempts, results)

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Store outcomes with their outputs, all in one transaction: when it raises, none is stored, or it is in doubt.

        Unless there is no room: then those are stored, in a second one, that need none.
        """
        try:
            return await self._settle(settlements)
        except BrokerFull:
            small = [settlement for settlement in settlements if not _needs_room(settlement)]
            if len(small) < len(settlements):
                await self._settle(small)
            raise

    async def keep(self) -> Kept:
        """Heartbeat; evicts who fell silent. Once evicted itself, enters anew and tells what was lost."""
        me, sent_s, sent_ms, beat = self._me, self._clock.monotonic(), self._clock.now_ms(), None
        if me is not None:
            try:
                beat = await self._broker.writer.ask(lambda db: member.beat(db, me, sent_s, sent_ms))
            except BaseException:
                self._watch.forget()
                raise
        if me is None or beat is None:
            self._lose(me)
            return Kept(await self._come_back())
        now_s = self._clock.monotonic()
        self._watch.beat(sent_s, now_s)
        self._watch.saw(now_s, beat.tick)
        if beat.oldest <= self._watch.silent_at(now_s):
            await self._evict(me)
        return Kept()

    async def release(self, partitions: frozenset[int]) -> None:
        """Hand back, uncounted, all that is held of these partitions."""
        me = self._me
        if me is None:
            return
        await self._broker.writer.ask(lambda db: group.hand_back(db, me, partitions), durable=True, rings=True)
        for position in [position for position in self._held if position.partition in partitions]:
            del self._held[position]

    async def close(self) -> None:
        """Hand back all that is held, and leave the group. Others take over in a while when the file cannot be written."""
        me, self._me, self._closed = self._me, None, True
        self._held.clear()
        if me is None:
            return
        try:
            await self._broker.writer.ask(lambda db: group.leave(db, me), durable=True, rings=True)
        except BrokerError as error:
            logger.warning("group %s could not be left: %s", self._subscription.group, error)

    async def _settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        me, positions = self._me, [settlement.position for settlement in settlements]
        attempts = [self._held.get(position, 0) for position in positions]
        if me is None or not any(attempts):
            return [False] * len(attempts)
        now_ms, inside = self._clock.now_ms(), self._broker.inside
        results = await self._broker.writer.ask(
            lambda db: group.settle(db, me, settlements, attempts, inside, now_ms),
            durable=True,
            rings=any(group.wakes(settlement) for settlement in settlements),
        )
        return self._answered(me, positions, attempts, results)

    def _answered(
        self, me: Member, positions: Sequence[Position], attempts: Sequence[int], results: list[bool] | None
    ) -> list[bool]:
        """Those are not held any more; None: nothing is, by that life."""
        if results is None:
            self._lose(me)
        held = self._held
        for position, attempt in zip(positions, attempts, strict=True):
            if held.get(position) == attempt:
                del held[position]
        return [False] * len(attempts) if results is None else results

    async def _take(self, limit: int) -> list[Claim]:
        # Not while something is held: it was lost, and `keep` has to tell it first.
        if self._me is None and not self._held and not self._closed:
            await self._come_back()
        me = self._me
        if me is None:
            return []
        self._turn += 1
        fresh = self._subscription.fresh
        wish = group.Wish(min(limit, MAX_CLAIMS), self._clock.now_ms(), self._turn, self._unsure, fresh)
        self._unsure = False
        try:
            taken = await self._broker.writer.ask(lambda db: group.take(db, me, wish, self._held))
        except BaseException:
            self._unsure = True
            raise
        if taken is None:
            self._lose(me)
        if taken is None or self._me is not me:  # what was claimed went with that life
            return []
        self._unsure |= taken.unsure
        # What was looked for because of one fetch may have been accepted by another meanwhile.
        claims = [claim for claim in taken.claims if claim.position not in self._held]
        for claim in claims:
            self._held[claim.position] = claim.attempt
        return claims

    async def _look(self) -> tuple[bool, float]:
        """Whether claiming is worth while, and how long to wait otherwise. One indexed read wakes nobody else."""
        me, watch_s = self._me, min(WATCH_S, self._subscription.lease_s / 4)
        if me is None:
            return not self._held, watch_s
        now_ms, tick = self._clock.now_ms(), self._watch.silent_at(self._clock.monotonic())
        look = await self._broker.reader.ask(lambda db: group.look(db, me, now_ms, fresh=self._subscription.fresh))
        self._watch.saw(self._clock.monotonic(), look.tick)
        if look.oldest <= tick:
            await self._evict(me)
        if look.ready:
            return True, PAUSE_S
        due_s = watch_s if look.due_ms is None else (look.due_ms - now_ms) / 1000
        return False, min(max(due_s, LEAST_PAUSE_S), watch_s)

    async def _evict(self, me: Member) -> None:
        tick = self._watch.silent_at(self._clock.monotonic())
        for name, events in await self._broker.writer.ask(
            lambda db: group.evict(db, me, tick), durable=True, rings=True
        ):
            logger.warning(
                "group %s of %s: %s fell silent, its %d events go to others",
                *(self._subscription.group, self._subscription.stream.name, name, events),
            )

    def _lose(self, me: Member | None) -> None:
        if self._me is me:
            self._me = None

    async def _come_back(self) -> frozenset[Position]:
        """Enter anew after an eviction, unless somebody else did meanwhile; what was held then is lost."""
        async with self._entering:
            if self._me is not None or self._closed:
                return frozenset()
            await self.enter()
            lost = frozenset(self._held)
            self._held.clear()
            return lost


def _needs_room(settlement: Settlement) -> bool:
    return bool(settlement.outputs or settlement.letters) or isinstance(settlement.outcome, Dead)
