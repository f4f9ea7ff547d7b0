"""`replay` of chosen events: `--until`, `--rate` and `--from` give them to a group, which stays where it is."""

from __future__ import annotations

import asyncio
import shlex
import signal
from collections.abc import Callable, Coroutine
from datetime import datetime
from threading import Thread
from typing import TypeVar

import pytest

from millstream.brokers.base import Broker, Dead, Done, GroupInfo, Outcome, Record, Settlement, StreamSpec, Subscription
from millstream.brokers.urls import broker_for
from millstream.cli import giving, show
from millstream.clock import Clock
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from tests.cli.conftest import Project
from tests.cli.test_terminal import terminal

T = TypeVar("T")

SPEC = StreamSpec("orders", 3, "order_id")
REPLAY = ("replay", "orders", "--to-group", "billing", "--since")
EVENTS = 24


class Calendar(Clock):
    """What is published is published at the time that was set."""

    def __init__(self, time: str) -> None:
        super().__init__()
        self._now_ms = round(datetime.fromisoformat(time).timestamp() * 1000)

    def now_ms(self) -> int:
        return self._now_ms


def ask(question: Callable[[Broker], Coroutine[None, None, T]], clock: Clock | None = None) -> T:
    """Ask the project's broker, as another process would."""

    async def answer() -> T:
        broker = broker_for("sqlite:///shop.db", Settings(), clock or Clock(), Telemetry())
        await broker.open()
        try:
            return await question(broker)
        finally:
            await broker.close()

    return asyncio.run(answer())


def publish(time: str, *partitions: int) -> None:
    """At this time, an event in each of these partitions."""

    async def append(broker: Broker) -> None:
        await broker.declare(SPEC)
        records = [Record(n, f"{time}-{i}", "order.placed", b"{}", f"k{n}") for i, n in enumerate(partitions)]
        await broker.append("orders", records)

    ask(append, Calendar(time))


def handle(outcome: Outcome | None = None, *, group: str = "billing", order: bool = False) -> list[str]:
    """Let a group come to all that it can be given; the positions."""

    async def settle(broker: Broker) -> list[str]:
        found: list[str] = []
        consumer = await broker.subscribe(Subscription(SPEC, group, "shop", order=order))
        await consumer.keep()
        while claims := await consumer.fetch(100, 0):
            assert {claim.attempt for claim in claims} == {1}
            found += [str(claim.position) for claim in claims]
            await consumer.settle([Settlement(claim.position, outcome or Done()) for claim in claims])
        await consumer.close()
        return found

    return ask(settle)


def info(group: str = "billing") -> GroupInfo:
    async def look(broker: Broker) -> GroupInfo:
        return next(found for found in await broker.admin.groups("orders") if found.group == group)

    return ask(look)


@pytest.fixture
def alone(project: Project) -> Project:
    """A project without an app: three events of 2020, two of 2022 and one of 2024, handled by two groups."""
    project.environment = {"MILLSTREAM_BROKER": "sqlite:///shop.db"}
    publish("2020-01-01", 0, 0, 1)
    publish("2022-01-01T12:00:00.283", 0, 1)
    publish("2024-01-01", 1)
    assert len(handle()) == len(handle(group="audit", order=True)) == 6
    return project


@pytest.mark.parametrize(
    ("since", "until", "given"),
    [
        ("2019-01-01", "2021-01-01", ["0@1", "0@2", "1@1"]),
        ("2022-01-01T12:00:00.283", "2022-01-01T12:00:00.283", ["0@3", "1@2"]),
        ("2022-01-01T12:00:00.284", "2222-01-01", ["1@3"]),
        ("2019-01-01", "2022-01-01T12:00:00.282", ["0@1", "0@2", "1@1"]),
    ],
)
@pytest.mark.parametrize("group", ["billing", "orders/audit"])
def test_a_group_is_given_the_events_between_two_times_and_stays_where_it_is(
    alone: Project, since: str, until: str, given: list[str], group: str
) -> None:
    words = ("replay", "orders", "--since", since, "--until", until, "--to-group", group)
    name = f"orders/{group.rpartition('/')[2]}"
    counted = show.many(len(given), "event")
    for more, code in ((("--plan",), 0), ((), 4)):
        done = alone(*words, *more)
        assert (done.exit_code, done.stdout) == (code, "")
        assert f"plan: {name} is given {counted}, from 202" in done.stderr
    assert info().pending == info("audit").pending == 0
    done = alone(*words, "--yes")
    assert (done.exit_code, done.stdout) == (0, f"gave {counted} to {name}\n")
    assert "left out" not in done.stderr and "go on with" not in done.stderr
    again = {"billing": handle(), "audit": handle(group="audit", order=True)}
    assert sorted(again.pop(name.removeprefix("orders/"))) == given and list(again.values()) == [[]]


def test_without_an_end_all_that_there_is_now_is_given(alone: Project) -> None:
    publish("2222-01-01", 2)  # by a broker whose clock is ahead
    handle()
    done = alone(*REPLAY, "2019-01-01", "--rate", "1000", "--yes")
    assert done.stdout == "gave 7 events to orders/billing\n"
    assert ", at most 1000 a second; not those that it has not settled yet" in done.stderr


def test_what_is_not_settled_is_left_out_and_said(alone: Project) -> None:
    publish("2024-01-02", 1, 2)
    words = (*REPLAY, "2024-01-01", "--until", "2024-01-03", "--yes")
    done = alone(*words)
    assert done.stdout == "gave 1 event to orders/billing\n"
    assert "2 were left out: not settled yet, so they come anyway; or gone" in done.stderr
    assert alone(*words).stdout == "gave 0 events to orders/billing\n"
    assert len(handle()) == 3


def test_an_event_that_died_is_given_too_and_its_dead_letter_stays(alone: Project) -> None:
    publish("2024-01-02", 1)
    handle(Dead("failed"))
    assert alone(*REPLAY, "2024-01-02", "--from", "1@0", "--yes").stdout == "gave 1 event to orders/billing\n"
    assert len(handle()) == 1 and info().dead == 1


def test_nothing_is_asked_where_there_is_nothing_to_give(alone: Project) -> None:
    done = alone(*REPLAY, "2025-01-01", "--until", "2026-01-01")
    assert (done.exit_code, done.stdout) == (0, "") and "is given 0 events once more" in done.stderr


@pytest.mark.parametrize(
    ("begin", "given"),
    [
        ("0@1", ["0@2", "0@3", "1@1", "1@2", "1@3"]),
        ("0@3", ["1@1", "1@2", "1@3"]),
        ("1@2", ["1@3"]),
        ("2@0", []),
    ],
)
def test_it_goes_on_behind_a_position_and_in_the_partitions_after_it(
    alone: Project, begin: str, given: list[str]
) -> None:
    assert alone(*REPLAY, "2019-01-01", "--from", begin, "--yes").exit_code == 0
    assert sorted(handle()) == given


def test_a_position_before_the_time_does_not_bring_earlier_events(alone: Project) -> None:
    assert alone(*REPLAY, "2021-01-01", "--from", "0@1", "--yes").exit_code == 0
    assert sorted(handle()) == ["0@3", "1@2", "1@3"]


@pytest.mark.parametrize("order", [False, True])
def test_cut_short_it_says_how_to_go_on_and_each_event_is_given_once(alone: Project, order: bool) -> None:
    group = "audit" if order else "billing"
    publish("2023-01-01", *(n % 3 for n in range(EVENTS)))
    assert len(handle(group=group, order=order)) == EVENTS
    words = ("replay", "orders", "--since", "2019-01-01", "--to-group", group, "--broker", "sqlite:///shop.db")
    commands: list[tuple[str, ...]] = [(*words, "--rate", "2.5", "--yes")]
    said, handled = list[str](), list[str]()
    for _ in range(2):
        program = alone.start(*commands[-1])
        program.until(lambda: info(group).pending >= 2)
        assert program.interrupt() == 130
        said.append(program.out)
        commands.append(tuple(shlex.split(program.err.splitlines()[-1].partition("go on with: millstream ")[2])))
        assert {"--from", "--until"} <= set(commands[-1])
        handled += handle(group=group, order=order)
    publish("2222-01-01", 0)  # comes too late for the command that began
    assert handle(group=group, order=order) == ["0@12"]
    done = alone(*(word if word != "2.5" else "1000" for word in commands[-1]))
    assert done.exit_code == 0 and "left out" not in done.stderr
    handled += handle(group=group, order=order)
    given = [int(out.split()[1]) for out in (*said, done.stdout)]
    assert sum(given) == EVENTS + 6 == len(handled) == len(set(handled))


def test_what_was_given_before_a_broker_failed_is_told_with_how_to_go_on(
    alone: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(giving, "PAGE", 2)
    monkeypatch.setattr(giving, "LOOK_EVERY", 2)
    looks: list[int] = []

    async def look(_: object, broker: Broker) -> int:
        looks.append(len(looks))
        if len(looks) == 3:
            await broker.admin.forget("orders", "billing")
        return 0

    monkeypatch.setattr(giving.Giving, "_pending", look)
    done = alone(*REPLAY, "2019-01-01", "--until", "2030-01-01", "--yes")
    assert (done.exit_code, done.stdout) == (3, "")
    assert (
        "gave 5 events; stopped; some events behind that place may have been given already; go on with: " in done.stderr
    )
    assert " --from 1@2 --yes\n" in done.stderr
    assert "stream 'orders' has no group 'billing'" in done.stderr.splitlines()[-1]


def test_interrupted_at_the_question_it_gives_nothing_and_says_the_whole_command(alone: Project) -> None:
    with terminal(alone, *REPLAY, "2019-01-01", "--rate", "9", columns=200) as screen:
        screen.until("Give them to orders/billing? [y/N]")
        screen.process.send_signal(signal.SIGINT)
        assert screen.ended() == 130
        assert "go on with: millstream replay orders --to-group orders/billing --since 20" in screen.text
    assert info().pending == 0


def test_a_terminal_shows_how_far_it_is(alone: Project) -> None:
    with terminal(alone, *REPLAY, "2019-01-01", "--rate", "4", "--yes", columns=100) as screen:
        assert screen.ended() == 0
        assert "giving" in screen.text and "━" in screen.text and "gave 6 events to orders/billing" in screen.text


def test_while_much_is_pending_it_waits_and_says_so_once(alone: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PAGE", 1), ("MAX_PENDING", 1), ("LOOK_EVERY", 1), ("LOOK_S", 0.01)):
        monkeypatch.setattr(giving, name, value)
    said: list[str] = []
    handled: list[str] = []
    workers: list[Thread] = []

    def note(words: str) -> None:
        said.append(words)
        if "waiting until it has fewer" in words:
            workers.append(Thread(target=lambda: handled.extend(handle())))
            workers[0].start()
            monkeypatch.setattr(giving, "MAX_PENDING", 4)

    monkeypatch.setattr(show, "note", note)
    done = alone(*REPLAY, "2019-01-01", "--until", "2030-01-01", "--yes")
    for worker in workers:
        worker.join()
    assert done.stdout == "gave 6 events to orders/billing\n"
    assert [words for words in said if "waiting" in words] == [
        "orders/billing has 2 pending events: waiting until it has fewer"
    ]
    assert len(handled) + len(handle()) == 6


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((*REPLAY, "1h", "--rate", "0"), "0 is not a rate: write a positive number."),
        ((*REPLAY, "1h", "--rate", "-3"), "-3 is not a rate"),
        ((*REPLAY, "1h", "--rate", "inf"), "inf is not a rate"),
        ((*REPLAY, "1h", "--rate", "nan"), "nan is not a rate"),
        ((*REPLAY, "1h", "--rate", "fast"), "'fast' is not a valid float"),
        ((*REPLAY, "1h", "--until", "soon"), "'soon' is not a time"),
        ((*REPLAY, "1h", "--until", "2h"), "lies before --since"),
        ((*REPLAY, "2222-01-01", "--rate", "5"), "lies before --since, 2222-01-01 00:00:00."),
        ((*REPLAY, "1h", "--from", "3"), "'3' is not a position: write partition@offset, as in 3@1693-0."),
        ((*REPLAY, "1h", "--from", "0@x"), "'0@x' is not a position"),
        ((*REPLAY, "1h", "--from", "3@1"), "--from 3@1: stream 'orders' has 3 partitions, counted from 0."),
        ((*REPLAY, "1h", "--rate", "5", "--live"), "--live is for a group that is moved"),
        (("replay", "orders", "--rate", "5", "--to-group", "billing"), "Missing option '--since'"),
        (("replay", "ordrs", "--since", "1h", "--rate", "5", "--to-group", "billing"), "There is no stream 'ordrs'"),
        (
            ("replay", "orders", "--since", "1h", "--rate", "5", "--to-group", "biling"),
            "There is no group 'orders/biling'",
        ),
        (("replay", "orders", "--since", "1h", "--rate", "5", "--to-group", "x/y"), "x/y is a group of another stream"),
    ],
)
def test_what_cannot_be_meant_is_said_and_nothing_is_given(
    alone: Project, words: tuple[str, ...], complaint: str
) -> None:
    done = alone(*words, "--yes")
    assert (done.exit_code, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert info().pending == 0
