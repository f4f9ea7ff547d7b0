"""The harness can fail: each mistake that it is there for is made on purpose, and found."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.processes import Trial


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def test_a_worker_that_settles_before_it_handles_is_found_to_lose_events(directory: Path) -> None:
    with Trial(f"sqlite:///{directory}/shop.db", directory) as trial:
        worker = trial.child("work", handler="slow:0.05", mutant="ack-first")
        trial.publish(100)
        trial.until(lambda: trial.history.runs, "a handler runs")
        worker.signal(signal.SIGKILL)
        worker.ended(5)
        trial.child("work")
        trial.until_settled()
        with pytest.raises(AssertionError, match="lost [1-9]"):
            trial.judge()


def test_a_worker_without_a_fence_is_found_to_settle_what_is_not_its_own(directory: Path) -> None:
    with Trial(f"sqlite:///{directory}/shop.db", directory) as trial:
        zombie = trial.child("work", handler="slow:0.3", concurrency=2, mutant="no-fence")
        trial.publish(2)
        trial.until(lambda: len(trial.history.runs) == 2, "both handlers run")
        trial.stop(zombie)
        trial.child("work", handler="slow:20")  # has them, and works on them for long
        trial.until(lambda: sum(trial.history.runs.values()) == 4, "somebody else has begun them")
        zombie.signal(signal.SIGCONT)
        trial.until(lambda: trial.history.stale(), "the stale settle is found")
        with pytest.raises(AssertionError, match="stale [1-9]"):
            trial.judge()


def test_an_event_that_nobody_sent_is_found(directory: Path) -> None:
    with Trial(f"sqlite:///{directory}/shop.db", directory) as trial:
        trial.publish(3)
        trial.child("work")
        trial.until_settled()
        trial.judge()
        trial.history.tried.discard("1")
        with pytest.raises(AssertionError, match="phantom 1"):
            trial.judge()
