"""Workers are killed at any moment, and nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.faults.nemesis import Nemesis
from tests.faults.processes import IN_FLIGHT, LONG, Trial, ending

EVENTS, KILLS = (200_000, 200) if LONG else (20_000, 22)
RATE = 1_300  # events a second: as long as the kills take


@pytest.mark.timeout(1_800 if LONG else 120)
def test_nothing_is_lost_when_workers_are_killed_at_any_moment(
    trial: Trial, record_property: Callable[[str, object], None]
) -> None:
    began_s = time.monotonic()
    publisher = trial.child("publish", EVENTS, RATE)
    nemesis = Nemesis(trial, workers=2)
    workers = nemesis.strike(KILLS, within_s=1_500 if LONG else 60)
    with ending(*workers):
        assert publisher.ended(1_500 if LONG else 60) == 0
        group = trial.until_settled()
        trial.judge()
    history = trial.history
    figures = {
        "events": len(history.confirmed),
        "kills": nemesis.kills,
        "of them at a chosen place": nemesis.armed,
        "repeats": history.repeats(),
        "repeats at most": nemesis.kills * IN_FLIGHT,
        "seconds": round(time.monotonic() - began_s, 1),
    }
    print(figures)
    for name, value in figures.items():
        record_property(name, value)
    assert len(history.confirmed) == EVENTS and nemesis.kills >= KILLS
    assert group.done == EVENTS and (group.lag, group.pending, group.dead) == (0, 0, 0)
    assert history.repeats() <= nemesis.kills * IN_FLIGHT
