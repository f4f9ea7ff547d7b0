"""A member of a group on Redis: events without order, each to whoever comes first.

    undelivered ─XREADGROUP >─► held by c ─ack─► done          Every pending entry belongs to a consumer whose fence
                                 │  └─dead letter, ack─►       exists, or to `~due` and is in `due`, or to a name
          retry, release, evict  │                             without fence, which the sweep finds within seconds.
                                 ▼
           waiting: pending under `~due`, and in `due` ─take─► held by c'

A consumer outlives its lives. Each life, an `Incarnation`, has a name that is used once; it ends when the others took it
for dead, and when the server turns out to be another one, which knows nothing of what we remember. Then all that it held
is lost: `settle` answers False, `keep` tells the worker once, and until it has, nothing is claimed, so that no position
comes back to a worker that still believes to hold it. The next life evicts its predecessor, without blame.

Nothing here tries again by itself. A lost connection raises `BrokerDown`; the next call, whichever it is, repairs the
links, kills the old ones on the server, and recovers what was delivered meanwhile. The caller sends the same again:
an ack that was not answered, and all else, is compared with owner and delivery count first. Somebody may have given the
event back meanwhile, and it may even have come to us: then it waits until its former outcome is out of the way.

A lone event is on its way for a quarter of a millisecond, of which the server and waking it up take 80 µs, a second write
would take 30 to 60, each turn of the loop 15. So the handlers of a few events go before our next read is written, which
took a fifth off. Behind a full page the read goes first: the server gathers the next one while this one is handled.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from millstream.brokers.base import (
    Claim,
    Dead,
    Done,
    Kept,
    Later,
    Position,
    Settlement,
    Subscription,
    finished,
)
from millstream.brokers.letters import put_off
from millstream.brokers.redis import parts
from millstream.brokers.redis.incarnation import Incarnation, Item
from millstream.brokers.redis.letters import error_text
from millstream.brokers.redis.members import MAX_ITEMS, Place, behind, new_name
from millstream.brokers.redis.outputs import Targets, append, fitting
from millstream.errors import (
    BrokerError,
    BrokerFull,
    GroupVanished,
    LeaseLost,
)
from millstream.telemetry import BROKER_ERROR, logger
from millstream.units import DEAD_FULL_S

if TYPE_CHECKING:
    from millstream.brokers.redis.broker import RedisBroker


MAX_FORMERS = 16  # lives whose eviction is still owed; the sweep finds all others
MAX_FEW = 8  # so many events take a fast handler no longer than writing the next read would

_Plan = dict[int, list[tuple[int, Item]]]
"""Per partition: which settlement, and its verdict."""


class RedisConsumer:
    """One running member of a group; see `brokers.base.Consumer` for its promises."""

    def __init__(self, broker: RedisBroker, subscription: Subscription) -> None:
        self._broker = broker
        self._clock = broker.clock
        self._subscription = subscription
        self._start = behind(subscription.start)
        self._life: Incarnation | None = None
        self._lives = 0
        self._name = new_name(broker.clock)
        self._formers: list[Incarnation] = []
        self._few = False
        self._lost: set[Position] = set()
        self._told = asyncio.Event()
        self._turn = asyncio.Lock()
        self._closed = False
        self._sweep_at = 0.0

    @classmethod
    async def join(cls, broker: RedisBroker, subscription: Subscription) -> RedisConsumer:
        """Enter a group, which is made if it is new. Raises `GroupOwned`, `StreamMismatch`, `NotSupported`."""
        consumer = cls(broker, subscription)
        await consumer._living()
        return consumer

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        """Claim up to `limit` events: those due again, then new ones. Waits up to `wait_s` for the first one.

        Cancelling loses nothing: what was on its way comes with the next call.
        """
        until = self._clock.monotonic() + wait_s
        if self._few:  # their handlers go first
            self._few = False
            await self._clock.sleep(0)
        while True:
            left_s = until - self._clock.monotonic()
            if self._lost:
                await self._clock.wait(self._told, max(0.0, left_s))
            else:
                claims = await self._claim(limit, left_s)
                if claims:
                    return claims
            if self._clock.monotonic() >= until:
                return []

    async def begin(self, positions: Sequence[Position]) -> None:
        """Note that the handlers of these suspects start now. Raises `LeaseLost` when they are not ours."""
        life = self._life
        if life is None or not all(position.offset in life.held[position.partition] for position in positions):
            raise LeaseLost(f"{self._name} does not hold these events any more")
        life = await self._living()
        offsets: dict[int, list[str]] = defaultdict(list)
        for position in positions:
            offsets[position.partition].append(position.offset)
        try:
            for partition, some in offsets.items():
                await life.mark(partition, some)
        except LeaseLost:
            self._end(life)
            raise

    async def finish(self, positions: Sequence[Position]) -> list[bool]:
        """`settle` for events that are done, and with which nothing is stored: the hot path, fresh events in one write."""
        life = self._life
        if life is None or not life.connected or life.in_doubt:
            return await self.settle(finished(positions))
        try:
            others = await self._acknowledge(life, positions)
        except (GroupVanished, LeaseLost):  # `settle` meets it again, and knows what to do
            return await self.settle(finished(positions))
        if life.in_doubt:  # since a moment ago: it was given back while we told its end
            life.answered(set(positions).difference(others))
        if life.fenced:
            self._end(life)
        if not others:
            return [True] * len(positions)
        answers = dict(zip(others, await self.settle(finished(others)), strict=True))
        return [answers.get(position, True) for position in positions]

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Store outcomes and outputs; False where an event was not ours any more.

        Fresh events that are done leave as one transaction. Then comes what needs no room, then dead letters and
        outputs: when one of these is refused, `BrokerFull` is raised after all the others are settled. The outputs of one
        event are stored all together, or none of them and its outcome neither.
        """
        if self._life is None:
            return [False] * len(settlements)
        life = await self._living()
        results = life.stored(settlements)
        try:
            await self._settle_or_heal(life, settlements, results)
            if life.in_doubt:
                life.answered([settlement.position for settlement in settlements])
        except LeaseLost as error:
            self._complain(error)
        if life.fenced:
            self._end(life)
        return results

    async def keep(self) -> Kept:
        """Beat, look after the other members, and tell what was lost since the last call."""
        lost, told = self._lost, self._told
        if not lost:
            await self._keep()
            lost = self._lost
        self._lost, self._told = set(), asyncio.Event()
        told.set()
        return Kept(lost=frozenset(lost))

    async def release(self, partitions: frozenset[int]) -> None:
        """Hand back, uncounted and at once, all that is held of these partitions."""
        if self._life is None:
            return
        life = await self._living()
        try:
            for partition in partitions:
                await self._release(life, partition)
        except LeaseLost:
            self._end(life)

    async def close(self) -> None:
        """Hand back all that is held, and leave the group. Never raises for a broker that is gone."""
        if self._closed:
            return
        self._closed = True
        life, self._life = self._life, None
        if life is None:
            return
        try:
            if not life.connected:
                await life.repair()
            await life.see()  # or it would come back as a second attempt
            for partition in life.place.partitions:
                await self._release(life, partition)
            await life.leave()
        except BrokerError as error:
            logger.info("%s left without saying so, others take over what it held: %s", life.name, error)
        finally:
            life.close()

    # Lives.

    async def _living(self) -> Incarnation:
        life = self._life
        if life is not None and life.connected:
            return life
        async with self._turn:  # of all calls that find it so, one repairs
            if self._closed:
                raise BrokerError("this consumer is closed")
            if self._life is not None and not self._life.connected:
                life = self._life
                try:
                    await life.repair()
                except LeaseLost as error:
                    self._complain(error)
                    self._end(life)
            if self._life is None:
                self._life = await self._enter()
            return self._life

    async def _enter(self) -> Incarnation:
        subscription = self._subscription
        await self._broker.declare(subscription.stream)
        place = Place(self._broker.keys(subscription.stream.name), subscription)
        self._lives += 1
        life = Incarnation(self._broker, place, subscription, f"{self._name}.{self._lives}")
        try:
            await life.enter(self._start)
            while self._formers:
                life.set_free(await self._formers[0].leave(life.writer))
                self._formers.pop(0)
        except BaseException:
            life.close()
            raise
        # Who was a member before never skips to the end: what came while the group was gone is for it.
        self._start = "0-0" if self._start == "$" else self._start
        return life

    def _end(self, life: Incarnation) -> None:
        self._lost.update(life.drop_all())
        if self._life is life:
            self._life = None
            self._formers = [*self._formers, life][-MAX_FORMERS:]
        life.close()

    async def _heal(self, life: Incarnation, error: BrokerError) -> None:
        self._complain(error)
        await life.join(self._start)

    def _complain(self, error: BrokerError) -> None:
        self._broker.telemetry.emit(BROKER_ERROR, group=self._subscription.group, error=error)
        group, stream = self._subscription.group, self._subscription.stream.name
        self._broker.telemetry.complain(group, self._clock.monotonic(), "group %s of %s: %s", group, stream, error)

    # Claiming and keeping.

    async def _claim(self, limit: int, left_s: float) -> list[Claim]:
        life = await self._living()
        if self._lost:  # the life before has ended just now, and the worker does not know yet
            return []
        try:
            await life.watch()
            await life.recover()
            have = len(life.surplus)
            if have < limit and life.wait_ms() <= 0:
                await life.take(limit - have)
            have = len(life.surplus)
            if have < limit:
                block_ms = 0 if have else max(0, int(min(left_s * 1000, max(0, life.wait_ms()) + 1)))
                await life.read(limit - have, block_ms)
            if life.full and (have := len(life.surplus)) < limit:  # a few partitions have more than their share
                await life.read(limit - have, 0, life.full)
            await life.trust()
            if self._life is not life:  # it has ended meanwhile, and all that it had claimed is lost with it
                return []
            claims, life.surplus = life.surplus[:limit], life.surplus[limit:]
            self._few = len(claims) <= MAX_FEW and not life.full
            return claims
        except GroupVanished as error:
            await self._heal(life, error)
        except LeaseLost as error:
            self._complain(error)
            self._end(life)
        return []

    async def _keep(self) -> None:
        life = await self._living()
        try:
            await life.beat()
            await life.watch()
            if (now := self._clock.monotonic()) >= self._sweep_at:
                self._sweep_at = now + life.members.sweep_s
                life.set_free(await life.members.sweep(life.writer))
        except GroupVanished as error:
            await self._heal(life, error)
        except LeaseLost as error:
            self._complain(error)
            self._end(life)

    # Settling.

    async def _settle_or_heal(self, life: Incarnation, settlements: Sequence[Settlement], results: list[bool]) -> None:
        try:
            await self._settle(life, settlements, results)
        except GroupVanished as error:
            await self._heal(life, error)  # what was pending is delivered again, so it is not ours any more
            await self._settle(life, settlements, results)

    async def _settle(self, life: Incarnation, settlements: Sequence[Settlement], results: list[bool]) -> None:
        bare = [index for index, settlement in enumerate(settlements) if not results[index] and _is_bare(settlement)]
        others = set(await self._acknowledge(life, [settlements[index].position for index in bare]))
        for index in bare:
            results[index] = settlements[index].position not in others
        left = [index for index, settled in enumerate(results) if not settled]
        if not left:
            return
        plain = [index for index in left if not settlements[index].outputs]
        staged = [index for index in left if settlements[index].outputs]
        refused = await self._apply(life, settlements, plain, results)
        if staged:
            held = [index for index in staged if life.holds(settlements[index].position)]
            settle = self._apply if self._broker.traits.atomic_outputs else self._append_and_apply
            refused = await settle(life, settlements, held, results) or refused
        if refused is not None:
            raise refused

    async def _acknowledge(self, life: Incarnation, positions: Sequence[Position]) -> list[Position]:
        # The hot path: fresh events, in one write. Returns those that are not fresh, or not ours: they are left to settle.
        fresh: dict[int, list[str]] = defaultdict(list)
        others: list[Position] = []
        for position in positions:
            fresh[position.partition].append(position.offset)
        for partition, offsets in fresh.items():
            counts = life.held[partition]
            if min(map(counts.get, offsets, repeat(0))) <= 0:
                others += [Position(partition, offset) for offset in offsets if counts.get(offset, 0) <= 0]
                fresh[partition] = [offset for offset in offsets if counts.get(offset, 0) > 0]
        acks = [(partition, offsets) for partition, offsets in fresh.items() if offsets]
        if acks:
            await life.acknowledge(acks)
            for partition, offsets in acks:
                forget = life.held[partition].pop
                for offset in offsets:
                    forget(offset, None)
        return others

    async def _append_and_apply(
        self, life: Incarnation, settlements: Sequence[Settlement], indexes: Sequence[int], results: list[bool]
    ) -> BrokerError | None:
        failed = await append(self._broker, [output for index in indexes for output in settlements[index].outputs])
        ready = [index for index in indexes if failed.keys().isdisjoint(o.stream for o in settlements[index].outputs)]
        bare = [replace(settlement, outputs=()) for settlement in settlements]
        refused = await self._apply(life, bare, ready, results)
        return next(iter(failed.values()), refused)

    async def _apply(
        self, life: Incarnation, settlements: Sequence[Settlement], indexes: Sequence[int], results: list[bool]
    ) -> BrokerError | None:
        # What needs no room comes first. Returns why something was not stored, after all the rest was.
        free: _Plan = defaultdict(list)
        large: _Plan = defaultdict(list)
        for index in indexes:
            settlement = settlements[index]
            position = settlement.position
            count = life.held[position.partition].get(position.offset)
            if count is not None:
                is_large = settlement.outputs or settlement.letters or type(settlement.outcome) is Dead
                (large if is_large else free)[position.partition].append(
                    (index, self._item(life, settlement, abs(count)))
                )
        await self._finish(life, free, results, settlements)
        return await self._finish(life, large, results, settlements)

    async def _finish(
        self, life: Incarnation, plan: _Plan, results: list[bool], settlements: Sequence[Settlement] = ()
    ) -> BrokerError | None:
        outputs = [output for planned in plan.values() for _, item in planned for output in item.outputs]
        targets = await Targets.of(self._broker, life.writer, outputs)
        refused = problem = targets.problem(outputs)
        for partition, planned in plan.items():
            left = [pair for pair in planned if problem is None or targets.problem(pair[1].outputs) is None]
            while left:
                count = fitting([(*item.outputs, *item.letters) for _, item in left[:MAX_ITEMS]])
                some, left = left[:count], left[count:]
                answers = await life.finish(partition, [item for _, item in some], targets)
                for (index, item), answer in zip(some, answers, strict=True):
                    if answer == b"FULL":
                        left.append((index, self._put_off(life, settlements[index], item)))
                    elif answer == b"MORE":
                        left.append((index, item))
                    elif isinstance(answer, int):
                        # Nobody takes anything from a living member: what was acked, and is not ours, was ours then.
                        results[index] = answer == 1 or Position(partition, item.offset) in life.doubted
                        life.held[partition].pop(item.offset, None)
                    else:
                        refused = _refusal(life, item, answer, targets)
                await life.schedule(partition, [item for _, item in some])
        return refused

    async def _release(self, life: Incarnation, partition: int) -> None:
        held = life.held[partition].items()
        items = [(index, Item("release", offset, abs(count))) for index, (offset, count) in enumerate(held)]
        await self._finish(life, {partition: items}, [False] * len(items))
        life.let_go(partition)

    def _item(self, life: Incarnation, settlement: Settlement, count: int) -> Item:
        offset, outcome, more = settlement.position.offset, settlement.outcome, (settlement.outputs, settlement.letters)
        if isinstance(outcome, Later):
            # The delay is what was meant; the two clocks need not agree.
            at_ms = max(0, int(life.now_ms + outcome.at_ms - self._clock.now_ms()))
            verdict = "retry" if outcome.counted else "postpone"
            return Item(verdict, offset, count, at_ms, parts.text(outcome.left), *more)
        if isinstance(outcome, Dead):
            return Item("dead", offset, count, outcome.reason, error_text(outcome.error), *more)
        return Item("done", offset, count, 0, "", *more)

    def _put_off(self, life: Incarnation, settlement: Settlement, item: Item) -> Item:
        group = self._subscription.group
        self._complain(BrokerFull(f"no room for more dead letters of {group!r}: replay or drop some. Such events wait"))
        if settlement.letters:
            return self._item(life, put_off(settlement, int(self._clock.now_ms() + DEAD_FULL_S * 1000)), item.attempt)
        return Item("release", item.offset, item.attempt, int(life.now_ms + DEAD_FULL_S * 1000))


def _refusal(life: Incarnation, item: Item, answer: Any, targets: Targets) -> BrokerError:
    # What `settle.lua` means by an answer that is no number.
    if isinstance(answer, bytes):
        return life.writer.failure(Exception(answer.decode().lstrip("-")), "dead letter")
    why, number = answer
    return targets.refusal(item.outputs[number - 1], why)


def _is_bare(settlement: Settlement) -> bool:
    """True for an event that is done, and with which nothing is stored."""
    return type(settlement.outcome) is Done and not (settlement.outputs or settlement.letters)
