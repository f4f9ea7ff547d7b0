"""What happens to a Redis server while two workers and a publisher are busy on it."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import LONG
from tests.faults.nemesis import Child, Crew
from tests.faults.oracle import Verdict, group_of, judge, until_settled
from tests.redis.brokers import run_in
from tests.servers import RedisServer

SEED = 13
RATE = 800
IN_FLIGHT, WORKERS = 32, 2
LINES_A_SECOND = 2  # one, and another where the second begins anew

Told = Callable[[str, object], None]


class Busy:
    """A server, and who is busy on it."""

    def __init__(self, server: RedisServer, crew: Crew) -> None:
        self.server = server
        self.crew = crew
        self.chance = random.Random(SEED)
        self.workers = [crew.worker() for _ in range(WORKERS)]
        self.publisher = crew.start("publish", 0, 1, RATE)
        self.until_finished(100)

    def until_finished(self, more: int) -> None:
        """Return when so many more events are finished: after a fault, the proof that all goes on."""
        journal = self.crew.journal
        aim = len(journal.lines("fin")) + more
        self.crew.until(lambda: len(journal.lines("fin")) >= aim, "nothing goes on any more")

    def pause(self, longest_s: float) -> None:
        """Let some time pass: not to wait for anything, but for the moment of a fault to be any."""
        time.sleep(self.chance.uniform(0.0, longest_s))

    def end(self) -> Verdict:
        """The verdict when all has come to rest."""
        (self.crew.directory / "enough").touch()
        assert self.publisher.wait() == 0, self.publisher.log
        until_settled(self.crew)
        assert all(child.code is None for child in self.workers), [child.log for child in self.workers]
        return judge(self.crew)


@contextmanager
def busy(journals: Path, fsync: str = "everysec") -> Iterator[Busy]:
    with RedisServer.start("7", appendonly="yes", appendfsync=fsync) as server, Crew(server.url, journals) as crew:
        yield Busy(server, crew)


def again(crew: Crew) -> int:
    """How often something was published that may have been stored already."""
    return len(crew.journal.lines("again"))


def most_lines_a_second(child: Child) -> int:
    """Of warnings and errors."""
    return max(Counter(re.findall(r"^(\d+)\.\d+ (?:WARNING|ERROR)", child.log, re.MULTILINE)).values(), default=0)


def check(crew: Crew, verdict: Verdict, told: Told, **more: object) -> None:
    figures = verdict.figures() | {"published again": again(crew), **more}
    print(f"\nseed {SEED}: {figures}")
    for name, value in figures.items():
        told(name, value)
    assert not verdict.lost and not verdict.phantom, f"{figures}\n{verdict.history}"
    assert (verdict.group.lag, verdict.group.pending) == (0, 0) and not verdict.dead


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_a_server_that_keeps_its_log_loses_nothing_when_it_comes_back(
    journals: Path, record_property: Told, how: str
) -> None:
    rounds = 50 if LONG else 4
    with busy(journals, "everysec" if how == "restart" else "always") as at:
        for _ in range(rounds):
            at.pause(0.5)
            if how == "kill":
                at.server.kill()
            at.server.restart()
            at.until_finished(50)
        verdict = at.end()
        check(at.crew, verdict, record_property, rounds=rounds)
        assert verdict.repeats <= rounds * WORKERS * IN_FLIGHT + again(at.crew)


def test_connections_that_are_cut_cost_nothing_and_repeat_nothing(journals: Path, record_property: Told) -> None:
    rounds = 500 if LONG else 50
    with busy(journals) as at:
        for _ in range(rounds):
            at.pause(0.2)
            run_in(at.server, "CLIENT", "KILL", "TYPE", "normal")
        at.until_finished(100)
        verdict = at.end()
        check(at.crew, verdict, record_property, rounds=rounds)
        assert verdict.repeats <= again(at.crew) + verdict.taken


@pytest.mark.parametrize("command", ["FLUSHALL", "DEL tasks:0 tasks:1 tasks:2 tasks:3", "XGROUP DESTROY tasks:2 work"])
def test_what_is_published_after_everything_vanished_is_handled(
    journals: Path, record_property: Told, command: str
) -> None:
    with busy(journals) as at:
        for _ in range(3):
            at.pause(0.3)
            run_in(at.server, *command.split())
            since_ns = time.monotonic_ns()
            at.until_finished(200)
        at.end()
        verdict = judge(at.crew, 0 if "DESTROY" in command else since_ns)
        noise = max(most_lines_a_second(child) for child in at.workers)
        check(at.crew, verdict, record_property, lines_a_second=noise)
        assert noise <= LINES_A_SECOND


def test_a_full_server_refuses_what_is_new_and_gives_out_what_it_has(journals: Path, record_property: Told) -> None:
    with busy(journals) as at:
        used = int(re.findall(r"used_memory:(\d+)", run_in(at.server, "INFO", "memory").decode())[0])
        run_in(at.server, "CONFIG", "SET", "maxmemory", used + 200_000)
        at.crew.until(lambda: again(at.crew) > 50, "it is never full")
        until_settled(at.crew)
        assert group_of(at.crew.url).lag == 0
        run_in(at.server, "CONFIG", "SET", "maxmemory", 0)
        at.until_finished(200)
        noise = max(most_lines_a_second(child) for child in at.workers)
        verdict = at.end()
        check(at.crew, verdict, record_property, lines_a_second=noise)
        assert verdict.repeats == 0, "what was refused was not stored"
        assert noise <= LINES_A_SECOND


def test_a_server_that_stands_still_for_longer_than_the_lease_takes_nothing_from_anybody(
    journals: Path, record_property: Told
) -> None:
    rounds = 20 if LONG else 3
    with busy(journals) as at:
        for _ in range(rounds):
            at.pause(0.3)
            at.server.pause()
            time.sleep(1.2)  # the fault itself
            at.server.resume()
            at.until_finished(100)
        verdict = at.end()
        check(at.crew, verdict, record_property, rounds=rounds)
        assert verdict.repeats <= again(at.crew) + verdict.taken
