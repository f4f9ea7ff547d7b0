"""`stream apply` and `stream drop`: shown first, then done; and what is shown of policies and losses."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from millstream.brokers.base import Policy, Record, StreamSpec, Subscription
from millstream.brokers.memory.broker import MemoryBroker
from millstream.units import FORGET_MS
from tests.cli.conftest import Project

HOUR_MS = 3_600_000

KEEPING = """
from millstream import App, Event, Retention, Stream

class Placed(Event, type="order.placed"):
    n: int = 0

kept = Stream("kept", Placed, retention=Retention(events=10, age="1h"), dedupe="1h")
dropping = Stream("dropping", Placed, retention=Retention(events=10, unread="drop", bytes="1GB"))
tight = Stream("tight", Placed, retention=Retention(events=10, ceiling=20))
silent = Stream("silent", Placed)
app = App("shop", streams=[kept, dropping, tight, silent])
"""


@pytest.fixture
def shop(project: Project, memory: MemoryBroker) -> Project:
    """A project whose app declares policies, on a broker in memory that the test shares."""
    project.write("keeping.py", KEEPING)
    project.environment = {"MILLSTREAM_APP": "keeping:app", "MILLSTREAM_BROKER": "memory://"}
    return project


async def fill(broker: MemoryBroker, stream: str, events: int, policy: Policy = Policy()) -> None:  # noqa: B008 - frozen
    await broker.open()
    await broker.declare(StreamSpec(stream), policy)
    await broker.append(stream, [Record(0, str(n), "order.placed", b"{}") for n in range(events)])


async def join(broker: MemoryBroker, stream: str, group: str, *, stay: bool = False) -> None:
    consumer = await broker.subscribe(Subscription(StreamSpec(stream), group, "shop"))
    await consumer.fetch(1, 0)
    if not stay:
        await consumer.close()


def policies(broker: MemoryBroker) -> dict[str, Policy]:
    return {info.spec.name: info.policy for info in asyncio.run(broker.admin.streams())}


def parsed(project: Project, *words: str) -> Any:
    done = project(*words, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_what_is_declared_is_shown_then_needs_a_yes_and_holds(shop: Project, memory: MemoryBroker) -> None:
    asyncio.run(fill(memory, "kept", 25))
    before = policies(memory)
    for words, code in (((), 4), (("--plan",), 0)):
        done = shop("stream", "apply", *words)
        assert done.exit_code == code and policies(memory) == before and not done.stdout
        lines = [line.split("  ") for line in done.stderr.splitlines()]
        plan = [[word.strip() for word in line if word] for line in lines[lines.index(["plan: change 1 stream"]) + 1 :]]
        assert plan[:4] == [
            ["STREAM", "SETTING", "RECORDED", "DECLARED"],
            ["kept", "dedupe", "-", "1h, 1,000,000 ids"],
            ["kept", "age", "-", "1h"],
            ["kept", "events", "-", "10"],
        ]
        assert "about 15 of its 25 events may go, once their groups have settled them" in done.stderr
        assert "tight is not there yet: its first event makes it as it is declared" in done.stderr
    done = shop("stream", "apply", "--yes")
    assert done.exit_code == 0 and done.stdout.startswith("kept has dedupe 1h")
    assert policies(memory)["kept"] == Policy(
        dedupe_ms=HOUR_MS, dedupe_ids=1_000_000, age_ms=HOUR_MS, events=10, forget_ms=FORGET_MS
    )
    done = shop("stream", "apply", "--yes")
    assert done.exit_code == 0 and "nothing to do: what is declared holds" in done.stderr


def test_only_the_streams_that_are_named_are_changed(shop: Project, memory: MemoryBroker) -> None:
    for stream in ("kept", "dropping"):
        asyncio.run(fill(memory, stream, 1))
    assert shop("stream", "apply", "dropping", "--yes").exit_code == 0
    assert policies(memory)["kept"] == Policy() and policies(memory)["dropping"].events == 10
    done = shop("stream", "apply", "kep", "--yes")
    assert done.exit_code == 2 and "shop has no stream 'kep'; it has: dropping, kept, silent, tight." in done.stderr


def test_what_would_be_lost_and_what_would_be_refused_is_said(shop: Project, memory: MemoryBroker) -> None:
    asyncio.run(fill(memory, "dropping", 30))
    asyncio.run(fill(memory, "tight", 30))
    done = shop("stream", "apply", "--plan")
    assert "about 20 of its 30 events may go, and what groups have not settled is lost" in done.stderr
    assert "tight is over that ceiling now: publishing is refused until it is below" in done.stderr


def test_what_the_app_says_nothing_about_stays_unless_it_is_to_be_exact(shop: Project, memory: MemoryBroker) -> None:
    recorded = Policy(events=7, dedupe_ms=5_000, dedupe_ids=9)
    for stream in ("silent", "dropping"):
        asyncio.run(fill(memory, stream, 1, recorded))
    assert shop("stream", "apply", "--yes").exit_code == 0
    found = policies(memory)
    assert found["silent"] == recorded
    assert (found["dropping"].events, found["dropping"].dedupe_ids, found["dropping"].keep) == (10, 9, False)
    assert shop("stream", "apply", "--exact", "--yes").exit_code == 0
    assert policies(memory)["silent"] == Policy() and policies(memory)["dropping"].dedupe_ids == 0


def test_applying_needs_an_app(shop: Project) -> None:
    shop.environment.pop("MILLSTREAM_APP")
    done = shop("stream", "apply")
    assert done.exit_code == 2 and "Give --app shop.main:app" in done.stderr


def test_a_stream_shows_its_policy_and_that_another_is_declared(shop: Project, memory: MemoryBroker) -> None:
    asyncio.run(fill(memory, "kept", 3, Policy(events=10)))
    asyncio.run(fill(memory, "silent", 3))
    found = parsed(shop, "stream", "show", "kept")
    assert found["policy"]["events"] == 10 and (found["delayed"], found["repeats"], found["trimmed"]) == (0, 0, 0)
    done = shop("stream", "show", "kept")
    assert "no dedupe, retention 10 events, unread kept, groups forgotten after 7d" in done.stdout
    assert "the app declares another policy: `millstream stream apply kept`" in done.stderr
    header, kept, silent = shop("stream", "ls").stdout.splitlines()
    assert header.endswith("POLICY") and "events 10" in kept and silent.endswith("-")


def test_a_group_shows_what_it_lost_and_when_it_was_seen(shop: Project, memory: MemoryBroker) -> None:
    asyncio.run(fill(memory, "kept", 5, Policy(events=1, keep=False)))
    asyncio.run(join(memory, "kept", "billing"))
    assert "LOST" not in shop("group", "ls").stdout
    asyncio.run(memory.tend("kept"))
    (found,) = parsed(shop, "group", "ls")
    assert found["lost"] > 0 and "seen_ms" in found
    header, line = shop("group", "ls").stdout.splitlines()
    assert header.split()[-1] == "LOST" and line.split()[-1] == str(found["lost"])
    shown = shop("group", "show", "billing").stdout
    assert "last seen" in shown and "lost" in shown


def test_dropping_a_stream_is_shown_then_needs_a_yes(shop: Project, memory: MemoryBroker) -> None:
    asyncio.run(fill(memory, "kept", 5))
    asyncio.run(join(memory, "kept", "billing"))
    for words, code in (((), 4), (("--plan",), 0)):
        done = shop("stream", "drop", "kept", *words)
        assert done.exit_code == code and "kept" in policies(memory)
        assert "plan: drop kept with 5 events and 1 group" in done.stderr
        assert "group billing of app shop: " in done.stderr and "0 dead letters" in done.stderr
    done = shop("stream", "drop", "kept", "--yes")
    assert (done.exit_code, done.stdout) == (0, "kept is dropped\n") and not policies(memory)
    done = shop("stream", "drop", "unknown", "--yes")
    assert done.exit_code == 2 and "There is no stream 'unknown'" in done.stderr


def test_a_stream_with_members_is_not_dropped(shop: Project, memory: MemoryBroker) -> None:
    asyncio.run(fill(memory, "kept", 5))
    asyncio.run(join(memory, "kept", "billing", stay=True))
    done = shop("stream", "drop", "kept", "--yes")
    assert done.exit_code == 4 and "kept is consumed by billing: stop these first" in done.stderr
    assert "0 dead letters; 1 consumer of it runs now" in done.stderr
    assert "kept" in policies(memory)
