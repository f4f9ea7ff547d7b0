"""A member of a group in an SQLite file.

    undelivered ─take─► held by a member ─done─► gone          pending.consumer = the member, while it is held
                           │  └─dead─► dead letter             pending.consumer = 0 and due_ms, while it waits
      later, release, evict│
                           ▼
                        waiting ─take, when due─► held, attempt + 1

Each arrow is one transaction, in which the member's own row in `member`, its *fence*, is looked for first. Evicting a
silent member deletes that row and moves all it held, so whoever comes back finds no fence and settles nothing. Member
numbers are never given twice.

Who is silent is judged without a wall clock: every beat raises the group's tick and writes it to the member; `Watch`
remembers which tick was seen when, by this process's own clock. A member that has not gone past a tick seen a lease ago has
been silent for a lease. Two races are closed when judging: a process that was paused, or that could not write itself, has
no right to judge (`Watch` forgets over a gap, and `evict` looks at the judge's own tick and at the time since it was
asked), and the ticks are compared in the transaction that evicts.

A member that finds its fence gone claims nothing before it has told what it lost: the worker might else take an old
handler's end for that of the new claim.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Sequence
from sqlite3 import Connection
from typing import TYPE_CHECKING, NamedTuple

from millstream.brokers.base import Claim, Kept, Position, Settlement, Subscription
from millstream.brokers.sqlite import group
from millstream.brokers.sqlite.group import Member
from millstream.errors import BrokerError, LeaseLost
from millstream.telemetry import logger

if TYPE_CHECKING:
    from millstream.brokers.sqlite.broker import SQLiteBroker

MAX_CLAIMS = 1_000  # in one transaction
WATCH_S = 0.5  # how often somebody is looked for who fell silent, at least
PAUSE_S = 0.01  # after others were faster


class Watch:
    """What this process remembers of a group's ticks, to judge who is silent."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._answered_s = 0.0
        self._seen: deque[tuple[float, int]] = deque()

    def forget(self) -> None:
        """Begin anew: nobody is judged before another lease has passed."""
        self._seen.clear()

    def saw(self, now_s: float, tick: int) -> None:
        """Remember an answer."""
        if self._seen and (now_s - self._answered_s > self._lease_s / 2 or tick < self._seen[-1][1]):
            self.forget()
        self._answered_s = now_s
        if not self._seen or now_s - self._seen[-1][0] >= self._lease_s / 40:
            self._seen.append((now_s, tick))

    def silent_at(self, now_s: float) -> int:
        """The newest tick that was seen a lease ago: members that have not gone past it are silent. -1: none yet."""
        while len(self._seen) > 1 and self._seen[1][0] <= now_s - self._lease_s:
            self._seen.popleft()
        return self._seen[0][1] if self._seen and self._seen[0][0] <= now_s - self._lease_s else -1


class _Look(NamedTuple):
    """What a reader saw of a group."""

    ready: bool
    due_ms: int | None
    tick: int
    silent: bool


class SQLiteConsumer:
    """One running member of a group."""

    def __init__(self, broker: SQLiteBroker, subscription: Subscription) -> None:
        self._broker = broker
        self._clock = broker.clock
        self._subscription = subscription
        self._name = f"ms.{socket.gethostname()}.{os.getpid()}.{self._clock.nonce()}"
        self._lives = 0
        self._me: Member | None = None
        self._held: dict[Position, int] = {}
        """Attempt by position; until its settlement is answered."""
        self._unseen: list[Claim] = []
        """Claimed by a fetch that was cancelled: for the next one."""
        self._unsure = False
        """A fetch may have claimed what we do not know of."""
        self._watch = Watch(subscription.lease_s)
        self._turn = 0
        self._entering = asyncio.Lock()

    async def enter(self) -> None:
        """Begin a life under a new name; makes stream and group where they are missing."""
        self._lives += 1
        name, nonce = f"{self._name}.{self._lives}", self._clock.nonce()
        subscription, inside = self._subscription, self._broker.inside(self._subscription.stream.name)
        beat_s = self._clock.monotonic()

        def leave(member: Member) -> None:  # the answer came too late for whoever asked
            self._me, self._unsure = member, True

        self._me = await self._broker.writer.ask(
            lambda db: group.enter(db, inside, subscription, name, nonce, beat_s), durable=True, rings=True, late=leave
        )
        self._unsure = False
        self._watch.forget()

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        """Claim up to `limit` events; waits up to `wait_s` for the first one."""
        until_s = self._clock.monotonic() + wait_s
        claims = await self._take(limit)
        while not claims and (left_s := until_s - self._clock.monotonic()) > 0:
            bell = self._broker.writer.bell
            look = await self._look()
            if look is not None and look.silent:
                await self._evict()
            if look is not None and look.ready:
                claims = await self._take(limit)
                if not claims:  # others were faster, or we may not claim now
                    await self._broker.writer.listen(bell, min(left_s, PAUSE_S))
            else:
                await self._broker.writer.listen(bell, min(left_s, self._next_look_s(look)))
        return claims

    async def begin(self, positions: Sequence[Position]) -> None:
        """Note that the handlers of these suspects start now; all of them, or `LeaseLost`."""
        me = self._me
        if me is None or not await self._broker.writer.ask(lambda db: group.begin(db, me, positions)):
            raise LeaseLost(f"group {self._subscription.group!r}: somebody else has taken over what we held")

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Store outcomes with their outputs, all in one transaction. Raising means that none is stored, or in doubt."""
        me = self._me
        attempts = [self._held.get(settlement.position, 0) for settlement in settlements]
        if me is None or not any(attempts):
            return [False] * len(settlements)
        items = [group.Item(settlement, attempt) for settlement, attempt in zip(settlements, attempts, strict=True)]
        now_ms, inside = self._clock.now_ms(), self._broker.inside
        rings = any(item.rings for item in items)
        results = await self._broker.writer.ask(
            lambda db: group.settle(db, me, items, inside, now_ms), durable=True, rings=rings
        )
        if self._me is me:
            for item, attempt in zip(items, attempts, strict=True):
                if self._held.get(item.settlement.position) == attempt:
                    del self._held[item.settlement.position]
        return results

    async def keep(self) -> Kept:
        """Heartbeat; looks for silent members too. After an eviction it enters anew and tells what was lost."""
        sent_s = self._clock.monotonic()
        me, tick = self._me, None
        try:
            if me is not None:
                tick = await self._broker.writer.ask(lambda db: group.beat(db, me, sent_s))
        except BaseException:
            self._watch.forget()
            raise
        if tick is None:
            return Kept(await self._come_back(me))
        now_s = self._clock.monotonic()
        if now_s - sent_s > self._subscription.lease_s / 4:
            self._watch.forget()  # the others may have waited like us, and not beaten since
        self._watch.saw(now_s, tick)
        await self._evict()
        return Kept()

    async def release(self, partitions: frozenset[int]) -> None:
        """Hand back, uncounted, all that is held of these partitions."""
        me = self._me
        if me is None:
            return
        await self._broker.writer.ask(lambda db: group.hand_back(db, me, partitions), durable=True, rings=True)
        self._held = {position: attempt for position, attempt in self._held.items() if position.partition not in partitions}
        self._unseen = [claim for claim in self._unseen if claim.stored.position.partition not in partitions]

    async def close(self) -> None:
        """Hand back all that is held, and leave the group."""
        me, self._me = self._me, None
        self._held.clear()
        self._unseen.clear()
        if me is None:
            return
        try:
            await self._broker.writer.ask(lambda db: group.leave(db, me), durable=True, rings=True)
        except BrokerError as error:
            logger.warning("group %s: could not leave, others take over in a while: %s", me.name, error)

    async def _take(self, limit: int) -> list[Claim]:
        if self._unseen:
            seen, self._unseen = self._unseen[:limit], self._unseen[limit:]
            return seen
        me = self._me
        if me is None:
            if not self._held:  # nothing that would have to be told first
                await self._come_back(None)
            return []
        self._turn += 1
        limit, now_ms, turn, unsure = min(limit, MAX_CLAIMS), self._clock.now_ms(), self._turn, self._unsure
        self._unsure = True  # until the answer is here
        claims = await self._broker.writer.ask(
            lambda db: group.take(db, me, group.Wish(limit, now_ms, turn, unsure), self._held),
            late=lambda claims: self._stow(me, claims),
        )
        return self._accept(me, claims)

    def _accept(self, me: Member, claims: list[Claim] | None) -> list[Claim]:
        if self._me is not me:  # closed or evicted meanwhile: these claims went with that life
            return []
        self._unsure = False
        if claims is None:
            self._me = None
            return []
        for claim in claims:
            self._held[claim.stored.position] = claim.attempt
        return claims

    def _stow(self, me: Member, claims: list[Claim] | None) -> None:
        self._unseen += self._accept(me, claims)
        # TODO
