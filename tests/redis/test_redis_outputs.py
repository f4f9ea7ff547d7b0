"""Outputs on Redis: stored with the outcome by one script, or before it where the URL says so; in both ways to consume."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from millstream.brokers.base import (
    Claim,
    Consumer,
    Dead,
    Done,
    Later,
    Outcome,
    Output,
    Policy,
    Settlement,
    StreamSpec,
    Subscription,
)
from millstream.brokers.ordered import OrderedConsumer
from millstream.brokers.redis.broker import RedisBroker
from millstream.brokers.redis.consumer import RedisConsumer
from millstream.brokers.redis.ledger import RedisLedger
from millstream.brokers.redis.link import Link
from millstream.errors import BadSetting, BrokerDown, BrokerFull, BrokerRefused
from tests.redis import brokers
from tests.redis.brokers import everything, made, opened, records, run_in
from tests.redis.consuming import LEASE_S, clock, persistent
from tests.redis.raw import GROUP
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

ORDERS = StreamSpec("orders")
MAILS = StreamSpec("mails", partitions=2, key="order_id")
DEDUPE = Policy(dedupe_ms=60_000, dedupe_ids=10_000)

both_modes = pytest.mark.parametrize("order", [False, True], ids=["queue", "log"])
both_ways = pytest.mark.parametrize("way", ["together", "before"])


@asynccontextmanager
async def consuming(
    server: RedisServer, order: bool, events: int, policy: Policy | None = None, way: str = "together"
) -> AsyncIterator[tuple[RedisBroker, Consumer, list[Claim]]]:
    """A member of a group, and what it has claimed; `mails` is the stream of outputs."""
    async with opened(f"{server.url}?outputs={way}", ORDERS) as broker:
        await broker.declare(MAILS, policy)
        consumer = await broker.subscribe(Subscription(ORDERS, GROUP, "app", lease_s=LEASE_S, order=order))
        await broker.append("orders", records(events))
        claims: list[Claim] = []
        while len(claims) < events:
            claims += await consumer.fetch(events - len(claims), 1.0)
        yield broker, consumer, claims
        await consumer.close()


def mails(count: int, *, first: int = 0, size_bytes: int = 20, **changes: Any) -> list[Output]:
    """So many outputs; by default with ids of the user's own."""
    derived = changes.pop("derived", False)
    found = records(count, partitions=2, size_bytes=size_bytes, first=first)
    return [Output("mails", replace(record, **changes), derived) for record in found]


def settled(claim: Claim, outputs: Sequence[Output] = ()) -> Settlement:
    return Settlement(claim.position, Done(), outputs)


async def stored(broker: RedisBroker) -> list[int]:
    """How many events there are in each partition of `mails`."""
    return [len(await broker.read("mails", partition, None, 10_000)) for partition in range(MAILS.partitions)]


def writer_of(consumer: Consumer) -> Link:
    if isinstance(consumer, RedisConsumer):
        assert consumer._life is not None
        return consumer._life.writer
    assert isinstance(consumer, OrderedConsumer) and isinstance(consumer._ledger, RedisLedger)
    return consumer._ledger._pair._links["writer"]


def lose_answer(link: Link) -> None:
    """The connection ends after the next write was done, and before its answer is seen."""
    send = link.send

    async def lost(*args: Any) -> list[Any]:
        await send(*args)
        link.close()
        raise BrokerDown("the answer was lost")

    link.send = lost  # type: ignore[method-assign, assignment]


@both_modes
@both_ways
async def test_a_settlement_whose_answer_was_lost_stores_its_outputs_once(
    server: RedisServer, order: bool, way: str
) -> None:
    policy = DEDUPE if way == "before" else None
    async with consuming(server, order, 3, policy, way) as (broker, consumer, claims):
        settlements = [settled(claim, mails(4, first=4 * n, derived=True)) for n, claim in enumerate(claims)]
        lose_answer(writer_of(consumer))
        with pytest.raises(BrokerDown):
            await consumer.settle(settlements)
        await persistent(consumer.settle, settlements)
        assert await stored(broker) == [6, 6]
        (group,) = await broker.admin.groups("orders")
        assert (group.pending, group.lag, group.done) == (0, 0, 3)


@both_modes
async def test_who_was_thrown_out_stores_no_output(server: RedisServer, order: bool) -> None:
    async with consuming(server, order, 2) as (broker, consumer, claims):
        if order:
            run_in(server, "HSET", "{orders}:lease:g", "owner", "somebody else", "epoch", 9_999_999_999_999)
        else:
            run_in(server, "DEL", *run_in(server, "KEYS", "*fence*"))
        assert await consumer.settle([settled(claim, mails(2)) for claim in claims]) == [False, False]
        assert await stored(broker) == [0, 0]


@both_modes
@both_ways
async def test_at_maxmemory_outputs_wait_and_all_else_goes_on(server: RedisServer, order: bool, way: str) -> None:
    async with consuming(server, order, 3, way=way) as (broker, consumer, claims):
        first, second, third = claims
        settlements = [settled(first, mails(3)), settled(second), settled(third, mails(1, first=3))]
        run_in(server, "CONFIG", "SET", "maxmemory", 1)
        try:
            for _ in range(2):
                with pytest.raises(BrokerFull):
                    await consumer.settle(settlements)
                (group,) = await broker.admin.groups("orders")
                assert group.done == 1 and await stored(broker) == [0, 0]
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", 0)
        await consumer.settle(settlements)
        assert await stored(broker) == [2, 2]
        (group,) = await broker.admin.groups("orders")
        assert group.done == 3


async def test_outputs_wait_while_a_stream_of_theirs_is_full_and_others_go_on(server: RedisServer) -> None:
    async with consuming(server, False, 4, Policy(ceiling_events=4)) as (broker, consumer, claims):
        await broker.declare(StreamSpec("letters"))
        letter = Output("letters", records(1)[0])
        first, second, third, fourth = claims
        settlements = [
            settled(first, mails(4)),
            settled(second, [letter, *mails(1)]),
            settled(third, mails(1)),
            settled(fourth, [letter]),
        ]
        for _ in range(2):
            with pytest.raises(BrokerFull, match=r"'mails'.* 4 events"):
                await consumer.settle(settlements)
            assert await stored(broker) == [2, 2] and len(await broker.read("letters", 0, None, 9)) == 1
            (group,) = await broker.admin.groups("orders")
            assert (group.done, group.pending) == (2, 2)


@both_modes
async def test_the_outputs_of_one_event_may_pass_a_ceiling_together(server: RedisServer, order: bool) -> None:
    async with consuming(server, order, 2, Policy(ceiling_events=6)) as (broker, consumer, claims):
        assert await consumer.settle([settled(claims[0], mails(10))]) == [True]
        with pytest.raises(BrokerFull, match=r"'mails' .* ceiling of 6 events"):
            await consumer.settle([settled(claims[1], mails(1))])
        assert await stored(broker) == [5, 5]


@both_modes
async def test_the_outputs_of_several_events_pass_a_ceiling_no_further_than_those_of_one(
    server: RedisServer, order: bool
) -> None:
    async with consuming(server, order, 6, Policy(ceiling_events=4)) as (broker, consumer, claims):
        with pytest.raises(BrokerFull, match=r"'mails' .* ceiling of 4 events"):
            await consumer.settle([settled(claim, mails(2)) for claim in claims[:3]] + [settled(claims[3], mails(4))])
        assert await stored(broker) == [2, 2]


@both_modes
async def test_outputs_that_fit_in_part_only_wait_for_room_and_hold_up_nothing_else(
    server: RedisServer, order: bool
) -> None:
    policy = replace(DEDUPE, ceiling_events=4)
    async with consuming(server, order, 2, policy, "before") as (broker, consumer, claims):
        for _ in range(2):
            with pytest.raises(BrokerFull, match=r"'mails' .* ceiling of 4 events"):
                await consumer.settle([settled(claims[0], mails(6)), settled(claims[1])])
            (group,) = await broker.admin.groups("orders")
            assert group.done == 1 and sum(await stored(broker)) == 4


@both_modes
@both_ways
async def test_an_id_that_is_remembered_is_not_stored_again(server: RedisServer, order: bool, way: str) -> None:
    async with consuming(server, order, 4, DEDUPE, way) as (broker, consumer, claims):
        own, derived = mails(2), mails(2, derived=True)
        for claim, outputs in zip(claims, [own, own, [*own, *mails(2, first=2)], derived], strict=True):
            assert await consumer.settle([settled(claim, outputs)]) == [True]
        assert await stored(broker) == ([3, 3] if way == "together" else [2, 2])
        repeats = [int(run_in(server, "HGET", f"{{mails:{n}}}:meta", "repeats")) for n in range(2)]
        assert repeats == ([2, 2] if way == "together" else [3, 3])


@both_modes
@both_ways
async def test_an_output_for_later_is_kept_aside(server: RedisServer, order: bool, way: str) -> None:
    async with consuming(server, order, 1, way=way) as (broker, consumer, claims):
        later = mails(2, due_ms=clock.now_ms() + 3_600_000)
        now = mails(2, first=2, due_ms=clock.now_ms() - 1_000)
        assert await consumer.settle([settled(claims[0], [*later, *now])]) == [True]
        assert await stored(broker) == [1, 1]
        assert [run_in(server, "ZCARD", f"{{mails:{n}}}:later") for n in range(2)] == [1, 1]


@both_modes
@both_ways
async def test_a_thousand_outputs_of_one_event_are_stored_in_their_order(
    server: RedisServer, order: bool, way: str
) -> None:
    async with consuming(server, order, 2, way=way) as (broker, consumer, claims):
        outputs = mails(1_000)
        assert await consumer.settle([settled(claims[0], outputs), settled(claims[1], mails(1, first=1_000))]) == [
            True,
            True,
        ]
        for partition in range(2):
            found = list(await everything(broker, "mails", partition))
            assert found == [f"id-{n}" for n in range(partition, 1_001, 2)]


@both_modes
async def test_more_outputs_than_one_call_takes_leave_in_several(server: RedisServer, order: bool) -> None:
    async with consuming(server, order, 300) as (broker, consumer, claims):
        settlements = [settled(claim, mails(2, first=2 * n, size_bytes=9_000)) for n, claim in enumerate(claims)]
        assert await consumer.settle(settlements) == [True] * 300
        for partition in range(2):
            assert list(await everything(broker, "mails", partition)) == [f"id-{n}" for n in range(partition, 600, 2)]
        if order:
            assert int(run_in(server, "HGET", "{orders}:lease:g", "seq")) >= 6, "of about a megabyte"


@both_modes
@pytest.mark.parametrize("key", ["mails:1", "{mails:1}:later", "{mails:1}:ids:2", "{mails:1}:meta"])
async def test_a_target_of_another_kind_leaves_no_half_of_the_outputs(
    server: RedisServer, order: bool, key: str
) -> None:
    async with consuming(server, order, 2, DEDUPE) as (broker, consumer, claims):
        run_in(server, "SET", key, "somebody else's")
        with pytest.raises(BrokerRefused, match=key.replace("{", r"\{")):
            await consumer.settle([settled(claims[0], mails(4))])
        assert run_in(server, "XLEN", "mails:0") == 0
        run_in(server, "DEL", key)
        await consumer.settle([settled(claims[0], mails(4))])
        assert await stored(broker) == [2, 2]


async def test_outputs_go_with_every_outcome_and_each_is_stored_once(server: RedisServer) -> None:
    async with consuming(server, False, 3) as (broker, consumer, claims):
        outcomes: tuple[Outcome, ...] = Done(), Later(clock.now_ms() + 60_000, "busy"), Dead("failed", "why")
        settlements = [
            Settlement(claim.position, outcome, mails(2, first=2 * n))
            for n, (claim, outcome) in enumerate(zip(claims, outcomes, strict=True))
        ]
        assert await consumer.settle([*settlements, *settlements]) == [True] * 3 + [False] * 3
        assert await stored(broker) == [3, 3]
        (group,) = await broker.admin.groups("orders")
        assert (group.dead, group.scheduled, group.done) == (1, 1, 1)


async def test_a_suspects_outputs_go_with_its_outcome_too(server: RedisServer) -> None:
    async with consuming(server, False, 1) as (broker, consumer, claims):
        assert isinstance(consumer, RedisConsumer)
        await consumer.begin([claims[0].position])
        assert await consumer.settle([settled(claims[0], mails(2))]) == [True]
        assert await stored(broker) == [1, 1] and not run_in(server, "EXISTS", "{orders}:note:g")


async def test_the_url_says_where_outputs_go(server: RedisServer) -> None:
    assert made(server.url).traits.atomic_outputs
    async with opened(f"{server.url}?outputs=before") as broker:
        assert not broker.traits.atomic_outputs
    with pytest.raises(BadSetting, match="together, before"):
        made(f"{server.url}?outputs=never")


async def test_an_output_for_an_unknown_stream_or_partition_stores_nothing(server: RedisServer) -> None:
    async with consuming(server, False, 2) as (broker, consumer, claims):
        (known, _) = mails(2)
        for wrong in Output("nowhere", known.record), Output("mails", replace(known.record, partition=2)):
            with pytest.raises(BrokerRefused, match=wrong.stream):
                await consumer.settle([settled(claims[0], [known, wrong])])
        assert await stored(broker) == [0, 0]
        assert await consumer.settle([settled(claims[0]), settled(claims[1], [known])]) == [True, True]
