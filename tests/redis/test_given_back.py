"""What is given back while the answer to its end is lost is handled again: by that answer alone nobody can tell."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from millstream.brokers.base import Claim, Consumer, Done, Settlement, Stored
from millstream.brokers.redis.consumer import RedisConsumer
from millstream.errors import BrokerDown
from millstream.wire import packs
from tests.redis import brokers
from tests.redis.brokers import records
from tests.redis.consuming import joined, life_of, persistent, soon
from tests.redis.raw import GROUP
from tests.redis.test_redis_outputs import both_modes, lose_answer, writer_of
from tests.redis.test_redis_packs import claims, consuming, part, settled
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

taken_or_not = pytest.mark.parametrize("taken", [True, False], ids=["taken", "waiting"])


async def looked(consumer: Consumer) -> list[Claim]:
    """What is handed out of all that is due now."""
    if isinstance(consumer, RedisConsumer):
        await persistent(consumer.keep)  # connects again
        life_of(consumer).set_free([0])
    found: list[Claim] = await persistent(consumer.fetch, 10, 0.2)
    return found


@both_modes
@taken_or_not
@pytest.mark.parametrize("single", [True, False], ids=["event", "part"])
async def test_what_is_given_back_while_the_answer_to_its_end_is_lost_is_handled_again(
    server: RedisServer, order: bool, taken: bool, single: bool
) -> None:
    async with consuming(server, order, 2) as (broker, consumer, [first, claim]):
        if single:
            await consumer.settle([settled(first, Done()), settled(claim, Done())])
            await broker.append("orders", [replace(record, key=None) for record in records(1)])
            (claim,) = await claims(consumer, 1)
            given, done = claim.stored, Settlement(claim.position, Done())
        else:
            await consumer.settle([settled(first, Done())])  # so that the server knows all scripts
            given, done = Stored(part(claim, 3), packs.read(claim.record, "").record(3)), settled(claim, Done())
        lose_answer(writer_of(consumer))
        with pytest.raises(BrokerDown):
            await consumer.settle([done])
        assert await broker.admin.give("orders", GROUP, [given]) == 1
        early = await looked(consumer) if taken else []
        assert await persistent(consumer.settle, [done]) == [True]
        (again,) = early or await claims(consumer, 1)
        assert (again.stored, again.left) in [(given, ()), (claim.stored, (3,))]
        assert (await broker.admin.groups("orders"))[0].pending == 1
        assert await consumer.settle([Settlement(again.position, Done())]) == [True]
        assert (await broker.admin.groups("orders"))[0].pending == 0


async def test_a_retry_whose_answer_was_lost_costs_one_attempt_though_it_comes_back_before_it_is_sent_again(
    server: RedisServer,
) -> None:
    async with consuming(server, False, 2) as (_, consumer, [first, claim]):
        await consumer.settle([settled(first, soon())])  # so that the server knows the script
        (again,) = await claims(consumer, 1)
        retry = settled(claim, soon())
        lose_answer(writer_of(consumer))
        with pytest.raises(BrokerDown):
            await consumer.settle([retry])
        assert await looked(consumer) == [], "it waits for that outcome"
        assert await persistent(consumer.settle, [retry]) == [True]
        (back,) = await claims(consumer, 1)
        assert (back.stored, back.attempt) == (claim.stored, 2)
        assert await consumer.settle([settled(again, Done()), settled(back, Done())]) == [True, True]


async def test_what_was_taken_before_its_outcome_could_be_sent_again_is_handed_back_at_the_end(
    server: RedisServer,
) -> None:
    async with consuming(server, False, 2) as (broker, consumer, [first, claim]):
        await consumer.settle([settled(first, soon())])
        lose_answer(writer_of(consumer))
        with pytest.raises(BrokerDown):
            await consumer.settle([settled(claim, soon())])
        assert len(await looked(consumer)) == 1  # the other one waits for its outcome
        await consumer.close()
        other = await joined(broker)
        assert sorted(back.attempt for back in await claims(other, 2)) == [2, 2]
        await other.close()
