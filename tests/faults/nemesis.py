"""The nemesis: kills workers at moments out of a seed, and starts new ones, until it has killed often enough.

Half of the deaths come from outside, at any moment; half are armed: a process kills itself at a chosen place, the
so-manieth time that it comes there, so that every gap between two steps is hit.
"""

from __future__ import annotations

import signal
import time

from tests.faults.processes import POLL_S, Child, Trial

PLACES = ("fetched", "before", "inside", "after", "settling", "settled")


class Nemesis:
    """Kills the workers of a trial."""

    def __init__(self, trial: Trial, workers: int, **environment: str) -> None:
        self._trial = trial
        self._environment = environment
        self._random = trial.random
        self.kills = 0
        self.armed = 0
        """Of the kills: how many came from inside, at a chosen place."""
        self._workers = [self._start() for _ in range(workers)]

    def strike(self, kills: int, within_s: float) -> list[Child]:
        """Kill so often, then leave the workers that live."""
        until_s = time.monotonic() + within_s
        while self.kills < kills:
            assert time.monotonic() < until_s, f"only {self.kills} of {kills} kills in {within_s:g} s"
            for index, (worker, die_s, _) in enumerate(self._workers):
                if worker.code is None and time.monotonic() >= die_s:
                    worker.signal(signal.SIGKILL)
                    worker.ended(10)
                if worker.code is not None:
                    self._count(worker)
                    self._workers[index] = self._start(last=self.kills >= kills)
            time.sleep(POLL_S)
        return self._disarmed()

    def _start(self, last: bool = False) -> tuple[Child, float, bool]:
        """A worker, when it is to die at the latest, and whether it is armed."""
        armed = not last and self._random.random() < 0.5
        environment = dict(self._environment)
        if armed:
            environment["die"] = f"{self._random.choice(PLACES)}:{self._random.randint(1, 200)}"
        life_s = self._random.uniform(2.5, 3.5) if armed else self._random.uniform(0.3, 1.5)
        return self._trial.child("work", **environment), time.monotonic() + life_s, armed

    def _count(self, worker: Child) -> None:
        assert worker.code == -signal.SIGKILL, f"it ended by itself: {worker.said()}"
        self.kills += 1
        self._trial.note(f"process {worker.pid} was killed ({self.kills})")

    def _disarmed(self) -> list[Child]:
        """Replace those that would still kill themselves."""
        for index, (worker, _, armed) in enumerate(self._workers):
            if armed or worker.code is not None:
                worker.signal(signal.SIGKILL)
                worker.ended(10)
                self._count(worker)
                self._workers[index] = self._start(last=True)
        self.armed = sum(line.verb == "died" for line in self._trial.history.told)
        return [worker for worker, _, _ in self._workers]
