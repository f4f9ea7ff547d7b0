"""The demo on each broker: nothing lost, one dead letter replayed, nothing left behind, and figures that can be wrong."""

from __future__ import annotations

import asyncio
import json
import shlex
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path

import pytest
from redis import Redis

from millstream import App, BadSetting, BrokerDown, Position, Settings
from millstream.brokers.base import Broker, Claim, Done, Settlement, Subscription
from millstream.brokers.urls import broker_for
from millstream.clock import Clock
from millstream.demo import place, sample
from millstream.demo.app import DEFAULT_SPEED, DemoOptions, Progress, Summary, play
from millstream.demo.flights import Desk, FlightLanded, flights, handlers, worth_an_alert
from millstream.demo.readback import Witness, read_back
from millstream.handlers.subscriber import Group
from millstream.publisher import spec_of
from millstream.telemetry import Telemetry
from tests.servers import RedisServer, free_port

EVENTS = 500
SAMPLE = Path(sample.__file__).parent / "flights-2013-01.jsonl.gz"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer.start("7") as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo makes its temporary folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


async def test_nothing_is_lost_on_a_new_sqlite_file_and_the_file_is_gone_afterwards(folder: Path) -> None:
    check(*await played(DemoOptions(events=EVENTS, speed=None)))
    assert list(folder.iterdir()) == []


async def test_nothing_is_lost_in_memory() -> None:
    check(*await played(DemoOptions(events=EVENTS, speed=None, broker="memory://")))


async def test_nothing_is_lost_on_redis_and_only_the_keys_of_the_run_are_removed(server: RedisServer) -> None:
    with Redis(port=server.port) as client:
        client.set("demo-of-somebody-else", "stays")
        check(*await played(DemoOptions(events=EVENTS, speed=None, broker=server.url)))
        assert client.keys() == [b"demo-of-somebody-else"]
        client.flushall()


async def test_the_summary_is_plain_json() -> None:
    summary, _ = await played(DemoOptions(events=30, speed=None, broker="memory://"))
    found = json.loads(json.dumps(summary.as_json()))
    assert set(found) == {"published", "groups", "alerts", "seconds", "broker", "keep_hint"}
    assert list(found["groups"]) == ["board", "delays", "alerts"]
    assert found["groups"]["board"] == {"handled": 30, "retried": 0, "dead": 0, "died": 0, "replayed": 0, "lost": 0}
    assert found["broker"] == "memory://"


async def test_an_interrupted_run_leaves_no_file(folder: Path) -> None:
    await interrupted(DemoOptions(events=20_000, speed=DEFAULT_SPEED))
    assert list(folder.iterdir()) == []


async def test_an_interrupted_run_leaves_no_key(server: RedisServer) -> None:
    await interrupted(DemoOptions(events=20_000, speed=DEFAULT_SPEED, broker=server.url))
    with Redis(port=server.port) as client:
        assert client.keys() == []


async def test_a_kept_run_can_be_read_with_what_the_hint_says(
    server: RedisServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for broker in (None, server.url):
        summary, _ = await played(DemoOptions(events=40, speed=None, broker=broker, keep=True))
        for variable in shlex.split(summary.keep_hint)[1:]:
            monkeypatch.setenv(*variable.split("=", 1))
        async with App("reader") as reader:
            assert len([envelope async for envelope in reader.read(flights)]) == 40


async def test_the_hint_shows_no_password_and_replaces_a_namespace() -> None:
    async with place.found("redis://u:secret@host:6379/3?namespace=theirs", keep=True) as here:
        assert "secret" in here.url
        assert "theirs" not in here.url
        assert "secret" not in here.hint


async def test_a_second_run_on_ones_own_file_counts_only_its_own_events(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'mine.db'}"
    for _ in range(2):
        summary, _ = await played(DemoOptions(events=25, speed=None, broker=url))
        assert summary.published == 25
        assert {figures.lost for figures in summary.groups.values()} == {0}
    assert (tmp_path / "mine.db").exists()


async def test_a_paced_run_takes_its_time_and_shows_pictures() -> None:
    first, *_, last = sample.events(60)
    wanted_s = 0.6
    speed = (last.time - first.time).total_seconds() / wanted_s
    _, pictures = await played(DemoOptions(events=60, speed=speed, broker="memory://"))
    publishing = [picture for picture in pictures if picture.phase == "publishing"]
    assert len(publishing) >= 4
    assert publishing[-1].elapsed_s > wanted_s * 0.8
    assert [picture.published for picture in pictures] == sorted(picture.published for picture in pictures)


async def test_a_run_of_a_single_event_has_its_dead_letter_too() -> None:
    summary, _ = await played(DemoOptions(events=1, speed=None, broker="memory://"))
    assert summary.groups["alerts"].replayed == summary.groups["alerts"].handled == 1


async def test_a_broker_that_is_down_is_a_broker_error() -> None:
    with pytest.raises(BrokerDown):
        await played(DemoOptions(events=10, broker=f"redis://127.0.0.1:{free_port()}/0"))


async def test_options_that_make_no_sense_are_refused() -> None:
    for wrong in ({"events": 0}, {"speed": 0.0}, {"speed": float("nan")}):
        with pytest.raises(BadSetting):
            DemoOptions(**wrong)


async def test_an_event_that_was_settled_though_no_handler_ended_counts_as_lost() -> None:
    async with settled_unseen(events=3) as (broker, positions):
        witness = Witness(confirmed=set(positions))
        witness.finished["board"].add(positions[0])
        published, figures, _ = await read_back(broker, [board()], witness)
        assert (published, figures["board"].handled, figures["board"].lost) == (3, 3, 2)


async def test_an_event_that_was_promised_and_is_not_stored_counts_as_lost() -> None:
    async with settled_unseen(events=3) as (broker, positions):
        witness = Witness(confirmed={*positions, Position(0, "999")})
        witness.finished["board"].update(positions)
        _, figures, _ = await read_back(broker, [board()], witness)
        assert figures["board"].lost == 1


async def test_an_event_that_was_never_delivered_counts_as_lost() -> None:
    async with settled_unseen(events=3, leave=1) as (broker, positions):
        witness = Witness(confirmed=set(positions))
        witness.finished["board"].update(positions)
        _, figures, _ = await read_back(broker, [board()], witness)
        assert figures["board"].lost == 1


def test_the_sample_is_small_and_whole() -> None:
    assert SAMPLE.stat().st_size <= 1_048_576
    events = list(sample.events(sample.EVENTS))
    assert len({(event.flight_id, type(event)) for event in events}) == sample.EVENTS
    assert events == sorted(events, key=lambda event: event.time)


def test_past_its_end_the_sample_goes_on_with_new_flights_on_later_days() -> None:
    events = list(islice(sample.events(2 * sample.EVENTS), sample.EVENTS - 1, sample.EVENTS + 1))
    assert events[0].time < events[1].time
    assert events[1].flight_id == f"{next(sample.events(1)).flight_id}-2"
    assert sum(1 for _ in sample.events(sample.EVENTS + 1)) == sample.EVENTS + 1


async def played(options: DemoOptions) -> tuple[Summary, list[Progress]]:
    pictures: list[Progress] = []
    return await play(options, pictures.append), pictures


def check(summary: Summary, pictures: list[Progress]) -> None:
    """The figures of a run of 500 events; what is expected is computed from the sample."""
    worth = [e for e in sample.events(EVENTS) if not isinstance(e, FlightLanded) and worth_an_alert(e)]
    assert summary.published == EVENTS
    assert {name: (f.handled, f.dead, f.lost) for name, f in summary.groups.items()} == {
        "board": (EVENTS, 0, 0),
        "delays": (EVENTS, 0, 0),
        "alerts": (EVENTS, 0, 0),
    }
    alerts = summary.groups["alerts"]
    assert (alerts.died, alerts.replayed) == (1, 1)
    assert alerts.retried > 3  # the dead letter was tried four times; some others failed at first
    assert summary.groups["board"].retried == summary.groups["delays"].retried == 0
    assert summary.alerts == len(worth)
    assert any(row.dead == 1 for picture in pictures for row in picture.groups)
    last = pictures[-1]
    assert sum(row.departed + row.landed + row.cancelled for row in last.airports) == EVENTS
    departures = sum(row.departed for row in last.airports)
    assert sum(row.departures for row in last.carriers) == departures
    assert len(last.alerts) == len(worth)


async def interrupted(options: DemoOptions) -> None:
    """Cancel a run in its midst, as Ctrl-C does."""
    under_way = asyncio.Event()

    def show(picture: Progress) -> None:
        if picture.published > 20:
            under_way.set()

    async with asyncio.timeout(20):
        run = asyncio.ensure_future(play(options, show))
        await under_way.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run


def board() -> Group:
    (group,) = (group for group in App("demo", include=[handlers(Desk())]).groups() if group.name == "board")
    return group


@asynccontextmanager
async def settled_unseen(events: int, leave: int = 0) -> AsyncIterator[tuple[Broker, list[Position]]]:
    """A broker with flight events that the group `board` settled as done, but for some, without running a handler."""
    broker = broker_for("memory://", Settings(), Clock(), Telemetry())
    app = App("demo", streams=[flights])
    async with app.opened(broker=broker):
        positions = await app.publish_many(sample.events(events), to=flights)
        consumer = await broker.subscribe(Subscription(spec_of(flights), "board", "demo"))
        claims: list[Claim] = await consumer.fetch(events - leave, 1)
        await consumer.settle([Settlement(claim.position, Done()) for claim in claims])
        yield broker, positions
        await consumer.close()
