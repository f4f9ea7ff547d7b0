"""A worker that is told to end: within its grace, without a repetition, and what it did not start goes on elsewhere."""

from __future__ import annotations

import signal
import time

from tests.faults.processes import GRACE_S, Child, Trial


def running(trial: Trial, child: Child, count: int) -> None:
    """Wait until so many handlers run in this process."""

    def started() -> int:
        lines = [line for lines in trial.history.lines.values() for line in lines if line.pid == child.pid]
        return sum((line.verb == "run") - (line.verb == "fin") for line in lines)

    trial.until(lambda: started() >= count, f"{count} handlers run")


def test_handlers_that_fit_into_the_grace_finish_and_nothing_is_repeated(trial: Trial) -> None:
    first = trial.child("work", handler="between:0.1:0.5", concurrency=8)
    trial.publish(100)
    running(trial, first, 8)
    began_s = time.monotonic()
    first.signal(signal.SIGTERM)
    second = trial.child("work", handler="between:0.1:0.2", concurrency=32)
    assert first.ended(GRACE_S + 1) == 0, first.said()
    assert time.monotonic() - began_s < GRACE_S
    group = trial.until_settled()
    second.signal(signal.SIGTERM)
    assert second.ended(GRACE_S + 1) == 0
    trial.judge()
    assert group.done == 100 and trial.history.repeats() == 0


def test_a_handler_that_outlasts_the_grace_is_cut_and_its_event_is_elsewhere_at_once(trial: Trial) -> None:
    first = trial.child("work", handler="hang", concurrency=2, grace_s=0.5)
    trial.publish(2)
    running(trial, first, 2)
    second = trial.child("work", handler="quick")
    first.signal(signal.SIGTERM)
    assert first.ended(4) == 1, first.said()
    left_s = time.monotonic()
    trial.until_settled()
    assert time.monotonic() - left_s < 1.0  # handed back: nobody had to wait for a lease
    second.signal(signal.SIGTERM)
    assert second.ended(GRACE_S + 1) == 0
    trial.judge()
    attempts = {line.attempt for lines in trial.history.lines.values() for line in lines if line.verb == "fin"}
    assert attempts == {1}  # being cut off is no attempt


def test_a_second_signal_cuts_off_what_still_runs(trial: Trial) -> None:
    worker = trial.child("work", handler="hang", concurrency=2, grace_s=60)
    trial.publish(2)
    running(trial, worker, 2)
    worker.signal(signal.SIGTERM)
    trial.until(lambda: trial.group() is not None, "it is told")
    assert worker.code is None
    worker.signal(signal.SIGTERM)
    assert worker.ended(3) == 1, worker.said()
    group = trial.group()
    assert group is not None and group.scheduled == 2 and group.consumers == 0


def test_a_plain_function_that_hangs_does_not_keep_its_process_alive(trial: Trial) -> None:
    worker = trial.child("work", handler="hang-sync", grace_s=0.5)
    trial.publish(2)
    running(trial, worker, 2)
    worker.signal(signal.SIGTERM)
    assert worker.ended(0.5 + 2) == 1, worker.said()
    group = trial.group()
    assert group is not None and group.scheduled == 2


def test_a_worker_with_nothing_to_do_ends_at_once(trial: Trial) -> None:
    worker = trial.child("work")
    trial.publish(1)
    trial.until_settled()
    began_s = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert worker.ended(GRACE_S) == 0
    assert time.monotonic() - began_s < 1.0
