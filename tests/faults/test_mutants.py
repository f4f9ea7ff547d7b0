"""The judge can say no: mistakes that are made on purpose are found by the tests beside this one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults import test_drain, test_outputs, test_retention, test_schedules, test_zombies
from tests.faults.nemesis import Crew
from tests.faults.oracle import judge, until_settled
from tests.servers import RedisServer


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


@pytest.mark.parametrize("order", ["none", "key"])
def test_outputs_that_are_stored_apart_from_the_outcome_are_doubled(file: str, journals: Path, order: str) -> None:
    with test_outputs.MillCrew(file, journals, FAULTS_MUTANT="apart", FAULTS_ORDER=order) as crew:
        victim = crew.start("work", FAULTS_DIE="unsettled:5")
        publisher = crew.start("publish", 400, 2_000)
        (journals / "enough").touch()
        assert (victim.wait(), publisher.wait()) == (-signal.SIGKILL, 0)
        crew.worker()
        test_outputs.until_ground(crew, file)
        result = test_outputs.weigh(crew, file)
        assert result.doubled and not result.missing
        with pytest.raises(AssertionError, match="doubled"):
            result.check()


def test_outputs_that_come_before_the_outcome_are_doubled_where_no_ids_are_remembered(journals: Path) -> None:
    with RedisServer.start() as server, test_outputs.MillCrew(server.url + "?outputs=before", journals) as crew:
        victim = crew.start("work", FAULTS_DIE="stored:5")
        publisher = crew.start("publish", 400, 2_000)
        (journals / "enough").touch()
        assert (victim.wait(), publisher.wait()) == (-signal.SIGKILL, 0)
        crew.worker()
        test_outputs.until_ground(crew, server.url)
        with pytest.raises(AssertionError, match="doubled"):
            test_outputs.weigh(crew, server.url).check()


def test_slots_that_are_published_without_a_look_at_the_last_one_come_twice(file: str, journals: Path) -> None:
    with test_schedules.BellCrew(file, journals, FAULTS_MUTANT="blind") as crew:
        test_schedules.rung(crew, 20, test_schedules.SEED)
        with pytest.raises(AssertionError, match="came twice"):
            test_schedules.check(test_schedules.heard(file))


def test_a_stream_that_is_trimmed_whatever_a_group_needs_loses_events(file: str, journals: Path) -> None:
    with test_retention.SiloCrew(file, journals, FAULTS_RETENTION="keep", FAULTS_MUTANT="careless") as crew:
        test_retention.fill(crew)
        lost = test_retention.missing(crew)
        assert lost and test_retention.group_of(file).lost == len(lost)
