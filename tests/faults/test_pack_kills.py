"""Workers are killed while they handle packs: nothing is lost, and what is repeated was in packs that they had in hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from millstream.brokers.base import Broker
from millstream.wire import packs
from tests.faults.conftest import LONG
from tests.faults.journal import Journal
from tests.faults.nemesis import Crew
from tests.faults.oracle import asked, in_hand
from tests.faults.shop import tasks
from tests.faults.test_kills import IN_FLIGHT, killed

SEED = 11
KILLS, EVENTS, RATE = (200, 200_000, 1_600) if LONG else (12, 10_000, 1_600)
PACK = 32


def test_kills_lose_no_event_of_a_pack_and_repeat_those_of_packs_in_hand(
    url: str, journals: Path, record_property: Callable[[str, object], None]
) -> None:
    with Crew(url, journals, FAULTS_PACK=str(PACK)) as crew:
        kills, verdict = killed(crew, SEED, KILLS, EVENTS, RATE)
        events = asked(url, events_of_packs)
        held = at_death(crew.journal)
        hit = sum(not events.keys().isdisjoint(entries) for entries in held)
        figures = {"seed": SEED, "kills": kills, "packs": len(events), "hit": hit, **verdict.figures()}
        print(f"\n{figures}")
        for name, value in figures.items():
            record_property(name, value)
        verdict.check()
        assert kills >= KILLS and verdict.events >= EVENTS and not verdict.dead
        assert sum(map(len, events.values())) > EVENTS / 2 and hit >= KILLS / 6, "most kills found no pack"
        assert verdict.in_hand <= IN_FLIGHT, "a pack is one of these"
        at_risk = [events.get(entry, {entry}) for entries in [*held, taken(crew.journal)] for entry in entries]
        assert begun_again(crew.journal) <= set[str]().union(*at_risk)
        assert verdict.duplicates <= verdict.repeats <= sum(map(len, at_risk))


async def events_of_packs(broker: Broker) -> Mapping[str, set[str]]:
    """The packs of the stream, and the events of each, by their ids."""
    found: dict[str, set[str]] = {}
    for partition in range(tasks.partitions):
        place = None
        while page := await broker.read(tasks.name, partition, place, 1_000):
            place = page[-1].position
            found |= {
                stored.record.id: {event.id for event in packs.read(stored.record, stored.position.offset)}
                for stored in page
                if packs.is_pack(stored.record)
            }
    return found


def at_death(journal: Journal) -> list[set[str]]:
    """What each process that was killed had in hand."""
    return [in_hand(journal, line.pid) for line in journal.lines("kill")]


def taken(journal: Journal) -> set[str]:
    """What living but slow processes lost to others."""
    return journal.ids("lost")


def begun_again(journal: Journal) -> set[str]:
    """The events whose handler began more than once."""
    return {id_ for id_, times in Counter(line.id for line in journal.lines("run")).items() if times > 1}
