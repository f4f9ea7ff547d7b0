"""Inbox and outbox while processes and PostgreSQL are killed: nothing lost, nothing twice, each key in order."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from millstream import App, Envelope
from tests.faults.conftest import LONG, LONG_S
from tests.faults.nemesis import PATIENCE_S, Child, Crew, state
from tests.postgres import PostgresServer
from tests.servers import RedisServer
from tests.sql import shop

SEED = 11
KILLS, SERVER_KILLS = (200, 20) if LONG else (12, 3)
EVENTS = 20_000 if LONG else 400
TASKS = 20_000 if LONG else 1_000
PATIENT_S = LONG_S if LONG else PATIENCE_S


class Place:
    """The database, and where the events go."""

    def __init__(self, crew: Crew, postgres: PostgresServer | None) -> None:
        self.crew = crew
        self.postgres = postgres


@pytest.fixture(params=["sqlite", "postgresql"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, journals: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A file beside a file, and PostgreSQL beside Redis."""
    with ExitStack() as stack:
        postgres, url, database = None, f"sqlite:///{tmp_path}/events.db", f"{tmp_path}/accounts.db"
        if request.param == "postgresql":
            postgres = stack.enter_context(PostgresServer.start())
            url, database = stack.enter_context(RedisServer.start("7")).url, postgres.database()
        monkeypatch.setenv("SHOP_DATABASE", database)
        monkeypatch.setenv("SHOP_ENOUGH", f"{tmp_path}/enough")
        shop.prepare()
        yield Place(stack.enter_context(Crew(url, journals)), postgres)


class Victims:
    """Processes that are killed and begun anew. Half of those that can carry the moment of their death within them."""

    def __init__(self, crew: Crew, points: tuple[str, ...], *kinds: tuple[str, ...]) -> None:
        self.kills = 0
        self._crew = crew
        self._chance = random.Random(SEED)
        self._points = points
        self._running = [(kind, self._new(kind)) for kind in kinds]

    def rampage(self, kills: int) -> None:
        """Kill so many."""
        goal = self.kills + kills
        while self.kills < goal:
            time.sleep(self._chance.uniform(0.1, 0.9))  # not to wait for anything: the moment of a kill is to be any
            if all(child.code is None for _, child in self._running):
                self._chance.choice(self._running)[1].end()
            for index, (kind, child) in enumerate(self._running):
                if child.code is not None:
                    unlucky = "the outbox cannot be used" in child.log  # it was started while PostgreSQL was
                    assert unlucky or child.code == -signal.SIGKILL, f"{kind} ended: {child.log[-3_000:]}"
                    self.kills += not unlucky
                    self._running[index] = kind, self._new(kind)

    def replace(self, *kinds: tuple[str, ...]) -> list[Child]:
        """Others that nobody kills any more."""
        for _, child in self._running:
            child.end()
        return [self._started(self._crew.run("-m", "tests.sql.shop", *kind)) for kind in kinds]

    def _started(self, child: Child) -> Child:
        self._crew.until(lambda: child.pid in self._crew.up(), f"process {child.pid} does not start", PATIENT_S)
        return child

    def _new(self, kind: tuple[str, ...]) -> Child:
        environment = {}
        if kind[0] != "write" and self._chance.random() < 0.5:
            environment["SHOP_DIE"] = f"{self._chance.choice(self._points)}:{self._chance.randint(1, 40)}"
        return self._crew.run("-m", "tests.sql.shop", *kind, **environment)


def strike(place: Place, victims: Victims) -> None:
    """All the kills, and between them PostgreSQL's."""
    for _ in range(SERVER_KILLS):
        victims.rampage(KILLS // SERVER_KILLS)
        if place.postgres is not None:
            place.postgres.kill()
            place.postgres.restart()


def test_what_was_booked_is_published_once_and_in_order_whatever_is_killed(
    place: Place, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    victims = Victims(place.crew, shop.POINTS, ("relay",), ("relay",), ("write", "1"), ("write", "2"))
    still = place.crew.run("-m", "tests.sql.shop", "relay", SHOP_DIE="still:2")
    place.crew.until(lambda: state(still.pid) == "T", f"the relay never stands still: {place.crew.said()}")
    strike(place, victims)
    still.send(signal.SIGCONT)  # with a batch in hand that others have long published
    place.crew.until(lambda: booked() >= EVENTS, "the writers write nothing", PATIENT_S)
    (tmp_path / "enough").touch()
    relays = victims.replace(("relay",), ("relay",))
    waiting = "SELECT COUNT(*) FROM millstream_outbox"
    place.crew.until(lambda: shop.query(waiting) == [(0,)], f"events stay behind: {place.crew.said()}", PATIENT_S)
    for child in (still, *relays):
        child.send(signal.SIGTERM)
    assert [child.wait() for child in (still, *relays)] == [0, 0, 0]

    accounts = dict(shop.query("SELECT id, number FROM account"))
    published, repeats = asyncio.run(stored(place.crew.url))
    record_property("kills", victims.kills)
    record_property("events", booked())
    record_property("repeats", repeats)
    print(f"\n{victims.kills} kills, {booked():,} events, {repeats:,} repeats dropped")
    assert published == {key: list(range(1, number + 1)) for key, number in accounts.items() if number}
    assert repeats > 0, "the kills hit nothing"


async def stored(url: str) -> tuple[dict[str, list[int]], int]:
    """What the stream holds of each account, in order, and how many repeats it has dropped."""
    published: dict[str, list[int]] = defaultdict(list)
    async with App("reader", broker=url) as app:
        async for envelope in app.read(shop.bookings):
            published[envelope.event.account].append(envelope.event.number)
        (info,) = await app.broker.admin.streams()
    return published, info.repeats


async def feed(url: str) -> None:
    """All tasks."""
    async with App("feeder", broker=url) as app:
        await app.publish_many([Envelope(shop.Task(number=n), id=f"t-{n}") for n in range(TASKS)], to=shop.tasks)


def booked() -> int:
    """All that was ever booked."""
    ((number,),) = shop.query("SELECT SUM(number) FROM account")
    return int(number)


def test_each_task_has_its_effect_once_whatever_is_killed(
    place: Place, record_property: Callable[[str, object], None]
) -> None:
    asyncio.run(feed(place.crew.url))
    victims = Victims(place.crew, shop.HANDLER_POINTS, ("handle",), ("handle",))
    strike(place, victims)
    workers = victims.replace(("handle",), ("handle",))
    effects = "SELECT COUNT(DISTINCT event_id) FROM effect"
    place.crew.until(lambda: shop.query(effects) == [(TASKS,)], f"tasks stay behind: {place.crew.said()}", PATIENT_S)
    for child in workers:
        child.send(signal.SIGTERM)
    assert [child.wait() for child in workers] == [0, 0]

    runs = Counter(line.id for line in place.crew.journal.lines("run"))
    again = sum(count - 1 for count in runs.values())
    record_property("kills", victims.kills)
    record_property("runs", sum(runs.values()))
    print(f"\n{victims.kills} kills, {TASKS:,} tasks, {again:,} runs again")
    assert shop.query("SELECT COUNT(*) FROM effect") == [(TASKS,)]
    assert len(runs) == TASKS and again > 0, "the kills hit nothing"
