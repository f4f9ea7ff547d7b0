"""Order and delivery hold while connections are cut, and members thrown out, by chance."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import pytest

from millstream.brokers.base import Claim, Consumer, Kept, Position, Settlement, Subscription, Traits
from millstream.brokers.ordered import OrderedConsumer
from millstream.brokers.redis.broker import RedisBroker
from millstream.brokers.redis.ledger import RedisLedger
from millstream.errors import LeaseLost
from millstream.settings import Settings
from millstream.testing.suite.chaos import Chaos
from millstream.testing.suite.trial import Place, trial
from tests.redis import brokers
from tests.redis.brokers import run_in
from tests.redis.consuming import persistent
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

CUT, THROWN_OUT = 0.04, 0.005  # of all calls
NAMESPACES = count()


class Cut:
    """A member whose connections end before or while it is called, and who is called again until it answers.

    Now and then somebody takes it for dead.
    """

    def __init__(self, consumer: OrderedConsumer, server: RedisServer, chance: random.Random) -> None:
        self._consumer = consumer
        self._server = server
        self._chance = chance

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        claims: list[Claim] = await self._called(self._consumer.fetch, limit, wait_s)
        return claims

    async def begin(self, positions: Sequence[Position]) -> None:
        with suppress(LeaseLost):
            await self._called(self._consumer.begin, positions)

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        answers: list[bool] = await self._called(self._consumer.settle, settlements)
        return answers

    async def finish(self, positions: Sequence[Position]) -> list[bool]:
        answers: list[bool] = await self._called(self._consumer.finish, positions)
        return answers

    async def keep(self) -> Kept:
        kept: Kept = await persistent(self._consumer.keep)
        return kept

    async def release(self, partitions: frozenset[int]) -> None:
        with suppress(LeaseLost):
            await self._called(self._consumer.release, partitions)

    async def close(self) -> None:
        await self._consumer.close()

    async def _called(self, call: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        life = self._consumer._ledger
        if isinstance(life, RedisLedger):
            for link in life._pair._links.values():
                if self._chance.random() < CUT:
                    run_in(self._server, "CLIENT", "KILL", "ID", link.client_id)
            if self._chance.random() < THROWN_OUT:
                run_in(self._server, "DEL", life._fence)
        return await persistent(call, *args)


@pytest.mark.parametrize("seed", [1, 2])
async def test_order_and_delivery_hold_while_connections_are_cut_and_members_thrown_out(
    server: RedisServer, seed: int
) -> None:
    chance = random.Random(seed)

    class CutBroker(RedisBroker):
        async def subscribe(self, subscription: Subscription) -> Consumer:
            consumer = await super().subscribe(subscription)
            assert isinstance(consumer, OrderedConsumer)
            return Cut(consumer, server, chance)

    place = Place(url=server.url, factory=CutBroker, settings=Settings(namespace=f"cut{next(NAMESPACES)}"))
    async with trial(place, Traits(order=True, packs=True)) as hands:
        chaos = Chaos(hands, seed)
        await chaos.run(300)
        await chaos.calm_down()
        assert chaos.first_done == chaos.published
