"""A member of a group on real servers: what it promises while connections, groups, servers and other members go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from millstream.brokers.base import Claim, Dead, Done, Later, Outcome, Output, Settlement, StreamSpec, Subscription
from millstream.brokers.redis import incarnation
from millstream.brokers.redis.broker import RedisBroker
from millstream.brokers.redis.consumer import RedisConsumer
from millstream.brokers.redis.incarnation import Incarnation
from millstream.brokers.redis.members import CLAIM_AFTER_S
from millstream.clock import Clock
from millstream.errors import BrokerDown, BrokerError, BrokerFull, GroupOwned, LeaseLost
from millstream.stream import Position
from tests.redis import brokers
from tests.redis.brokers import opened, records, run_in
from tests.redis.raw import DUE, GROUP, LOG, META, NOTE, Raw
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

ORDERS = StreamSpec("orders")
MANY = StreamSpec("many", partitions=4, key="order_id")
LEASE_S = 1.0
WAIT_S = 10.0  # for what must come; nothing takes so long

clock = Clock()


async def joined(broker: RedisBroker, spec: StreamSpec = ORDERS, **changes: Any) -> RedisConsumer:
    wanted = {"stream": spec, "group": GROUP, "owner": "app", "lease_s": LEASE_S} | changes
    return await RedisConsumer.join(broker, Subscription(**wanted))


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
    return await consumer.settle([Settlement(claim.stored.position, outcome or Done()) for claim in claims])


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
    return [claim.stored.record.id for claim in claims]


def soon(seconds: float = 0.0) -> Later:
    return Later(clock.now_ms() + int(seconds * 1000), "try again")


def pending(server: RedisServer) -> int:
    (info,) = run_in(server, "XINFO", "GROUPS", LOG)
    found: int = dict(zip(info[::2], info[1::2], strict=True))[b"pending"]
    return found


def clients(server: RedisServer, side: str) -> list[bytes]:
    lines = run_in(server, "CLIENT", "LIST").splitlines()
    return [line.split(b" ", 1)[0].removeprefix(b"id=") for line in lines if f"-{side} ".encode() in line]


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
        sizes, found = [], []
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
        assert claim.fault and not claim.stored.record.type and b"hello" in claim.stored.record.data
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
        assert (await silent.keep()).lost == {claim.stored.position for claim in held}
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
        assert (await consumer.keep()).lost == {claim.stored.position for claim in held}
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
            await victim.begin([claim.stored.position for claim in claims[:started]])
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


# Connections, groups and servers that go away


@pytest.mark.parametrize("side", ["reader", "writer"])
async def test_a_lost_connection_costs_no_event_and_no_attempt(server: RedisServer, side: str) -> None:
    async with alone(server) as (broker, consumer):
        done: set[str] = set()
        for number in range(20):
            await broker.append("orders", records(10, first=10 * number))
            claims = await persistent(consumer.fetch, 10, 0.1)
            async with asyncio.TaskGroup() as group:
                acks = [Settlement(claim.stored.position, Done()) for claim in claims]
                settling = group.create_task(persistent(consumer.settle, acks))
                fetching = group.create_task(persistent(consumer.fetch, 5, 0.02))
                for id_ in clients(server, side):
                    run_in(server, "CLIENT", "KILL", "ID", id_)
            assert all(settling.result())
            more = fetching.result()
            assert all(await persistent(settled, consumer, more))
            assert {claim.attempt for claim in claims + more} <= {1}
            assert done.isdisjoint(ids(claims + more)), "what was acked does not come again"
            done.update(ids(claims + more))
        while claims := await persistent(consumer.fetch, 100, 0.1):
            assert {claim.attempt for claim in claims} == {1} and all(await settled(consumer, claims))
            done.update(ids(claims))
        assert len(done) == 200 and pending(server) == 0 and not (await consumer.keep()).lost


async def test_what_was_delivered_and_never_seen_is_recovered(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(450))
        with Raw(server.port) as redis:  # as a read whose answer was lost
            assert len(redis.read(life_of(consumer).name, 450)) == 450
        assert await consumer.fetch(10, 0) == []
        for id_ in clients(server, "reader"):
            run_in(server, "CLIENT", "KILL", "ID", id_)
        with pytest.raises(BrokerDown):
            await consumer.fetch(10, 1)
        claims = await claimed(consumer, 450)
        assert len(set(ids(claims))) == 450 and {claim.attempt for claim in claims} == {1}
        assert all(await settled(consumer, claims))


async def test_what_was_taken_by_a_call_that_was_cancelled_is_recovered(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(3))
        assert all(await settled(consumer, await claimed(consumer, 3), soon()))
        life_of(consumer)._watch_at = float("inf")  # so that the next question is for what is due
        server.pause()
        try:
            task = asyncio.get_running_loop().create_task(consumer.fetch(3, WAIT_S))
            await asyncio.sleep(0.05)  # a task has no sign that it waits for an answer
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        finally:
            server.resume()
        claims = await consumer.fetch(3, WAIT_S)
        assert [claim.attempt for claim in claims] == [2] * 3 and all(await settled(consumer, claims))


async def test_a_connection_that_only_we_have_lost_is_ended_on_the_server(server: RedisServer) -> None:
    async with alone(server) as (_, consumer):
        old = life_of(consumer).reader
        old._error = BrokerDown("cut off")  # as behind a broken network: the server notices nothing
        assert await consumer.fetch(1, 0) == []
        (now,) = clients(server, "reader")
        assert int(now) != old.client_id == int(now) - 1
        old._transport.abort() if old._transport else None


@pytest.mark.parametrize("command", [("XGROUP", "DESTROY", "orders", "g"), ("DEL", "orders"), ("FLUSHALL",)])
async def test_a_group_that_vanishes_under_a_waiting_read_is_made_again(
    server: RedisServer, command: tuple[str, ...]
) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(3))
        assert all(await settled(consumer, await claimed(consumer, 3)))
        await consumer.keep()  # sweeps: the group can be made again where it stands
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(persistent(consumer.fetch, 10, WAIT_S))
            await brokers.until(lambda: life_of(consumer)._blocked_until_ms > 0)
            run_in(server, *command)
            if command[0] == "FLUSHALL":
                await broker.declare(ORDERS)
            await broker.append("orders", records(1, first=3))
        claims = waiting.result()
        assert ids(claims) == ["id-3"] and await settled(consumer, claims) == [True]
        assert not (await consumer.keep()).lost and await consumer.fetch(10, 0) == []


async def test_a_group_that_vanishes_while_events_are_held_loses_none(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(4))
        first, _second, *_ = held = await claimed(consumer, 4)
        run_in(server, "XGROUP", "DESTROY", LOG, GROUP)
        assert await settled(consumer, [first], soon()) == [False]
        again = await claimed(consumer, 1)
        assert ids(again) == ids([first])
        assert await consumer.fetch(10, 0) == [], "what is held does not come twice"
        assert await settled(consumer, [*held[1:], *again]) == [True] * 4 and pending(server) == 0


async def test_a_stream_that_begins_anew_is_read_from_its_beginning(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        late = await joined(broker, group="late", start="now")
        run_in(server, "FLUSHALL")
        await broker.declare(ORDERS)
        await broker.append("orders", records(2))
        assert ids(await claimed(consumer, 2)) == ids(await claimed(late, 2)) == ["id-0", "id-1"]
        await late.close()


async def test_another_life_of_the_server_ends_that_of_the_consumer() -> None:
    for version in brokers.VERSIONS:
        with RedisServer.start(version, appendonly="yes", appendfsync="always") as server:
            async with opened(server.url, ORDERS) as broker:
                consumer = await joined(broker)
                await broker.append("orders", records(3))
                done, *held = await claimed(consumer, 3)
                assert await settled(consumer, [done]) == [True]
                server.restart()
                assert await persistent(settled, consumer, held) == [False] * 2
                assert (await persistent(consumer.keep)).lost == {claim.stored.position for claim in held}
                again = await claimed(consumer, 2)
                assert [(claim.attempt, claim.suspect) for claim in again] == [(2, 0)] * 2
                assert ids(again) == ids(held) and await settled(consumer, again) == [True] * 2
                assert len(run_in(server, "KEYS", "*fence*")) == 1
                await consumer.close()


async def test_closing_without_a_server_is_quiet() -> None:
    with RedisServer.start("7") as server:
        async with opened(server.url, ORDERS) as broker:
            consumer = await joined(broker)
            await broker.append("orders", records(1))
            await claimed(consumer, 1)
            server.kill()
            await consumer.close()


# No room


async def test_at_maxmemory_acks_retries_and_beats_go_on(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(6))
        acked, retried, dead, staged, *held = await claimed(consumer, 6)
        run_in(server, "CONFIG", "SET", "maxmemory", 1)
        try:
            settlements = [
                Settlement(dead.stored.position, Dead("failed", "why")),
                Settlement(
                    staged.stored.position, Done(), [Output("orders", record) for record in records(1, first=6)]
                ),
                Settlement(acked.stored.position, Done()),
                Settlement(retried.stored.position, soon()),
            ]
            for _ in range(2):
                with pytest.raises(BrokerFull):
                    await consumer.settle(settlements)
                assert pending(server) == 5, "all that needs no room is settled"
            assert not (await consumer.keep()).lost
            (again,) = await claimed(consumer, 1)
            assert ids([again]) == ids([retried]) and await settled(consumer, [again, *held]) == [True] * 3
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", 0)
        assert await consumer.settle(settlements) == [True, True, False, False]
        assert ids(await claimed(consumer, 1)) == ["id-6"]


async def test_an_event_waits_while_there_is_no_room_for_its_dead_letter(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incarnation, "MAX_DEAD", 1)
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(3))
        claims = await claimed(consumer, 3)
        assert await settled(consumer, claims, Dead("failed", "")) == [True] * 3
        (group,) = await broker.admin.groups("orders")
        assert (group.dead, group.pending, group.scheduled) == (1, 2, 2)
        for info in await broker.admin.pending("orders", GROUP, 10):
            assert info.due_ms is not None and 290_000 < info.due_ms - clock.now_ms() < 310_000
            assert info.attempt == 0, "it does not count"


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
        assert group.pending + group.done + group.dead + group.dropped + group.lag == 40
        (stream,) = await broker.admin.streams()
        assert (stream.spec, stream.events, stream.added) == (MANY, 40, 40)
