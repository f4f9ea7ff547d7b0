"""What a crash leaves behind: noted before it runs, alone if it was running, dead when it has killed too often."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from millstream import App, Batch, Retry
from millstream.brokers.base import Claim, Record, StreamSpec, Subscription
from millstream.brokers.memory.broker import MemoryBroker
from millstream.brokers.memory.group import Group
from millstream.testing.clock import VirtualClock
from millstream.worker.gate import Gate
from tests.worker.place import Base, Faulty, Placed, app_of, at_work, memory, orders, payments, settled, until

BILLING = Subscription(StreamSpec("orders", 2), "billing", "shop", lease_s=1.0)


async def crashing(
    broker: MemoryBroker, clock: VirtualClock, lives: Sequence[int], begin: bool = True
) -> list[list[Claim]]:
    """Members that claim so many events, start what they must, and fall silent, one after the other."""
    seen: list[list[Claim]] = []
    for count in lives:
        consumer = await broker.subscribe(BILLING)
        seen.append(await consumer.fetch(count, 0))
        if begin:
            await consumer.begin([claim.position for claim in seen[-1] if claim.suspect])
        await clock.advance(1.1)
    return seen


class Shop:
    """An app at whose broker members have crashed."""

    def __init__(self, app: App, events: int) -> None:
        self.app = app
        self.clock = VirtualClock()
        self.broker = Faulty(memory(app, self.clock))
        self._records = [Record(0, f"o-{n}", "order.placed", b'{"n": %d}' % n) for n in range(events)]

    async def left_by(self, *lives: int) -> None:
        for stream in (orders, payments):
            await self.broker.declare(StreamSpec(stream.name, stream.partitions))
        await self.broker.append("orders", self._records)
        await crashing(self.broker.broker, self.clock, lives)
        self.app.clock = self.clock


async def test_events_that_were_fetched_in_a_crash_are_noted_and_run_side_by_side() -> None:
    app, gate, running, most = app_of(), asyncio.Event(), 0, 0

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1

    shop = Shop(app, 5)
    await shop.left_by(5)
    async with at_work(app, shop.broker):
        await until(lambda: running == 5)
        gate.set()
        await settled(shop.broker)
    assert shop.broker.calls["begin"] == 5


async def test_an_event_that_was_running_in_a_crash_runs_with_nothing_beside_it() -> None:
    app, beside, running = app_of(), list[set[str]](), set[str]()
    gates = {"mail": asyncio.Event(), "billing": asyncio.Event()}

    async def during(name: str) -> None:
        running.add(name)
        beside.append(set(running))
        await gates[name.partition("-")[0]].wait()
        running.discard(name)

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        await during(f"billing-{event.n}")

    @app.subscriber(orders, "mail", start="now")
    async def tell(event: Base) -> None:
        await during(f"mail-{event.n}")

    shop = Shop(app, 1)
    await shop.left_by(1)  # the only one that the dead member held: nobody else can be to blame
    async with at_work(app, shop.broker) as process:
        await until(lambda: running == {"billing-0"})
        await app.publish(Placed(n=7), to=orders)
        await until(lambda: process.progress()[-1] == 1 and process._workers[0].in_flight == 2)
        assert running == {"billing-0"}
        gates["billing"].set()
        await until(lambda: running == {"mail-7"})
        gates["mail"].set()
        await settled(shop.broker)
    assert [names for names in beside if "billing-0" in names] == [{"billing-0"}]


async def test_a_suspect_waits_for_those_that_run_already_and_lets_nobody_else_start() -> None:
    gate, entered, over = Gate(), asyncio.Event(), asyncio.Event()
    gate.running = 2

    async def suspect() -> None:
        async with gate.alone():
            entered.set()
            await over.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(suspect())
        await until(lambda: gate.closed)
        gate.leave()
        opened = tasks.create_task(gate.opened())
        await turns()
        assert not entered.is_set()
        gate.leave()
        await until(entered.is_set)
        assert not opened.done()
        over.set()
    assert opened.done() and not gate.closed


async def turns() -> None:
    """Let all that can happen happen."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_an_event_that_killed_too_often_and_the_last_time_alone_is_dead_without_being_run() -> None:
    app, handled = app_of(retry=Retry(2)), list[int]()

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        handled.append(event.n)

    shop = Shop(app, 1)
    await shop.left_by(1, 1)
    async with at_work(app, shop.broker):
        await settled(shop.broker)
        (letter,) = await shop.broker.admin.dead("orders", "billing")
    assert (handled, letter.reason, letter.attempts) == ([], "crashed", 3)
    assert "2 attempts" in letter.error


async def test_those_that_only_ran_beside_a_killer_are_not_blamed() -> None:
    app, handled = app_of(retry=Retry(2)), list[int]()

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        handled.append(event.n)

    shop = Shop(app, 3)
    await shop.left_by(3, 3)  # attempts used up, and running in the last crash, but never alone
    async with at_work(app, shop.broker):
        await settled(shop.broker)
        assert not await shop.broker.admin.dead("orders", "billing")
    assert sorted(handled) == [0, 1, 2]


async def test_who_ran_alone_is_settled_before_the_next_suspect_begins() -> None:
    app, handled = app_of(), list[int]()

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        handled.append(event.n)

    shop = Shop(app, 2)
    await shop.left_by(2, 2)
    gate = shop.broker.hanging["settle"] = asyncio.Event()
    async with at_work(app, shop.broker):
        await until(lambda: shop.broker.calls["settle"] == 1)
        await turns()
        begun = len(handled)
        gate.set()
        await settled(shop.broker)
    assert sorted(handled) == [0, 1]
    assert begun == 1, "had the second one killed us, the first one would have been blamed too"


async def test_a_suspect_that_somebody_else_has_by_now_is_not_run() -> None:
    app, handled = app_of(), list[int]()

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        handled.append(event.n)

    shop = Shop(app, 1)
    await shop.left_by(1)
    gate = shop.broker.hanging["begin"] = asyncio.Event()
    async with at_work(app, shop.broker) as process:
        await until(lambda: shop.broker.calls["begin"] == 1)
        group = shop.broker.broker.logs["orders"].groups["billing"]
        assert isinstance(group, Group)
        (member,) = group.members.values()
        member.held, member.present = {}, False
        gate.set()
        await until(lambda: process._workers[0].in_flight == 0)
    assert handled == []


async def test_in_a_batch_group_who_was_running_in_a_crash_is_called_alone() -> None:
    app, calls = app_of(), list[list[int]]()

    @app.subscriber(orders, "billing", batch=Batch(10))
    async def load(events: list[Base]) -> None:
        calls.append([event.n for event in events])

    shop = Shop(app, 6)
    await shop.left_by(3, 3)
    async with at_work(app, shop.broker):
        await settled(shop.broker)
    assert sorted(calls) == [[0], [1], [2], [3, 4, 5]]


async def test_the_timeout_of_a_suspect_begins_when_its_handler_does() -> None:
    app, gate, ended = app_of(timeout="5s"), asyncio.Event(), list[str]()

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        try:
            await gate.wait()
            ended.append("well")
        except asyncio.CancelledError:
            ended.append("timed out")
            raise

    shop = Shop(app, 1)
    await shop.left_by(1)
    begun = shop.broker.hanging["begin"] = asyncio.Event()
    async with at_work(app, shop.broker):
        await until(lambda: shop.broker.calls["begin"] == 1)
        await shop.clock.advance(20)
        begun.set()
        await shop.clock.advance(3)
        gate.set()
        await settled(shop.broker)
    assert ended == ["well"]
