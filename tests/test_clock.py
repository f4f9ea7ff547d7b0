"""The clock, real and virtual."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from contextvars import ContextVar

import pytest
import uvloop

from millstream.clock import Clock
from millstream.testing.clock import BOOT_S, START_MS, VirtualClock

LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, uvloop.new_event_loop]


def test_ids_are_short_and_unique() -> None:
    clock = Clock()
    ids = [clock.new_id() for _ in range(1_000)]
    assert len(set(ids)) == 1_000
    assert all(len(id) <= 24 and id.isascii() and id.isalnum() for id in ids)


def test_many_ids_are_those_that_come_one_by_one() -> None:
    clock, other = Clock(), Clock()
    first, *more = clock.new_ids(3)
    prefix = first[:12]
    assert [first, *more, clock.new_id(), *clock.new_ids(2)] == [f"{prefix}{n}" for n in range(1, 7)]
    assert clock.new_ids(0) == [] and clock.new_id() == f"{prefix}7"
    assert other.new_id()[:12] != prefix


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks on this system")
def test_a_forked_child_draws_other_ids_than_its_parent() -> None:
    code = """
import os
from millstream.clock import Clock

clock = Clock()
clock.new_id()
child = os.fork()
os.write(1, clock.new_id().encode() + b" ")  # in one piece: print may cut it in two, and they would mix
if child:
    os.waitpid(child, 0)
"""
    # In a process of its own: to fork one that has threads, as a run of tests may, is asking for a deadlock.
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    parent, child = answer.stdout.split()
    assert parent[:12] != child[:12]


def test_a_nonce_has_twelve_characters() -> None:
    assert {len(Clock().nonce()) for _ in range(200)} == {12}


async def test_a_wait_tells_whether_the_event_came_or_the_time_ran_out() -> None:
    clock, event = Clock(), asyncio.Event()
    assert not await clock.wait(event, 0.001)
    clock.call_later(0.001, event.set)
    assert await clock.wait(event, 10)
    assert await clock.wait(event, 0)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_time_stands_still_until_it_is_let_pass_and_then_timers_fire_in_order(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> list[tuple[str, int]]:
        clock = VirtualClock()
        fired: list[tuple[str, int]] = []

        async def sleeper(name: str, seconds: float) -> None:
            await clock.sleep(seconds)
            fired.append((name, clock.now_ms() - START_MS))
            await clock.sleep(1)
            fired.append((name, clock.now_ms() - START_MS))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sleeper("slow", 3))
            tasks.create_task(sleeper("quick", 0.25))
            await asyncio.sleep(0.01)
            assert fired == [] and clock.now_ms() == START_MS and clock.monotonic() == BOOT_S
            await clock.advance(2)
            assert clock.monotonic() == BOOT_S + 2
            await clock.advance(2)
        return fired

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(main()) == [("quick", 250), ("quick", 1_250), ("slow", 3_000), ("slow", 4_000)]


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_virtual_timeout_cancels_like_a_real_one(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def limited(clock: VirtualClock, seconds: float) -> str:
        try:
            async with clock.timeout(seconds):
                await clock.sleep(10)
        except TimeoutError:
            return f"out of time at {clock.monotonic() - BOOT_S:g}"
        return f"slept until {clock.monotonic() - BOOT_S:g}"

    async def main() -> list[str]:
        clock = VirtualClock()
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(limited(clock, seconds)) for seconds in (0, 3, 20)]
            await clock.advance(60)
        assert clock.next_timer_s() is None
        return [task.result() for task in asked]

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(main()) == ["out of time at 0", "out of time at 3", "slept until 10"]


async def test_a_virtual_timeout_inside_of_another_ends_only_its_own_block() -> None:
    clock = VirtualClock()

    async def nested() -> str:
        async with clock.timeout(100):
            try:
                async with clock.timeout(1) as inner:
                    await asyncio.Event().wait()
            except TimeoutError:
                assert inner.expired()
                await clock.sleep(5)
        return "went on"

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(nested())
        await clock.advance(10)
    assert task.result() == "went on"


async def test_cancelling_a_virtual_sleep_leaves_no_timer() -> None:
    clock = VirtualClock()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(clock.sleep(5))
        await clock.sleep(0)
        task.cancel()
    assert clock.next_timer_s() is None


async def test_a_virtual_wait_ends_by_event_or_by_time() -> None:
    clock, event = VirtualClock(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        early, late = tasks.create_task(clock.wait(event, 1)), tasks.create_task(clock.wait(event, 5))
        clock.call_later(2, event.set)
        await clock.advance(3)
    assert (early.result(), late.result()) == (False, True)


async def test_a_timer_that_a_timer_starts_fires_in_the_same_advance() -> None:
    clock, at = VirtualClock(), list[float]()

    def again() -> None:
        at.append(clock.monotonic() - BOOT_S)
        clock.call_later(0.5, again)

    clock.call_later(0.5, again)
    await clock.advance(2)
    assert at == [0.5, 1.0, 1.5, 2.0]
    assert clock.next_timer_s() == 0.5


async def test_a_cancelled_timer_does_not_fire() -> None:
    clock, fired = VirtualClock(), list[str]()
    clock.call_later(1, fired.append, "kept")
    clock.call_later(1, fired.append, "cancelled").cancel()
    clock.call_later(0, fired.append, "at once").cancel()
    await clock.advance(2)
    assert fired == ["kept"]


async def test_a_timer_runs_in_the_context_of_whoever_set_it() -> None:
    clock, name, seen = VirtualClock(), ContextVar("name", default="?"), list[str]()

    async def setter(value: str) -> None:
        name.set(value)
        clock.call_later(1, lambda: seen.append(name.get()))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(setter("a"))
        tasks.create_task(setter("b"))
    await clock.advance(1)
    assert seen == ["a", "b"]


async def test_the_loop_is_settled_by_the_callers_own_means_between_any_two_timers() -> None:
    calls: list[int] = []

    async def settle() -> None:
        calls.append(clock.now_ms() - START_MS)

    clock = VirtualClock(settle)
    clock.call_later(1, int)
    clock.call_later(2, int)
    await clock.advance(3)
    assert calls == [0, 1_000, 2_000, 3_000]


async def test_hairs_of_floats_neither_delay_a_timer_nor_stop_the_clock() -> None:
    clock, fired = VirtualClock(), list[int]()
    for n in range(1, 1_000):
        clock.call_later(0.1 * n + 0.2 - 0.2, fired.append, n)
    clock.call_later(1e-9, fired.append, 0)  # less than a millisecond still takes time
    await clock.advance(0.001)
    assert fired == [0]
    await clock.advance(99.899)
    assert fired == list(range(1_000))


async def test_two_tasks_cannot_both_let_time_pass() -> None:
    clock = VirtualClock()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(clock.advance(1))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="only one task"):
            await clock.advance(1)
    await clock.advance(1)
    assert clock.monotonic() == BOOT_S + 2


def test_chance_and_ids_come_from_the_seed() -> None:
    def drawn(seed: int) -> tuple[float, str, str]:
        clock = VirtualClock(seed=seed)
        return clock.chance(), clock.nonce(), clock.new_id()

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(100)}) == 100
    assert all(0 <= VirtualClock(seed=seed).chance() < 1 for seed in range(100))
