"""`stream`, `group` and `dead`: lists, details, and the changes that are first shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from millstream import Settings
from millstream.brokers.base import Claim, Dead, Done, Outcome, Record, Settlement, StreamSpec, Subscription
from millstream.brokers.urls import broker_for
from millstream.clock import Clock
from millstream.telemetry import Telemetry
from tests.cli.conftest import Project

FAILED = Dead("failed", "Traceback (most recent call last):\n  …\nValueError: too much")
REJECTED = Dead("rejected", "a bad order")


def happen(project: Project, group: str, outcomes: Sequence[Outcome], stream: str = "orders", keep: int = 0) -> None:
    """Publish an event for each outcome and let a group come to it; `keep` more stay with the group, not settled."""
    asyncio.run(_happen(f"sqlite:///{project.path}/shop.db", stream, group, outcomes, keep))


async def _happen(url: str, stream: str, group: str, outcomes: Sequence[Outcome], keep: int) -> None:
    broker = broker_for(url, Settings(), Clock(), Telemetry())
    await broker.open()
    spec = StreamSpec(stream, 1, "order_id")
    await broker.declare(spec)
    consumer = await broker.subscribe(Subscription(spec, group, "shop", start="now"))
    await consumer.fetch(1, 0)
    records = [
        Record(0, f"{group}-{n}", "order.placed", b'{"order_id":"1"}', "1", headers=b'{"a":"b"}')
        for n in range(len(outcomes) + keep)
    ]
    await broker.append(stream, records)
    claims: list[Claim] = []
    while len(claims) < len(records):
        claims += await consumer.fetch(len(records), 1)
    settled = [Settlement(claim.position, outcome) for claim, outcome in zip(claims, outcomes, strict=False)]
    assert all(await consumer.settle(settled))
    await consumer.close()
    await broker.close()


@pytest.fixture
def alone(project: Project) -> Project:
    """A project without an app: the commands look at its broker only."""
    project.environment = {"MILLSTREAM_BROKER": "sqlite:///shop.db"}
    return project


def parsed(project: Project, *words: str) -> Any:
    done = project(*words, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def letters(project: Project, *words: str) -> list[str]:
    return [letter["id"] for letter in parsed(project, "dead", "ls", *words)]


def test_lists_of_nothing_say_so_beside_an_empty_result(alone: Project) -> None:
    for words in (("stream", "ls"), ("group", "ls"), ("dead", "ls")):
        assert parsed(alone, *words) == []
        done = alone(*words)
        assert (done.exit_code, done.stdout) == (0, "") and len(done.stderr.splitlines()) == 2


def test_streams_are_listed_and_shown(alone: Project) -> None:
    happen(alone, "billing", [Done(), Done()])
    (listed,) = parsed(alone, "stream", "ls")
    assert (listed["name"], listed["events"], listed["key"], listed["partitions"]) == ("orders", 2, "order_id", 1)
    header, line = alone("stream", "ls").stdout.splitlines()
    assert header.split() == ["STREAM", "PARTITIONS", "KEY", "EVENTS", "SIZE", "LAST"] and line.startswith("orders")
    found = parsed(alone, "stream", "show", "orders")
    assert {**found, "groups": 0} == {**listed, "groups": 0} and found["groups"][0]["name"] == "orders/billing"
    assert "orders/billing" in alone("stream", "show", "orders").stdout
    done = alone("stream", "show", "ordrs")
    assert done.exit_code == 2 and "There is no stream 'ordrs'; there are: orders." in done.stderr


def test_an_app_adds_the_types_of_its_streams(project: Project) -> None:
    project("publish", "orders", "order.placed", "order_id=1")
    assert parsed(project, "stream", "show", "orders")["types"] == ["order.placed", "order.cancelled"]
    assert "order.placed, order.cancelled" in project("stream", "show", "orders").stdout


def test_groups_are_listed_and_shown_with_what_waits(alone: Project) -> None:
    happen(alone, "billing", [Done(), FAILED], keep=2)
    (listed,) = parsed(alone, "group", "ls")
    assert {name: listed[name] for name in ("name", "owner", "pending", "dead", "done")} == {
        "name": "orders/billing",
        "owner": "shop",
        "pending": 2,
        "dead": 1,
        "done": 1,
    }
    for name in ("billing", "orders/billing"):
        shown = parsed(alone, "group", "show", name)
        assert [event["position"].split("@")[0] for event in shown.pop("oldest_pending")] == ["0", "0"]
        assert shown == listed
    table = alone("group", "show", "billing").stdout
    assert "dead letters      1" in table and "PENDING" in table


def test_a_group_of_two_streams_needs_its_stream_and_an_unknown_one_names_the_others(alone: Project) -> None:
    happen(alone, "billing", [Done()])
    happen(alone, "billing", [Done()], stream="payments")
    done = alone("group", "show", "billing")
    assert done.exit_code == 2 and "Which 'billing'? Say orders/billing or payments/billing." in done.stderr
    assert alone("group", "show", "payments/billing").exit_code == 0
    done = alone("group", "show", "biling")
    assert done.exit_code == 2 and "there are: orders/billing, payments/billing" in done.stderr


def test_adopting_is_shown_then_needs_a_yes_and_changes_the_owner(alone: Project) -> None:
    happen(alone, "billing", [Done()])
    adopt = ("group", "adopt", "billing", "--owner", "new")
    assert alone(*adopt, "--plan").exit_code == 0
    done = alone(*adopt)
    assert done.exit_code == 4 and "plan: orders/billing changes from app shop to new" in done.stderr
    assert parsed(alone, "group", "show", "billing")["owner"] == "shop"
    done = alone(*adopt, "--yes")
    assert (done.exit_code, done.stdout) == (0, "orders/billing belongs to new now\n")
    assert parsed(alone, "group", "show", "billing")["owner"] == "new"
    assert alone(*adopt, "--yes").exit_code == 0
    assert alone("group", "adopt", "billing", "--yes").exit_code == 2  # by whom?


def test_dead_letters_are_listed_by_what_is_asked_for(alone: Project) -> None:
    happen(alone, "billing", [FAILED, Done(), REJECTED])
    happen(alone, "warehouse", [FAILED])
    assert letters(alone) == ["billing-0", "billing-2", "warehouse-0"]
    assert letters(alone, "--group", "billing") == ["billing-0", "billing-2"]
    assert letters(alone, "--reason", "rejected") == ["billing-2"]
    assert letters(alone, "--type", "order.lost") == []
    assert letters(alone, "--since", "1h", "--type", "order.placed", "--group", "orders/warehouse") == ["warehouse-0"]
    assert letters(alone, "--since", "2222-01-01") == []
    assert alone("dead", "ls", "--group", "biling").exit_code == 2
    limited = alone("dead", "ls", "--limit", "2", "-o", "jsonl")
    assert len(limited.stdout.splitlines()) == 2 and "--limit 0 shows all" in limited.stderr
    assert alone("dead", "ls").stdout.splitlines()[1].endswith("failed        1  ValueError: too much")


def test_more_letters_than_one_page_are_all_found(alone: Project) -> None:
    happen(alone, "billing", [FAILED] * 250)
    assert len(letters(alone, "--limit", "0")) == 250
    done = alone("dead", "replay", "--yes")
    assert (done.exit_code, done.stdout) == (0, "replayed 250 dead letters\n")
    assert letters(alone) == []
    assert parsed(alone, "group", "show", "billing")["replayed"] == 250


def test_a_dead_letter_is_shown_whole(alone: Project) -> None:
    happen(alone, "billing", [FAILED])
    (position,) = [letter["position"] for letter in parsed(alone, "dead", "ls")]
    for name in ("billing-0", position):
        shown = parsed(alone, "dead", "show", name)
        assert shown["data"] == {"order_id": "1"} and shown["headers"] == {"a": "b"} and shown["error"] == FAILED.error
    text = alone("dead", "show", "billing-0").stdout
    assert '"order_id": "1"' in text and "ValueError: too much" in text and "reason" in text
    done = alone("dead", "show", "nothing")
    assert done.exit_code == 2 and "There is no dead letter with the id or position 'nothing'." in done.stderr


def test_what_several_groups_gave_up_needs_the_group(alone: Project) -> None:
    happen(alone, "billing", [FAILED])
    happen(alone, "warehouse", [Done()])
    asyncio.run(_bury_again(f"sqlite:///{alone.path}/shop.db"))
    done = alone("dead", "show", "billing-0")
    assert done.exit_code == 2 and "say --group orders/audit or orders/billing" in done.stderr
    assert alone("dead", "show", "billing-0", "--group", "audit").exit_code == 0


async def _bury_again(url: str) -> None:
    broker = broker_for(url, Settings(), Clock(), Telemetry())
    await broker.open()
    consumer = await broker.subscribe(Subscription(StreamSpec("orders", 1, "order_id"), "audit", "shop"))
    claims = await consumer.fetch(10, 1)
    await consumer.settle([Settlement(claim.position, REJECTED) for claim in claims])
    await consumer.close()
    await broker.close()


@pytest.mark.parametrize(
    ("verb", "past", "figure"), [("replay", "replayed", "replayed"), ("drop", "dropped", "dropped")]
)
def test_letters_are_changed_as_planned_and_only_after_a_yes(alone: Project, verb: str, past: str, figure: str) -> None:
    happen(alone, "billing", [FAILED, FAILED, REJECTED])
    happen(alone, "warehouse", [FAILED])
    for words, code in ((("--plan",), 0), ((), 4)):
        done = alone("dead", verb, "--reason", "failed", *words)
        assert (done.exit_code, done.stdout) == (code, "")
        plan = [line.split() for line in done.stderr.splitlines()[1:5]]
        assert plan[0] == ["plan:", verb, "3", "dead", "letters"]
        assert plan[2:] == [["orders/billing", "failed", "2"], ["orders/warehouse", "failed", "1"]]
    assert len(letters(alone)) == 4
    done = alone("dead", verb, "--reason", "failed", "--yes", "--rate", "1000")
    assert (done.exit_code, done.stdout) == (0, f"{past} 3 dead letters\n")
    assert letters(alone) == ["billing-2"]
    assert parsed(alone, "group", "show", "billing")[figure] == 2
    assert alone("dead", verb, "--reason", "failed", "--yes").exit_code == 0  # nothing is left to do


def test_ids_that_nobody_has_are_named_and_the_others_are_done(alone: Project) -> None:
    happen(alone, "billing", [FAILED, FAILED])
    done = alone("dead", "drop", "billing-1", "nothing", "--yes")
    assert (done.exit_code, done.stdout) == (1, "dropped 1 dead letter\n")
    assert "no dead letter has the id or position nothing" in done.stderr
    assert letters(alone) == ["billing-0"]


def test_replaying_is_slowed_down_to_the_rate_and_can_be_cut_short(alone: Project) -> None:
    happen(alone, "billing", [FAILED] * 20)
    program = alone.start("dead", "replay", "--yes", "--rate", "0.5")
    program.until(lambda: len(letters(alone)) == 19)
    assert program.interrupt() == 130
    assert program.out == "replayed 1 dead letter\n"
    assert "replayed 1 of 20; go on with the same command" in program.err
    assert len(letters(alone)) == 19
