"""`schedule`: what is listed of an app's schedules and of others, and an event beside the slots."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from millstream.brokers.base import Record, Slot, StreamSpec
from millstream.brokers.memory.broker import MemoryBroker
from millstream.clock import Clock
from tests.cli.conftest import Project

HOUR_MS = 3_600_000

CLOCKS = """
from datetime import datetime
from millstream import App, Event, Router, Stream, every, schedule

class Tick(Event, type="tick"):
    at: str = ""

def fail(at: datetime) -> Tick:
    raise LookupError("no tick today")

ticks = Stream("ticks", Tick)
tocks = Stream("tocks", Tick)
parts = Router()
parts.include(
    schedule("*/5 * * * *", lambda at: Tick(at=f"{at:%H}"), to=ticks, tz="Europe/Berlin", name="five"),
    every("1h", Tick, to=ticks, name="hourly", missed="all"),
    every("2h", Tick, to=tocks, name="hourly"),
    every("1d", fail, to=ticks, name="broken"),
)
app = App("clocks", include=[parts])
empty = App("empty")
clash = App("clash", include=[parts, every("3h", Tick, to=ticks, name="hourly")])
"""


@pytest.fixture
def clocks(project: Project, memory: MemoryBroker, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with schedules, on a broker in memory that the test shares."""
    monkeypatch.setattr("millstream.app.broker_for", lambda *_: memory)
    project.write("clocks.py", CLOCKS)
    project.environment = {"MILLSTREAM_APP": "clocks:app", "MILLSTREAM_BROKER": "memory://"}
    return project


def parsed(project: Project, *words: str) -> Any:
    done = project(*words, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


async def come_to(broker: MemoryBroker, stream: str, name: str, at_ms: int) -> None:
    await broker.open()
    await broker.declare(StreamSpec(stream))
    assert await broker.append_slot(stream, Slot(name, at_ms), Record(0, name, "tick", b"{}"))


def test_schedules_are_listed_with_their_slots(clocks: Project) -> None:
    listed = parsed(clocks, "schedule", "ls")
    assert [each["name"] for each in listed] == ["ticks/broken", "ticks/five", "ticks/hourly", "tocks/hourly"]
    assert {name: listed[1][name] for name in ("stream", "schedule", "expression", "tz", "missed", "last_ms")} == {
        "stream": "ticks",
        "schedule": "five",
        "expression": "*/5 * * * *",
        "tz": "Europe/Berlin",
        "missed": "last",
        "last_ms": None,
    }
    now_ms = Clock().now_ms()
    assert all(now_ms - 60_000 < each["next_ms"] for each in listed)
    assert listed[2]["next_ms"] % HOUR_MS == 0 and listed[2]["expression"] == "every 1h"
    header, *_, last = clocks("schedule", "ls").stdout.splitlines()
    assert header.split() == ["SCHEDULE", "EXPRESSION", "ZONE", "LAST", "SLOT", "NEXT", "SLOT"]
    assert last.startswith("tocks/hourly") and "every 2h" in last


def test_slots_that_were_come_to_are_shown_those_of_other_apps_too(clocks: Project, memory: MemoryBroker) -> None:
    ahead_ms = (Clock().now_ms() // HOUR_MS + 10) * HOUR_MS
    asyncio.run(come_to(memory, "ticks", "hourly", ahead_ms))
    asyncio.run(come_to(memory, "ticks", "nightly", 5_000))
    listed = {each["schedule"]: each for each in parsed(clocks, "schedule", "ls") if each["stream"] == "ticks"}
    assert (listed["hourly"]["last_ms"], listed["hourly"]["next_ms"]) == (ahead_ms, ahead_ms + HOUR_MS)
    other = listed["nightly"]
    assert (other["last_ms"], other["next_ms"], other["expression"], other["tz"]) == (5_000, None, None, None)
    clocks.environment.pop("MILLSTREAM_APP")
    assert [each["name"] for each in parsed(clocks, "schedule", "ls")] == ["ticks/hourly", "ticks/nightly"]


def test_where_there_are_no_schedules_it_says_so(clocks: Project) -> None:
    done = clocks("schedule", "ls", "--app", "clocks:empty")
    assert (done.exit_code, done.stdout) == (0, "") and "There are no schedules" in done.stderr
    clocks.environment.pop("MILLSTREAM_APP")
    done = clocks("schedule", "ls")
    assert (done.exit_code, done.stdout) == (0, "") and "No schedule has published here yet" in done.stderr


def test_two_schedules_of_one_name_are_refused(clocks: Project) -> None:
    done = clocks("schedule", "ls", "--app", "clocks:clash")
    assert done.exit_code == 2 and "two schedules of this app are named 'hourly' on stream 'ticks'" in done.stderr


def test_running_one_publishes_its_event_once_more(clocks: Project, memory: MemoryBroker) -> None:
    done = clocks("schedule", "run", "five")
    assert done.exit_code == 0, done.output
    position, id_ = done.stdout.split()
    assert clocks("schedule", "run", "tocks/hourly").exit_code == 0
    assert clocks("schedule", "run", "five").stdout.split()[1] != id_
    stored = asyncio.run(memory.read("ticks", 0, None, 10))
    assert [str(stored[0].position), stored[0].record.id] == [position, id_] and len(stored) == 2
    assert b'"schedule":"five"' in stored[0].record.headers and b'"at":"' in stored[0].record.data
    assert asyncio.run(memory.admin.slots("ticks")) == {}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("six",), "clocks has no schedule 'six'; it has: ticks/broken, ticks/five, ticks/hourly, tocks/hourly."),
        (("hourly",), "Which 'hourly'? Say ticks/hourly or tocks/hourly."),
        (("broken",), "broken has no event for now: clocks.py, line 9: LookupError: no tick today"),
        (("five", "--app", "clocks:empty"), "empty has no schedule 'five'; it has: none."),
    ],
)
def test_what_cannot_be_run_is_refused(clocks: Project, words: tuple[str, ...], complaint: str) -> None:
    done = clocks("schedule", "run", *words)
    assert done.exit_code == 2 and complaint in done.stderr and not done.stdout


def test_running_one_needs_the_app(clocks: Project) -> None:
    clocks.environment.pop("MILLSTREAM_APP")
    done = clocks("schedule", "run", "five")
    assert done.exit_code == 2 and "Run a schedule of which app? Give --app" in done.stderr
