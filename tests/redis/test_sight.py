"""Sight: a member of a settled group asks for little, and sees all the same what changes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest

from millstream.brokers.ledger import View
from millstream.brokers.ordered import OrderedConsumer
from millstream.brokers.redis.ledger import RedisLedger
from tests.redis import brokers
from tests.redis.brokers import opened, run_in
from tests.redis.consuming import WAIT_S
from tests.redis.raw import LEASE
from tests.redis.test_redis_ordered import MANY, ORDERS, alone, life_of, member
from tests.servers import RedisServer

started = brokers.started
server = brokers.server


async def shared(consumers: Sequence[OrderedConsumer], *counts: int) -> None:
    """Let them beat until they have so many partitions each."""
    async with asyncio.timeout(WAIT_S):
        while sorted(len(consumer._windows) for consumer in consumers) != sorted(counts):
            for consumer in consumers:
                await consumer.release((await consumer.keep()).drain)
    for consumer in consumers:
        await life_of(consumer).look()


async def asked(life: RedisLedger, monkeypatch: pytest.MonkeyPatch) -> tuple[View, int]:
    """A look, and how many leases it asked for."""
    writer, leases = await life._pair.writer(), Counter[bool]()
    calls = writer.calls

    async def noted(commands: Sequence[Sequence[object]], deadline_s: float = WAIT_S) -> list[object]:
        leases.update(command[0] == "HMGET" for command in commands)
        return await calls(commands, deadline_s)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(writer, "calls", noted)
        return await life.look(), leases[True]


def owners(view: View) -> Counter[str]:
    return Counter(lease.owner for lease in view.leases)


async def test_where_all_is_settled_a_member_asks_for_its_own_leases_alone(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(server.url, MANY) as broker:
        both = [await member(broker, MANY) for _ in range(2)]
        await shared(both, 2, 2)
        life, other = map(life_of, both)
        view, leases = await asked(life, monkeypatch)
        assert owners(view) == {life.name: 2, other.name: 2} and leases == 2
        life._sight._sweep_at = 0.0
        view, leases = await asked(life, monkeypatch)
        assert owners(view) == {life.name: 2, other.name: 2} and leases == 4
        for consumer in both:
            await consumer.close()


async def test_who_comes_and_who_goes_is_seen_at_once(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(server.url, MANY) as broker:
        both = [await member(broker, MANY) for _ in range(2)]
        await shared(both, 2, 2)
        life = life_of(both[0])
        third = await member(broker, MANY)
        view, leases = await asked(life, monkeypatch)
        assert len(view.members) == 3 and leases == 2 + 4
        await third.close()
        assert len((await life.look()).members) == 2
        await both[1].close()
        view, _ = await asked(life, monkeypatch)
        assert view.members == {life.name} and owners(view) == {life.name: 2, "": 2}
        await both[0].close()


async def test_what_has_no_owner_is_looked_at_until_somebody_has_taken_it(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(server.url, ORDERS) as broker:
        both = [await member(broker) for _ in range(2)]
        await shared(both, 1, 0)
        owner, idle = sorted(both, key=lambda consumer: len(consumer._windows), reverse=True)
        assert (await asked(life_of(idle), monkeypatch))[1] == 0
        await owner.close()
        for _ in range(2):
            view, leases = await asked(life_of(idle), monkeypatch)
            assert owners(view) == {"": 1} and leases == 1
        await idle.close()


async def test_a_lease_of_ours_that_somebody_has_changed_is_seen_at_once(server: RedisServer) -> None:
    async with alone(server) as (_, consumer):
        life = life_of(consumer)
        assert owners(await life.look()) == {life.name: 1}
        run_in(server, "HSET", LEASE, "owner", "", "want", life.name)
        assert [(lease.owner, lease.want) for lease in (await life.look()).leases] == [("", life.name)]
