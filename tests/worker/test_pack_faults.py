"""Packs in the worker when something happens: they are lost, or move, find no room for dead letters, run in threads."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import pytest
from msgspec.structs import replace

from millstream import Delivery, Reject, Retry, Settings
from millstream.brokers.base import Settlement, Subscription
from millstream.clock import Clock
from millstream.errors import BrokerFull
from millstream.telemetry import LOST, TIMED_OUT
from millstream.testing import TestApp
from millstream.worker.process import Process
from tests.worker.place import PATIENCE_S, Faulty, FaultyConsumer, at_work, heard, memory, settled, until
from tests.worker.test_broken_broker import take_all, trusted_until_s
from tests.worker.test_runs import Moved, Seen, app_of, birds, event_of, flights, pack_of, put, replies
from tests.worker.test_suspects import turns


@pytest.mark.parametrize("delivers", [False, True])
async def test_a_pack_that_was_lost_is_cancelled_and_comes_again_as_a_whole(delivers: bool) -> None:
    app, finished, cancelled, gate = app_of(), Counter[int](), list[int](), asyncio.Event()
    lost, faults = heard(app, LOST), Faulty(memory(app))

    async def handle(n: int) -> None:
        if n >= 2 and not lost:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                cancelled.append(n)
                raise
        finished[n] += 1

    if delivers:

        @app.subscriber(birds, "billing", concurrency=2)
        async def with_delivery(event: Seen, d: Delivery) -> None:
            await handle(event.n)
            d.publish(Seen(n=event.n), to=replies)
    else:

        @app.subscriber(birds, "billing", concurrency=2)
        async def bare(event: Seen) -> None:
            await handle(event.n)

    async with at_work(app, faults) as process:
        await put(app, pack_of([event_of(n) for n in range(6)]))
        await until(lambda: process.running == 2)
        faults.broker.logs["birds"].groups["billing"].members.clear()
        await take_all(faults, "birds")
        await until(lambda: len(cancelled) == 2)
        await settled(faults, stream="birds")
        assert process._workers[0].in_flight == 0
        outputs = await faults.read("replies", 0, None, 500)
    assert lost and finished == {n: 2 if n < 2 else 1 for n in range(6)}
    assert len(outputs) == (6 if delivers else 0), "those of a pack that was lost are dropped"


async def test_a_partition_moves_between_two_events_of_a_pack_and_nothing_is_repeated() -> None:
    first, second = app_of(), app_of()
    seen: dict[str, list[int]] = {"D-0": [], "D-1": []}
    moved, began, go = list[int](), set[str](), asyncio.Semaphore(0)

    @first.subscriber(flights, "log")
    async def slowly(event: Moved) -> None:
        began.add(event.tail)
        await go.acquire()
        seen[event.tail].append(event.n)

    @second.subscriber(flights, "log")
    async def at_once(event: Moved) -> None:
        seen[event.tail].append(event.n)
        moved.append(event.n)

    def one_more() -> bool:
        go.release()
        return bool(moved)

    broker = memory(first)
    async with at_work(first, broker):
        for partition, tail in enumerate(seen):
            pack = pack_of([event_of(n, "aircraft.moved", tail) for n in range(2_000)])
            await put(first, replace(pack, partition=partition), stream="flights")
        await until(lambda: len(began) == 2)
        async with at_work(second, broker):
            await until(one_more)
            for _ in range(4_000):
                go.release()
            await settled(broker, "log", "flights")
    assert moved and all(numbers == list(range(2_000)) for numbers in seen.values())


class Full(Faulty):
    """A broker without room for dead letters of events of packs."""

    full = True

    async def subscribe(self, subscription: Subscription) -> FaultyConsumer:
        consumer = await super().subscribe(subscription)
        settle = consumer.settle

        async def settle_small(settlements: list[Settlement]) -> list[bool]:
            dying = [settlement for settlement in settlements if settlement.letters]
            if not self.full or not dying:
                return await settle(settlements)
            await settle([settlement for settlement in settlements if not settlement.letters])
            raise BrokerFull("no room")

        consumer.settle = settle_small  # type: ignore[assignment, method-assign]
        return consumer


async def test_a_pack_with_dead_letters_waits_for_room_and_others_go_on() -> None:
    app, seen = app_of(), Counter[int]()

    @app.subscriber(birds, "log")
    async def log(event: Seen) -> None:
        seen[event.n] += 1
        if event.n in (1, 3):
            raise Reject("no such bird")

    broker = Full(memory(app))
    async with at_work(app, broker):
        await put(app, *(pack_of([event_of(n) for n in range(start, start + 5)]) for start in range(0, 50, 5)))
        await until(lambda: seen.total() == 50)

        async with asyncio.timeout(PATIENCE_S):
            while (await broker.broker.admin.groups("birds"))[0].done != 9:
                await asyncio.sleep(0)
        assert not await broker.admin.dead("birds", "log")
        broker.full = False
        await settled(broker, "log", "birds")
        letters = await broker.admin.dead("birds", "log")
    assert [letter.stored.record.id for letter in letters] == ["e-1", "e-3"]
    assert set(seen.values()) == {1}, "what waits for room is not handled again"


async def test_a_pack_for_a_handler_in_threads_is_handled_event_by_event_and_settled_once() -> None:
    app, seen = app_of(), Counter[int]()
    both = threading.Barrier(2)

    @app.subscriber(birds, "log", concurrency=2)
    def log(event: Seen) -> None:
        if event.n < 2:
            both.wait(10)  # two events of one pack side by side
        seen[event.n] += 1
        if event.n == 5:
            raise Reject("no such bird")

    async with at_work(app):
        await put(app, pack_of([event_of(n) for n in range(8)]))
        await settled(app.broker, "log", "birds")
        (info,) = await app.broker.admin.groups("birds")
    assert seen == dict.fromkeys(range(8), 1)
    assert (info.done, info.dead, info.retried) == (1, 1, 0)


async def test_a_handler_in_a_thread_that_outlives_the_grace_leaves_its_event_and_those_behind_it() -> None:
    app = app_of()
    app.settings = Settings(lease="1s", grace="100ms", concurrency=1)
    seen, hangs, go = Counter[int](), threading.Event(), threading.Event()

    @app.subscriber(birds, "log")
    def log(event: Seen) -> None:
        if event.n == 2 and not hangs.is_set():
            hangs.set()
            go.wait(10)
        seen[event.n] += 1

    broker = memory(app)
    async with at_work(app, broker):
        await put(app, pack_of([event_of(n) for n in range(5)]))
        await until(hangs.is_set)
    go.set()
    async with at_work(app, broker):
        await settled(broker, "log", "birds")
        (info,) = await app.broker.admin.groups("birds")
    assert info.done == 1 and [seen[n] for n in (0, 1, 3, 4)] == [1] * 4, "what had ended before is not repeated"
    assert 1 <= seen[2] <= 2


async def test_between_two_events_of_a_pack_a_suspect_gets_its_turn_alone() -> None:
    app, began, noted = app_of(), list[int](), list[int]()
    ready, go, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @app.subscriber(birds, "log", concurrency=1)
    async def log(event: Seen) -> None:
        began.append(event.n)
        await asyncio.sleep(0)
        if event.n == 2:
            ready.set()
            await go.wait()

    async def suspect(process: Process) -> None:
        async with process._gate.alone():
            noted.extend(began)
            await over.wait()
            assert began == noted

    async with at_work(app) as process, asyncio.TaskGroup() as tasks:
        await put(app, pack_of([event_of(n) for n in range(6)]))
        await ready.wait()
        tasks.create_task(suspect(process))
        await until(lambda: process._gate.closed)
        go.set()
        await until(lambda: noted)
        await turns()
        over.set()
        await settled(app.broker, "log", "birds")
    assert noted == [0, 1, 2] and began == list(range(6))


class Leaping(Clock):
    """A clock that leaps ahead, as it does for a process that was frozen."""

    leapt_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.leapt_s


async def test_who_was_frozen_in_a_pack_starts_nothing_more_before_a_heartbeat_is_answered() -> None:
    app, trusted, clock = app_of(), list[bool](), Leaping()
    app.clock = clock

    @app.subscriber(birds, "log")
    async def log(event: Seen) -> None:
        trusted.append(clock.monotonic() < trusted_until_s(process))
        if event.n in (3, 7):
            clock.leapt_s += 10  # nobody else has the loop meanwhile

    async with at_work(app) as process:
        await put(app, pack_of([event_of(n) for n in range(12)]))
        await settled(app.broker, "log", "birds")
    assert trusted == [True] * 12


async def test_a_handler_that_swallows_its_timeout_keeps_nobody_behind_it_from_theirs() -> None:
    app, ended = app_of(), list[int]()
    told = heard(app, TIMED_OUT)

    @app.subscriber(birds, "log", timeout="10s", retry=Retry(1), concurrency=1)
    async def log(event: Seen) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if event.n != 1:
                raise
        ended.append(event.n)

    async with TestApp(app, raise_errors=False, patience="20ms") as t:
        [at] = await put(app, pack_of([event_of(n) for n in range(4)]))
        await t.idle()
        await t.advance("1h")
    assert ended == [1]
    assert [measurements["position"].offset for measurements in told] == [f"{at.offset}.{n}" for n in (0, 2, 3)]


async def test_a_partition_that_is_given_away_takes_with_it_what_has_not_begun_of_a_pack() -> None:
    app, began = app_of(), list[int]()
    ready, go = asyncio.Event(), asyncio.Event()

    @app.subscriber(birds, "log", concurrency=1)
    async def log(event: Seen) -> None:
        began.append(event.n)
        await asyncio.sleep(0)
        if event.n == 2:
            ready.set()
            await go.wait()

    broker = memory(app)
    async with at_work(app, broker) as process:
        lanes = process._workers[0]._lanes
        assert lanes is not None
        await put(app, pack_of([event_of(n) for n in range(6)]))
        await ready.wait()
        asyncio.get_running_loop().call_soon(go.set)
        async with lanes.drained(frozenset({0})):
            await turns()
            assert began == [0, 1, 2]
    async with at_work(app, broker):
        await settled(broker, "log", "birds")
    assert began == list(range(6))
