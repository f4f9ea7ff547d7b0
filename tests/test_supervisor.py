"""The supervisor and its children, as real processes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from millstream import App
from millstream.clock import Clock
from millstream.worker.supervisor import Supervisor
from tests.faults.journal import Journal
from tests.faults.nemesis import Child, Crew, ended
from tests.faults.oracle import judge, publish, until_settled
from tests.faults.shop import GROUP, Block, Task, tasks

EXIT_S = 10.0  # of Pythons on a busy machine


@pytest.fixture
def crew(tmp_path: Path) -> Any:
    with Crew(f"sqlite:///{tmp_path}/shop.db", tmp_path) as crew:
        yield crew


def supervised(crew: Crew, workers: int = 2, **environment: str) -> Child:
    """A supervisor whose children have all joined."""
    supervisor = crew.start("work", workers, **environment)
    crew.until(lambda: len(crew.up()) == workers, f"the children do not join: {supervisor.log}")
    return supervisor


def joined_s(journal: Journal, index: int) -> float:
    return sorted(journal.lines("up"))[index].time_ns / 1e9


def test_a_child_that_dies_is_replaced_after_a_pause_that_grows(crew: Crew) -> None:
    supervisor = supervised(crew)
    pauses_s = []
    for turn in range(3):
        victim = crew.up()[-1] if turn else crew.up()[0]
        killed_s = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        crew.until(lambda: len(crew.up()) == 3 + turn, f"nobody replaces it: {supervisor.log}")  # noqa: B023
        pauses_s.append(joined_s(crew.journal, -1) - killed_s)
    assert all(pause_s > least_s for pause_s, least_s in zip(pauses_s, (0.5, 1.0, 2.0), strict=True)), pauses_s
    assert pauses_s[-1] < 2.0 + EXIT_S
    assert supervisor.log.count("was killed by SIGKILL; it starts again in") == 3
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait(EXIT_S) == 0 and ended(crew.up())


def test_a_child_that_was_told_to_end_alone_is_replaced_too(crew: Crew) -> None:
    supervisor = supervised(crew)
    os.kill(crew.up()[0], signal.SIGTERM)
    crew.until(lambda: len(crew.up()) == 3, f"nobody replaces it: {supervisor.log}")
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait(EXIT_S) == 0 and ended(crew.up())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_all_children(crew: Crew, number: signal.Signals) -> None:
    supervisor = supervised(crew, MILLSTREAM_CONCURRENCY="2")
    publish(crew, [(f"s-{n}", Task(seconds=0.5)) for n in range(20)])
    crew.until(lambda: len({line.pid for line in crew.journal.lines("run")}) == 2, "one does nothing")
    supervisor.send(number)
    assert supervisor.wait(EXIT_S) == 0, supervisor.log
    assert ended(crew.up())
    assert crew.journal.ids("run") == crew.journal.ids("fin") == crew.journal.ids("set")
    other = crew.worker()
    until_settled(crew)
    other.send(signal.SIGTERM)
    other.wait()
    verdict = judge(crew)
    verdict.check()
    assert verdict.repeats == 0


def test_work_that_is_cut_off_is_told_by_the_exit_code_and_a_second_signal_reaches_the_children(crew: Crew) -> None:
    supervisor = supervised(crew, MILLSTREAM_GRACE="60s")
    publish(crew, [("s-1", Task(seconds=60.0))])
    crew.until(lambda: crew.journal.lines("run"), "no handler begins")
    idle = next(pid for pid in crew.up() if pid != crew.journal.lines("run")[0].pid)
    supervisor.send(signal.SIGTERM)
    crew.until(lambda: ended([idle]), "the signal was not passed on")
    assert supervisor.code is None
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait(EXIT_S) == 1 and crew.journal.ids("cut") == {"s-1"}


def test_a_supervisor_that_is_killed_takes_its_children_along(crew: Crew) -> None:
    supervisor = supervised(crew)
    publish(crew, [("s-1", Task(seconds=0.5))])
    crew.until(lambda: crew.journal.lines("run"), "no handler begins")
    crew.kill(supervisor)
    crew.until(lambda: ended(crew.up()), "they live on", EXIT_S)
    assert crew.journal.ids("set") == {"s-1"}, "they drain before they end"


def test_a_child_that_does_not_end_within_its_grace_is_killed(crew: Crew) -> None:
    supervisor = supervised(crew, MILLSTREAM_GRACE="200ms", FAULTS_MUTANT="deaf")
    supervisor.send(signal.SIGTERM)
    assert supervisor.wait(0.2 + 5.0 + EXIT_S) == 1, supervisor.log
    assert ended(crew.up()) and supervisor.log.count("did not end within its grace: killed") == 2


def test_an_app_that_may_not_start_is_not_started_for_ever(crew: Crew) -> None:
    async def other() -> None:
        app = App("other", broker=crew.url)
        app.subscriber(tasks, GROUP)(nothing)
        async with app.worker():
            pass

    asyncio.run(other())
    supervisor = crew.run("-m", "millstream", "run", "tests.faults.shop:shop", "--workers", 2)
    assert supervisor.wait(EXIT_S) == 4, supervisor.log
    assert len(re.findall(r"worker \d is process", supervisor.log)) <= 2
    assert "belongs to the app 'other'" in supervisor.log


async def nothing(event: Task | Block) -> None:
    pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_that_comes_while_a_child_is_spawned_reaches_it_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    supervisor, spawn = Supervisor(1, 30.0, Clock()), asyncio.create_subprocess_exec

    async def slow_spawn(*_: object, **options: Any) -> asyncio.subprocess.Process:
        child = await spawn(sys.executable, "-c", "import time; time.sleep(60)", **options)
        os.kill(os.getpid(), number)
        await supervisor._stopping.wait()
        return child

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow_spawn)
    async with asyncio.timeout(EXIT_S):
        assert await supervisor.run() == 0
