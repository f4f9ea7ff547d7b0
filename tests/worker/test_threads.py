"""Handlers that are plain functions."""

from __future__ import annotations

import threading
from contextvars import ContextVar

from millstream import Call, Delivery, Handle, Retry, Settings
from millstream.testing import TestApp
from tests.worker.place import Base, Charged, Placed, app_of, at_work, orders, payments, settled, until

CURRENT: ContextVar[str] = ContextVar("CURRENT", default="none")


async def test_plain_functions_run_in_threads_beside_each_other() -> None:
    app, everyone = app_of(Settings(lease="1s", threads=4)), threading.Barrier(4)

    @app.subscriber(orders, "billing")
    def charge(event: Base) -> None:
        everyone.wait(10)  # passes only when four are inside at once

    async with at_work(app):
        await app.publish_many([Placed(n=n) for n in range(8)])
        await settled(app.broker)


async def test_no_more_plain_functions_run_at_once_than_threads_are_allowed() -> None:
    app, lock, gate = app_of(Settings(lease="1s", threads=3)), threading.Lock(), threading.Event()
    now = most = 0

    @app.subscriber(orders, "billing")
    def charge(event: Base) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        gate.wait(10)
        with lock:
            now -= 1

    async with at_work(app):
        await app.publish_many([Placed(n=n) for n in range(30)])
        await until(lambda: now == 3)
        gate.set()
        await settled(app.broker)
    assert most == 3


async def test_a_thread_sees_the_context_of_its_call_and_may_publish() -> None:
    def marked(handle: Handle) -> Handle:
        async def inner(call: Call) -> None:
            CURRENT.set("marked")
            await handle(call)

        return inner

    app, seen = app_of(middleware=[marked]), list[str]()

    @app.subscriber(orders, "billing")
    def charge(delivery: Delivery[Placed]) -> None:
        seen.append(CURRENT.get())
        delivery.publish(Charged(n=delivery.event.n))

    async with TestApp(app) as t:
        await t.publish(Placed(n=7))
        assert t.published(payments) == [Charged(n=7)]
    assert seen == ["marked"]


async def test_whatever_a_plain_function_raises_ends_its_event_and_not_the_worker() -> None:
    app, errors = app_of(retry=Retry(1)), [StopIteration(), SystemExit(1), KeyError(1), ValueError("last")]

    @app.subscriber(orders, "billing")
    def charge(event: Base) -> None:
        raise errors[event.n]

    async with TestApp(app, raise_errors=False) as t:
        for n in range(len(errors)):
            await t.publish(Placed(n=n))
        letters = t.dead("billing")
    assert len(letters) == 4 and "last" in letters[-1].error


async def test_a_plain_function_past_its_timeout_has_failed_and_is_not_waited_for() -> None:
    app, gate, ended = app_of(retry=Retry(1)), threading.Event(), threading.Event()

    @app.subscriber(orders, "billing", timeout="50ms")
    def charge(event: Base) -> None:
        if event.n == 1:
            gate.wait(30)
            ended.set()

    async with at_work(app):
        await app.publish(Placed(n=1), to=orders)
        await app.publish(Placed(n=2), to=orders)
        await settled(app.broker)
        (group,) = await app.broker.admin.groups("orders")
        gate.set()
    assert (group.done, group.dead) == (1, 1)
    assert ended.wait(10)


async def test_threads_end_with_the_worker() -> None:
    app = app_of()

    @app.subscriber(orders, "billing")
    def charge(event: Base) -> None: ...

    before = threading.active_count()
    async with at_work(app):
        await app.publish_many([Placed(n=n) for n in range(50)])
        await settled(app.broker)
    await until(lambda: threading.active_count() == before)
