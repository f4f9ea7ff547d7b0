"""Schedules: which slots there are, that each is published once, and what becomes of those that nobody was there for."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from millstream import (
    App,
    BadSetting,
    BrokerDown,
    BrokerRefused,
    Event,
    NotSupported,
    Part,
    Router,
    Stream,
    Unconfirmed,
    every,
    schedule,
)
from millstream.brokers.base import Traits
from millstream.clock import Clock
from millstream.handlers.router import Runtime
from millstream.telemetry import SLOT_FAILED, SLOT_PUBLISHED, SLOTS_MISSED, Telemetry
from millstream.testing import TestApp, VirtualClock
from millstream.testing.clock import START_MS
from millstream.worker.schedule import LATE_MS, MAX_CAUGHT_UP, Schedule, schedules

MINUTE_MS = 60_000


class Tick(Event, type="tick"):
    at: str = ""


class Tock(Event, type="tock"):
    n: int


ticks = Stream("ticks", Tick)
both = Stream("both", Tick | Tock)


class Wall:
    """What all processes share: the slots that are stored, and the events with them."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.published: list[int] = []
        self.before: Exception | None = None
        self.after: Exception | None = None
        self.tries = 0

    async def slots(self, _stream: str) -> Mapping[str, int]:
        if self.before is not None:
            raise self.before
        return dict(self.last)

    async def store(self, event: Any, name: str, at_ms: int) -> bool:
        self.tries += 1
        if self.before is not None:
            raise self.before
        stored = at_ms > self.last.get(name, 0)
        if stored:
            self.last[name] = at_ms
            if event is not None:
                self.published.append(at_ms)
        await asyncio.sleep(0)
        if self.after is not None:
            error, self.after = self.after, None
            raise error
        return stored


class Office:
    """One process: the `Runtime` of its schedules."""

    def __init__(self, wall: Wall, clock: Clock) -> None:
        self.wall = wall
        self.clock = clock
        self.telemetry = Telemetry()
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.telemetry.listen(lambda name, measurements: self.told.append((name, measurements)))
        self.broker: Any = SimpleNamespace(url="wall://", traits=Traits(slots=True), admin=wall)

    async def publish_slot(self, event: Any, *, to: Stream[Any], schedule: str, at_ms: int) -> bool:
        return await self.wall.store(event, schedule, at_ms)

    def heard(self, name: str) -> list[Mapping[str, Any]]:
        return [measurements for told, measurements in self.told if told == name]


class SetClock(VirtualClock):
    """Its wall clock can be set."""

    off_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.off_ms


@asynccontextmanager
async def kept(*parts: Part, wall: Wall, clock: Clock) -> AsyncIterator[Office]:
    """A process that keeps these schedules inside the block."""
    office = Office(wall, clock)
    async with AsyncExitStack() as stack:
        for part in parts:
            await stack.enter_async_context(part.running(cast("Runtime", office)))
        await asyncio.sleep(0)
        yield office


def minutes(wall: Wall) -> list[float]:
    """The slots that were published, in minutes since the clock's start."""
    return [(at_ms - START_MS) / MINUTE_MS for at_ms in wall.published]


def times(part: Part, begin: datetime, count: int) -> list[str]:
    assert isinstance(part, Schedule)
    slots = part.timetable.slots(int(begin.timestamp() * 1000))
    zone = part.timetable.zone
    return [datetime.fromtimestamp(next(slots) / 1000, zone).strftime("%d %H:%M%z") for _ in range(count)]


def name_of(part: Part) -> str:
    assert isinstance(part, Schedule)
    return part.name


async def test_slots_begin_behind_the_first_start_and_come_in_their_time() -> None:
    wall, clock = Wall(), VirtualClock()
    async with kept(every("5m", Tick, to=ticks), wall=wall, clock=clock) as office:
        await clock.advance(299)
        assert wall.published == []
        await clock.advance(1)
        assert minutes(wall) == [5]
        await clock.advance(600)
    assert minutes(wall) == [5, 10, 15]
    assert [told["at_ms"] for told in office.heard(SLOT_PUBLISHED)] == wall.published
    assert not office.heard(SLOTS_MISSED)


async def test_each_slot_comes_once_from_three_processes_of_which_some_always_die() -> None:
    wall, clock = Wall(), VirtualClock()
    part = every("10s", Tick, to=ticks)
    async with AsyncExitStack() as one, AsyncExitStack() as two, AsyncExitStack() as three:
        stacks = [one, two, three]
        for stack in stacks:
            await stack.enter_async_context(kept(part, wall=wall, clock=clock))
        for turn in range(60):
            stack = stacks[turn % 3]
            await stack.aclose()
            await clock.advance(7.3)
            await stack.enter_async_context(kept(part, wall=wall, clock=clock))
    assert wall.published == list(range(START_MS + 10_000, clock.now_ms() + 1, 10_000))


@pytest.mark.parametrize(("missed", "published"), [("last", [1, 60]), ("skip", [1]), ("all", list(range(1, 61)))])
async def test_slots_that_nobody_was_there_for_come_as_declared_and_are_told(
    missed: Any, published: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    wall, clock = Wall(), VirtualClock()
    part = every("1m", Tick, to=ticks, missed=missed)
    async with kept(part, wall=wall, clock=clock):
        await clock.advance(70)
    await clock.advance(3_550)  # to minute 60 and 20 seconds
    for _ in range(2):  # what was told once is not told again
        async with kept(part, wall=wall, clock=clock) as office:
            await clock.advance(1)
        assert minutes(wall) == published
    assert not office.told
    (line,) = caplog.messages
    assert "missed 59 slots, the last one at 2026-01-01T01:00:00+00:00" in line and f"missed={missed!r}" in line
    assert f" {len(published) - 1} of them are published now" in line
    assert wall.last[name_of(part)] == START_MS + 60 * MINUTE_MS


async def test_a_slot_that_is_a_little_late_is_not_missed() -> None:
    wall, clock = Wall(), VirtualClock()
    part = every("1m", Tick, to=ticks, missed="skip")
    async with kept(part, wall=wall, clock=clock):
        await clock.advance(50)
    await clock.advance(10 + LATE_MS / 1000)
    async with kept(part, wall=wall, clock=clock) as office:
        await clock.advance(1)
    assert minutes(wall) == [1] and not office.heard(SLOTS_MISSED)


async def test_of_very_many_missed_slots_the_latest_thousand_come(caplog: pytest.LogCaptureFixture) -> None:
    wall, clock = Wall(), VirtualClock()
    part = schedule("* * * * *", Tick, to=ticks, missed="all")
    async with kept(part, wall=wall, clock=clock):
        await clock.advance(1)
    await clock.advance(86_400 * 30)
    async with kept(part, wall=wall, clock=clock) as office:
        for _ in range(2 * MAX_CAUGHT_UP):
            await asyncio.sleep(0)
    assert len(wall.published) == MAX_CAUGHT_UP and minutes(wall)[-1] == 30 * 24 * 60
    assert office.heard(SLOTS_MISSED)[0]["passed"] == 1 and "missed more than 1,000 slots" in caplog.text


async def test_a_slot_is_tried_until_the_broker_takes_it_and_those_that_wait_for_it_follow(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wall, clock = Wall(), VirtualClock()
    async with kept(every("1m", Tick, to=ticks), wall=wall, clock=clock) as office:
        wall.before = BrokerDown("no connection")
        await clock.advance(290)
        assert wall.published == [] and wall.tries > 10
        wall.before = None
        await clock.advance(30)
    assert minutes(wall) == [1, 4, 5]
    assert [told["count"] for told in office.heard(SLOTS_MISSED)] == [3]
    assert "(schedule tick-" in caplog.text and "no connection" in caplog.text


@pytest.mark.parametrize("error", [BrokerDown("cut"), Unconfirmed("cut")])
async def test_a_lost_reply_makes_no_second_event(error: Exception) -> None:
    wall, clock = Wall(), VirtualClock()
    async with kept(every("1m", Tick, to=ticks), wall=wall, clock=clock) as office:
        await clock.advance(30)
        wall.after = error
        await clock.advance(60)
    assert minutes(wall) == [1] and len(office.heard(SLOT_PUBLISHED)) == 1


async def test_an_error_that_trying_again_cannot_mend_is_raised() -> None:
    wall, clock = Wall(), VirtualClock()
    with pytest.raises(ExceptionGroup) as caught:
        async with kept(every("1m", Tick, to=ticks), wall=wall, clock=clock):
            wall.before = BrokerRefused("no permission")
            await clock.advance(60)
            await asyncio.Event().wait()
    assert caught.group_contains(BrokerRefused)


async def test_who_was_stopped_while_others_published_misses_nothing() -> None:
    wall, clock, stopped = Wall(), VirtualClock(), SetClock()
    part = every("1m", Tick, to=ticks)
    async with kept(part, wall=wall, clock=clock), kept(part, wall=wall, clock=stopped) as office:
        await clock.advance(3_600)
        stopped.off_ms = 3_590_000
        await stopped.advance(40)
    assert minutes(wall) == list(range(1, 61)) and not office.heard(SLOTS_MISSED)


async def test_a_clock_that_goes_back_repeats_nothing_and_one_that_jumps_ahead_misses_slots() -> None:
    wall, clock = Wall(), SetClock()
    async with kept(every("5m", Tick, to=ticks), wall=wall, clock=clock) as office:
        await clock.advance(600)
        clock.off_ms = -600_000
        await clock.advance(900)
        assert minutes(wall) == [5, 10, 15]
        clock.off_ms = 3_600_000 - 10_000
        await clock.advance(60)
    assert minutes(wall) == [5, 10, 15, 85]
    assert [told["count"] for told in office.heard(SLOTS_MISSED)] == [14]


async def test_the_earliest_clock_decides() -> None:
    wall, clock, fast = Wall(), VirtualClock(), SetClock()
    fast.off_ms = 20_000
    part = every("1m", Tick, to=ticks)
    async with kept(part, wall=wall, clock=clock) as slow, kept(part, wall=wall, clock=fast) as early:
        await fast.advance(40)
        assert minutes(wall) == [1]
        await clock.advance(60)
    assert minutes(wall) == [1] and len(early.heard(SLOT_PUBLISHED)) == 1 and not slow.told


async def test_a_last_slot_that_lies_far_ahead_is_told(caplog: pytest.LogCaptureFixture) -> None:
    wall, clock = Wall(), VirtualClock()
    part = every("1m", Tick, to=ticks)
    wall.last[name_of(part)] = START_MS + 10 * MINUTE_MS
    async with kept(part, wall=wall, clock=clock):
        await clock.advance(660)
    assert minutes(wall) == [11]
    (line,) = caplog.messages
    assert "has come to 2026-01-01T00:10:00+00:00 already, which lies ahead" in line


async def test_what_falls_due_during_the_first_start_is_published() -> None:
    wall, clock = Wall(), VirtualClock()
    await clock.advance(59)
    wall.before = BrokerDown("still starting")
    async with kept(every("1m", Tick, to=ticks), wall=wall, clock=clock):
        await clock.advance(3)
        wall.before = None
        await clock.advance(3)
    assert minutes(wall) == [1]


async def test_a_first_start_within_an_hour_that_comes_twice_publishes_nothing_from_before() -> None:
    wall, clock = Wall(), SetClock()
    clock.off_ms = int(datetime(2026, 10, 25, 1, 10, tzinfo=UTC).timestamp() * 1000) - START_MS  # 02:10, once more
    async with kept(schedule("30 2 * * *", Tick, to=ticks, tz="Europe/Berlin"), wall=wall, clock=clock) as office:
        await clock.advance(3_600)
    assert (wall.published, office.heard(SLOTS_MISSED)) == ([], [])


async def test_a_function_that_fails_is_told_and_the_next_slot_comes(caplog: pytest.LogCaptureFixture) -> None:
    wall, clock = Wall(), VirtualClock()

    def make(at: datetime) -> Tick:
        if at.minute == 5:
            raise ValueError("no fives")
        return Tick(at=at.isoformat())

    async with kept(schedule("*/5 * * * *", make, to=ticks, tz="Europe/Berlin"), wall=wall, clock=clock) as office:
        await clock.advance(600)
    assert minutes(wall) == [10]
    (failed,) = office.heard(SLOT_FAILED)
    assert str(failed["exception"]) == "no fives" and "2026-01-01T01:05:00+01:00" in caplog.text


def test_clocks_that_are_put_forward_or_back_move_fixed_hours_and_leave_equal_steps() -> None:
    night = schedule("30 2 * * *", Tick, to=ticks, tz="Europe/Berlin")
    assert times(night, datetime(2026, 3, 28, tzinfo=UTC), 3) == ["28 02:30+0100", "29 03:00+0200", "30 02:30+0200"]
    assert times(night, datetime(2026, 10, 24, tzinfo=UTC), 3) == ["24 02:30+0200", "25 02:30+0200", "26 02:30+0100"]
    steps = schedule("*/30 * * * *", Tick, to=ticks, tz="Europe/Berlin")
    begin = datetime(2026, 10, 25, 0, 0, tzinfo=UTC)
    assert times(steps, begin, 3) == ["25 02:30+0200", "25 02:00+0100", "25 02:30+0100"]


@pytest.mark.parametrize("line", ["30 2 * * *", "*/20 1-3 * * *", "15 2 L * *", "0 9 * * MON-FRI", "7 7 * * FRI#2"])
def test_backwards_the_slots_are_the_same_as_forwards(line: str) -> None:
    part = schedule(line, Tick, to=ticks, tz="Europe/Berlin")
    assert isinstance(part, Schedule)
    begin, end = (int(datetime(2026, month, 1, tzinfo=UTC).timestamp() * 1000) for month in (2, 12))
    forwards: list[int] = []
    for at_ms in part.timetable.slots(begin):
        if at_ms > end:
            break
        forwards.append(at_ms)
    backwards: list[int] = []
    for at_ms in part.timetable.back(end):
        if at_ms <= begin:
            break
        backwards.append(at_ms)
    assert forwards == sorted(set(backwards)) and len(forwards) > 5


@pytest.mark.parametrize(
    ("declare", "complaint"),
    [
        (lambda: schedule("*/5 * * *", Tick, to=ticks), "not a cron line: write five fields.*'\\*/5 \\* \\* \\* \\*'"),
        (lambda: schedule("0 25 * * *", Tick, to=ticks), "not a cron line, bad hour: write five fields"),
        (lambda: schedule("@daily", Tick, to=ticks), "'@daily' is not a cron line"),
        (lambda: schedule("* * * * * *", Tick, to=ticks), "five fields"),
        (lambda: schedule("0 0 30 2 *", Tick, to=ticks), "bad day-of-month"),
        (lambda: schedule("0 0 * * *", Tick, to=ticks, tz="Berlin"), "'Berlin' is not a time zone.*Europe/Berlin"),
        (lambda: schedule("0 0 * * *", Tick, to=ticks, tz="../etc"), "is not a time zone"),
        (lambda: every("1ms", Tick, to=ticks), "from 100 ms to 366 days"),
        (lambda: every("soon", Tick, to=ticks), "'soon' is not a duration"),
        (lambda: every("1m", Tick, to=ticks, missed=cast("Any", "never")), "'skip', 'last' or 'all'"),
        (lambda: every("1m", Tick, to=ticks, name="a b"), "cannot name a schedule"),
        (lambda: every("1m", Tock, to=both), "Tock cannot be made of nothing.*lambda at: Tock\\(n=…\\)"),
        (lambda: every("1m", Tock, to=cast("Any", ticks)), "does not carry Tock; it carries Tick"),
        (lambda: every("1m", cast("Any", 7), to=ticks), "7 makes no events"),
        (lambda: every("1m", lambda at: Tick(), to=both), "name the schedule with name="),
        (lambda: every("1m", Tick, to=cast("Any", "ticks")), "to='ticks' is not a stream"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_once(declare: Callable[[], Part], complaint: str) -> None:
    with pytest.raises(BadSetting, match=complaint):
        declare()


def test_without_the_library_the_way_to_it_is_named_and_intervals_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cronsim", None)
    with pytest.raises(BadSetting, match=r"pip install 'millstream\[cron\]'"):
        schedule("* * * * *", Tick, to=ticks)
    assert name_of(every("1m", Tick, to=ticks))


def test_a_name_left_out_is_made_of_stream_type_and_line_and_stays_the_same() -> None:
    # Written down on purpose: under another name a running schedule would begin anew.
    assert name_of(schedule("*/5  * * * *", Tick, to=ticks)) == name_of(schedule("*/5 * * * *", Tick, to=ticks))
    assert name_of(schedule("*/5 * * * *", Tick, to=ticks)) == "tick-6cc7f723"
    assert name_of(every("90s", Tick, to=ticks)) == name_of(every("1.5m", Tick, to=ticks)) == "tick-9351aec3"
    others = [
        schedule("*/5 * * * *", Tick, to=ticks),
        schedule("*/5 * * * *", Tick, to=ticks, tz="Europe/Berlin"),
        schedule("5 * * * *", Tick, to=ticks),
        schedule("*/5 * * * *", Tick, to=both),
        every("5m", Tick, to=ticks),
    ]
    assert len({name_of(part) for part in others}) == len(others)


async def test_two_schedules_of_one_app_with_one_name_are_refused() -> None:
    one, other = every("1m", Tick, to=ticks, name="tick"), every("2m", Tick, to=ticks, name="tick")
    elsewhere = every("2m", Tick, to=both, name="tick")
    with pytest.raises(BadSetting, match=r"two schedules .* named 'tick' on stream 'ticks', 'every 1m' and 'every 2m'"):
        async with App("shop", broker="memory://", include=[one, other]).worker():
            pass
    inner = Router()
    inner.include(one, elsewhere)
    assert schedules(App("shop", include=[inner, one]).parts()) == [one, elsewhere]
    with pytest.raises(BadSetting, match="named 'tick'"):
        schedules(App("shop", include=[inner, other]).parts())


async def test_a_broker_without_slots_is_refused_at_the_start() -> None:
    office = Office(Wall(), VirtualClock())
    office.broker.traits = Traits()
    with pytest.raises(NotSupported, match="wall:// cannot publish on a schedule"):
        async with every("1m", Tick, to=ticks).running(cast("Runtime", office)):
            pass


async def test_in_a_test_slots_come_as_time_is_advanced(caplog: pytest.LogCaptureFixture) -> None:
    handled: list[str] = []
    daily = schedule("0 3 * * *", lambda at: Tick(at=f"{at:%d %H:%M}"), to=ticks, tz="Europe/Berlin")
    app = App("shop", include=[daily, every("6h", Tick, to=ticks)])

    @app.subscriber(ticks, "clock")
    async def strike(event: Tick) -> None:
        handled.append(event.at)

    caplog.set_level(logging.WARNING)
    async with TestApp(app) as t:
        await t.advance("1d")
        assert [tick.at for tick in t.published(ticks)] == ["01 03:00", "", "", "", ""]
        assert handled == ["01 03:00", "", "", "", ""]
    assert not caplog.messages


async def test_in_a_test_a_slot_without_an_event_fails_the_test() -> None:
    def make(at: datetime) -> Tick:
        raise LookupError("no such tick")

    async with TestApp(App("shop", include=[every("1h", make, to=ticks)])) as t:
        await t.advance("30m")
        with pytest.raises(LookupError, match="no such tick"):
            await t.advance("1h")
