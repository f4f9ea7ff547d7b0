"""The janitor: when it makes its rounds, what it says and how often, and that nothing stops it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from millstream import App, BrokerDown, BrokerRefused, Envelope, Event, Retention, Stream
from millstream.brokers.base import Tended, Traits
from millstream.telemetry import BROKER_ERROR, EVENTS_LOST, FADING, FELL_DUE, FILLING, FORGOTTEN, TRIMMED, Telemetry
from millstream.testing import TestApp, VirtualClock
from millstream.testing.clock import START_MS
from millstream.worker.janitor import DELAYED_S, LONGEST_PAUSE_S, OTHERWISE_S, REMIND_S, TRIMMING_S, Janitor
from tests.worker.place import QUICK, at_work, heard, until

HOUR_MS = 3_600_000


class Reminder(Event, type="reminder"):
    n: int


reminders = Stream("reminders", Reminder)


ALL = Traits(delayed=True, retention=True)


class Stage:
    """A broker that answers `tend` as it is told, and a janitor at work on it."""

    def __init__(self, *streams: str, traits: Traits = ALL) -> None:
        self.clock = VirtualClock()
        self.telemetry = Telemetry()
        self.answer: Tended | Exception = Tended()
        self.once: list[Tended] = []
        self.rounds: list[tuple[str, float]] = []
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.telemetry.listen(lambda name, measurements: self.told.append((name, measurements)))
        broker: Any = SimpleNamespace(traits=traits, tend=self.tend)
        self.janitor = Janitor(streams or ("orders",), broker, self.clock, self.telemetry)

    async def tend(self, stream: str) -> Tended:
        self.rounds.append((stream, (self.clock.now_ms() - START_MS) / 1000))
        if self.once:
            return self.once.pop(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    @property
    def times(self) -> list[float]:
        """When rounds were made, in seconds since the start."""
        return [at_s for _, at_s in self.rounds]

    def heard(self, name: str) -> list[Mapping[str, Any]]:
        return [measurements for told, measurements in self.told if told == name]

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[Stage]:
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(self.janitor.run())
            await self.clock.advance(0)
            yield self
            running.cancel()


async def test_rounds_are_made_twice_a_second_where_delayed_events_may_come() -> None:
    async with Stage().at_work() as stage:
        await stage.clock.advance(2)
    assert stage.times == [0, DELAYED_S, 1, 1.5, 2]


async def test_rounds_are_made_every_few_seconds_where_there_is_only_trimming() -> None:
    async with Stage(traits=Traits(retention=True)).at_work() as stage:
        await stage.clock.advance(11)
    assert stage.times == [0, OTHERWISE_S, 10]


async def test_there_are_no_rounds_where_there_is_nothing_to_tend() -> None:
    async with Stage(traits=Traits()).at_work() as stage:
        await stage.clock.advance(60)
    assert stage.times == []


async def test_a_round_is_made_when_an_event_falls_due() -> None:
    stage = Stage()
    stage.once = [Tended(due_ms=START_MS + 120), Tended(published=1)]
    async with stage.at_work():
        await stage.clock.advance(0.2)
    assert stage.times == [0, 0.12, 0.12]
    assert stage.heard(FELL_DUE) == [{"stream": "orders", "count": 1}]


async def test_an_event_that_is_due_and_cannot_be_published_makes_no_endless_loop() -> None:
    stage = Stage()
    stage.answer = Tended(due_ms=START_MS - 1)
    async with stage.at_work():
        await stage.clock.advance(1)
    assert stage.times == [0, DELAYED_S, 1]


async def test_what_takes_many_rounds_is_done_at_once_and_other_streams_have_their_turn() -> None:
    stage = Stage("orders", "payments")
    stage.once = [Tended(trimmed=500), Tended(), Tended(trimmed=20)]
    async with stage.at_work():
        await stage.clock.advance(0.1)
    assert [stream for stream, _ in stage.rounds] == ["orders", "payments", "orders", "orders"]
    assert [told["count"] for told in stage.heard(TRIMMED)] == [500, 20]


async def test_where_there_is_always_something_to_trim_the_broker_is_left_to_others_in_between() -> None:
    stage = Stage()
    stage.answer = Tended(trimmed=1)
    async with stage.at_work():
        await stage.clock.advance(1)
    assert 2 < len(stage.times) <= 1 + 1 / TRIMMING_S


async def test_it_can_be_asked_for_a_round_and_then_makes_no_others() -> None:
    stage = Stage()
    stage.janitor.only_when_asked()
    async with stage.at_work():
        await stage.clock.advance(86_400)
        stage.once = [Tended(due_ms=stage.clock.now_ms() + HOUR_MS)]
        stage.janitor.ask()
        await stage.clock.advance(86_400)
    assert stage.times == [0, 86_400, 86_400 + 3_600]


@pytest.mark.parametrize("error", [BrokerDown("no connection"), BrokerRefused("no permission"), TypeError("a fault")])
async def test_an_error_is_told_and_tried_again_after_growing_pauses(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage()
    stage.answer = error
    async with stage.at_work():
        await stage.clock.advance(60)
        pauses = [after - before for before, after in pairwise(stage.times)]
        assert pauses[0] <= DELAYED_S and pauses[3] > pauses[0] and all(pause <= LONGEST_PAUSE_S for pause in pauses)
        assert len(pauses) >= 60 / LONGEST_PAUSE_S
        assert len(stage.heard(BROKER_ERROR)) == len(stage.times)
        assert f"cannot tend stream orders now and tries again: {error}" in caplog.messages
        stage.answer = Tended()
        await stage.clock.advance(LONGEST_PAUSE_S + 1)
    assert stage.times[-1] - stage.times[-2] == DELAYED_S


async def test_what_is_lost_in_every_round_makes_one_line_a_second_that_counts_all_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = Stage()
    stage.answer = Tended(trimmed=1, lost={"billing": 2})
    async with stage.at_work():
        await stage.clock.advance(2.5)
        stage.answer = Tended()
        await stage.clock.advance(1)
    counts = [int(record.message.split()[3]) for record in caplog.records if " lost " in record.message]
    assert len(counts) == 4 and sum(counts) == sum(told["count"] for told in stage.heard(EVENTS_LOST)) > 20


async def test_lost_events_are_told_for_each_group(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    stage.once = [Tended(lost={"billing": 3, "audit": 1})]
    async with stage.at_work():
        await stage.clock.advance(5)
    assert stage.heard(EVENTS_LOST) == [
        {"group": "billing", "stream": "orders", "count": 3},
        {"group": "audit", "stream": "orders", "count": 1},
    ]
    assert "group billing lost 3 events of stream orders: they were gone before it had settled them" in caplog.messages


async def test_a_group_that_fades_is_told_once_until_it_lived_again(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    fading = Tended(fading={"billing": START_MS + HOUR_MS})
    async with stage.at_work():
        for answer in (fading, Tended(), fading, Tended(forgotten=frozenset({"billing"}))):
            stage.answer = answer
            await stage.clock.advance(2)
    told = {"group": "billing", "stream": "orders"}
    assert stage.heard(FADING) == [{**told, "at_ms": START_MS + HOUR_MS}] * 2
    assert stage.heard(FORGOTTEN) == [told]
    assert "in 1.0 hours they may go. Run it, or `millstream group forget orders/billing`" in caplog.messages[0]
    assert caplog.messages[-1] == "group orders/billing: nobody has served it for so long that its events may go now"


@pytest.mark.parametrize(
    ("pinned_by", "remedy"),
    [
        (
            "billing",
            "group billing has not settled its oldest events: run it, `millstream group forget orders/billing`",
        ),
        (
            "dead letters of billing",
            "dead letters of group billing keep its oldest events: `millstream dead ls --group",
        ),
        ("", "nothing keeps its events but its own bounds: lower these, or raise the ceiling"),
    ],
)
async def test_the_alarm_before_the_ceiling_comes_once_and_is_repeated_in_the_log(
    pinned_by: str, remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage()
    full = Tended(fullness=0.83, pinned_by=pinned_by)
    async with stage.at_work():
        for answer in (full, replace(full, fullness=0.78), full, Tended(fullness=0.5), full):
            stage.answer = answer
            await stage.clock.advance(2)
        assert stage.heard(FILLING) == [{"stream": "orders", "fullness": 0.83, "pinned_by": pinned_by}] * 2
        assert len(caplog.messages) == 2 and remedy in caplog.messages[0]
        assert "stream orders is 83% full, and at its ceiling publishing is refused" in caplog.messages[0]
        await stage.clock.advance(2 * REMIND_S)
    assert len(caplog.messages) == 4 and len(stage.heard(FILLING)) == 2


async def test_a_process_at_work_publishes_what_falls_due() -> None:
    app = App("shop", streams=[reminders], settings=QUICK)
    fell = heard(app, FELL_DUE)
    got: list[int] = []

    @app.subscriber(reminders, "people")
    async def remind(event: Reminder) -> None:
        got.append(event.n)

    async with at_work(app):
        await app.publish(Envelope(Reminder(n=1), due=timedelta(milliseconds=50)), to=reminders)
        assert got == []
        await until(lambda: got == [1])
    assert fell == [{"stream": "reminders", "count": 1}]


async def test_in_a_test_delayed_events_come_as_time_is_advanced() -> None:
    got: list[tuple[int, datetime]] = []
    app = App("shop", streams=[reminders])

    @app.subscriber(reminders, "people")
    async def remind(event: Reminder) -> None:
        got.append((event.n, datetime.fromtimestamp(t._clock.now_ms() / 1000)))
        if event.n < 3:
            await app.publish(Envelope(Reminder(n=event.n + 1), due=timedelta(minutes=20)), to=reminders)

    async with TestApp(app) as t:
        await t.publish(Envelope(Reminder(n=1), due=timedelta(minutes=10)))
        assert got == [] and t.published(reminders) == []
        await t.advance("9m")
        assert got == []
        await t.advance("1h")
        assert [n for n, _ in got] == [1, 2, 3]
        assert [(after[1] - before[1]).seconds for before, after in pairwise(got)] == [1_200, 1_200]
        assert t.published(reminders) == [Reminder(n=n) for n in (1, 2, 3)]


async def test_in_a_test_old_events_go_as_time_is_advanced(caplog: pytest.LogCaptureFixture) -> None:
    short = Stream("short", Reminder, retention=Retention(age="1h"))
    app = App("shop", streams=[short])

    @app.subscriber(short, "people")
    async def remind(event: Reminder) -> None:
        pass

    trimmed = heard(app, TRIMMED, EVENTS_LOST)
    caplog.set_level(logging.WARNING)
    async with TestApp(app) as t:
        await t.publish(Reminder(n=1))
        await t.advance("59m")
        assert not trimmed
        await t.advance("2m")
        assert trimmed == [{"stream": "short", "count": 1}]
    assert not caplog.messages
