"""`key`: keys that wait are listed and shown, then released or dropped, as planned."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from millstream.brokers.base import Broker, Claim, Later, ParkedKey, Record, Settlement, StreamSpec, Subscription
from millstream.brokers.ledger import HELD_MS
from millstream.brokers.memory.broker import MemoryBroker
from millstream.brokers.urls import broker_for
from millstream.cli import show, target
from millstream.cli.target import Interrupt
from millstream.clock import Clock
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from tests.cli.conftest import Project
from tests.cli.test_terminal import terminal

ORDERS = StreamSpec("orders", 1, "order_id")
ERROR = "Traceback (most recent call last):\n  …\nValueError: too much"


def wait(broker: Broker, *keys: str | None, due_ms: int = HELD_MS, group: str = "billing") -> None:
    """Publish events of these keys; in the group, all of them come to wait."""

    async def fail() -> None:
        await broker.open()
        await broker.declare(ORDERS)
        consumer = await broker.subscribe(Subscription(ORDERS, group, "shop", order=True))
        records = [Record(0, f"{group}-{n}", "order.placed", b'{"total":1}', key) for n, key in enumerate(keys)]
        await broker.append("orders", records)
        failed: set[str | None] = set()
        for claim in await consumer.fetch(len(keys), 0):
            await consumer.settle([_failed(claim, due_ms, first=claim.record.key not in failed)])
            failed.add(claim.record.key or claim.record.id)
        await consumer.close()
        await broker.close()

    asyncio.run(fail())


def _failed(claim: Claim, due_ms: int, *, first: bool) -> Settlement:
    return Settlement(claim.position, Later(due_ms, ERROR if first else "", counted=first))


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


@dataclass
class Impatience:
    """Somebody who presses Ctrl-C, so often, while the second page of keys is under way."""

    presses: int
    pages: int = 0
    interrupts: list[Interrupt] = field(default_factory=list)

    def watch(self, memory: MemoryBroker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(target, "Interrupt", self._interrupt)
        for name in ("release_keys", "drop_keys"):
            monkeypatch.setattr(memory.admin, name, self._beside(getattr(memory.admin, name)))

    def _interrupt(self) -> Interrupt:
        self.interrupts.append(Interrupt())
        return self.interrupts[-1]

    def _beside(self, change: Callable[[Sequence[ParkedKey]], Awaitable[list[int]]]) -> Callable[..., Any]:
        async def changed(keys: Sequence[ParkedKey]) -> list[int]:
            done = await change(keys)
            self.pages += 1
            if self.pages == 2:
                for press in range(self.presses):
                    os.kill(os.getpid(), signal.SIGINT)
                    await (self.interrupts[-1].asked.wait() if press == 0 else asyncio.Event().wait())
            return done

        return changed


def command(said: str) -> list[str]:
    """The words behind `millstream` of the command with which to go on."""
    return shlex.split(said.partition("go on with: millstream ")[2].partition("\n")[0])


@pytest.mark.parametrize(
    ("verb", "said", "rest"),
    [
        ("release", "released 200 keys", "released 30 keys"),
        ("drop", "dropped 200 events of 200 keys", "dropped 30 events of 30 keys"),
    ],
)
def test_stopped_by_ctrl_c_it_tells_what_was_done_and_goes_on_with_the_rest(
    project: Project, memory: MemoryBroker, monkeypatch: pytest.MonkeyPatch, verb: str, said: str, rest: str
) -> None:
    names = [f"-k{n}" for n in range(229)]
    wait(memory, *names, None)
    Impatience(presses=1).watch(memory, monkeypatch)
    monkeypatch.setattr(show, "LINE_S", 0.0)
    done = project("key", verb, "billing", "--yes", "--", *names, "0@230")
    assert (done.exit_code, done.stdout) == (130, f"{said}\n")
    doing = {"release": "releasing", "drop": "dropping"}[verb]
    lines = [line.split("  ")[0] for line in done.stderr.splitlines() if line.startswith(doing)]
    assert lines == [f"{doing} 100 keys", f"{doing} 200 keys"]
    go_on = command(done.stderr)
    assert go_on == ["key", verb, "orders/billing", "--yes", "--", *names[200:], "0@230"]
    done = project(*go_on)
    assert (done.exit_code, done.stdout) == (0, f"{rest}\n") and "go on with" not in done.stderr


def test_cut_off_by_a_second_ctrl_c_it_tells_what_is_in_doubt(
    project: Project, memory: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait(memory, *(f"k{n}" for n in range(230)))
    Impatience(presses=2).watch(memory, monkeypatch)
    done = project("key", "release", "billing", "--all", "--yes", "--broker", "memory://")
    assert (done.exit_code, done.stdout) == (130, "")
    doubt = "some of the next 100 keys may have been released already"
    assert f"released 100 keys; stopped; {doubt}; go on with: millstream key " in done.stderr
    go_on = command(done.stderr)
    assert go_on == ["key", "release", "orders/billing", "--broker", "memory://", "--yes", "--all"]
    assert project(*go_on).stdout == "released 230 keys\n"


def test_interrupted_at_the_question_it_does_nothing_and_says_the_whole_command(project: Project) -> None:
    project.environment = {"MILLSTREAM_BROKER": "sqlite:///shop.db"}
    broker = broker_for("sqlite:///shop.db", Settings(), Clock(), Telemetry())
    wait(broker, "a", "b")
    with terminal(project, "key", "drop", "billing", "a", columns=200) as screen:
        screen.until("Drop all that waits of 1 key, for ever? [y/N]")
        screen.process.send_signal(signal.SIGINT)
        assert screen.ended() == 130
        assert "dropped 0 events of 0 keys; stopped; go on with: millstream key drop orders/billing -- a" in screen.text
    assert len(parsed(project, "key", "ls", "billing")) == 2
