"""Packs on Redis: what is left of them and their dead letters, with outputs in either way, in both ways to consume."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from millstream.brokers.base import (
    Claim,
    Consumer,
    Done,
    Later,
    Letter,
    Outcome,
    Policy,
    Position,
    Settlement,
    Stored,
    Subscription,
)
from millstream.brokers.redis import incarnation, progress
from millstream.brokers.redis.broker import RedisBroker
from millstream.errors import BrokerDown, BrokerFull
from millstream.wire import packs
from millstream.wire.entry import Record
from millstream.wire.packs import Columns
from tests.redis import brokers
from tests.redis.brokers import opened, records, run_in
from tests.redis.consuming import LEASE_S, ORDERS, claimed, clock, joined, persistent, soon
from tests.redis.raw import GROUP, LOG
from tests.redis.test_redis_outputs import DEDUPE, MAILS, both_modes, both_ways, lose_answer, mails, stored, writer_of
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

EVENTS = 5


@asynccontextmanager
async def consuming(
    server: RedisServer, order: bool, count: int = 1, way: str = "together"
) -> AsyncIterator[tuple[RedisBroker, Consumer, list[Claim]]]:
    """A member of a group, and the packs that it has claimed; `mails` is the stream of outputs."""
    async with opened(f"{server.url}?outputs={way}", ORDERS) as broker:
        await broker.declare(MAILS, DEDUPE if way == "before" else None)
        consumer = await broker.subscribe(Subscription(ORDERS, GROUP, "app", lease_s=LEASE_S, order=order))
        await broker.append("orders", [pack(n) for n in range(count)])
        yield broker, consumer, await claims(consumer, count)
        await consumer.close()


def pack(number: int) -> Record:
    events = [replace(event, id="", key=None) for event in records(EVENTS)]
    return packs.write(Columns.of(events), "none", partition=0, id_=f"p-{number}")


async def claims(consumer: Consumer, count: int) -> list[Claim]:
    found: list[Claim] = []
    until = clock.monotonic() + 10
    while len(found) < count and clock.monotonic() < until:
        found += await consumer.fetch(count - len(found), 0.5)
    return found


def settled(claim: Claim, outcome: Outcome, dying: Sequence[int] = (), outputs: int = 0) -> Settlement:
    events = packs.read(claim.record, claim.position.offset)
    letters = [Letter(part, events.record(part), "failed", "broken") for part in dying]
    return Settlement(claim.position, outcome, mails(outputs, derived=True), letters=letters)


def left(*parts: int) -> Later:
    return replace(soon(), left=parts)


async def dead(broker: RedisBroker) -> list[Position]:
    return [letter.stored.position for letter in await broker.admin.dead("orders", GROUP)]


def part(claim: Claim, number: int) -> Position:
    position = claim.position
    return Position(position.partition, packs.part_offset(position.offset, number))


@both_modes
@both_ways
async def test_a_settlement_whose_answer_was_lost_stores_letters_and_outputs_once(
    server: RedisServer, order: bool, way: str
) -> None:
    async with consuming(server, order, way=way) as (broker, consumer, [claim]):
        settlement = settled(claim, left(0, 3), dying=[1, 4], outputs=2)
        lose_answer(writer_of(consumer))
        with pytest.raises(BrokerDown):
            await consumer.settle([settlement])
        await persistent(consumer.settle, [settlement])
        assert await stored(broker) == [1, 1] and await dead(broker) == [part(claim, 1), part(claim, 4)]
        [again] = await claims(consumer, 1)
        assert (list(again.left), again.attempt) == ([0, 3], 2)
        assert await consumer.settle([settled(again, Done())]) == [True]


@both_modes
@both_ways
async def test_at_maxmemory_letters_wait_and_all_else_goes_on(server: RedisServer, order: bool, way: str) -> None:
    async with consuming(server, order, 3, way) as (broker, consumer, [dying, done, retried]):
        settlements = [settled(dying, left(0), dying=[1]), settled(done, Done()), settled(retried, left(4))]
        run_in(server, "CONFIG", "SET", "maxmemory", 1)
        try:
            for _ in range(2):
                with pytest.raises(BrokerFull):
                    await consumer.settle(settlements)
                assert await dead(broker) == []
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", 0)
        await consumer.settle(settlements)
        assert await dead(broker) == [part(dying, 1)]
        again = {claim.position: list(claim.left) for claim in await claims(consumer, 2)}
        assert again == {dying.position: [0], retried.position: [4]}


@both_modes
@both_ways
async def test_without_room_for_letters_their_events_wait_and_what_is_finished_is(
    server: RedisServer, order: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (incarnation, progress):
        monkeypatch.setattr(module, "MAX_DEAD", 1)
    for name in ("ordered", "redis.consumer"):
        monkeypatch.setattr(f"millstream.brokers.{name}.DEAD_FULL_S", 0.0)
    async with consuming(server, order, way=way) as (broker, consumer, [claim]):
        assert await consumer.settle([settled(claim, left(0), dying=[1, 4], outputs=2)]) == [True]
        assert await dead(broker) == [] and await stored(broker) == [1, 1]
        [again] = await claims(consumer, 1)
        assert (list(again.left), again.attempt) == ([0, 1, 4], 1)
        assert await consumer.settle([settled(again, Done(), dying=[4])]) == [True]
        assert await dead(broker) == [part(claim, 4)]


async def test_what_is_done_counts_packs_whatever_died_of_them(server: RedisServer) -> None:
    async with consuming(server, False, 2) as (broker, consumer, [first, second]):
        outcomes = settled(first, Done(), dying=[0, 1]), settled(second, left(3), dying=[4])
        assert await consumer.settle(outcomes) == [True, True]
        assert await figures(broker) == (1, 1, 3)
        letters = await broker.admin.dead("orders", GROUP)
        assert await broker.admin.drop(letters[:1]) == [True]
        assert await broker.admin.replay(letters[2:]) == [True]
        assert await figures(broker) == (1, 1, 1)
        [again] = await claims(consumer, 1)
        assert list(again.left) == [3, 4] and await consumer.settle([settled(again, Done())]) == [True]
        assert await figures(broker) == (2, 0, 1)


async def figures(broker: RedisBroker) -> tuple[int | None, int, int]:
    """Done, pending, dead."""
    [info] = await broker.admin.groups("orders")
    return info.done, info.pending, info.dead


async def test_the_letter_of_an_event_keeps_its_pack(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        await broker.declare(ORDERS, Policy(events=10))
        consumer = await joined(broker)
        await broker.append("orders", [pack(n) for n in range(300)])
        first, *others = await claimed(consumer, 300)
        assert await consumer.settle([settled(first, Done(), dying=[2])]) == [True]
        assert all(await consumer.settle([settled(claim, Done()) for claim in others]))
        for _ in range(2):
            tended = await broker.tend("orders")
            assert (tended.trimmed, tended.pinned_by) == (0, f"dead letters of {GROUP}")
        assert await broker.admin.replay(await broker.admin.dead("orders", GROUP)) == [True]
        [again] = await claimed(consumer, 1)
        assert list(again.left) == [2] and await consumer.settle([settled(again, Done())]) == [True]
        assert (await broker.tend("orders")).trimmed >= 100 and run_in(server, "XLEN", LOG) <= 200
        await consumer.close()


@both_modes
async def test_an_event_of_a_pack_is_given_once_more_alone(server: RedisServer, order: bool) -> None:
    async with consuming(server, order) as (broker, consumer, [claim]):
        assert await consumer.settle([settled(claim, Done())]) == [True]
        events = packs.read(claim.record, claim.position.offset)
        given = [Stored(part(claim, number), events.record(number)) for number in (3, 1)]
        assert await broker.admin.give("orders", GROUP, [*given, given[0]]) == 2
        assert len(await broker.admin.pending("orders", GROUP, 10)) == (2 if order else 1)
        found = await claims(consumer, 2 if order else 1)
        parts = [(packs.part_of(again.position.offset)[1], *again.left) for again in found]
        assert sorted(parts, key=str) == ([(1,), (3,)] if order else [(None, 1, 3)])
        assert all(await consumer.settle([Settlement(again.position, Done()) for again in found]))
