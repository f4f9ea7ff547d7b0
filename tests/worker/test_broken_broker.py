"""What a worker does while its broker fails."""

from __future__ import annotations

import asyncio
import time

import pytest

from millstream import App, Delivery, Settings
from millstream.brokers.base import Dead, Settlement
from millstream.brokers.memory.group import Group
from millstream.errors import BrokerDown, BrokerFull, BrokerRefused, Reject
from millstream.telemetry import BROKER_ERROR, LOST, STALE
from tests.worker.place import (
    Base,
    Charged,
    Faulty,
    FaultyConsumer,
    Placed,
    app_of,
    at_work,
    heard,
    memory,
    orders,
    payments,
    settled,
    until,
)

DOWN = BrokerDown("nobody answers")


def charging(app: App) -> list[int]:
    handled: list[int] = []

    @app.subscriber(orders, "billing")
    async def charge(delivery: Delivery[Base]) -> None:
        handled.append(delivery.event.n)
        delivery.publish(Charged(n=delivery.event.n), to=payments)

    return handled


@pytest.mark.parametrize("call", ["fetch", "settle", "keep"])
async def test_nothing_is_lost_while_the_broker_is_down(call: str) -> None:
    app = app_of(Settings(lease="20s", grace="2s", concurrency=8))
    handled, faults, errors = charging(app), Faulty(memory(app)), heard(app, BROKER_ERROR)
    async with at_work(app, faults):
        await app.publish_many([Placed(n=n) for n in range(50)])
        faults.before[call] = DOWN
        await app.publish_many([Placed(n=n) for n in range(50, 100)])
        if call != "keep":  # its next turn comes in a second
            await until(lambda: len(errors) >= 3)
        del faults.before[call]
        await settled(faults)
        assert [len(await faults.read("payments", 0, None, 500))] == [100]
    assert sorted(handled) == list(range(100))  # each of them once: the same outcome was sent again


async def test_a_settle_whose_reply_was_lost_is_sent_again_and_repeats_nothing() -> None:
    app = app_of()
    handled, faults, stale = charging(app), Faulty(memory(app)), heard(app, STALE)
    async with at_work(app, faults):
        faults.after["settle"] = DOWN
        await app.publish_many([Placed(n=n) for n in range(20)])
        await until(lambda: faults.calls["settle"] >= 3)
        faults.after.clear()
        await settled(faults)
        assert len(await faults.read("payments", 0, None, 500)) == 20
    assert sorted(handled) == list(range(20)) and not stale  # refused as repeats: nobody else had them


async def test_pauses_between_tries_grow_and_one_line_a_second_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of()
    charging(app)
    faults, errors = Faulty(memory(app)), heard(app, BROKER_ERROR)
    async with at_work(app, faults):
        faults.before["fetch"] = DOWN
        await app.publish(Placed())
        began_s = time.monotonic()
        await until(lambda: len(errors) >= 6)
        took_s = time.monotonic() - began_s
        faults.before.clear()
    assert took_s >= 0.15  # 10 + 20 + 40 + 80 + 160 ms, less up to a half
    lines = [record for record in caplog.records if "cannot fetch" in record.message]
    assert 1 <= len(lines) <= 1 + took_s


async def test_a_broker_that_refuses_us_ends_the_worker_with_its_error() -> None:
    app = app_of()
    charging(app)
    faults = Faulty(memory(app))
    with pytest.raises(BrokerRefused, match="wrong password"):
        async with at_work(app, faults):
            faults.before["fetch"] = BrokerRefused("wrong password")
            await asyncio.Event().wait()


async def test_a_handler_that_swallows_its_cancellation_does_not_hold_up_that_end() -> None:
    app, started = app_of(), asyncio.Event()
    faults = Faulty(memory(app))

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    with pytest.raises(BrokerRefused):
        async with asyncio.timeout(5), at_work(app, faults):
            await app.publish(Placed())
            await started.wait()
            faults.before["keep"] = BrokerRefused("wrong password")
            await asyncio.Event().wait()


async def test_a_full_broker_keeps_dead_letters_waiting_and_settles_the_others() -> None:
    app, handled = app_of(Settings(lease="1s", concurrency=4, max_in_flight=100)), list[int]()

    @app.subscriber(orders, "billing")
    async def charge(event: Base) -> None:
        handled.append(event.n)
        if event.n < 10:
            raise Reject("no")

    broker = Full(memory(app))
    async with at_work(app, broker):
        await app.publish_many([Placed(n=n) for n in range(10)])
        await until(lambda: len(handled) == 10)
        for n in range(10, 2_000, 10):
            await app.publish_many([Placed(n=i) for i in range(n, n + 10)])
        await until(lambda: len(handled) == 2_000)
        async with asyncio.timeout(5):  # a pause for each round of the full broker would make it 20 of a second
            while (group := (await broker.admin.groups("orders"))[0]).done != 1_990:
                await asyncio.sleep(0.001)
        assert (group.pending - group.scheduled, group.dead) == (10, 0)
        broker.full = False
        await settled(broker)
        (group,) = await broker.admin.groups("orders")
    assert (group.dead, group.done) == (10, 1_990)


async def test_nothing_is_lost_while_a_disk_is_so_full_that_no_outcome_can_be_stored() -> None:
    app = app_of(Settings(lease="20s", concurrency=8))
    handled, faults, errors = charging(app), Faulty(memory(app)), heard(app, BROKER_ERROR)

    @app.subscriber(orders, "mail")
    async def tell(event: Base) -> None: ...

    async with at_work(app, faults):
        faults.before["settle"] = BrokerFull("the disk is full")
        await app.publish_many([Placed(n=n) for n in range(50)])
        await until(lambda: len(errors) >= 6)
        del faults.before["settle"]
        await settled(faults)
        await settled(faults, "mail")
        assert len(await faults.read("payments", 0, None, 500)) == 50
    assert sorted(handled) == list(range(50))


class Full(Faulty):
    """A broker without room for dead letters."""

    full = True

    async def subscribe(self, subscription: object) -> FaultyConsumer:
        consumer = await super().subscribe(subscription)  # type: ignore[arg-type]
        settle = consumer.settle

        async def settle_small(settlements: list[Settlement]) -> list[bool]:
            letters = [s for s in settlements if isinstance(s.outcome, Dead)]
            if not self.full or not letters:
                return await settle(settlements)
            await settle([s for s in settlements if s not in letters])
            raise BrokerFull("no room")

        consumer.settle = settle_small  # type: ignore[assignment, method-assign]
        return consumer


async def test_nothing_starts_once_the_heartbeat_is_not_answered_any_more() -> None:
    app = app_of(Settings(lease="500ms", grace="2s", concurrency=8))
    handled, faults = charging(app), Faulty(memory(app))
    async with at_work(app, faults) as process:
        faults.hanging["keep"] = asyncio.Event()
        faults.hanging["settle"] = asyncio.Event()
        await until(lambda: faults.calls["keep"])
        await until(lambda: time.monotonic() > trusted_until_s(process))
        await app.publish_many([Placed(n=n) for n in range(5)])
        await until(lambda: process._workers[0].in_flight == 5)
        assert handled == []
        faults.hanging.pop("keep").set()
        faults.hanging.pop("settle").set()
        await settled(faults)
    assert sorted(handled) == list(range(5))


def trusted_until_s(process: object) -> float:
    lanes = process._workers[0]._lanes  # type: ignore[attr-defined]
    return float(lanes._keeper.trusted_until)


async def test_a_worker_whose_heartbeat_fails_still_drains_at_once() -> None:
    app = app_of(Settings(lease="500ms", grace="20s"))
    handled, faults = charging(app), Faulty(memory(app))
    began_s = 0.0
    async with at_work(app, faults) as process:
        faults.before["keep"] = DOWN
        await until(lambda: time.monotonic() > trusted_until_s(process))
        await app.publish_many([Placed(n=n) for n in range(5)])
        await until(lambda: process._workers[0].in_flight)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 5 and handled == []
    (group,) = await faults.admin.groups("orders")
    assert (group.lag or 0) + group.scheduled == 5  # handed back


async def test_what_was_lost_is_cancelled_and_its_outputs_are_dropped() -> None:
    app, cancelled, finished = app_of(), list[int](), list[int]()
    lost, gate = heard(app, LOST), asyncio.Event()

    @app.subscriber(orders, "billing", concurrency=2)
    async def charge(delivery: Delivery[Base]) -> None:
        delivery.publish(Charged(n=delivery.attempt), to=payments)
        if delivery.attempt == 1:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                cancelled.append(delivery.event.n)
                raise
        finished.append(delivery.event.n)

    faults = Faulty(memory(app))
    async with at_work(app, faults) as process:
        await app.publish_many([Placed(n=n) for n in range(4)])
        await until(lambda: process.running == 2 and process._workers[0].in_flight == 4)
        faults.broker.logs["orders"].groups["billing"].members.clear()
        await take_all(faults)
        await until(lambda: len(cancelled) == 2)
        await settled(faults)
        outputs = await faults.read("payments", 0, None, 500)
        assert process._workers[0].in_flight == 0
    assert lost and sorted(finished) == [0, 1, 2, 3] and len(outputs) == 4
    assert {stored.record.data for stored in outputs} == {b'{"n":2}'}


async def take_all(faults: Faulty, stream: str = "orders") -> None:
    """Take everything away from its holders, as a living observer does when they are silent."""
    group = faults.broker.logs[stream].groups["billing"]
    assert isinstance(group, Group)
    holders = {pending.holder for pending in group.pending.values() if pending.holder is not None}
    for member in holders:
        taken = dict(member.held)
        for pending in [group.pending[position] for position in taken]:
            group._wait(pending, 0)
        member.held, member.present = taken, False
