"""`group seek`, `group forget` and `replay`: a group goes to another place, or goes."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime

import pytest

from millstream.brokers.base import (
    Claim,
    Consumer,
    Dead,
    Done,
    GroupInfo,
    Later,
    Outcome,
    Record,
    Settlement,
    StreamSpec,
    Subscription,
)
from millstream.brokers.ledger import HELD_MS
from millstream.brokers.memory.broker import MemoryBroker
from millstream.cli import place
from millstream.clock import Clock
from tests.cli.conftest import Project

SPEC = StreamSpec("orders", 2, "order_id")
OPEN = Later(HELD_MS, "busy")


class Calendar(Clock):
    """What is published is published on the day that was set."""

    def __init__(self, day: str) -> None:
        super().__init__()
        self._now_ms = int(datetime.fromisoformat(day).timestamp() * 1000)

    def now_ms(self) -> int:
        return self._now_ms


def publish(broker: MemoryBroker, day: str, *partitions: int) -> None:
    """On this day, an event in each of these partitions."""

    async def append() -> None:
        await broker.declare(SPEC)
        await broker.append("orders", [Record(n, f"{n}", "order.placed", b"{}", f"k{n}") for n in partitions])

    broker.clock = Calendar(day)
    asyncio.run(append())


def handle(broker: MemoryBroker, *outcomes: Outcome, order: bool = False, group: str = "billing") -> list[Claim]:
    """Let a group come to so many events."""

    async def settle() -> list[Claim]:
        consumer = await join(broker, order=order, group=group)
        claims = await consumer.fetch(len(outcomes), 0) if outcomes else []
        await consumer.settle([Settlement(c.stored.position, o) for c, o in zip(claims, outcomes, strict=True)])
        await consumer.close()
        return claims

    return asyncio.run(settle())


async def join(broker: MemoryBroker, *, order: bool = False, group: str = "billing") -> Consumer:
    return await broker.subscribe(Subscription(SPEC, group, "shop", lease_s=3_600, order=order))


def info(broker: MemoryBroker, group: str = "billing") -> GroupInfo:
    [found] = [found for found in asyncio.run(broker.admin.groups("orders")) if found.group == group]
    return found


@pytest.fixture
def history(memory: MemoryBroker) -> MemoryBroker:
    """Three events of 2020 and two of 2022, all handled by `billing` and by `warehouse`."""
    publish(memory, "2020-01-01", 0, 0, 1)
    publish(memory, "2022-01-01", 0, 1)
    for group in ("billing", "warehouse"):
        handle(memory, *[Done()] * 5, group=group)
    return memory


@pytest.mark.parametrize(
    ("to", "lag", "count"),
    [
        ("beginning", 5, "5 events, from 2020-01-01 00:00:00 to 2022-01-01 00:00:00"),
        ("now", 0, "0 events"),
        ("2021-01-01", 2, "2 events, from 2022-01-01 00:00:00 to 2022-01-01 00:00:00"),
        ("2222-01-01", 0, "0 events"),
    ],
)
def test_a_group_is_moved_as_planned_and_only_after_a_yes(
    project: Project, history: MemoryBroker, to: str, lag: int, count: str
) -> None:
    seek = ("group", "seek", "billing", "--to", to)
    for words, code in ((("--plan",), 0), ((), 4)):
        done = project(*seek, *words)
        assert (done.exit_code, done.stdout) == (code, "")
        assert f"plan: orders/billing goes to {to}" in done.stderr and f"behind it lie {count}" in done.stderr
    assert info(history).lag == 0
    done = project(*seek, "--yes")
    assert done.exit_code == 0 and done.stdout.startswith(f"orders/billing goes on from {to}")
    assert (info(history).lag, info(history, "warehouse").lag) == (lag, 0)


def test_what_a_move_may_skip_is_told(project: Project, history: MemoryBroker) -> None:
    publish(history, "2023-01-01", 0, 0)
    handle(history, OPEN)
    told = project("group", "seek", "billing", "--to", "now", "--plan").stderr
    assert "1 event it has not been given yet; those before that place it never will be" in told
    assert "1 pending event will be forgotten; those behind that place come again" in told
    handle(history, OPEN, order=True, group="audit")
    told = project("group", "seek", "audit", "--to", "now", "--plan").stderr
    assert "1 waiting event of keys; those before that place stay" in told


def test_many_events_are_not_counted_to_the_end(
    project: Project, history: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "MAX_COUNTED", 2)
    monkeypatch.setattr(place, "PAGE", 1)
    told = project("group", "seek", "billing", "--to", "beginning", "--plan").stderr
    assert "behind it lie more than 2 events, from 2020-01-01 00:00:00 on" in told


@pytest.mark.parametrize("verb", ["seek", "replay"])
def test_a_group_that_runs_is_moved_only_when_that_is_meant(project: Project, history: MemoryBroker, verb: str) -> None:
    words = {
        "seek": ("group", "seek", "billing", "--to", "beginning"),
        "replay": ("replay", "orders", "--since", "2019-01-01", "--to-group", "billing"),
    }[verb]
    asyncio.run(join(history))
    done = project(*words, "--plan")
    assert done.exit_code == 0 and "1 consumer of it runs now" in done.stderr
    done = project(*words, "--yes")
    assert (done.exit_code, done.stdout) == (4, "")
    assert "orders/billing runs: stop its consumers, or say --live, and they lose what they hold" in done.stderr
    assert info(history).lag == 0
    assert project(*words, "--yes", "--live").exit_code == 0
    assert info(history).lag == 5


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("group", "seek", "biling", "--to", "now"), "There is no group 'biling'; there are: orders/billing"),
        (("group", "seek", "billing"), "Missing option '--to'"),
        (
            ("group", "seek", "billing", "--to", "soon"),
            "'soon' is not a time: write 5m (ago), 2026-08-01T12:00Z or today.",
        ),
        (("group", "forget", "biling"), "There is no group 'biling'; there are: orders/billing"),
        (
            ("replay", "ordrs", "--since", "1h", "--to-group", "billing"),
            "There is no stream 'ordrs'; there are: orders.",
        ),
        (
            ("replay", "orders", "--since", "1h", "--to-group", "biling"),
            "There is no group 'orders/biling'; there are: ",
        ),
        (
            ("replay", "orders", "--since", "1h", "--to-group", "other/billing"),
            "other/billing is a group of another stream",
        ),
        (("replay", "orders", "--since", "1h"), "Missing option '--to-group'"),
        (("replay", "orders", "--to-group", "billing"), "Missing option '--since'"),
        (("replay", "orders", "--since", "x", "--to-group", "billing"), "'x' is not a time"),
    ],
)
def test_what_cannot_be_meant_is_said_and_nothing_is_done(
    project: Project, history: MemoryBroker, words: tuple[str, ...], complaint: str
) -> None:
    done = project(*words, "--yes")
    assert (done.exit_code, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert info(history).lag == 0


def test_a_group_is_forgotten_as_planned_and_only_after_a_yes(project: Project, history: MemoryBroker) -> None:
    publish(history, "2023-01-01", 0, 0, 1)
    handle(history, Dead("failed"), OPEN)
    for words, code in ((("--plan",), 0), ((), 4)):
        done = project("group", "forget", "billing", *words)
        assert (done.exit_code, done.stdout) == (code, "")
        plan = "plan: forget orders/billing of app shop, with 1 dead letter, 1 pending event, and its place, 1 event before"
        assert plan in done.stderr
    done = project("group", "forget", "orders/billing", "--yes")
    assert (done.exit_code, done.stdout) == (0, "orders/billing is forgotten\n")
    groups = json.loads(project("group", "ls", "-o", "json").stdout)
    assert [group["name"] for group in groups] == ["orders/warehouse"]


def test_a_group_that_runs_is_not_forgotten(project: Project, history: MemoryBroker) -> None:
    asyncio.run(join(history))
    assert "1 consumer of it runs now" in project("group", "forget", "billing", "--plan").stderr
    done = project("group", "forget", "billing", "--yes")
    assert done.exit_code == 4 and "orders/billing runs: stop its consumers first" in done.stderr
    assert info(history).consumers == 1


@pytest.mark.parametrize("group", ["billing", "orders/billing"])
def test_history_is_replayed_into_one_group(project: Project, history: MemoryBroker, group: str) -> None:
    replay = ("replay", "orders", "--since", "2021-01-01", "--to-group", group)
    for words, code in ((("--plan",), 0), ((), 4)):
        done = project(*replay, *words)
        assert (done.exit_code, done.stdout) == (code, "")
        assert (
            "plan: orders/billing sees 2 events, from 2022-01-01 00:00:00 to 2022-01-01 00:00:00 again" in done.stderr
        )
    done = project(*replay, "--yes")
    assert (done.exit_code, done.stdout) == (0, "orders/billing goes on from 2021-01-01 00:00:00\n")
    assert "`millstream group show orders/billing` shows how far they are" in done.stderr
    assert (info(history).lag, info(history, "warehouse").lag) == (2, 0)
    again = handle(history, Done(), Done())
    assert {str(claim.position) for claim in again} == {"0@3", "1@2"}


def test_a_replay_that_would_skip_events_is_refused(project: Project, history: MemoryBroker) -> None:
    def replayed(group: str, since: str) -> int:
        done = project("replay", "orders", "--since", since, "--to-group", group, "--yes")
        assert ("may not have settled all events from before that time" in done.stderr) == (done.exit_code == 4)
        return done.exit_code

    handle(history, group="fresh")
    assert replayed("fresh", "2021-01-01") == 4  # it has not been given anything yet
    assert replayed("fresh", "2019-01-01") == 0
    handle(history, *[OPEN] * 5, group="busy")
    assert replayed("busy", "2021-01-01") == 4  # some events of 2020 are pending
    assert replayed("busy", "2019-01-01") == 0
    publish(history, "2023-01-01", 0, 1)
    assert info(history).lag == 2
    assert replayed("billing", "2023-06-01") == 4
    assert replayed("billing", "2021-01-01") == 0  # it has come as far as that in every partition


def test_a_replay_into_an_ordered_group_leaves_what_waits_before_it(project: Project, history: MemoryBroker) -> None:
    handle(history, *[OPEN] * 5, order=True, group="audit")
    assert info(history, "audit").pending == 5
    done = project("replay", "orders", "--since", "2021-01-01", "--to-group", "audit", "--yes")
    assert done.exit_code == 0
    assert (info(history, "audit").pending, info(history, "audit").lag) == (3, 2)


def test_a_key_that_waits_for_a_person_is_shown_among_what_is_pending(project: Project, history: MemoryBroker) -> None:
    handle(history, *[OPEN] * 5, order=True, group="audit")
    shown = json.loads(project("group", "show", "audit", "-o", "json").stdout)
    assert {event["due_ms"] for event in shown["oldest_pending"]} == {None}
    handle(history, *[OPEN] * 5, group="busy")
    assert "PENDING" in project("group", "show", "busy").stdout
