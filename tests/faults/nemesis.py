"""The processes of one test, and what is done to them: killed, stopped, and started again, by a plan that a seed repeats."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.faults.journal import Journal, Pen
from tests.faults.shop import POINTS
from tests.servers import wait_until

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0  # a machine with two busy cores

QUICK = {"MILLSTREAM_LEASE": "1s", "MILLSTREAM_GRACE": "3s", "MILLSTREAM_CONCURRENCY": "16"}


class Child:
    """One process of ours."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self.pid = process.pid

    @property
    def code(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.poll()

    @property
    def log(self) -> str:
        """All that it said."""
        return self._log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, within_s: float = PATIENCE_S) -> int:
        """Its exit code. Raises `TimeoutExpired`."""
        return self._process.wait(within_s)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Crew:
    """All processes of one test; none is left at the end of the block, children of supervisors included."""

    def __init__(self, url: str, directory: Path, **environment: str) -> None:
        self.url = url
        self.directory = directory
        self.journal = Journal(directory)
        self.pen = Pen(directory)
        self._environment = QUICK | environment
        self._children: list[Child] = []

    def start(self, *words: object, **environment: str) -> Child:
        """A process of the shop: a verb, its words, and what its environment has besides."""
        return self.run("-m", "tests.faults.shop", *words, **environment)

    def run(self, *words: object, **environment: str) -> Child:
        """A Python of ours."""
        log = self.directory / f"{len(self._children)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                start_new_session=True,
                env=os.environ
                | {
                    "PYTHONPATH": str(ROOT / "src"),
                    "MILLSTREAM_BROKER": self.url,
                    "FAULTS_JOURNAL": str(self.directory),
                }
                | self._environment
                | environment,
            )
        child = Child(process, log)
        self._children.append(child)
        return child

    def worker(self, **environment: str) -> Child:
        """A worker that is a member of its group."""
        child = self.start("work", **environment)
        self.until(lambda: child.pid in self.up(), f"process {child.pid} does not join: {child.log}")
        return child

    def said(self) -> str:
        """The last words of every process, and how it ended."""
        return "\n".join(f"--- process {c.pid}, ended with {c.code}:\n{c.log[-2_000:]}" for c in self._children)

    def up(self) -> list[int]:
        """The processes that ever joined, in this order."""
        return [line.pid for line in sorted(self.journal.lines("up"))]

    def kill(self, child: Child) -> None:
        """Kill it with SIGKILL."""
        self.pen.write("kill", pid=child.pid)
        child.end()

    def stop(self, child: Child) -> None:
        """Stop it with SIGSTOP; it stands still when this returns, and stands in nobody's way.

        A process that stands still inside SQLite's turnstile, in the midst of a write, stops all others too: nobody could
        take over. That is SQLite's nature and no fault to look for here.
        """
        wait_until(lambda: self._stopped(child), PATIENCE_S, "it never stands still outside of the turnstile")
        self.pen.write("stop", pid=child.pid)

    def _stopped(self, child: Child) -> bool:
        child.send(signal.SIGSTOP)
        wait_until(lambda: state(child.pid) == "T", PATIENCE_S, "it goes on")
        turnstile = Path(self.url.removeprefix("sqlite:///") + "-turn")
        if not turnstile.exists():
            return True
        with turnstile.open("rb") as file:
            for _ in range(100):  # others are in there for a moment only
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.001)
                else:
                    return True
        child.send(signal.SIGCONT)
        return False

    def resume(self, child: Child) -> None:
        """Let it go on."""
        self.pen.write("cont", pid=child.pid)
        child.send(signal.SIGCONT)

    def until(self, met: Callable[[], object], complaint: str, within_s: float = PATIENCE_S) -> None:
        """Return as soon as the condition is met."""
        wait_until(lambda: bool(met()), within_s, complaint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.end()
        for pid in set(self.up()):
            if is_ours(pid, self.directory):
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Plan:
    """How many workers there are, and when they die."""

    workers: int = 2
    points: Sequence[str] = POINTS
    latest: int = 500
    """So often somebody comes to the point of its death at most."""
    pause_s: float = 0.8
    """The longest time between two kills."""


PLAN = Plan()


class Nemesis:
    """Kills the workers of a crew, and starts new ones in their place."""

    def __init__(self, crew: Crew, seed: int, plan: Plan = PLAN, /, **environment: str) -> None:
        self.kills = 0
        self._crew = crew
        self._plan = plan
        self._chance = random.Random(seed)
        self._environment = environment
        self._workers = [self._new() for _ in range(plan.workers)]

    def rampage(self, kills: int) -> None:
        """Kill until there were so many. Half of the workers carry the moment of their death within them."""
        while self.kills < kills:
            # Not to wait for anything: the moment of a kill is to be any.
            time.sleep(self._chance.uniform(0.0, self._plan.pause_s))
            if all(child.code is None for child in self._workers):
                self._chance.choice(self._workers).send(signal.SIGKILL)
            self._replace()

    def peace(self) -> list[Child]:
        """Workers that nobody kills any more, in place of the others."""
        for child in self._workers:
            self._crew.kill(child)
        self.kills += len(self._workers)
        return [self._crew.worker(**self._environment) for _ in self._workers]

    def _replace(self) -> None:
        for index, child in enumerate(self._workers):
            if child.code is None:
                continue
            assert child.code == -signal.SIGKILL, f"process {child.pid} ended with {child.code}: {child.log[-2_000:]}"
            self.kills += 1
            self._crew.pen.write("kill", pid=child.pid)
            self._workers[index] = self._new()

    def _new(self) -> Child:
        if self._chance.random() < 0.5:
            return self._crew.start("work", **self._environment)
        point, count = self._chance.choice(self._plan.points), self._chance.randint(1, self._plan.latest)
        return self._crew.start("work", FAULTS_DIE=f"{point}:{count}", **self._environment)


def state(pid: int) -> str:
    """The kernel's letter for what a process does; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def ended(pids: Iterable[int]) -> bool:
    """True when all these processes have ended. One that nobody has waited for yet counts as ended."""
    return all(state(pid) in ("", "Z", "X") for pid in pids)


def is_ours(pid: int, directory: Path) -> bool:
    """True while this process writes its journal there: its number may be another one's by now."""
    try:
        return str(directory).encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
