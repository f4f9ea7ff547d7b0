"""How a worker leaves: from the front to the back, within its grace."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated

import pytest

from millstream import App, Delivery, Depends, Settings
from tests.worker.place import Base, Charged, Faulty, Placed, app_of, at_work, memory, orders, payments, until


async def test_leaving_finishes_what_runs_settles_it_and_hands_back_the_rest() -> None:
    app, started, gate = app_of(Settings(lease="1s", concurrency=3)), list[int](), asyncio.Event()
    finished: list[int] = []

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        started.append(event.n)
        await gate.wait()
        finished.append(event.n)

    broker = memory(app)
    async with asyncio.TaskGroup() as tasks, at_work(app, broker) as process:
        await app.publish_many([Placed(n=n) for n in range(20)])
        await until(lambda: process._workers[0].in_flight == 6 and len(started) == 3)
        tasks.create_task(opened_later(gate, process))
    assert sorted(started) == sorted(finished) and len(finished) == 3
    (group,) = await broker.admin.groups("orders")
    assert (group.done, group.scheduled, group.lag, group.consumers) == (3, 3, 14, 0)
    assert {pending.attempt for pending in await broker.admin.pending("orders", "billing", 100)} == {0}


async def opened_later(gate: asyncio.Event, process: object) -> None:
    await until(lambda: process._workers[0]._lanes._stopping)  # type: ignore[attr-defined]
    gate.set()


async def test_a_handler_that_outlasts_the_grace_is_cut_and_its_event_goes_back_uncounted() -> None:
    app, ends = app_of(Settings(lease="1s", grace="100ms")), list[str]()

    @app.subscriber(orders, "billing")
    async def charge(delivery: Delivery[Base]) -> None:
        delivery.publish(Charged(n=1), to=payments)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    broker = memory(app)
    async with at_work(app, broker) as process:
        await app.publish(Placed())
        await until(lambda: process.running)
    assert not process.finished and ends == ["cancelled"]
    (pending,) = await broker.admin.pending("orders", "billing", 100)
    assert (pending.attempt, pending.consumer) == (0, "")
    assert await broker.read("payments", 0, None, 10) == []


async def test_a_hanging_plain_function_does_not_hold_up_the_end() -> None:
    app, gate = app_of(Settings(lease="1s", grace="100ms")), threading.Event()

    @app.subscriber(orders, "billing")
    def charge(event: Base) -> None:
        gate.wait(30)

    broker = memory(app)
    async with at_work(app, broker) as process:
        await app.publish(Placed())
        await until(lambda: process.running)
        began_s = time.monotonic()
    took_s = time.monotonic() - began_s
    gate.set()
    assert not process.finished and took_s < 2
    assert [pending.consumer for pending in await broker.admin.pending("orders", "billing", 100)] == [""]


async def test_an_outcome_that_cannot_be_settled_within_the_grace_is_given_up() -> None:
    app = app_of(Settings(lease="1s", grace="100ms"))

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None: ...

    broker = Faulty(memory(app))
    broker.hanging["settle"] = asyncio.Event()
    async with at_work(app, broker) as process:
        await app.publish(Placed())
        await until(lambda: broker.calls["settle"])
    assert not process.finished


async def test_an_error_inside_the_block_drains_and_travels_on_as_it_is() -> None:
    app, finished = app_of(), list[int]()

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        await asyncio.sleep(0.01)
        finished.append(event.n)

    with pytest.raises(ZeroDivisionError):
        async with at_work(app) as process:
            await app.publish(Placed(n=1))
            await until(lambda: process.running)
            raise ZeroDivisionError
    assert finished == [1]


async def test_lifespan_is_entered_before_the_first_handler_and_left_after_the_last() -> None:
    order: list[str] = []

    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[None]:
        order.append("lifespan")
        yield
        order.append("over")

    app = app_of(lifespan=lifespan)

    def open_pool() -> Iterator[str]:
        order.append("pool")
        yield "pool"
        order.append("pool closed")

    @app.subscriber(orders, "billing")
    async def charge(event: Base, pool: Annotated[str, Depends(open_pool, scope="process")]) -> None:
        order.append("handler")
        await asyncio.sleep(0.01)
        order.append("handled")

    async with at_work(app) as process:
        await app.publish(Placed())
        await until(lambda: process.running)
    assert order == ["lifespan", "pool", "handler", "handled", "pool closed", "over"]


async def test_what_lives_as_long_as_the_process_is_made_once_for_all_handlers() -> None:
    app, made, seen = app_of(), list[str](), list[str]()

    async def open_pool() -> AsyncIterator[str]:
        made.append("made")
        yield f"pool {len(made)}"
        made.append("closed")

    @app.subscriber(orders, "billing")
    async def charge(event: Base, pool: Annotated[str, Depends(open_pool, scope="process")]) -> None:
        seen.append(pool)

    @app.subscriber(orders, "warehouse")
    async def pack(event: Base, pool: Annotated[str, Depends(open_pool, scope="process")]) -> None:
        seen.append(pool)

    async with at_work(app):
        await app.publish_many([Placed(), Placed()])
        await until(lambda: len(seen) == 4)
        assert made == ["made"]
    assert made == ["made", "closed"] and set(seen) == {"pool 1"}


async def test_only_names_the_groups_that_run() -> None:
    app, seen = app_of(), list[str]()

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        seen.append("billing")

    @app.subscriber(orders, "warehouse")
    async def pack(event: Base) -> None:
        seen.append("warehouse")

    @app.listener(orders)
    async def hear(event: Base) -> None:
        seen.append("listener")

    broker = memory(app)
    async with app.opened(broker=broker), app.worker(only=["billing"]):
        await app.publish(Placed())
        await until(lambda: seen)
    assert seen == ["billing"]
    assert [group.group for group in await broker.admin.groups("orders")] == ["billing"]
