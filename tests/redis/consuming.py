"""Consumers on real servers, and how a worker would call them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from msgspec.structs import replace

from millstream.brokers.base import Claim, Done, Later, Outcome, Settlement, StreamSpec, Subscription
from millstream.brokers.redis.broker import RedisBroker
from millstream.brokers.redis.consumer import RedisConsumer
from millstream.brokers.redis.incarnation import Incarnation
from millstream.clock import Clock
from millstream.errors import BrokerError
from tests.redis.brokers import opened, run_in
from tests.redis.raw import GROUP, LOG
from tests.servers import RedisServer

ORDERS = StreamSpec("orders")
MANY = StreamSpec("many", partitions=4, key="order_id")
LEASE_S = 1.0
WAIT_S = 10.0  # for what must come; nothing takes so long

clock = Clock()


async def joined(broker: RedisBroker, spec: StreamSpec = ORDERS, **changes: Any) -> RedisConsumer:
    subscription = Subscription(spec, GROUP, "app", lease_s=LEASE_S)
    return await RedisConsumer.join(broker, replace(subscription, **changes))


@asynccontextmanager
async def alone(server: RedisServer, spec: StreamSpec = ORDERS) -> AsyncIterator[tuple[RedisBroker, RedisConsumer]]:
    async with opened(server.url, spec) as broker:
        consumer = await joined(broker, spec)
        yield broker, consumer
        await consumer.close()


def life_of(consumer: RedisConsumer) -> Incarnation:
    assert consumer._life is not None
    return consumer._life


async def claimed(consumer: RedisConsumer, count: int, *, beats: bool = False) -> list[Claim]:
    """So many claims, in as many calls as it takes."""
    claims: list[Claim] = []
    async with asyncio.timeout(WAIT_S):
        while len(claims) < count:
            claims += await consumer.fetch(count - len(claims), 0.1)
            if beats:
                await consumer.keep()
    return claims


async def settled(consumer: RedisConsumer, claims: Sequence[Claim], outcome: Outcome | None = None) -> list[bool]:
    return await consumer.settle([Settlement(claim.position, outcome or Done()) for claim in claims])


async def persistent(call: Any, *args: Any) -> Any:
    """As a worker calls: again, while it is told that trying again can help."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await call(*args)
            except BrokerError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(0.01)


def ids(claims: Sequence[Claim]) -> list[str]:
    return [claim.record.id for claim in claims]


def soon(seconds: float = 0.0) -> Later:
    return Later(clock.now_ms() + int(seconds * 1000), "try again")


def pending(server: RedisServer) -> int:
    (info,) = run_in(server, "XINFO", "GROUPS", LOG)
    found: int = dict(zip(info[::2], info[1::2], strict=True))[b"pending"]
    return found


def clients(server: RedisServer, side: str) -> list[bytes]:
    lines = run_in(server, "CLIENT", "LIST").splitlines()
    return [line.split(b" ", 1)[0].removeprefix(b"id=") for line in lines if f"-{side} ".encode() in line]
