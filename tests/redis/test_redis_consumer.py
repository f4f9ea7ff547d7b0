"""A member of a group on real servers: what it claims, settles and keeps, and what becomes of it when it dies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from millstream.brokers.base import Claim, Dead, Done, Later, Output, Settlement
from millstream.brokers.redis.incarnation import Incarnation
from millstream.brokers.redis.members import CLAIM_AFTER_S
from millstream.brokers.redis.sizes import MAX_REPLY_BYTES
from millstream.errors import BrokerError, GroupOwned, LeaseLost
from millstream.stream import Position
from millstream.units import MAX_EVENT_BYTES
from tests.redis import brokers
from tests.redis.brokers import opened, records, run_in
from tests.redis.consuming import (
    LEASE_S,
    MANY,
    ORDERS,
    WAIT_S,
    alone,
    claimed,
    clients,
    clock,
    ids,
    joined,
    life_of,
    pending,
    settled,
    soon,
)
from tests.redis.raw import DUE, GROUP, LOG, META, NOTE, TICK, Raw
from tests.servers import RedisServer

started = brokers.started
server = brokers.server


def brought_by(life: Incarnation, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many events each read brings from now on."""
    brought: list[int] = []
    claim = life._claim

    def noted(found: Sequence[Any]) -> None:
        brought.extend(len(entries) for _, entries in found)
        claim(found)

    monkeypatch.setattr(life, "_claim", noted)
    return brought


# The healthy way


async def test_events_are_claimed_settled_and_gone(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(2_500))
        claims = await claimed(consumer, 2_500)
        assert ids(claims) == [f"id-{n}" for n in range(2_500)] and {claim.attempt for claim in claims} == {1}
        assert await consumer.fetch(10, 0) == []
        assert await settled(consumer, claims) == [True] * 2_500
        assert await settled(consumer, claims[:3]) == [False] * 3
        (group,) = await broker.admin.groups("orders")
        assert (group.done, group.pending, group.lag, group.consumers) == (2_500, 0, 0, 1)


async def test_no_more_than_asked_for_comes_from_many_partitions(server: RedisServer) -> None:
    async with alone(server, MANY) as (broker, consumer):
        await broker.append("many", records(100, partitions=4))
        sizes: list[int] = []
        found: list[Claim] = []
        while len(found) < 100:
            claims = await consumer.fetch(3, WAIT_S)
            sizes.append(len(claims))
            found += claims
        assert max(sizes) == 3 and len(set(ids(found))) == 100
        assert all(await settled(consumer, found))


async def test_one_busy_partition_of_many_fills_a_fetch(server: RedisServer) -> None:
    async with alone(server, MANY) as (broker, consumer):
        await broker.append("many", records(100))
        assert len(await consumer.fetch(80, WAIT_S)) == 80


async def test_large_events_come_few_at_a_time_from_the_first_read_on(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with alone(server) as (broker, consumer):
        for _ in range(2):  # an append holds 8 MB at most
            await broker.append("orders", [replace(record, data=b"x" * 524_288) for record in records(12)])
        brought = brought_by(life_of(consumer), monkeypatch)
        assert all(await settled(consumer, await claimed(consumer, 24)))
        assert brought[0] <= MAX_REPLY_BYTES // MAX_EVENT_BYTES and max(brought) <= MAX_REPLY_BYTES // 524_288


async def test_small_events_come_many_at_a_time_from_the_third_read_on(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(1_000))
        brought = brought_by(life_of(consumer), monkeypatch)
        assert all(await settled(consumer, await claimed(consumer, 1_000)))
        assert len(brought) == 3


async def test_a_few_events_are_handled_before_the_next_read_and_a_page_after_it(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with alone(server) as (broker, consumer):
        life, steps = life_of(consumer), list[str]()
        read = life.read

        async def noted(*args: Any) -> None:
            steps.append("read")
            await read(*args)

        monkeypatch.setattr(life, "read", noted)
        for count, order in ((1, ["handler", "read"]), (4, ["read", "handler"])):
            await broker.append("orders", records(count))
            assert len(await consumer.fetch(4, WAIT_S)) == count
            steps.clear()
            asyncio.get_running_loop().call_soon(steps.append, "handler")
            life._watch_at = float("inf")  # or that would come before
            assert await consumer.fetch(4, 0) == [] and steps == order


async def test_a_retry_comes_back_when_it_is_due_and_not_before(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(1))
        begun = clock.monotonic()
        assert await settled(consumer, await claimed(consumer, 1), soon(0.3)) == [True]
        (claim,) = await consumer.fetch(1, WAIT_S)
        assert claim.attempt == 2 and not claim.suspect and not claim.postponed
        assert 0.29 <= clock.monotonic() - begun < 2
        await settled(consumer, [claim], Later(clock.now_ms(), "later", counted=False))
        (claim,) = await consumer.fetch(1, WAIT_S)
        assert (claim.attempt, claim.postponed) == (2, 1)
        assert await settled(consumer, [claim]) == [True] and not run_in(server, "EXISTS", DUE, NOTE)


async def test_a_retry_that_falls_due_ends_a_fetch_that_waits(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(1))
        claims = await claimed(consumer, 1)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(consumer.fetch(1, WAIT_S))
            await brokers.until(lambda: life_of(consumer)._blocked_until_ms > 0)
            begun = clock.monotonic()
            await settled(consumer, claims, soon(0.02))
        assert len(waiting.result()) == 1 and clock.monotonic() - begun < 0.2


async def test_an_entry_that_is_no_event_is_claimed_with_its_fault(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        run_in(server, "XADD", LOG, "*", "hello", "world")
        (claim,) = await claimed(consumer, 1)
        assert claim.fault and not claim.record.type and b"hello" in claim.record.data
        await settled(consumer, [claim], soon())
        (claim,) = await claimed(consumer, 1)
        assert claim.fault and claim.attempt == 2
        assert await settled(consumer, [claim], Dead("undecodable", "x" * 5_000 + "\ud800")) == [True]
        (letter,) = await broker.admin.dead("orders", GROUP)
        assert letter.stored == claim.stored and len(letter.error) == 4_000
        assert await broker.admin.replay([letter]) == [True]
        assert ids(await claimed(consumer, 1)) == ids([claim])


async def test_outputs_are_stored_before_their_outcome(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.declare(MANY)
        await broker.append("orders", records(2))
        one, two = await claimed(consumer, 2)
        outputs = [Output("many", record) for record in records(4, partitions=4)]
        lost = Settlement(Position(0, "1-1"), Done(), outputs)
        settlements = [Settlement(one.stored.position, Done(), outputs), lost, Settlement(two.stored.position, Done())]
        assert await consumer.settle(settlements) == [True, False, True]
        assert [len(await broker.read("many", partition, None, 10)) for partition in range(4)] == [1] * 4


async def test_a_cancelled_fetch_loses_nothing(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        for number in range(10):
            task = asyncio.get_running_loop().create_task(consumer.fetch(5, WAIT_S))
            await asyncio.sleep(0.002 * number)
            await broker.append("orders", records(3, first=3 * number))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await settled(consumer, await task)
        left = await consumer.fetch(100, 1)
        assert {claim.attempt for claim in left} <= {1} and all(await settled(consumer, left))
        assert await consumer.fetch(100, 0) == [] and pending(server) == 0
        (group,) = await broker.admin.groups("orders")
        assert group.done == 30


async def test_a_closed_consumer_hands_back_what_it_held_uncounted(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(4))
        leaver = await joined(broker)
        one, _two = await claimed(leaver, 2)
        await leaver.release(frozenset({0}))
        assert await settled(leaver, [one]) == [False]
        assert {claim.attempt for claim in await claimed(leaver, 2)} == {1}
        await leaver.close()
        claims = await claimed(consumer, 4, beats=True)
        assert {claim.attempt for claim in claims} == {1} and {claim.suspect for claim in claims} == {0}
        assert len(clients(server, "reader")) == 1 and run_in(server, "KEYS", "*fence*") == [life_of(consumer)._fence]
        with pytest.raises(BrokerError):
            await leaver.fetch(1, 0)


async def test_a_closed_consumer_hands_back_what_it_was_given_and_never_saw_uncounted(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        leaver = await joined(broker)
        task = asyncio.get_running_loop().create_task(leaver.fetch(5, WAIT_S))
        await brokers.until(lambda: life_of(leaver)._blocked_until_ms > 0)
        task.cancel()  # as at the end of a worker: the question is under way, and nobody waits for its answer
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await broker.append("orders", records(3))
        await leaver.close()
        claims = await claimed(consumer, 3, beats=True)
        assert {claim.attempt for claim in claims} == {1} and all(await settled(consumer, claims))


async def test_a_group_belongs_to_one_app_until_somebody_adopts_it(server: RedisServer) -> None:
    async with alone(server) as (broker, _):
        with pytest.raises(GroupOwned, match="belongs to the app 'app'"):
            await joined(broker, owner="other")
        await broker.admin.adopt("orders", GROUP, "other")
        await (await joined(broker, owner="other")).close()


# Members that die


async def test_a_silent_member_is_taken_over_within_a_second_of_its_lease(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(3))
        silent = await joined(broker)
        held = await claimed(silent, 3)
        await silent.keep()
        begun = clock.monotonic()
        claims = await claimed(consumer, 3, beats=True)
        assert LEASE_S * 0.9 <= clock.monotonic() - begun <= LEASE_S + 1
        assert ids(claims) == ids(held)
        assert {(claim.attempt, claim.suspect) for claim in claims} == {(2, 1)}
        assert await settled(silent, held) == [False] * 3, "a zombie settles nothing"
        assert (await silent.keep()).lost == {claim.position for claim in held}
        assert await settled(consumer, claims) == [True] * 3
        await broker.append("orders", records(1, first=3))
        assert len(await claimed(silent, 1)) == 1, "it lives on under another name"
        await silent.close()
        assert len(run_in(server, "KEYS", "*fence*")) == 1


async def test_a_slow_member_that_beats_keeps_what_it_holds(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(1))
        slow = await joined(broker)
        held = await claimed(slow, 1)
        until = clock.monotonic() + 2.5 * LEASE_S
        while clock.monotonic() < until:
            assert await consumer.fetch(1, 0.2) == []
            await consumer.keep()
            assert not (await slow.keep()).lost
        assert await settled(slow, held) == [True]
        await slow.close()


async def test_what_a_fenced_member_held_is_lost_once_and_before_it_claims_again(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(2))
        held = await claimed(consumer, 2)
        with Raw(server.port) as redis:
            name = life_of(consumer).name
            assert redis.evict(name, redis.score(name)) == [b"done", 2] and redis.bury(name, redis.score(name)) == b"OK"
        assert await consumer.fetch(10, 0) == [] and await consumer.fetch(10, 0.05) == []
        with pytest.raises(LeaseLost):
            await consumer.begin([held[0].stored.position])
        assert (await consumer.keep()).lost == {claim.position for claim in held}
        assert not (await consumer.keep()).lost
        assert ids(await claimed(consumer, 2)) == ids(held)


async def test_after_a_long_pause_nothing_is_handed_out_that_others_may_have(server: RedisServer) -> None:
    async with alone(server, MANY) as (broker, consumer):
        await broker.append("many", records(4, partitions=4))
        assert len(await consumer.fetch(1, WAIT_S)) == 1 and len(life_of(consumer).surplus) == 3
        other = await joined(broker, MANY)
        assert len(await claimed(other, 4, beats=True)) == 4
        assert await consumer.fetch(3, 0) == [] and len((await consumer.keep()).lost) == 4
        await other.close()


async def test_an_ack_on_its_way_when_the_fence_falls_is_refused(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(2))
        held = await claimed(consumer, 2)
        assert await settled(consumer, held[:1]) == [True]  # armed for the next one
        with Raw(server.port) as redis:
            redis.evict(life_of(consumer).name, redis.score(life_of(consumer).name))
            assert await settled(consumer, held[1:]) == [False]
            assert [owner for _, owner, _ in redis.pending()] == [b"~due"]


async def test_suspects_are_narrowed_down_in_two_steps(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(3))

        async def crash(started: int) -> list[Claim]:
            """A member that takes all three, starts some of them, and is taken over."""
            victim = await joined(broker)
            claims = await claimed(victim, 3)
            await victim.begin([claim.position for claim in claims[:started]])
            life_of(victim).close()
            with Raw(server.port) as redis:
                redis.evict(life_of(victim).name, redis.score(life_of(victim).name))
            return claims

        assert {claim.suspect for claim in await crash(0)} == {0}
        assert [claim.suspect for claim in await crash(1)] == [1, 1, 1]
        assert [claim.suspect for claim in await crash(1)] == [2, 1, 1]
        claims = await claimed(consumer, 3, beats=True)
        assert [claim.suspect for claim in claims] == [3, 1, 1] and {claim.attempt for claim in claims} == {4}
        assert await settled(consumer, claims) == [True] * 3 and not run_in(server, "EXISTS", NOTE)


# What nobody else looks at


async def test_a_foreign_consumer_that_left_events_lying_is_adopted(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(2))
        with Raw(server.port) as redis:
            assert len(redis.read("foreign")) == 2
        members = life_of(consumer).members
        assert members.claim_after_s == CLAIM_AFTER_S
        await consumer.keep()
        assert await consumer.fetch(2, 0) == []
        members.claim_after_s, consumer._sweep_at = 0.0, 0.0
        run_in(server, "HDEL", META, f"seen:{GROUP}")
        claims = await claimed(consumer, 2, beats=True)
        assert [(claim.attempt, claim.suspect) for claim in claims] == [(2, 0)] * 2


async def test_a_sweep_finds_lost_due_times_and_names_without_fence(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(3))
        (claim,) = await claimed(consumer, 1)
        await settled(consumer, [claim], soon(100))
        run_in(server, "DEL", DUE)
        with Raw(server.port) as redis:  # a zombie's read, served after its eviction
            redis.read("ms.zombie.1")
        claims = await claimed(consumer, 3, beats=True)
        assert sorted((claim.attempt, claim.suspect) for claim in claims) == [(2, 0)] * 3
        names = {row[1] for row in run_in(server, "XINFO", "CONSUMERS", LOG, GROUP)}
        assert names == {b"~due", life_of(consumer).name.encode()}


async def test_figures_of_a_group_add_up(server: RedisServer) -> None:
    async with alone(server, MANY) as (broker, consumer):
        await broker.append("many", records(40, partitions=4))
        claims = await claimed(consumer, 30)
        await settled(consumer, claims[:10])
        await settled(consumer, claims[10:16], Dead("failed", "why"))
        await settled(consumer, claims[16:19], soon(100))
        letters = await broker.admin.dead("many", GROUP)
        assert letters == sorted(letters, key=lambda letter: Position.parse(letter.ref).partition)
        assert await broker.admin.dead("many", GROUP, letters[2].ref, 2) == letters[3:5]
        assert await broker.admin.replay(letters[:2]) == [True] * 2 == await broker.admin.drop(letters[2:4])
        assert await broker.admin.replay(letters[:4]) == [False] * 4 == await broker.admin.drop(letters[:4])
        (group,) = await broker.admin.groups("many")
        assert (group.done, group.dead, group.replayed, group.dropped) == (10, 2, 2, 2)
        assert (group.retried, group.scheduled, group.lag) == (3, 5, 40 - 30 - len(life_of(consumer).surplus))
        assert group.pending + (group.done or 0) + group.dead + group.dropped + (group.lag or 0) == 40
        (stream,) = await broker.admin.streams()
        assert (stream.spec, stream.events, stream.added) == (MANY, 40, 40)


async def test_a_member_is_counted_as_long_as_somebody_sweeps(server: RedisServer) -> None:
    async with opened(server.url, ORDERS, lease="0.5s") as broker:
        consumer = await joined(broker, lease_s=0.5)
        await brokers.until(lambda: uptime_s(server) > 3)
        await consumer.keep()
        life_of(consumer)._watch_at = float("inf")
        run_in(server, "SET", TICK, 7_000)  # a small number that nothing else on this server has touched
        await consumer.keep()
        (group,) = await broker.admin.groups("orders")
        assert group.consumers == 1
        run_in(server, "HINCRBY", META, f"seen:{GROUP}", -2_000)
        (group,) = await broker.admin.groups("orders")
        assert group.consumers == 0
        await consumer.close()


def uptime_s(server: RedisServer) -> int:
    (line,) = (line for line in run_in(server, "INFO", "server").split() if line.startswith(b"uptime_in_seconds:"))
    return int(line.partition(b":")[2])
