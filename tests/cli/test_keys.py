"""`key`: keys that wait are listed and shown, then released or dropped, as planned."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from millstream.brokers.base import Claim, Later, ParkedKey, Record, Settlement, StreamSpec, Subscription
from millstream.brokers.ledger import HELD_MS
from millstream.brokers.memory.broker import MemoryBroker
from tests.cli.conftest import Project

ORDERS = StreamSpec("orders", 1, "order_id")
ERROR = "Traceback (most recent call last):\n  …\nValueError: too much"


def wait(broker: MemoryBroker, *keys: str | None, due_ms: int = HELD_MS, group: str = "billing") -> None:
    """Publish events of these keys; in the group, all of them come to wait."""

    async def fail() -> None:
        await broker.declare(ORDERS)
        consumer = await broker.subscribe(Subscription(ORDERS, group, "shop", order=True))
        records = [Record(0, f"{group}-{n}", "order.placed", b'{"total":1}', key) for n, key in enumerate(keys)]
        await broker.append("orders", records)
        failed: set[str | None] = set()
        for claim in await consumer.fetch(len(keys), 0):
            await consumer.settle([_failed(claim, due_ms, first=claim.stored.record.key not in failed)])
            failed.add(claim.stored.record.key or claim.stored.record.id)
        await consumer.close()

    asyncio.run(fail())


def _failed(claim: Claim, due_ms: int, *, first: bool) -> Settlement:
    return Settlement(claim.stored.position, Later(due_ms, ERROR if first else "", counted=first))


def keys(broker: MemoryBroker, group: str = "billing") -> list[ParkedKey]:
    return asyncio.run(broker.admin.keys("orders", group))


def parsed(project: Project, *words: str) -> Any:
    done = project(*words, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_keys_that_wait_are_listed(project: Project, memory: MemoryBroker) -> None:
    wait(memory, "a", "b", "a", None)
    listed = parsed(project, "key", "ls", "billing")
    assert [(key["key"], key["events"], key["attempts"], key["due_ms"]) for key in listed] == [
        ("a", 2, 1, None),
        ("b", 1, 1, None),
        ("0@4", 1, 1, None),
    ]
    assert listed[0] | {"since_ms": 0} == {
        "name": "orders/billing",
        "stream": "orders",
        "group": "billing",
        "partition": 0,
        "key": "a",
        "events": 2,
        "first": "0@1",
        "attempts": 1,
        "due_ms": None,
        "error": ERROR,
        "since_ms": 0,
    }
    header, first, *_ = project("key", "ls", "orders/billing").stdout.splitlines()
    assert header.split() == ["SINCE", "KEY", "EVENTS", "TRIES", "NEXT", "TRY", "ERROR"]
    assert first.endswith("a         2      1  held      ValueError: too much")
    limited = project("key", "ls", "billing", "--limit", "2", "-o", "jsonl")
    assert len(limited.stdout.splitlines()) == 2 and "there are more than these 2" in limited.stderr


def test_a_list_of_no_keys_says_so(project: Project, memory: MemoryBroker) -> None:
    wait(memory)
    assert parsed(project, "key", "ls", "billing") == []
    assert "no key of orders/billing waits" in project("key", "ls", "billing").stderr
    done = project("key", "release", "billing", "--all", "--yes")
    assert (done.exit_code, done.stdout) == (0, "") and "plan: release 0 keys" in done.stderr


def test_a_key_is_shown_with_its_events_and_the_error(project: Project, memory: MemoryBroker) -> None:
    wait(memory, "a", "b", "a", None)
    shown = parsed(project, "key", "show", "billing", "a")
    assert [(event["position"], event["data"]) for event in shown["waiting"]] == [
        ("0@1", {"total": 1}),
        ("0@3", {"total": 1}),
    ]
    assert (shown["key"], shown["error"], shown["due_ms"]) == ("a", ERROR, None)
    text = project("key", "show", "billing", "a").stdout
    assert "next try     held" in text and "billing-2" in text and "Traceback" in text
    assert parsed(project, "key", "show", "billing", "0@4")["events"] == 1  # an event without a key


def test_when_a_key_is_tried_next_is_shown(project: Project, memory: MemoryBroker) -> None:
    wait(memory, "a", due_ms=0)
    wait(memory, "b", due_ms=1_600_000_000_000, group="warehouse")
    assert "at once" in project("key", "ls", "billing").stdout
    assert "2020-09-1" in project("key", "ls", "warehouse").stdout


@pytest.mark.parametrize(
    "words", [("show", "billing", "x"), ("release", "billing", "a", "x"), ("drop", "billing", "x")]
)
def test_a_key_that_does_not_wait_is_named_and_nothing_is_done(
    project: Project, memory: MemoryBroker, words: tuple[str, ...]
) -> None:
    wait(memory, "a")
    done = project("key", *words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Nothing waits under key 'x' in orders/billing; `millstream key ls orders/billing` shows" in done.stderr
    assert keys(memory)[0].due_ms is None


@pytest.mark.parametrize("words", [("ls",), ("show", "a"), ("release", "a"), ("release", "--all"), ("drop", "a")])
def test_an_unknown_group_is_named(project: Project, memory: MemoryBroker, words: tuple[str, ...]) -> None:
    wait(memory, "a")
    done = project("key", words[0], "biling", *words[1:])
    assert done.exit_code == 2 and "There is no group 'biling'; there are: orders/billing." in done.stderr


@pytest.mark.parametrize("words", [("release", "billing"), ("release", "billing", "a", "--all"), ("drop", "billing")])
def test_which_keys_are_meant_must_be_said(project: Project, memory: MemoryBroker, words: tuple[str, ...]) -> None:
    wait(memory, "a")
    assert project("key", *words, "--yes").exit_code == 2
    assert keys(memory)[0].due_ms is None


def test_keys_are_released_as_planned_and_only_after_a_yes(project: Project, memory: MemoryBroker) -> None:
    wait(memory, "a", "b", "c", "a")
    for words, code in ((("--plan",), 0), ((), 4)):
        done = project("key", "release", "billing", "a", "c", *words)
        assert (done.exit_code, done.stdout) == (code, "")
        assert "plan: release 2 keys of orders/billing, with 3 events" in done.stderr
    assert {key.due_ms for key in keys(memory)} == {None}
    done = project("key", "release", "billing", "a", "c", "a", "--yes")
    assert (done.exit_code, done.stdout) == (0, "released 2 keys\n")
    assert {key.key: (key.due_ms, key.attempts) for key in keys(memory)} == {"a": (0, 0), "b": (None, 1), "c": (0, 0)}
    assert project("key", "release", "billing", "--all", "--yes").stdout == "released 3 keys\n"
    assert {key.due_ms for key in keys(memory)} == {0}


def test_keys_are_dropped_as_planned_and_only_after_a_yes(project: Project, memory: MemoryBroker) -> None:
    wait(memory, "a", "b", "a")
    for words, code in ((("--plan",), 0), ((), 4)):
        done = project("key", "drop", "billing", "a", *words)
        assert (done.exit_code, done.stdout) == (code, "")
        assert "plan: drop 1 key of orders/billing, with 2 events" in done.stderr
    assert len(keys(memory)) == 2
    done = project("key", "drop", "billing", "a", "--yes")
    assert (done.exit_code, done.stdout) == (0, "dropped 2 events of 1 key\n")
    assert [key.key for key in keys(memory)] == ["b"]


def test_more_keys_than_a_plan_names_are_all_released(project: Project, memory: MemoryBroker) -> None:
    wait(memory, *(f"k{n}" for n in range(130)))
    done = project("key", "release", "billing", "--all", "--yes")
    assert done.stdout == "released 130 keys\n" and "and 110 more" in done.stderr
    assert {key.due_ms for key in asyncio.run(memory.admin.keys("orders", "billing", 200))} == {0}


@pytest.mark.parametrize(("verb", "said"), [("release", "released 1 key\n"), ("drop", "dropped 1 event of 1 key\n")])
def test_keys_that_somebody_else_was_faster_with_are_counted(
    project: Project, memory: MemoryBroker, monkeypatch: pytest.MonkeyPatch, verb: str, said: str
) -> None:
    wait(memory, "a", "b")
    known = keys(memory)

    async def stale(*_: object) -> list[ParkedKey]:
        return known

    asyncio.run(memory.admin.drop_keys(known[:1]))
    monkeypatch.setattr(memory.admin, "keys", stale)
    done = project("key", verb, "billing", "a", "b", "--yes")
    assert (done.exit_code, done.stdout) == (1, said)
    assert "1 key did not wait any more" in done.stderr
