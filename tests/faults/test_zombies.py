"""A stopped process comes back to events that somebody else has by now, and settles none of them."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.faults.processes import LONG, Child, Trial, ending

ZOMBIES = 4
ROUNDS = 50 if LONG else 5  # of four zombies each: 20
EVENTS = 40  # a round: enough for every process to hold some


class Rounds:
    """Rounds of: let all work, stop the zombies, let the healthy one take over, wake the zombies."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.logged = 0
        """Zombies that noticed that they had lost something."""

    def play(self, number: int, zombies: list[Child]) -> None:
        trial = self.trial
        trial.publish(EVENTS, prefix=f"r{number}-")
        mine = {f"r{number}-{n}" for n in range(EVENTS)}
        trial.until(lambda: all(self._holds(zombie, mine) for zombie in zombies), "each zombie holds an event")
        before = {zombie.pid: self._told(zombie) for zombie in zombies}
        for zombie in zombies:
            trial.stop(zombie)
        held = {zombie.pid: self._holding(zombie, mine) for zombie in zombies}
        trial.note(f"round {number}: stopped with {held}")
        trial.until(lambda: mine <= trial.history.finished, f"round {number} is finished by the healthy one")
        trial.until(lambda: self._all_accepted(mine), f"round {number} is settled by the healthy one")
        for zombie in zombies:
            zombie.signal(signal.SIGCONT)
        trial.until(
            lambda: all(not held[zombie.pid] or self._told(zombie) > before[zombie.pid] for zombie in zombies),
            "every zombie notices what it has lost",
        )
        self.logged += sum(bool(ids) for ids in held.values())

    def _all_accepted(self, ids: set[str]) -> bool:
        return all(self.trial.history.settled[id_] for id_ in ids)

    def _holds(self, zombie: Child, ids: set[str]) -> bool:
        return bool(self._holding(zombie, ids))

    def _holding(self, zombie: Child, ids: set[str]) -> set[str]:
        """The events whose handler this process has begun, and not ended."""
        history, found = self.trial.history, set[str]()
        for id_ in ids:
            verbs = [line.verb for line in history.lines[id_] if line.pid == zombie.pid]
            if verbs == ["run"]:
                found.add(id_)
        return found

    def _told(self, zombie: Child) -> int:
        names = ("consumer.lost", "settle.refused")
        told = self.trial.history.told
        return sum(line.pid == zombie.pid and line.words[0] in names for line in told if line.verb == "told")


@pytest.mark.timeout(1_200 if LONG else 120)
def test_a_zombie_settles_nothing(trial: Trial, record_property: Callable[[str, object], None]) -> None:
    rounds = Rounds(trial)
    healthy = trial.child("work", handler="slow:0.05", concurrency=4)
    zombies = [trial.child("work", handler="slow:0.4", concurrency=2) for _ in range(ZOMBIES)]
    with ending(healthy, *zombies):
        for number in range(ROUNDS):
            rounds.play(number, zombies)
        trial.until_settled()
        trial.judge()
    figures = {"zombies": rounds.logged, "stale settles": len(trial.history.stale())}
    print(figures)
    for name, value in figures.items():
        record_property(name, value)
    assert rounds.logged >= 4 * ROUNDS and trial.history.settled.total() == ROUNDS * EVENTS
