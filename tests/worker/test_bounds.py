"""How much a worker does at once, and how much it holds."""

from __future__ import annotations

import asyncio

from millstream import App, Batch, Settings
from tests.worker.place import Base, Cancelled, Placed, app_of, at_work, memory, orders, settled, until


class Counting:
    """How many are inside now, and how many were at most."""

    def __init__(self) -> None:
        self.now = self.most = self.all = 0

    async def __aenter__(self) -> None:
        self.now += 1
        self.all += 1
        self.most = max(self.most, self.now)

    async def __aexit__(self, *_: object) -> None:
        self.now -= 1


async def test_as_many_handlers_run_at_once_as_the_setting_says_and_no_more() -> None:
    app, inside, gate = app_of(), Counting(), asyncio.Event()

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        async with inside:
            await gate.wait()

    async with at_work(app):
        await app.publish_many([Placed(n=n) for n in range(100)])
        await until(lambda: inside.now == 8)
        gate.set()
        await settled(app.broker)
    assert (inside.most, inside.all) == (8, 100)


async def test_concurrency_of_a_group_holds_across_its_handlers() -> None:
    app, inside, gate = app_of(), Counting(), asyncio.Event()

    @app.subscriber(orders, "billing", concurrency=3)
    async def charge(event: Placed) -> None:
        async with inside:
            await gate.wait()

    @app.subscriber(orders, "billing")
    async def refund(event: Cancelled) -> None:
        async with inside:
            await gate.wait()

    async with at_work(app):
        await app.publish_many([cls(n=n) for n in range(50) for cls in (Placed, Cancelled)])
        await until(lambda: inside.now == 3)
        gate.set()
        await settled(app.broker)
    assert (inside.most, inside.all) == (3, 100)


async def pending_while_all_hang(app: App) -> int:
    """How many of 1,000 events a process holds while no handler ends."""
    gate, started = asyncio.Event(), Counting()

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        async with started:
            await gate.wait()

    broker = memory(app)
    async with at_work(app, broker) as process:
        await app.publish_many([Placed(n=n) for n in range(1_000)])
        await until(lambda: started.now == app.settings.concurrency)
        await until(lambda: all(worker.in_flight >= worker._ahead.limit for worker in process._workers))
        (info,) = await broker.admin.groups("orders")
        gate.set()
        await settled(broker)
        return info.pending


async def test_a_process_holds_at_most_twice_as_many_events_as_it_handles_at_once() -> None:
    assert await pending_while_all_hang(app_of()) == 16


async def test_max_in_flight_bounds_what_a_process_holds() -> None:
    assert await pending_while_all_hang(app_of(Settings(lease="1s", concurrency=8, max_in_flight=10))) == 10


async def test_a_batch_becomes_full_though_what_a_process_may_hold_is_hardly_more() -> None:
    app = app_of(Settings(lease="1s", max_in_flight=10))
    batches: list[int] = []

    @app.subscriber(orders, "billing", batch=Batch(10, within="1h"))
    async def load(events: list[Base]) -> None:
        batches.append(len(events))

    async with at_work(app):
        for n in range(20):  # one at a time, so that none of them fills the batch alone
            await app.publish(Placed(n=n))
        await settled(app.broker)
    assert batches == [10, 10]


async def test_a_handler_that_never_suspends_leaves_time_for_the_heartbeat() -> None:
    app = app_of(Settings(lease="500ms", concurrency=1, max_in_flight=10_000))
    handled: list[int] = []
    lost: list[object] = []
    app.telemetry.listen(lambda name, _: lost.append(name))

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        handled.append(sum(range(20_000)))  # about half a millisecond

    async with at_work(app):
        await app.publish_many([Placed(n=n) for n in range(3_000)])
        await settled(app.broker)
    assert (len(handled), lost) == (3_000, [])
