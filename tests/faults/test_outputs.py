"""Workers are killed, and their connections cut, while handlers publish: what an event made is in the next stream once."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from millstream import App
from millstream.brokers.base import Broker, GroupInfo, StreamInfo
from tests.faults import mill, shop
from tests.faults.conftest import LONG, LONG_S
from tests.faults.mill import CHUNK, GROUP, bags_of
from tests.faults.nemesis import PATIENCE_S, Child, Crew, Nemesis, Plan
from tests.faults.oracle import MAX_SHOWN, asked, in_hand
from tests.faults.proxy import Proxy
from tests.servers import RedisServer

SEED = 19
KILLS, SACKS, RATE = (60, 40_000, 500) if LONG else (12, 3_000, 400)
CUT_EVERY_S = 0.4
PAUSE_S = 1.6  # a process must have begun, and in the order of keys waited out the lease of the last one
FEW, CEILING = (10_000, 1_000) if LONG else (1_500, 400)
STOPS, POWER_LOSSES = (50, 30) if LONG else (4, 4)
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

    def __str__(self) -> str:
        return ", ".join(
            f"{name.replace('_', ' ')} {value.total() if isinstance(value, Counter) else value}"
            for name, value in vars(self).items()
        )

    def check(self) -> None:
        bad = self.missing + self.doubled + self.strange
        assert not bad and not self.same_ids, f"{self}\n{sorted(bad)[:MAX_SHOWN]}"


def weigh(crew: Crew, direct: str, sacks: Set[int] | None = None) -> Yield:
    """Compare the stream of bags with these sacks, or with those that were published."""
    ground = {int(id_[2:]) for id_ in crew.journal.ids("ok")} if sacks is None else sacks
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


async def all_sacks(direct: str) -> set[int]:
    async with App("reader", broker=direct) as app:
        return {envelope.event.number async for envelope in app.read(mill.sacks)}


async def all_bags(direct: str) -> tuple[Counter[tuple[int, int]], set[str], StreamInfo]:
    found, ids = Counter[tuple[int, int]](), set[str]()
    async with App("reader", broker=direct) as app:
        async for envelope in app.read(mill.bags):
            found[envelope.event.sack, envelope.event.number] += 1
            ids.add(envelope.id)
        (info,) = (info for info in await app.broker.admin.streams() if info.spec.name == mill.bags.name)
    return found, ids, info


def publish(direct: str, first: int, count: int) -> int:
    """Publish sacks from this process; the number of the next one."""

    async def send() -> None:
        async with App("farm", broker=direct) as app:
            await app.publish_many([mill.sack(number) for number in range(first, first + count)], to=mill.sacks)

    asyncio.run(send())
    return first + count


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
            nemesis = Nemesis(crew, SEED, Plan(points=points, latest=100, pause_s=PAUSE_S))
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
def test_a_stream_that_is_full_holds_up_who_publishes_to_it_and_nothing_is_lost_or_doubled(
    place: Place, journals: Path, record_property: Told, order: str
) -> None:
    (journals / "enough").touch()
    with crew_of(place, journals, order, FAULTS_CEILING=str(CEILING)) as crew:
        assert crew.start("publish", FEW, 100_000, MILLSTREAM_BROKER=place.direct).wait() == 0
        most = 0
        nemesis = Nemesis(crew, SEED, Plan(latest=200, pause_s=PAUSE_S))
        while nemesis.kills < KILLS // 2:
            nemesis.rampage(nemesis.kills + 1)
            most = max(most, bags_info(place.direct).events)
        nemesis.peace()
        until_ground(crew, place.direct)
        expected = {(f"s-{sack}", number) for sack in range(FEW) for number in range(bags_of(sack))}
        crew.until(lambda: shipped(crew) == expected, "not all is shipped", PATIENT_S)
        info = bags_info(place.direct)
    print(
        f"\nseed {SEED}, {nemesis.kills} kills, at most {most} bags of {CEILING}, {info.added} ever, {info.repeats} repeats"
    )
    record_property("most", most)
    assert info.added == len(expected), "some are there twice"
    # Redis lets the outputs of one event past the ceiling together: three bags where there is room for one.
    assert 0.8 * CEILING <= most <= CEILING + 2, "it was never full, or more than full"


@IN_BOTH_ORDERS
@pytest.mark.parametrize("outputs", ["with", "before"])
def test_after_a_loss_of_power_the_bags_are_those_of_the_sacks_that_are_left(
    powered: None, journals: Path, record_property: Told, order: str, outputs: str
) -> None:
    chance = random.Random(SEED)
    with RedisServer.start("8" if outputs == "before" else "7", appendonly="yes", appendfsync="everysec") as server:
        place = Place(server.url, server.url + "?outputs=before" * (outputs == "before"))
        with crew_of(place, journals, order) as crew:
            workers = [crew.worker() for _ in range(2)]
            number = 0
            for _ in range(POWER_LOSSES):
                number = publish(place.direct, number, 400)
                time.sleep(chance.uniform(0.0, 1.0))  # the moment is to be any
                server.kill()
                server.restart()
            until_ground(crew, place.direct)
            left = asyncio.run(all_sacks(place.direct))
            result = weigh(crew, place.direct, left)
            assert [child.code for child in workers] == [None, None], crew.said()
    print(f"\nseed {SEED}, {POWER_LOSSES} losses of power, {len(left)} of {number} sacks left: {result}")
    record_property("sacks left", len(left))
    result.check()
    assert len(left) < number or result.begun_again > 0, "no power was lost"


def shipped(crew: Crew) -> set[tuple[str, int]]:
    """Bags that were shipped: the sack's id, and the bag's number."""
    return {(line.id, line.attempt) for line in crew.journal.lines("ship")}


def bags_info(direct: str) -> StreamInfo:
    async def look(broker: Broker) -> StreamInfo:
        (info,) = (info for info in await broker.admin.streams() if info.spec.name == mill.bags.name)
        return info

    return asked(direct, look)


@IN_BOTH_ORDERS
def test_processes_that_are_stopped_past_their_lease_store_nothing_twice(
    place: Place, journals: Path, record_property: Told, order: str
) -> None:
    chance, lanes = random.Random(SEED), {"MILLSTREAM_CONCURRENCY": "4", "FAULTS_SECONDS": "0.1"}
    with crew_of(place, journals, order, MILLSTREAM_GRACE="10s") as crew:
        workers = [crew.worker(**lanes) for _ in range(3)]
        publisher = crew.start("publish", 1, 100, MILLSTREAM_BROKER=place.direct)
        for _ in range(STOPS):
            runs = len(crew.journal.lines("run"))
            crew.until(lambda: len(crew.journal.lines("run")) > runs + CHUNK, "nothing goes on")  # noqa: B023
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
