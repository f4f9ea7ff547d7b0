"""The ledger on Redis: one life of a member of a group that consumes in the order of keys.

Per partition one hash, the lease, is the truth: owner and epoch, and how far the group has come. All that changes it is a
script that compares owner and epoch first, so whoever was taken over changes nothing any more. The group's id at the log is
set with each commit, for tools: `XINFO GROUPS` shows the exact lag, and no pending list exists.

Who lives is told by the same beats, fences and ticks as without order. The fence is the right to acquire; a member found
silent keeps it until it owns nothing any more.

Times in the ledger are the server's, those of the callers their own: they are translated here. As long as both clocks may
be equal, as far as the last beat could tell, they are taken as equal.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from millstream.brokers.base import (
    Claim,
    Output,
    Position,
    Subscription,
    check_mode,
)
from millstream.brokers.ledger import (
    HELD_MS,
    Commit,
    Committed,
    Cursor,
    Grant,
    Head,
    Heads,
    Lease,
    State,
    View,
)
from millstream.brokers.redis import outputs, parked
from millstream.brokers.redis.gaps import Gaps
from millstream.brokers.redis.incarnation import TRUST
from millstream.brokers.redis.joining import join
from millstream.brokers.redis.link import Link, ReplyError
from millstream.brokers.redis.members import Place, Ticks, behind, new_name
from millstream.brokers.redis.outputs import Targets
from millstream.brokers.redis.pages import Page, Pages
from millstream.brokers.redis.pair import Pair
from millstream.brokers.redis.progress import BEFORE_ALL, call, committed, grant
from millstream.brokers.redis.scripts import scripts
from millstream.brokers.redis.sight import Sight
from millstream.errors import BrokerDown, BrokerError, BrokerFull, LeaseLost
from millstream.wire import entry

if TYPE_CHECKING:
    from millstream.brokers.redis.broker import RedisBroker

MAX_FORMERS = 16  # former lives whose leases are ours; those of older ones are silent by now

_NEVER = float("inf")


class Lives:
    """The lives of one member, one after the other: each call begins a new one."""

    def __init__(self, broker: RedisBroker, subscription: Subscription) -> None:
        self._broker = broker
        self._subscription = subscription
        self._place = Place(broker.keys(subscription.stream.name), subscription)
        self._name = new_name(broker.clock)
        self._count = 0
        self._life: RedisLedger | None = None
        self._formers: deque[str] = deque(maxlen=MAX_FORMERS)

    def __call__(self) -> RedisLedger:
        """The next life; the one before has ended."""
        start = behind(self._subscription.start)
        if self._life is not None:
            self._life.replaced()
            if self._life.entered:
                self._formers.append(self._life.name)
        if self._formers and start == "$":  # what came while the group was gone is for who was a member before
            start = BEFORE_ALL
        self._count += 1
        name = f"{self._name}.{self._count}"
        self._life = RedisLedger(self._broker, self._place, self._subscription, name, start, tuple(self._formers))
        return self._life


class RedisLedger:
    """One life of a member; see `brokers.ledger.Ledger`."""

    def __init__(
        self,
        broker: RedisBroker,
        place: Place,
        subscription: Subscription,
        name: str,
        start: str,
        formers: Sequence[str],
    ) -> None:
        self.name = name
        self.entered = False
        """True from when others may know of it."""
        self._broker = broker
        self._clock = broker.clock
        self._place = place
        self._subscription = subscription
        self._start = start
        self._formers = formers
        self._nonce = broker.clock.nonce().encode()
        self._fence = place.fence(name)
        self._pair = Pair(broker, name)
        self._pages = Pages(place, self._pair, broker.budget)
        self._ticks = Ticks(broker.clock, subscription.lease_s)
        self._replaced = False
        self._beat_at = 0.0
        self._sight = Sight(place, name, broker.clock, self._ticks, subscription.lease_s, self._ours)
        self._gaps = Gaps(place, name, broker.clock, subscription.lease_s)
        self._ahead_ms = 0.0
        self._appended: dict[int, tuple[int, int]] = {}

    # Its life.

    @property
    def now_ms(self) -> float:
        """The time by which things are due: ours."""
        return self._clock.now_ms()

    async def enter(self) -> None:
        """Become a member. The leases of former lives are ours to take at once."""
        try:
            await self._broker.declare(self._subscription.stream)
            await self._pair.connect()
            writer = await self._pair.writer()
            place, subscription = self._place, self._subscription
            await join(writer, place, subscription.owner, self._start, subscription.lease_s, "log")
            sent_ms, sent_at = self._clock.now_ms(), self._clock.monotonic()
            self.entered = True
            keys = self._fence, self._place.live, self._place.tick
            state, *answer = await writer.run(scripts["enter"], keys, (self.name, self._nonce))
            if state != b"OK":
                raise BrokerDown(f"the name {self.name!r} was used before: try again")
            self._set_time(sent_ms, answer[1])
            self._beat_at = sent_at
            for former in self._formers:
                await self._bury(writer, former)
        except BaseException:
            self._pair.close()
            raise

    async def beat(self) -> None:
        """Say that we live."""
        writer = await self._writer()
        sent_ms, sent_at = self._clock.now_ms(), self._clock.monotonic()
        keys = self._fence, self._place.live, self._place.tick
        try:
            state, *answer = await writer.run(scripts["beat"], keys, (self.name, self._nonce))
        except BrokerError:
            self._ticks.forget()
            raise
        if state != b"OK":
            raise self._lost()
        self._beat_at = sent_at
        self._set_time(sent_ms, answer[1])

    async def look(self) -> View:
        """See who lives, and who has what; forget those who are silent and own nothing."""
        return await self._sight.look(await self._writer(), self.now_ms + self._ahead_ms)

    async def leave(self) -> None:
        """Be a member no longer."""
        try:
            await self._bury(await self._writer(), self.name)
        finally:
            self._pair.close()

    def replaced(self) -> None:
        """Another life goes on: what is still called fails, and decides nothing."""
        self._replaced = True
        self._pair.close()

    # Leases.

    async def acquire(self, seen: Lease) -> Grant | None:
        """Take a lease that is free, or whose owner is silent."""
        writer, at = await self._writer(), self._place.at[seen.partition]
        keys = at.log, self._fence, self._place.live, at.lease, at.meta, at.parked, at.parkinfo, at.note, at.stats
        self._sight.changed()
        score = self._sight.silent.get(seen.owner, b"")
        who = self._place.group, self.name, self._nonce
        state, *answer = await writer.run(
            scripts["acquire"], keys, (*who, seen.owner, seen.epoch, score, *self._formers)
        )
        if state == b"FENCED":
            raise self._lost()
        if state == b"MODE":
            check_mode(self._place.stream, self._place.group, False, True)
        if state != b"OK":
            return None
        found = grant(seen.partition, answer)
        self._gaps.begin(found, answer[-1])
        self._pages.acquired(seen.partition)
        return found

    async def ask(self, seen: Lease) -> None:
        """Ask the owner of a lease for it."""
        writer, keys = await self._writer(), (self._place.at[seen.partition].lease,)
        await writer.run(scripts["ask"], keys, (self.name, seen.owner, seen.epoch, seen.want))

    async def release(self, partition: int, epoch: int, heir: str) -> None:
        """Give a lease back."""
        writer = await self._writer()
        self._sight.changed()
        await writer.run(scripts["yield"], (self._place.at[partition].lease,), (self.name, epoch, heir))

    # Reading.

    async def read(self, cursors: Mapping[int, Cursor], limit: int, wait_s: float) -> list[Claim]:
        """Events behind the cursors; waits for the first one, for a second at most."""
        writer = await self._writer()
        if not self._pages.under_way:
            await self._gaps.look(writer, cursors)
        try:
            pages = await self._pages.read(cursors, limit, wait_s)
        except BrokerDown:
            if self._replaced:  # all that could come is lost with this life
                return []
            raise
        if pages and self._clock.monotonic() - self._beat_at > TRUST * self._subscription.lease_s:
            await self.beat()  # we may have been taken for dead
        claims: list[Claim] = []
        for partition, page in pages.items():
            claims += _claims(partition, page, cursors[partition].epoch)
        if claims:
            self._pages.seen(max([len(claim.record.data) for claim in claims]))
            await self._read_ahead(cursors, pages, limit)
        for partition, page in pages.items():
            self._gaps.passed(partition, cursors[partition], page[-1][0].decode(), len(page))
        return claims

    def wake(self) -> None:
        """End a `read` that waits."""
        self._pair.wake()

    async def heads(self, partition: int, epoch: int, busy: Sequence[str], limit: int) -> Heads | None:
        """Begin the first events of parked keys that are due and not busy."""
        writer, at = await self._writer(), self._place.at[partition]
        # Of the first so many at least one is not busy and not begun now, if there are as many.
        found = await writer.call("ZRANGE", at.parked, 0, len(busy) + limit, "WITHSCORES")
        due_ms = {key.decode(): self._ours(score) for key, score in zip(found[::2], found[1::2], strict=True)}
        for key in busy:
            due_ms.pop(key, None)
        due = [key for key, at_ms in due_ms.items() if at_ms <= self.now_ms][:limit]
        if not due:
            return Heads((), min(due_ms.values(), default=_NEVER))
        keys = at.lease, at.parked, at.parkinfo, at.note, *(self._place.park(partition, key) for key in due)
        state, *rows = await writer.run(scripts["heads"], keys, (self.name, epoch, *due))
        if state != b"OK":
            return None
        heads = [Head(row[0].decode(), parked.claim(partition, row, epoch)) for row in rows]
        for head in heads:
            del due_ms[head.key]
        return Heads(heads, min(due_ms.values(), default=_NEVER))

    # Progress.

    async def begin(self, partition: int, epoch: int, offsets: Sequence[str]) -> bool:
        """Note that the handlers of these suspects start now."""
        writer, at = await self._writer(), self._place.at[partition]
        return bool(await writer.run(scripts["begin"], (at.lease, at.note), (self.name, epoch, *offsets)) == b"OK")

    async def commit(self, commits: Sequence[Commit]) -> list[Committed]:
        """Store progress with its outputs, in one write; or, where the server cannot do both in one step, outputs before."""
        writer = await self._writer()
        if not self._broker.traits.atomic_outputs:
            return await self._append_and_commit(writer, commits)
        outputs = [effect for commit in commits for effect in commit.effects if isinstance(effect, Output)]
        targets = await Targets.of(self._broker, writer, outputs)
        if (problem := targets.problem(outputs)) is not None:
            raise problem
        answers = await self._commit(writer, commits, targets)
        return [answers[commit.partition] for commit in commits]

    # Below: how.

    async def _writer(self) -> Link:
        if self._replaced:
            raise BrokerDown(f"{self.name} has come to its end, another life of this member goes on")
        return await self._pair.writer()

    async def _read_ahead(self, cursors: Mapping[int, Cursor], pages: Mapping[int, Page], limit: int) -> None:
        if self._gaps.due:
            return
        with suppress(BrokerError):  # the next read meets it too, and what was read is handled meanwhile
            await self._pages.read_ahead(cursors, pages, limit)

    def _lost(self) -> LeaseLost:
        return LeaseLost(
            f"{self.name} is no member any more: it was silent for its lease, or this is another server now"
        )

    async def _bury(self, writer: Link, name: str) -> None:
        score = await writer.call("ZSCORE", self._place.live, name) or b""
        await writer.run(scripts["bury"], (self._place.fence(name), self._place.live), (name, score))

    def _set_time(self, sent_ms: float, server_ms: int) -> None:
        least, most = server_ms - self._clock.now_ms() - 1, server_ms - sent_ms + 1
        self._ahead_ms = min(max(0.0, least), most)

    def _theirs(self, at_ms: float) -> int:
        return int(at_ms) if at_ms <= 0 or at_ms >= HELD_MS else max(1, math.ceil(at_ms + self._ahead_ms))

    def _ours(self, score: bytes) -> float:
        at_ms = float(score)
        return at_ms if at_ms <= 0 or at_ms >= HELD_MS else at_ms - self._ahead_ms

    async def _commit(self, writer: Link, commits: Sequence[Commit], targets: Targets | None) -> dict[int, Committed]:
        calls = [call(self._place, self.name, self._gaps.counted(commit), self._theirs, targets) for commit in commits]
        replies = await writer.run_each(scripts["commit"], calls)
        answers: dict[int, Committed] = {}
        for commit, reply in zip(commits, replies, strict=True):
            if isinstance(reply, ReplyError):
                raise writer.failure(reply, "script commit")
            if targets is not None and reply[0] == b"REFUSED":
                answers[commit.partition] = self._refused(commit, targets, *reply[1:])
            else:
                answers[commit.partition] = committed(*reply)
        return answers

    def _refused(self, commit: Commit, targets: Targets, why: bytes, number: int) -> Committed:
        output = [effect for effect in commit.effects if isinstance(effect, Output)][number - 1]
        error = targets.refusal(output, why)
        if not isinstance(error, BrokerFull):
            raise error
        return Committed(State.FULL, why=str(error))

    async def _append_and_commit(self, writer: Link, commits: Sequence[Commit]) -> list[Committed]:
        refused = await self._append(writer, commits)
        answers = dict(refused)
        answers |= await self._commit(writer, [commit for commit in commits if commit.partition not in refused], None)
        for partition, answer in answers.items():
            if answer.state is not State.STORED:
                self._appended.pop(partition, None)
        return [answers[commit.partition] for commit in commits]

    async def _append(self, writer: Link, commits: Sequence[Commit]) -> dict[int, Committed]:
        # Outputs of those whose lease is ours. Returns what is answered to the commits that are not to be sent.
        given = {commit.partition: [e for e in commit.effects if isinstance(e, Output)] for commit in commits}
        todo = [commit for commit in commits if given[commit.partition]]
        todo = [commit for commit in todo if self._appended.get(commit.partition) != (commit.epoch, commit.seq)]
        refused = dict.fromkeys(await self._not_ours(writer, todo), Committed(State.LOST)) if todo else {}
        todo = [commit for commit in todo if commit.partition not in refused]
        failed = await outputs.append(self._broker, [o for commit in todo for o in given[commit.partition]])
        for error in failed.values():
            if not isinstance(error, BrokerFull):
                raise error
        for commit in todo:
            why = next((failed[o.stream] for o in given[commit.partition] if o.stream in failed), None)
            if why is None:
                self._appended[commit.partition] = commit.epoch, commit.seq
            else:
                refused[commit.partition] = Committed(State.FULL, why=str(why))
        return refused

    async def _not_ours(self, writer: Link, commits: Sequence[Commit]) -> list[int]:
        asked = [("HMGET", self._place.at[commit.partition].lease, "owner", "epoch") for commit in commits]
        leases = await writer.calls(asked)
        for lease in leases:
            if isinstance(lease, ReplyError):
                raise writer.failure(lease, "HMGET")
        ours = [[self.name.encode(), b"%d" % commit.epoch] for commit in commits]
        return [commit.partition for commit, lease, our in zip(commits, leases, ours, strict=True) if lease != our]


def _claims(partition: int, page: Page, epoch: int) -> list[Claim]:
    return [
        Claim(Position(partition, offset), record, 1, 0, 0, fault, epoch)
        for offset, record, fault in entry.read_page(partition, page)
    ]
