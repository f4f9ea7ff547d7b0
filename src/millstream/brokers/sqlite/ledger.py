"""The ledger of an ordered group in an SQLite file: one life of a member. `ordered.py` has its steps.

A lease passes from a silent owner to another one by its epoch alone. The row of a silent member is deleted only when it
owns nothing any more, so that nothing can be done in its name; it finds that out with its next beat, and that is the end of
this life.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from millstream.brokers.base import Claim, Output, Subscription
from millstream.brokers.ledger import NEEDS_ROOM, Commit, Committed, Cursor, Grant, Heads, Lease, State, View
from millstream.brokers.sqlite import member, ordered
from millstream.brokers.sqlite.member import Life, Member
from millstream.brokers.sqlite.watch import Watch
from millstream.brokers.sqlite.writer import Job
from millstream.errors import BrokerDown, BrokerFull, LeaseLost
from millstream.telemetry import logger

if TYPE_CHECKING:
    from millstream.brokers.sqlite.broker import SQLiteBroker

T = TypeVar("T")


class SQLiteLedger:
    """One life of a member."""

    def __init__(self, broker: SQLiteBroker, subscription: Subscription) -> None:
        self.name = f"ms.{socket.gethostname()}.{os.getpid()}.{broker.clock.nonce()}"
        self._broker = broker
        self._clock = broker.clock
        self._subscription = subscription
        self._member: Member | None = None
        self._watch = Watch(subscription.lease_s)
        self._wakes = 0
        self._turn = -1  # the partition that was read last

    @property
    def now_ms(self) -> float:
        """The time by which things are due."""
        return self._clock.now_ms()

    async def enter(self) -> None:
        """Become a member. Raises `GroupOwned`, `StreamMismatch`, and `NotSupported` for a group without order."""
        subscription, inside = self._subscription, self._broker.inside(self._subscription.stream.name)
        life = Life(self.name, self._clock.nonce(), self._clock.monotonic(), self._clock.now_ms())
        self._member = await self._broker.writer.ask(
            lambda db: member.enter(db, inside, subscription, life), durable=True
        )
        self._watch.beat(life.beat_s, self._clock.monotonic())

    async def beat(self) -> None:
        """Say that we live. Raises `LeaseLost` when others found us silent, or the group is gone."""
        me, sent_s, sent_ms = self._me, self._clock.monotonic(), self._clock.now_ms()
        try:
            beat = await self._broker.writer.ask(lambda db: member.beat(db, me, sent_s, sent_ms))
        except BaseException:
            self._watch.forget()
            raise
        if beat is None:
            raise LeaseLost(f"{self.name} was found silent, or group {self._subscription.group!r} was deleted")
        now_s = self._clock.monotonic()
        self._watch.beat(sent_s, now_s)
        self._watch.saw(now_s, beat.tick)

    async def look(self) -> View:
        """See who lives, and who has what. One who was silent itself judges nobody."""
        me, tick = self._me, self._silent_at()
        sight = await self._broker.reader.ask(lambda db: ordered.look(db, me))
        self._watch.saw(self._clock.monotonic(), sight.tick)
        silent = {name for name, beat in sight.members.items() if beat <= tick and name != self.name}
        if silent - {lease.owner for lease in sight.leases}:
            await self._tidy(me, tick)
        return View(frozenset(sight.members.keys() - silent | {self.name}), sight.leases)

    async def acquire(self, seen: Lease) -> Grant | None:
        """Take a lease that is free, or whose owner is silent. Raises `LeaseLost` when we were found silent ourselves."""
        me, tick = self._me, self._silent_at()
        return await self._write(lambda db: ordered.acquire(db, me, seen, tick))

    async def ask(self, seen: Lease) -> None:
        """Ask the owner of a lease for it."""
        me = self._me
        await self._broker.writer.ask(lambda db: ordered.ask(db, me, seen))

    async def release(self, partition: int, epoch: int, heir: str) -> None:
        """Give a lease back."""
        me = self._me
        await self._write(lambda db: ordered.release(db, me, partition, epoch, heir))

    async def read(self, cursors: Mapping[int, Cursor], limit: int, wait_s: float) -> list[Claim]:
        """Events behind the cursors; waits for the first one."""
        me, wakes, until_s = self._me, self._wakes, self._clock.monotonic() + wait_s
        cursors = dict(cursors)
        while True:
            bell = self._broker.writer.bell
            turn = self._turn
            claims = await self._broker.reader.ask(lambda db: ordered.read(db, me, cursors, limit, turn))  # noqa: B023 - awaited
            if claims:
                self._turn = claims[-1].position.partition
            left_s = until_s - self._clock.monotonic()
            if claims or left_s <= 0 or self._wakes != wakes:
                return claims
            await self._broker.writer.listen(bell, left_s)

    def wake(self) -> None:
        """End a `read` that waits."""
        self._wakes += 1
        with suppress(BrokerDown):
            self._broker.writer.ring()

    async def heads(self, partition: int, epoch: int, busy: Sequence[str], limit: int) -> Heads | None:
        """Begin the first events of parked keys that are due."""
        me, now_ms = self._me, self._clock.now_ms()
        return await self._write(lambda db: ordered.heads(db, me, partition, epoch, busy, limit, now_ms))

    async def begin(self, partition: int, epoch: int, offsets: Sequence[str]) -> bool:
        """Note that the handlers of these suspects start now."""
        me = self._me
        return await self._write(lambda db: ordered.begin(db, me, partition, epoch, offsets))

    async def commit(self, commits: Sequence[Commit]) -> list[Committed]:
        """Store progress, all in one transaction; when the disk is full, that which needs no room in a second one."""
        try:
            return await self._commit(commits)
        except BrokerFull:
            small = [commit for commit in commits if not _needs_room(commit)]
            if len(small) == len(commits):
                raise
        answers = iter(await self._commit(small))
        return [Committed(State.FULL) if _needs_room(commit) else next(answers) for commit in commits]

    async def leave(self) -> None:
        """Be a member no longer."""
        me = self._me
        await self._write(lambda db: ordered.leave(db, me))

    @property
    def _me(self) -> Member:
        if self._member is None:
            raise LeaseLost(f"{self.name} is no member yet")
        return self._member

    def _silent_at(self) -> int:
        return self._watch.silent_at(self._clock.monotonic())

    async def _write(self, job: Job[T]) -> T:
        return await self._broker.writer.ask(job, durable=True)

    async def _commit(self, commits: Sequence[Commit]) -> list[Committed]:
        me, inside, now_ms = self._me, self._broker.inside, self._clock.now_ms()
        published = any(isinstance(effect, Output) for commit in commits for effect in commit.effects)
        return await self._broker.writer.ask(
            lambda db: ordered.commit(db, me, commits, inside, now_ms), durable=True, rings=published
        )

    async def _tidy(self, me: Member, tick: int) -> None:
        for name in await self._write(lambda db: ordered.tidy(db, me, tick)):
            stream, group = self._subscription.stream.name, self._subscription.group
            logger.warning("group %s of %s: %s fell silent, its partitions are others' now", group, stream, name)


def _needs_room(commit: Commit) -> bool:
    return any(isinstance(effect, NEEDS_ROOM) for effect in commit.effects)
