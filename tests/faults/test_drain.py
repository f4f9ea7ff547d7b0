"""SIGTERM: what runs is finished, what is done is settled, the rest goes back at once."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path

from tests.faults.nemesis import Child, Crew
from tests.faults.oracle import judge, publish, until_settled
from tests.faults.shop import Block, Task

LANES = {"MILLSTREAM_CONCURRENCY": "8"}
MARGIN_S = 2.0  # of a busy machine


def ended_in_s(child: Child) -> float:
    """How long it takes from a SIGTERM to the end."""
    began_s = time.monotonic()
    child.send(signal.SIGTERM)
    child.wait()
    return time.monotonic() - began_s


def until_begun(crew: Crew, count: int) -> None:
    crew.until(lambda: len(crew.journal.lines("run")) >= count, "no handler begins")


def test_a_drain_finishes_what_runs_and_hands_back_the_rest_unharmed(url: str, journals: Path) -> None:
    with Crew(url, journals, **LANES) as crew:
        child = crew.worker()
        for turn in range(3):
            publish(crew, [(f"d-{turn}-{n}", Task(seconds=0.1 + n % 5 / 10)) for n in range(40)])
            until_begun(crew, len(crew.journal.lines("run")) + 8)
            took_s = ended_in_s(child)
            assert (child.code, took_s < 0.5 + MARGIN_S) == (0, True), child.log
            runs = crew.journal.ids("run")
            assert runs == crew.journal.ids("fin") == crew.journal.ids("set"), crew.journal.history(runs)
            child = crew.worker()
        until_settled(crew)
        assert ended_in_s(child) < MARGIN_S
        verdict = judge(crew)
        verdict.check()
        assert verdict.repeats == 0 and max(Counter(line.id for line in crew.journal.lines("set")).values()) == 1
        assert {line.attempt for line in crew.journal.lines("got")} == {1}, (
            "what was handed back had its attempt counted"
        )


def test_what_outlives_the_grace_is_cut_off_and_goes_on_elsewhere_at_once(url: str, journals: Path) -> None:
    cut_off(url, journals)


def cut_off(url: str, journals: Path, **environment: str) -> None:
    with Crew(url, journals, MILLSTREAM_GRACE="500ms", MILLSTREAM_LEASE="60s", **environment) as crew:
        slow = crew.worker(FAULTS_SLOW="60")
        publish(crew, [("d-1", Task(fault="slow")), ("d-2", Task(fault="slow"))])
        until_begun(crew, 2)
        other = crew.worker()
        assert 0.5 <= ended_in_s(slow) < 0.5 + MARGIN_S and slow.code == 1, slow.log
        until_settled(crew, 5.0)  # a small part of the lease: nobody waits for it
        assert ended_in_s(other) < MARGIN_S and other.code == 0
        verdict = judge(crew)
        verdict.check()
        assert crew.journal.ids("cut") == {"d-1", "d-2"} and verdict.repeats == 2 and verdict.duplicates == 0
        assert {line.attempt for line in crew.journal.lines("got")} == {1}, "the stop of a process is no failed attempt"


def test_a_second_signal_does_not_wait_for_the_grace(url: str, journals: Path) -> None:
    with Crew(url, journals, MILLSTREAM_GRACE="60s", MILLSTREAM_LEASE="60s") as crew:
        slow = crew.worker(FAULTS_SLOW="60")
        publish(crew, [("d-1", Task(fault="slow"))])
        until_begun(crew, 1)
        slow.send(signal.SIGINT)  # two of one kind that come at once are one
        assert ended_in_s(slow) < MARGIN_S and slow.code == 1, slow.log
        other = crew.worker()
        until_settled(crew, 5.0)
        assert ended_in_s(other) < MARGIN_S and other.code == 0
        judge(crew).check()


def test_a_thread_that_hangs_does_not_keep_the_process_alive(url: str, journals: Path) -> None:
    with Crew(url, journals, MILLSTREAM_GRACE="500ms") as crew:
        hanging = crew.worker()
        publish(crew, [("b-1", Block(seconds=60.0))])
        until_begun(crew, 1)
        assert ended_in_s(hanging) < 0.5 + 2.0 and hanging.code == 1, hanging.log
        assert not crew.journal.ids("fin")
