"""Events that kill their process: each is dead after its attempts, its neighbours are all handled."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

from tests.faults.processes import GRACE_S, Trial

EVENTS = 200
POISON = {"57": "exit", "133": "kill"}
ATTEMPTS = 2


@pytest.mark.timeout(120)
def test_an_event_that_ends_its_process_is_dead_after_its_attempts_and_takes_nobody_along(trial: Trial) -> None:
    kinds = " ".join(f"{id_}={kind}" for id_, kind in POISON.items())
    supervisor = trial.child("supervise", 2, handler="slow:0.01", attempts=str(ATTEMPTS))
    trial.publish(EVENTS, kinds=kinds)
    group = trial.until_settled(within_s=90)
    supervisor.signal(signal.SIGTERM)
    assert supervisor.ended(GRACE_S + 3) == 0, supervisor.said()
    letters = trial.dead()
    assert {letter.stored.record.id: letter.reason for letter in letters} == dict.fromkeys(POISON, "crashed")
    trial.judge(dead=set(POISON))
    history = trial.history
    assert history.finished == {str(n) for n in range(EVENTS)} - set(POISON)
    assert (group.done, group.dead, group.pending) == (EVENTS - len(POISON), len(POISON), 0)
    starts = Counter({id_: history.runs[id_] for id_ in POISON})
    print({"poison": dict(starts), "repeats of others": history.repeats() - sum(starts.values()) + len(POISON)})
    # Alone at last: seen in a crowd, suspected beside others, and once more with nobody beside it.
    assert all(ATTEMPTS <= count <= ATTEMPTS + 2 for count in starts.values())
    assert supervisor.said().count("it starts again") == sum(starts.values())
