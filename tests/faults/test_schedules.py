"""Three processes keep one schedule, and are killed: each slot is published once, and none is missing."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millstream import App
from tests.faults.belfry import INTERVAL_MS, POINTS, strikes
from tests.faults.conftest import LONG
from tests.faults.nemesis import Child, Crew, Nemesis, Plan
from tests.faults.proxy import Proxy
from tests.servers import RedisServer

SEED = 23
SLOTS = 2_000 if LONG else 200
PROCESSES = 3
CUT_EVERY_S = 0.5

Told = Callable[[str, object], None]


class BellCrew(Crew):
    """Its processes are those of the belfry."""

    def start(self, *words: object, **environment: str) -> Child:
        return self.run("-m", "tests.faults.belfry", *words, **environment)


@pytest.fixture(params=["sqlite", "redis"])
def ways(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A broker of this test alone: directly; and as processes reach it, for Redis by connections that are cut."""
    if request.param == "sqlite":
        yield (f"sqlite:///{tmp_path}/belfry.db",) * 2
        return
    with RedisServer.start("8" if LONG else "7") as server, Proxy(server.port, SEED) as proxy:
        proxy.every_s = CUT_EVERY_S
        yield server.url, proxy.url


def heard(url: str) -> list[int]:
    """The slots whose events are stored, in their order."""

    async def read() -> list[int]:
        async with App("reader", broker=url) as app:
            return [envelope.event.at_ms async for envelope in app.read(strikes)]

    return asyncio.run(read())


def rung(crew: Crew, slots: int, seed: int) -> int:
    """Kill processes until so many slots are published. Returns how many kills there were."""
    nemesis = Nemesis(crew, seed, Plan(PROCESSES, POINTS, latest=15))
    while len(crew.journal.ids("set")) < slots:
        nemesis.rampage(nemesis.kills + 1)
    peaceful = nemesis.peace()
    after = len(crew.journal.ids("set"))
    crew.until(lambda: len(crew.journal.ids("set")) > after + 10, f"the bell is silent: {crew.said()}")
    for child in peaceful:
        child.send(signal.SIGTERM)
    assert [child.wait() for child in peaceful] == [0] * PROCESSES, crew.said()
    return nemesis.kills


def check(slots: list[int]) -> None:
    """Each once, none missing, in their order."""
    twice = [at_ms for at_ms, count in Counter(slots).items() if count > 1]
    assert not twice, f"{len(twice)} slots came twice: {twice[:20]}"
    assert slots == list(range(slots[0], slots[-1] + 1, INTERVAL_MS)), "slots are missing, or out of order"


def test_each_slot_is_published_once_whatever_is_killed(
    ways: tuple[str, str], journals: Path, record_property: Told
) -> None:
    direct, cut = ways
    with BellCrew(cut, journals) as crew:
        kills = rung(crew, SLOTS, SEED)
        slots = heard(direct)
    print(f"\nseed {SEED}, {kills} kills, {len(slots)} slots, {len(crew.journal.lines('set'))} of them answered")
    record_property("kills", kills)
    record_property("slots", len(slots))
    check(slots)
    assert len(slots) >= SLOTS and kills >= SLOTS / 20
