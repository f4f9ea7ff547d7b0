"""Workers and their publisher are killed at any moment, under load: nothing is lost, and little is repeated."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from tests.faults.conftest import LONG, LONG_S
from tests.faults.nemesis import PATIENCE_S, Crew, Nemesis
from tests.faults.oracle import Verdict, in_hand, judge, until_settled

SEED = 7
KILLS, EVENTS, RATE = (200, 200_000, 1_600) if LONG else (20, 20_000, 1_600)
IN_FLIGHT = 2 * 16
PATIENT_S = LONG_S if LONG else PATIENCE_S


def killed(crew: Crew, seed: int, kills: int, events: int, rate: float, **worker: str) -> tuple[int, Verdict]:
    """What comes out when workers are killed while events come, until there are enough of both."""
    publisher = crew.start("publish", 0, events // 2, rate)
    nemesis = Nemesis(crew, seed, **worker)
    nemesis.rampage(kills // 2)
    crew.kill(publisher)  # what it has tried and not confirmed may appear or not
    first = max(int(line.id[2:]) for line in crew.journal.lines("try")) + 1
    publisher = crew.start("publish", first, max(1, events - len(crew.journal.ids("ok"))), rate)
    nemesis.rampage(kills - 2)
    workers = nemesis.peace()
    (crew.directory / "enough").touch()
    assert publisher.wait(PATIENT_S) == 0, publisher.log
    until_settled(crew, PATIENT_S)
    for child in workers:
        child.send(signal.SIGTERM)
    assert [child.wait() for child in workers] == [0, 0]
    return nemesis.kills, judge(crew)


def test_kills_at_any_moment_lose_nothing_and_repeat_little(
    url: str, journals: Path, record_property: Callable[[str, object], None]
) -> None:
    with Crew(url, journals) as crew:
        kills, verdict = killed(crew, SEED, KILLS, EVENTS, RATE)
        hit = sum(bool(in_hand(crew.journal, line.pid)) for line in crew.journal.lines("kill"))
        print(f"\nseed {SEED}, {kills} kills, {hit} of them with work in hand: {verdict.figures()}")
        for name, value in {"seed": SEED, "kills": kills, **verdict.figures()}.items():
            record_property(name, value)
        verdict.check()
        assert kills >= KILLS and verdict.events >= EVENTS and verdict.in_hand <= IN_FLIGHT and not verdict.dead
        assert hit >= KILLS / 3, "most kills found nothing to destroy"
        # A process that the machine held up for a lease is as good as dead; that is no fault, and counted by itself.
        assert verdict.duplicates <= verdict.repeats <= kills * IN_FLIGHT + verdict.taken
