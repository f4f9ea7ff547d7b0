"""Processes are stopped past their lease while they hold events, others take over, and they go on: too late to settle."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.conftest import LONG
from tests.faults.nemesis import PATIENCE_S, Crew
from tests.faults.oracle import in_hand, judge, late_starts, publish, until_settled
from tests.faults.shop import Task

SEED = 11
ROUNDS = 500 if LONG else 20  # a round: one process stopped with events in hand

ZOMBIES, LANES, LIVING_LANES = 4, 2, 8
HANDLER_S = 0.2


class Graveyard:
    """Some processes that are stopped, and one that never is."""

    def __init__(self, crew: Crew, seed: int, **environment: str) -> None:
        self.rounds = 0
        self._turn = 0
        self._crew = crew
        self._chance = random.Random(seed)
        few = environment | {"MILLSTREAM_CONCURRENCY": str(LANES)}
        self._zombies = [crew.worker(**few) for _ in range(ZOMBIES)]
        self._living = crew.worker(**environment | {"MILLSTREAM_CONCURRENCY": str(LIVING_LANES)})

    def haunt(self, rounds: int) -> None:
        """Stop and resume all zombies, until there were so many rounds."""
        while self.rounds < rounds:
            self._turn += 1
            assert self._turn <= rounds, "no process ever has anything in hand"
            count = 2 * (ZOMBIES * LANES + LIVING_LANES)  # as many as all can hold
            publish(self._crew, [(f"z-{self._turn}-{n}", Task(seconds=HANDLER_S)) for n in range(count)])
            taken = self._stop()
            if self._turn % 2:
                until_settled(self._crew)
            else:  # they come back while the other one is at it
                self._crew.until(lambda: self._begun_again(taken), "nobody takes over")  # noqa: B023
            for zombie in self._zombies:
                self._crew.resume(zombie)
            until_settled(self._crew)
            self._crew.until(self._answered, "a zombie never heard what became of its events")

    def _stop(self) -> set[str]:
        """Stop each while its handlers run, or a moment later; what they hold then."""
        journal, taken = self._crew.journal, set[str]()
        runs = len(journal.lines("run"))
        until_s = time.monotonic() + PATIENCE_S
        while len(journal.lines("run")) == runs and time.monotonic() < until_s:
            time.sleep(0.001)
        for zombie in self._zombies:
            time.sleep(self._chance.uniform(0.0, HANDLER_S / 2))  # not to wait for anything: the moment is to be any
            self._crew.stop(zombie)
            held = in_hand(journal, zombie.pid)
            self.rounds += bool(held)
            taken |= held
        return taken

    def _begun_again(self, taken: set[str]) -> bool:
        return not taken or any(
            line.id in taken and line.pid == self._living.pid for line in self._crew.journal.lines("run")
        )

    def _answered(self) -> bool:
        return not any(in_hand(self._crew.journal, zombie.pid) for zombie in self._zombies)


def test_a_process_stopped_past_its_lease_settles_nothing(
    url: str, journals: Path, record_property: Callable[[str, object], None]
) -> None:
    with Crew(url, journals, MILLSTREAM_GRACE="10s") as crew:
        graveyard = Graveyard(crew, SEED)
        graveyard.haunt(ROUNDS)
        verdict, late = judge(crew), late_starts(crew.journal)
        refused = len(crew.journal.lines("ref"))
        print(
            f"\nseed {SEED}, {graveyard.rounds} rounds, {refused} outcomes refused, {late} begun late",
            verdict.figures(),
        )
        for name, value in {"rounds": graveyard.rounds, "refused": refused, **verdict.figures()}.items():
            record_property(name, value)
        verdict.check()
        assert verdict.taken + refused >= ROUNDS and verdict.group.done in (None, verdict.events)
        # Whoever wakes up asks first whether it is still alive; only a stop between that question and the start is late.
        assert late <= 1
