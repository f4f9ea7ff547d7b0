"""Workers are killed, and their connections cut, while handlers publish: what an event made is in the next stream once."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from millstream import App
from millstream.brokers.base import Broker, GroupInfo, StreamInfo
from tests.faults import mill, shop
from tests.faults.conftest import LONG, LONG_S
from tests.faults.mill import CHUNK, GROUP, bags_of
from tests.faults.nemesis import PATIENCE_S, Child, Crew, Nemesis
from tests.faults.oracle import asked, in_hand
from tests.faults.proxy import Proxy
from tests.servers import RedisServer

SEED = 19
KILLS, SACKS, RATE = (60, 40_000, 500) if LONG else (12, 3_000, 400)
CUT_EVERY_S = 0.4
PAUSE_S = 1.6  # a process must have begun, and in the order of keys waited out the lease of the last one
STOPS = 50 if LONG else 4
PLACES = ["sqlite", "redis 7", "redis 8 before", *(["redis 8", "redis 7 before"] if LONG else [])]
PATIENT_S = LONG_S if LONG else 2 * PATIENCE_S

Told = Callable[[str, object], None]


IN_BOTH_ORDERS = pytest.mark.parametrize("order", ["none", "key"])


class MillCrew(Crew):
    """Its processes are those of the mill."""

    def start(self, *words: object, **environment: str) -> Child:
        return self.run("-m", "tests.faults.mill", *words, **environment)


@dataclass(frozen=True)
class Place:
    """A broker, directly and by the way that workers take."""

    direct: str
    workers: str
    proxy: Proxy | None = None

    @property
    def before(self) -> bool:
        """Outputs are stored before the outcome."""
        return "before" in self.workers

    @contextmanager
    def storm(self) -> Iterator[None]:
        """Connections are cut inside the block."""
        if self.proxy is not None:
            self.proxy.every_s = CUT_EVERY_S
        yield
        if self.proxy is not None:
            self.proxy.every_s = 0.0


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """SQLite, Redis, and Redis where outputs are stored before the outcome."""
    if request.param == "sqlite":
        yield Place(f"sqlite:///{tmp_path}/mill.db", f"sqlite:///{tmp_path}/mill.db")
        return
    _, version, *before = request.param.split()
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer.start(version))
        proxy = stack.enter_context(Proxy(server.port, SEED))
        yield Place(server.url, proxy.url + "?outputs=before" * bool(before), proxy)


@dataclass(frozen=True)
class Yield:
    """What came out: bags by sack and number."""

    missing: Counter[tuple[int, int]]
    doubled: Counter[tuple[int, int]]
    strange: Counter[tuple[int, int]]
    bags: int
    same_ids: int
    begun_again: int
    """Events that were handled once more."""
    repeats: int
    """Bags that were dropped since their ids were known."""

    def check(self) -> None:
        assert not (self.missing or self.doubled or self.strange or self.same_ids), self


def weigh(crew: Crew, direct: str) -> Yield:
    """Compare the stream of bags with the sacks."""
    ground = {int(id_[2:]) for id_ in crew.journal.ids("ok")}
    expected = Counter((sack, number) for sack in ground for number in range(bags_of(sack)))
    found, ids, info = asyncio.run(all_bags(direct))
    runs = crew.journal.lines("run")
    return Yield(
        missing=expected - found,
        doubled=Counter({bag: count for bag, count in found.items() if count > 1}),
        strange=Counter({bag: count for bag, count in found.items() if bag not in expected}),
        bags=found.total(),
        same_ids=found.total() - len(ids),
        begun_again=len(runs) - len({line.id for line in runs}),
        repeats=info.repeats,
    )


async def all_bags(direct: str) -> tuple[Counter[tuple[int, int]], set[str], StreamInfo]:
    found, ids = Counter[tuple[int, int]](), set[str]()
    async with App("reader", broker=direct) as app:
        async for envelope in app.read(mill.bags):
            found[envelope.event.sack, envelope.event.number] += 1
            ids.add(envelope.id)
        (info,) = (info for info in await app.broker.admin.streams() if info.spec.name == mill.bags.name)
    return found, ids, info


def until_ground(crew: Crew, direct: str) -> None:
    """Return when no sack is left, and no bag is kept for later."""
    seen: list[tuple[GroupInfo, int]] = []

    async def look(broker: Broker) -> tuple[GroupInfo, int]:
        (group,) = (info for info in await broker.admin.groups(mill.sacks.name) if info.group == GROUP)
        return group, sum(info.delayed for info in await broker.admin.streams())

    def ground() -> bool:
        if not crew.up():  # before that there may be no group
            return False
        seen[:] = [asked(direct, look)]
        group, delayed = seen[0]
        return (group.lag, group.pending, delayed) == (0, 0, 0)

    try:
        crew.until(ground, "not ground", PATIENT_S)
    except RuntimeError as late:
        raise AssertionError(f"{late}: {seen}\n{crew.said()}") from None


def crew_of(place: Place, journals: Path, order: str, **environment: str) -> MillCrew:
    """Where outputs are stored before the outcome, the stream of bags has to remember ids."""
    dedupe = {"FAULTS_DEDUPE": "1"} if place.before else {}
    return MillCrew(place.workers, journals, FAULTS_ORDER=order, **dedupe, **environment)


@IN_BOTH_ORDERS
def test_what_handlers_publish_is_stored_once_whatever_is_killed_and_cut(
    place: Place, journals: Path, record_property: Told, order: str
) -> None:
    with crew_of(place, journals, order) as crew:
        publisher = crew.start("publish", SACKS, RATE, MILLSTREAM_BROKER=place.direct)
        crew.until(lambda: crew.journal.lines("ok"), f"nothing is published: {publisher.log}")
        with place.storm():
            points = mill.POINTS if place.before else shop.POINTS
            nemesis = Nemesis(crew, SEED, points=points, latest=100, pause_s=PAUSE_S)
            nemesis.rampage(KILLS - 2)
        workers = nemesis.peace()
        (journals / "enough").touch()
        assert publisher.wait(PATIENT_S) == 0, publisher.log
        until_ground(crew, place.direct)
        for child in workers:
            child.send(signal.SIGTERM)
        assert [child.wait() for child in workers] == [0, 0], crew.said()
        result = weigh(crew, place.direct)
    cuts = place.proxy.cuts if place.proxy is not None else 0
    print(f"\nseed {SEED}, {nemesis.kills} kills, {cuts} cuts: {result}")
    for name in ("bags", "begun_again", "repeats"):
        record_property(name, getattr(result, name))
    result.check()
    assert nemesis.kills >= KILLS and result.bags > SACKS and result.begun_again > 0, "the kills hit nothing"
    if place.proxy is not None:
        assert cuts >= KILLS / 2, "hardly anything was cut"
    if place.before:
        assert result.repeats > 0, "nothing was ever stored twice"


@IN_BOTH_ORDERS
def test_processes_that_are_stopped_past_their_lease_store_nothing_twice(
    place: Place, journals: Path, record_property: Told, order: str
) -> None:
    chance, lanes = random.Random(SEED), {"MILLSTREAM_CONCURRENCY": "4"}
    with crew_of(place, journals, order, MILLSTREAM_GRACE="10s") as crew:
        workers = [crew.worker(**lanes) for _ in range(3)]
        publisher = crew.start("publish", 10 * STOPS * CHUNK, 4 * CHUNK, MILLSTREAM_BROKER=place.direct)
        for _ in range(STOPS):
            victims = chance.sample(workers, 2)
            for victim in victims:
                time.sleep(chance.uniform(0.0, 0.05))  # the moment is to be any
                crew.stop(victim)
            held = set[str]().union(*(in_hand(crew.journal, victim.pid) for victim in victims))
            crew.until(lambda: not held or begun_again(crew) & held, "nobody takes over")  # noqa: B023
            for victim in victims:
                crew.resume(victim)
        (journals / "enough").touch()
        assert publisher.wait(PATIENT_S) == 0, publisher.log
        until_ground(crew, place.direct)
        result = weigh(crew, place.direct)
        refused = len(crew.journal.lines("ref", "lost"))
    print(f"\nseed {SEED}, {STOPS} stops, {refused} refused: {result}")
    for name, value in {"refused": refused, "bags": result.bags, "repeats": result.repeats}.items():
        record_property(name, value)
    result.check()
    assert refused > 0 and result.begun_again > 0, "nobody was ever too late"


def begun_again(crew: Crew) -> set[str]:
    """Events whose handler began more than once."""
    return {id_ for id_, count in Counter(line.id for line in crew.journal.lines("run")).items() if count > 1}
