"""Connections, groups, memory and servers go away under a member of a group: no event is lost, none blamed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from millstream.brokers.base import Dead, Done, Outcome, Output, Settlement
from millstream.brokers.redis import incarnation
from millstream.brokers.redis.link import Link
from millstream.errors import BrokerDown, BrokerFull
from tests.redis import brokers
from tests.redis.brokers import opened, records, run_in
from tests.redis.consuming import (
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
    persistent,
    settled,
    soon,
)
from tests.redis.raw import GROUP, LOG, Raw
from tests.servers import VERSIONS, RedisServer

started = brokers.started
server = brokers.server


def late_answer(link: Link) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold back the next answer on a link: it has come when the first event is set, and goes on with the second."""
    answered, hold = asyncio.Event(), asyncio.Event()
    send = link.send

    async def late(*args: Any) -> list[Any]:
        link.send = send  # type: ignore[method-assign]
        answers = await send(*args)
        answered.set()
        await hold.wait()
        return answers

    link.send = late  # type: ignore[method-assign, assignment]
    return answered, hold


# Connections, groups and servers that go away


@pytest.mark.parametrize("side", ["reader", "writer"])
async def test_a_lost_connection_costs_no_event_and_no_attempt(server: RedisServer, side: str) -> None:
    async with alone(server) as (broker, consumer):
        done: set[str] = set()
        for number in range(20):
            await broker.append("orders", records(10, first=10 * number))
            claims = await persistent(consumer.fetch, 10, 0.1)
            async with asyncio.TaskGroup() as group:
                acks = [Settlement(claim.position, Done()) for claim in claims]
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
            await brokers.until(lambda: len(life_of(consumer).writer._waiting) > 0)  # it waits for the answer
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
        try:
            assert await consumer.fetch(1, 0) == []
            assert clients(server, "reader") == [b"%d" % life_of(consumer).reader.client_id]
            assert life_of(consumer).reader.client_id != old.client_id
        finally:
            assert old._transport is not None
            old._transport.abort()


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


@pytest.mark.parametrize("outcome", [Done(), soon()])
async def test_an_outcome_between_a_groups_rebirth_and_the_next_delivery_leaves_nothing_lying(
    server: RedisServer, outcome: Outcome
) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(1))
        held = await claimed(consumer, 1)
        life_of(consumer)._watch_at = float("inf")  # so that the next thing to be sent is the outcome
        run_in(server, "XGROUP", "DESTROY", LOG, GROUP)
        run_in(server, "XGROUP", "CREATE", LOG, GROUP, 0)
        async with asyncio.TaskGroup() as group:
            answered, hold = late_answer(life_of(consumer).writer)
            group.create_task(settled(consumer, held, outcome))
            await answered.wait()
            assert await consumer.fetch(10, 0) == [], "it is delivered once more, and we still hold it"
            hold.set()
        assert ids(await claimed(consumer, 1)) == ids(held)


async def test_what_is_given_back_while_its_end_is_being_told_is_handed_out_at_once(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(1))
        [held] = await claimed(consumer, 1)
        async with asyncio.TaskGroup() as group:
            answered, hold = late_answer(life_of(consumer).writer)
            finishing = group.create_task(consumer.finish([held.position]))
            await answered.wait()
            assert await broker.admin.give("orders", GROUP, [held.stored]) == 1
            life_of(consumer).set_free([0])
            assert await consumer.fetch(10, 0) == [], "we still hold it, as far as we know"
            hold.set()
        assert finishing.result() == [True]
        [again] = await claimed(consumer, 1)
        assert again.stored == held.stored and await consumer.finish([again.position]) == [True]
        assert (await broker.admin.groups("orders"))[0].pending == 0


async def test_a_stream_that_begins_anew_is_read_from_its_beginning(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        late = await joined(broker, group="late", start="now")
        run_in(server, "FLUSHALL")
        await broker.declare(ORDERS)
        await broker.append("orders", records(2))
        assert ids(await claimed(consumer, 2)) == ids(await claimed(late, 2)) == ["id-0", "id-1"]
        await late.close()


async def test_another_life_of_the_server_ends_that_of_the_consumer() -> None:
    for version in VERSIONS:
        with RedisServer.start(version, appendonly="yes", appendfsync="always") as server:
            async with opened(server.url, ORDERS) as broker:
                consumer = await joined(broker)
                await broker.append("orders", records(3))
                done, *held = await claimed(consumer, 3)
                assert await settled(consumer, [done]) == [True]
                server.restart()
                assert await persistent(settled, consumer, held) == [False] * 2
                assert (await persistent(consumer.keep)).lost == {claim.position for claim in held}
                again = await claimed(consumer, 2)
                assert [(claim.attempt, claim.suspect) for claim in again] == [(2, 0)] * 2
                assert ids(again) == ids(held) and await settled(consumer, again) == [True] * 2
                assert len(run_in(server, "KEYS", "*fence*")) == 1
                await consumer.close()


async def test_after_another_life_of_the_server_nothing_is_claimed_before_the_loss_is_told() -> None:
    with RedisServer.start("7", appendonly="yes", appendfsync="always") as server:
        async with opened(server.url, ORDERS) as broker:
            consumer = await joined(broker)
            await broker.append("orders", records(3))
            held = await claimed(consumer, 3)
            server.restart()
            # It is this call that finds out; the worker still believes to hold them, and would drop them when it is told.
            assert await persistent(consumer.fetch, 10, 0.2) == []
            assert (await persistent(consumer.keep)).lost == {claim.position for claim in held}
            again = await claimed(consumer, 3)
            assert not (await persistent(consumer.keep)).lost and await settled(consumer, again) == [True] * 3
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
                Settlement(acked.position, Done()),
                Settlement(retried.position, soon()),
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
