"""Several processes at one file: nothing is lost, nobody starves, and a kill at any moment leaves the file intact."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import subprocess
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from millstream.brokers.base import GroupInfo, Position, Record
from millstream.brokers.sqlite.broker import SQLiteBroker
from tests.sqlite.places import (
    ORDERS,
    eventually,
    ids,
    intact,
    joined,
    lines,
    opened,
    outcomes,
    process,
    rest,
)

KILLS = 12


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


def kill(child: subprocess.Popen[str]) -> list[str]:
    """Kill it with SIGKILL; what it had said by then."""
    child.send_signal(signal.SIGKILL)
    child.wait()
    return rest(child)


async def read_all(broker: SQLiteBroker) -> list[str]:
    found = []
    for partition in range(ORDERS.partitions):
        after: Position | None = None
        while page := await broker.read("orders", partition, after, 100):
            found += [stored.record.id for stored in page]
            after = page[-1].position
    return found


async def drained(broker: SQLiteBroker) -> list[str]:
    """Handle what is left, as a member that is patient enough to take over from the dead."""
    consumer, handled = await joined(broker), []

    async def left() -> GroupInfo:
        await consumer.keep()
        claims = await consumer.fetch(100, 0.1)
        handled.extend(ids(claims))
        await consumer.settle(outcomes(claims))
        return (await broker.admin.groups("orders"))[0]

    await eventually(left, lambda info: info.lag == 0 and info.pending == 0)
    await consumer.close()
    return handled


async def test_a_publisher_two_consumers_and_a_reader_use_one_file_at_once(tmp_path: Path) -> None:
    path, count = tmp_path / "shop.db", 600
    async with opened(path) as broker:
        with (
            process("consume", url_of(path)) as one,
            process("consume", url_of(path)) as two,
            process("publish", url_of(path), "p", count) as publisher,
        ):
            seen: list[str] = []
            after: dict[int, Position | None] = dict.fromkeys(range(ORDERS.partitions))
            while len(seen) < count:
                await broker.wait("orders", after, 5.0)
                for partition in after:
                    for stored in await broker.read("orders", partition, after[partition], 50):
                        seen.append(stored.record.id)
                        after[partition] = stored.position
            confirmed = rest(publisher)
            assert publisher.wait() == 0

            async def info() -> GroupInfo:
                return (await broker.admin.groups("orders"))[0]

            settled = await eventually(info, lambda info: info.done == count)
            assert (settled.lag, settled.pending, settled.consumers) == (0, 0, 2)
            handled = kill(one) + kill(two)
    assert sorted(seen) == sorted(confirmed) == sorted(handled)
    assert intact(path)


async def test_kills_at_random_moments_lose_nothing_and_leave_the_file_intact(tmp_path: Path) -> None:
    path, chance = tmp_path / "shop.db", random.Random(7)
    confirmed: list[str] = []
    handled: Counter[str] = Counter()
    async with opened(path):
        pass
    for round_ in range(KILLS):
        with (
            process("consume", url_of(path)) as consumer,
            process("publish", url_of(path), round_, 100_000) as publisher,
        ):
            confirmed += await asyncio.to_thread(lines, publisher, chance.randint(1, 150))
            handled.update(await asyncio.to_thread(lines, consumer, chance.randint(1, 150)))
            for child in chance.sample([consumer, publisher], 2):
                said = await asyncio.to_thread(kill, child)
                if child is publisher:
                    confirmed += said
                else:
                    handled.update(said)
        assert intact(path)
    async with opened(path) as broker:
        handled.update(await drained(broker))
        stored = await read_all(broker)
        info = (await broker.admin.groups("orders"))[0]
    assert set(confirmed) <= set(stored), "a confirmed event is gone"
    assert len(stored) == len(set(stored))
    assert set(handled) == set(stored), "an event was not handled"
    # A consumer has at most 20 events in hand, and says each before it settles them.
    assert sum(handled.values()) - len(stored) <= KILLS * 20
    assert info.done == len(stored)


async def test_four_processes_that_commit_back_to_back_all_get_their_turn(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path):
        pass
    with ExitStack() as stack:
        children = [stack.enter_context(process("contend", url_of(path), 2)) for _ in range(4)]
        for child in children:
            assert lines(child, 1) == ["ready"]
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        told = [await asyncio.to_thread(lines, child, 1) for child in children]
    commits = [int(line[0].split()[0]) for line in told]
    assert min(commits) > max(commits) / 5, commits  # without the turnstile, some get a handful of commits in all


async def test_an_event_of_another_process_wakes_a_waiting_fetch(tmp_path: Path) -> None:
    path, late_us = tmp_path / "shop.db", []
    async with opened(path) as broker:
        with process("echo", url_of(path)) as child:
            assert await asyncio.to_thread(lines, child, 1) == ["ready"]
            for n in range(40):
                await asyncio.sleep(0.02)  # not to wait for anything: so that the other one has nothing to do
                now = b"%d" % time.monotonic_ns()
                await broker.append("orders", [Record(n % 2, f"e-{n}", "order.placed", now)])
                late_us.append(int((await asyncio.to_thread(lines, child, 1))[0]))
    assert statistics.median(late_us) < 25_000, late_us  # 2 to 5 ms on an idle machine


async def test_a_process_that_holds_the_file_makes_others_wait_and_costs_nobody_his_events(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        slow, other = await joined(broker), await joined(broker)
        await broker.append("orders", [Record(0, "a", "order.placed", b"{}")])
        claims = await slow.fetch(1, 1.0)
        await other.keep()
        with process("hold", url_of(path)) as holder:
            assert await asyncio.to_thread(lines, holder, 1) == ["inside"]
            beats = asyncio.gather(other.keep(), slow.keep())
            publishing = asyncio.gather(broker.append("orders", [Record(0, "b", "order.placed", b"{}")]))
            until_s = time.monotonic() + 1.5  # longer than the lease
            while time.monotonic() < until_s:
                await broker.admin.groups("orders")  # reading goes on meanwhile
                assert not publishing.done()
                await asyncio.sleep(0.05)
            assert holder.stdin is not None
            holder.stdin.close()
            kept = await beats
            await publishing
        assert [one.lost for one in kept] == [frozenset(), frozenset()]
        assert await other.keep() is not None
        assert await slow.settle(outcomes(claims)) == [True]
        await slow.close()
        await other.close()


async def test_a_process_killed_inside_the_turnstile_lets_the_next_one_in(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        with process("hold", url_of(path)) as holder:
            assert await asyncio.to_thread(lines, holder, 1) == ["inside"]
            publishing = asyncio.gather(broker.append("orders", [Record(0, "b", "order.placed", b"{}")]))
            kill(holder)
            assert len(await publishing) == 1
