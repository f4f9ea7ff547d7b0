"""What a group needs is never trimmed, whatever happens; and what goes all the same is counted to the event."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millstream import App
from millstream.brokers.base import Broker, GroupInfo, StreamInfo
from millstream.units import size_bytes
from tests.faults.conftest import LONG, LONG_S
from tests.faults.nemesis import PATIENCE_S, Child, Crew, Nemesis, Plan
from tests.faults.oracle import asked, in_hand
from tests.faults.silo import BYTES, CEILING, CEILING_BYTES, EVENTS, GROUP, grain, load
from tests.redis.brokers import run_in
from tests.servers import VERSIONS, RedisServer

SEED = 29
LOADS, RATE, SLOW_RATE = (20_000, 600, 60) if LONG else (3_800, 600, 60)
LANES = 6
KILLS, PAUSE_S = (40, 1.6) if LONG else (8, 1.6)
ROTTEN = 101
ROUNDS = 400 if LONG else 40
NODE_EVENTS, NODE_BYTES = 100, 16_384
REST_S = 0.5  # who tends right after another one is only told what that one has found
PATIENT_S = LONG_S if LONG else PATIENCE_S

Told = Callable[[str, object], None]

IN_BOTH_ORDERS = pytest.mark.parametrize("order", ["none", "key"])


class SiloCrew(Crew):
    """Its processes are those of the silo."""

    def start(self, *words: object, **environment: str) -> Child:
        return self.run("-m", "tests.faults.silo", *words, **environment)


@pytest.fixture(params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer.start(request.param) as server:
        yield server


def group_of(url: str) -> GroupInfo:
    async def look(broker: Broker) -> GroupInfo:
        (info,) = (info for info in await broker.admin.groups(grain.name) if info.group == GROUP)
        return info

    return asked(url, look)


def stream_of(url: str) -> StreamInfo:
    """The stream, when housekeeping finds nothing to remove any more."""

    async def look(broker: Broker) -> StreamInfo:
        quiet = 0
        while quiet < 3:
            quiet = 0 if (await broker.tend(grain.name)).trimmed else quiet + 1
            await asyncio.sleep(REST_S)
        (info,) = await broker.admin.streams()
        return info

    return asked(url, look)


def until_settled(crew: Crew) -> GroupInfo:
    seen: list[GroupInfo] = []

    def settled() -> bool:
        seen[:] = [group_of(crew.url)]
        return (seen[0].lag, seen[0].pending) == (0, 0)

    try:
        crew.until(settled, "not settled", PATIENT_S)
    except RuntimeError as late:
        raise AssertionError(f"{late}: {seen}\n{crew.said()}") from None
    return seen[0]


def missing(crew: Crew) -> set[str]:
    """What was published and not handled."""
    return crew.journal.ids("ok") - crew.journal.ids("fin")


def fill(crew: Crew) -> Child:
    """Let a producer be ten times too fast until it is refused, and the consumer catch up then. Returns the producer."""
    journal, seconds = crew.journal, LANES / SLOW_RATE
    child = crew.worker(MILLSTREAM_CONCURRENCY=str(LANES), FAULTS_SECONDS=str(seconds))
    producer = crew.start("publish", LOADS, RATE, MILLSTREAM_PUBLISH_PATIENCE="0s")
    crew.until(lambda: journal.lines("full") or producer.code is not None, "nothing is refused", PATIENT_S)
    (crew.directory / "fast").touch()
    assert producer.wait(PATIENT_S) == 0, producer.log
    until_settled(crew)
    child.send(signal.SIGTERM)
    assert child.wait() == 0, child.log
    return producer


@pytest.mark.parametrize(("order", "bound"), [("none", "keep"), ("key", "keep"), ("none", "size")])
def test_a_producer_ten_times_too_fast_is_warned_about_and_refused_and_nothing_unread_goes(
    url: str, journals: Path, record_property: Told, order: str, bound: str
) -> None:
    with SiloCrew(url, journals, FAULTS_RETENTION=bound, FAULTS_ORDER=order) as crew:
        producer = fill(crew)
        group, stream, journal = group_of(url), stream_of(url), crew.journal
        alarm, refusal = (min(journal.lines(word), default=None) for word in ("alarm", "full"))
        figures = {
            "loads": len(journal.ids("ok")),
            "missing": len(missing(crew)),
            "lost": group.lost,
            "refusals": len(journal.lines("full")),
            "trimmed": stream.trimmed,
            "left": stream.events,
            "bytes": stream.bytes or 0,
        }
    print(f"\n{figures}")
    for name, value in figures.items():
        record_property(name, value)
    assert (figures["loads"], figures["missing"], group.lost) == (LOADS, 0, 0), figures
    assert alarm is not None and refusal is not None and alarm < refusal, "no alarm before the ceiling"
    for word in ("grain", "ceiling", GROUP, "run the group", "raise the ceiling"):
        assert word in producer.log
    assert stream.trimmed == LOADS - stream.events
    nodes = 4 if url.startswith("redis") else 0  # which Redis removes whole, one more of each partition may stay
    if bound == "size":
        assert (stream.bytes or 0) <= BYTES + nodes * NODE_BYTES and f"{size_bytes(CEILING_BYTES):,}" in producer.log
        return
    handled = sum(line.time_ns < refusal.time_ns for line in journal.lines("fin"))
    stored = sum(line.time_ns < refusal.time_ns for line in journal.lines("ok"))
    assert stored - handled > 0.8 * (CEILING - EVENTS) and f"{CEILING:,}" in producer.log, "refused too early"
    assert stream.events <= EVENTS + nodes * NODE_EVENTS


class Harvest:
    """Loads that come while workers are killed, until there were enough of both; then all are handled."""

    def __init__(self, crew: Crew) -> None:
        producer = crew.start("publish", LOADS, RATE)
        nemesis = Nemesis(crew, SEED, Plan(latest=200, pause_s=PAUSE_S), FAULTS_SECONDS="0.02")
        nemesis.rampage(KILLS - 2)
        assert producer.wait(PATIENT_S) == 0, producer.log
        self.workers = nemesis.peace()
        self.group = until_settled(crew)
        self.kills = nemesis.kills
        self.hit = sum(bool(in_hand(crew.journal, line.pid)) for line in crew.journal.lines("kill"))

    def tell(self, told: Told, stream: StreamInfo) -> None:
        figures = {
            "kills": self.kills,
            "with work in hand": self.hit,
            "lost": self.group.lost,
            "done": self.group.done,
            "dead": self.group.dead,
            "trimmed": stream.trimmed,
        }
        print(f"\nseed {SEED}, {figures}")
        for name, value in figures.items():
            told(name, value)


@IN_BOTH_ORDERS
def test_what_nobody_needs_goes_at_once_and_all_else_stays_whoever_is_killed(
    url: str, journals: Path, record_property: Told, order: str
) -> None:
    with SiloCrew(url, journals, FAULTS_RETENTION="least", FAULTS_ORDER=order, FAULTS_ROTTEN=str(ROTTEN)) as crew:
        harvest, rotten = Harvest(crew), {f"g-{number}" for number in range(0, LOADS, ROTTEN)}
        letters = asked(url, lambda broker: broker.admin.dead(grain.name, GROUP, limit=10_000))
        assert {letter.stored.record.id for letter in letters} == rotten == missing(crew)
        (journals / "healed").touch()
        assert all(asked(url, lambda broker: broker.admin.replay(letters)))
        group = until_settled(crew)
        crew.until(lambda: not missing(crew), "not all of the dead letters are handled")
        stream = stream_of(url)
        harvest.tell(record_property, stream)
        assert (group.lost, group.dead, len(crew.journal.ids("ok"))) == (0, 0, LOADS)
        assert harvest.hit >= KILLS / 4, "the kills found nothing to destroy"
        assert stream.events <= (4 * NODE_EVENTS if url.startswith("redis") else 4)


@IN_BOTH_ORDERS
def test_what_is_dropped_unread_is_counted_to_the_event_whoever_is_killed(
    url: str, journals: Path, record_property: Told, order: str
) -> None:
    with SiloCrew(url, journals, FAULTS_RETENTION="drop", FAULTS_ORDER=order, MILLSTREAM_CONCURRENCY="4") as crew:
        harvest = Harvest(crew)
        stream = stream_of(url)
        group = group_of(url)
        harvest.tell(record_property, stream)
        assert group.done is not None and group.done + group.lost == LOADS == len(crew.journal.ids("ok")), group
        assert group.lost >= len(missing(crew)) > 0, "nothing was dropped"
        assert harvest.hit >= KILLS / 4, "the kills found nothing to destroy"


def publish(crew: Crew, first: int, count: int) -> None:
    """Publish loads from this process."""

    async def send() -> None:
        async with App("silo", broker=crew.url, streams=[grain]) as client:
            await client.publish_many([load(number) for number in range(first, first + count)], to=grain)
        for number in range(first, first + count):
            crew.pen.write("ok", f"g-{number}")

    asyncio.run(send())


def trim(server: RedisServer, left: int) -> int:
    """Remove by hand all but so many of each partition; how many went."""
    return sum(int(run_in(server, "XTRIM", f"grain:{partition}", "MAXLEN", left)) for partition in range(4))


def check_counted(crew: Crew, record_property: Told, **more: object) -> None:
    """What is missing is what is counted, and it is told once."""
    group, gone = until_settled(crew), missing(crew)
    crew.until(lambda: group_of(crew.url).lost >= len(gone), f"only {group.lost} of {len(gone)} are counted")
    crew.until(lambda: told(crew) >= len(gone), f"only {told(crew)} of {len(gone)} are told")
    group = group_of(crew.url)
    figures = {"missing": len(gone), "lost": group.lost, "told": told(crew), "done": group.done, **more}
    print(f"\n{figures}")
    for name, value in figures.items():
        record_property(name, value)
    assert gone and len(gone) == group.lost == told(crew), figures


def told(crew: Crew) -> int:
    """How many lost events the workers have told."""
    return sum(line.attempt for line in crew.journal.lines("gone"))


@IN_BOTH_ORDERS
def test_what_is_removed_unread_is_counted_to_the_event(
    server: RedisServer, journals: Path, record_property: Told, order: str
) -> None:
    with SiloCrew(server.url, journals, FAULTS_ORDER=order) as crew:
        first = crew.worker()
        publish(crew, 0, 200)
        until_settled(crew)
        first.send(signal.SIGTERM)
        assert first.wait() == 0, first.log
        publish(crew, 200, 1_000)
        removed = trim(server, 60) - 200
        crew.worker()
        check_counted(crew, record_property, removed=removed)
        assert len(missing(crew)) == removed == 1_000 - 4 * 60


@IN_BOTH_ORDERS
def test_what_is_removed_in_the_hands_of_a_process_that_dies_is_counted_to_the_event(
    server: RedisServer, journals: Path, record_property: Told, order: str
) -> None:
    with SiloCrew(server.url, journals, FAULTS_ORDER=order, MILLSTREAM_CONCURRENCY="16") as crew:
        victim = crew.worker(FAULTS_SECONDS="60")
        publish(crew, 0, 800)
        crew.until(lambda: len(crew.journal.lines("run")) == 16, "it does not begin")
        held = in_hand(crew.journal, victim.pid)
        crew.kill(victim)
        removed = trim(server, 60)
        crew.worker()
        check_counted(crew, record_property, removed=removed, held=len(held))
        assert len(missing(crew)) == removed == 800 - 4 * 60
        assert len(missing(crew) & held) >= 16


@IN_BOTH_ORDERS
def test_what_is_removed_again_and_again_under_load_is_handled_or_counted(
    server: RedisServer, journals: Path, record_property: Told, order: str
) -> None:
    chance = random.Random(SEED)
    slow = {"FAULTS_SECONDS": "0.04", "MILLSTREAM_CONCURRENCY": "12"}
    with SiloCrew(server.url, journals, FAULTS_ORDER=order, **slow) as crew:
        workers = [crew.worker() for _ in range(2)]
        removed = 0
        for number in range(ROUNDS):
            publish(crew, 100 * number, 100)
            time.sleep(chance.uniform(0.0, 0.1))  # the moment is to be any
            partition, left = chance.randrange(4), chance.randrange(200)
            removed += int(run_in(server, "XTRIM", f"grain:{partition}", "MAXLEN", left))
        (journals / "fast").touch()
        check_counted(crew, record_property, removed=removed)
        assert ROUNDS <= len(missing(crew)) < removed, "hardly anything unread was removed, or nobody had any of it"
        assert [child.code for child in workers] == [None, None], crew.said()


@IN_BOTH_ORDERS
def test_what_is_removed_while_workers_are_killed_is_settled_or_counted(
    server: RedisServer, journals: Path, record_property: Told, order: str
) -> None:
    chance = random.Random(SEED)
    slow = {"FAULTS_SECONDS": "0.04", "MILLSTREAM_CONCURRENCY": "12"}
    with SiloCrew(server.url, journals, FAULTS_ORDER=order, **slow) as crew:
        nemesis = Nemesis(crew, SEED, Plan(latest=100, pause_s=PAUSE_S))
        crew.until(crew.up, "nobody joins")
        published = 0
        while nemesis.kills < KILLS - 2:
            publish(crew, published, 1_000)
            published += 1_000
            nemesis.rampage(nemesis.kills + 1)
            partition, left = chance.randrange(4), chance.randrange(200)
            run_in(server, "XTRIM", f"grain:{partition}", "MAXLEN", left)
        nemesis.peace()
        (journals / "fast").touch()
        until_settled(crew)
        crew.until(lambda: accounted(crew.url) >= published, "some are neither settled nor counted")
        group = group_of(crew.url)
        figures = {"kills": nemesis.kills, "published": published, "done": group.done, "lost": group.lost}
        print(f"\nseed {SEED}, {figures}")
        record_property("lost", group.lost)
        assert accounted(crew.url) == published and group.lost > 0, figures


def accounted(url: str) -> int:
    """How many events are settled, or counted as lost."""
    group = group_of(url)
    return (group.done or 0) + group.lost
