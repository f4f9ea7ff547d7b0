"""An event whose handler takes its process down: it becomes a dead letter, and nobody else suffers."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.faults.nemesis import Crew
from tests.faults.oracle import judge, publish, until_settled
from tests.faults.shop import Task

EVENTS, ATTEMPTS = 200, 3
POISONS = {"p-exit": "exit", "p-kill": "kill"}
PATIENT_S = 60.0  # six crashes, each with its lease and a pause before the restart


def test_an_event_that_kills_its_process_dies_alone(url: str, journals: Path) -> None:
    events = [(f"e-{n}", Task(seconds=n % 3 / 1_000)) for n in range(EVENTS)]
    for place, (name, fault) in zip((50, 120), POISONS.items(), strict=True):
        events.insert(place, (name, Task(fault=fault)))
    with Crew(url, journals, FAULTS_ATTEMPTS=str(ATTEMPTS)) as crew:
        publish(crew, events)
        supervisor = crew.start("work", 2)
        crew.until(crew.up, f"no worker joins: {supervisor.log}")
        until_settled(crew, PATIENT_S)
        supervisor.send(signal.SIGTERM)
        assert supervisor.wait() == 0, supervisor.log
        verdict = judge(crew)
        verdict.check()
        assert verdict.group.done in (None, EVENTS)
        assert {(letter.stored.record.id, letter.reason) for letter in verdict.dead} == {
            (p, "crashed") for p in POISONS
        }
        for poison in POISONS:
            runs = [line for line in crew.journal.lines("run") if line.id == poison]
            assert 2 <= len(runs) <= ATTEMPTS, crew.journal.history([poison])
