"""The judge can say no: mistakes that are made on purpose are found by the tests beside this one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults import test_drain, test_zombies
from tests.faults.nemesis import Crew
from tests.faults.oracle import judge, until_settled


@pytest.fixture
def file(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/shop.db"


def test_events_that_are_over_before_they_are_handled_are_lost(file: str, journals: Path) -> None:
    with Crew(file, journals, FAULTS_MUTANT="ack_first") as crew:
        # Killed with a handler in its midst, whatever the machine does.
        victim = crew.start("work", FAULTS_DIE="inside:5")
        publisher = crew.start("publish", 0, 200, 2_000)
        (crew.directory / "enough").touch()
        assert (victim.wait(), publisher.wait()) == (-signal.SIGKILL, 0)
        crew.worker()
        until_settled(crew)
        verdict = judge(crew)
        assert verdict.lost and any(id_ in verdict.history for id_ in verdict.lost)
        with pytest.raises(AssertionError, match="lost"):
            verdict.check()


def test_outcomes_that_are_believed_without_a_look_at_who_holds_the_event_are_stale(file: str, journals: Path) -> None:
    with Crew(file, journals, MILLSTREAM_GRACE="10s", FAULTS_MUTANT="no_fence") as crew:
        test_zombies.Graveyard(crew, test_zombies.SEED).haunt(8)
        verdict = judge(crew)
        assert verdict.stale
        with pytest.raises(AssertionError, match="stale"):
            verdict.check()


def test_a_process_that_keeps_what_it_holds_at_its_end_makes_others_wait(file: str, journals: Path) -> None:
    with pytest.raises(AssertionError, match="not settled"):
        test_drain.cut_off(file, journals, FAULTS_MUTANT="no_hand_back")
