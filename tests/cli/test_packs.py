"""Streams with packs: what the commands show of them, and `stream train`."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import zstandard

from millstream.brokers.base import Dead, Done, Later, Record, Settlement, StreamSpec, Subscription
from millstream.brokers.ledger import HELD_MS
from millstream.brokers.memory.broker import MemoryBroker
from millstream.wire import packs
from millstream.wire.packs import Columns
from tests.cli.conftest import Project

SPEC = StreamSpec("orders", 2)
PACKED = """
from datetime import datetime
from millstream import App, Event, Pack, Stream

class Placed(Event, type="order.placed"):
    n: int
    at: datetime | None = None
    note: bytes = b""

orders = Stream("orders", Placed, pack=Pack(events=4))
binary = Stream("binary", Placed, pack=Pack(), codec="msgpack")
app = App("shop", streams=[orders, binary])
"""


@pytest.fixture
def packed(project: Project) -> Project:
    """An app whose stream `orders` has two packs of four events, and an event alone."""
    project.write("shop.py", PACKED)
    line = '{"type": "order.placed", "n": %d}'
    project.write("orders.jsonl", "\n".join(line % n for n in range(9)))
    assert project("publish", "orders", "--file", "orders.jsonl").exit_code == 0
    return project


def shown(project: Project, *words: str) -> list[dict[str, Any]]:
    done = project("tail", *words, "-o", "jsonl")
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_tail_shows_events_with_their_positions_and_never_packs(packed: Project) -> None:
    events = shown(packed, "orders", "--since", "today")
    assert [event["data"]["n"] for event in events] == list(range(9))
    assert [event["position"] for event in events] == [*(f"0@{1 + n // 4}.{n % 4}" for n in range(8)), "0@3"]
    assert {(event["type"], event["source"]) for event in events} == {("order.placed", "shop")}
    assert len({event["id"] for event in events}) == 9
    assert [event["data"]["n"] for event in shown(packed, "orders", "--limit", "2")] == [7, 8]
    assert [event["data"]["n"] for event in shown(packed, "orders", "--since", "today", "--limit", "3")] == [0, 1, 2]
    assert shown(packed, "orders", "--type", packs.TYPE) == []


def test_what_tail_prints_can_be_published_again(packed: Project) -> None:
    lines = packed("tail", "orders", "--since", "today", "-o", "jsonl").stdout
    for stream in ("binary", "orders"):
        assert packed("publish", stream, "--file", "-", input=lines).exit_code == 0
    assert [event["data"]["n"] for event in shown(packed, "orders", "--since", "today")] == [*range(9)] * 2
    assert {event["id"] for event in shown(packed, "binary")} == {event["id"] for event in shown(packed, "orders")}


@pytest.mark.parametrize("app", [("--app", "shop:app"), ("--broker", "sqlite:///shop.db")])
def test_events_in_messagepack_are_written_as_such_and_shown_as_json(packed: Project, app: tuple[str, str]) -> None:
    assert json.loads(packed("stream", "show", "binary", "-o", "json").stdout)["codec"] == "msgpack"
    assert packed("publish", "binary", "order.placed", "n:=1", "at=2026-01-01T12:00:00Z").exit_code == 0
    packed.environment = {}
    assert packed("publish", "binary", "order.placed", "n:=2", *app).exit_code == 0
    assert [event["data"]["n"] for event in shown(packed, "binary", *app)] == [1, 2]
    assert shown(packed, "binary", *app)[0]["data"] == {"n": 1, "at": "2026-01-01T12:00:00Z", "note": ""}


def pack(partition: int, *numbers: int) -> Record:
    datas = [b'{"n":%d}' % n for n in numbers]
    return packs.write(Columns(datas, "order.placed"), "zstd", partition=partition, id_=f"p{numbers[0]}", source="shop")


def settled(memory: MemoryBroker, outcome: Done | Dead) -> list[Record]:
    """All that the group is given, settled so."""
    found: list[Record] = []

    async def settle() -> None:
        consumer = await memory.subscribe(Subscription(SPEC, "billing", "shop"))
        claims = await consumer.fetch(100, 0)
        await consumer.settle([Settlement(claim.position, outcome) for claim in claims])
        await consumer.close()
        found.extend(claim.record for claim in claims)

    run(settle)
    return sorted(found, key=lambda record: record.id)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def test_a_pack_that_nobody_can_read_is_shown_with_what_is_wrong(memory: MemoryBroker, project: Project) -> None:
    async def append() -> None:
        await memory.declare(SPEC)
        await memory.append("orders", [pack(0, 1, 2), Record(1, "broken", packs.TYPE, b"nonsense")])

    run(append)
    good, other, bad = shown(project, "orders")
    assert [good["position"], other["position"], bad["position"]] == ["0@1.0", "0@1.1", "1@1"]
    assert "not a pack that can be read" in bad["fault"] and "data" not in bad
    settled(memory, Dead("undecodable", "not a pack"))
    letter = json.loads(project("dead", "show", "broken", "-o", "json").stdout)
    assert "not a pack that can be read" in letter["fault"]
    whole = json.loads(project("dead", "show", "p1", "-o", "json").stdout)
    assert (whole["type"], whole["data"]) == (packs.TYPE, [{"n": 1}, {"n": 2}])


def test_replay_gives_a_pack_as_it_is(memory: MemoryBroker, project: Project) -> None:
    async def append() -> None:
        await memory.declare(SPEC)
        await memory.append("orders", [pack(0, 1, 2), pack(0, 3, 4), Record(1, "alone", "order.placed", b"{}")])

    run(append)
    before = settled(memory, Done())
    plan = project("replay", "orders", "--since", "today", "--to-group", "billing", "--plan")
    assert "plan: orders/billing sees 5 events, from " in plan.stderr
    words = ("replay", "orders", "--since", "today", "--until", "2222-01-01", "--to-group", "billing", "--yes")
    assert project(*words).stdout == "gave 5 events to orders/billing\n"
    assert settled(memory, Done()) == before and len(before) == 3
    done = project(*words, "--from", "0@1")
    assert done.stdout == "gave 3 events to orders/billing\n"
    done = project(*words)
    assert done.stdout == "gave 2 events to orders/billing\n"
    assert "3 were left out: not settled yet" in done.stderr
    done = project(*words, "--from", "0@1.1")
    assert done.exit_code == 2 and "write partition@offset, as in 3@1693-0" in done.stderr


def test_the_rate_of_a_replay_is_of_events(memory: MemoryBroker, project: Project) -> None:
    async def append() -> None:
        await memory.declare(SPEC)
        await memory.append("orders", [pack(0, *range(n, n + 10)) for n in (1, 11, 21)])

    run(append)
    settled(memory, Done())
    began = time.monotonic()
    words = ("replay", "orders", "--since", "today", "--to-group", "billing", "--rate", "100", "--yes")
    assert project(*words).stdout == "gave 30 events to orders/billing\n"
    assert time.monotonic() - began >= 0.2


def test_of_a_pack_that_waits_the_events_are_shown_that_are_left(memory: MemoryBroker, project: Project) -> None:
    async def wait() -> None:
        await memory.declare(SPEC)
        await memory.append("orders", [pack(0, 1, 2, 3)])
        consumer = await memory.subscribe(Subscription(SPEC, "billing", "shop", order=True))
        (claim,) = await consumer.fetch(1, 0)
        await consumer.settle([Settlement(claim.position, Later(HELD_MS, "broken", left=(0, 2)))])
        await consumer.close()

    run(wait)
    fields = json.loads(project("key", "show", "billing", "0@1", "-o", "json").stdout)
    assert [(event["position"], event["data"]) for event in fields["waiting"]] == [
        ("0@1.0", {"n": 1}),
        ("0@1.2", {"n": 3}),
    ]


def test_a_dictionary_is_trained_from_the_newest_events_and_its_savings_are_told(
    memory: MemoryBroker, project: Project
) -> None:
    async def append() -> None:
        await memory.declare(SPEC)
        for n in range(0, 4_000, 2):
            data = b'{"order_id":"o-%d","customer":"c-%d","currency":"EUR","state":"placed","total":%d}'
            datas = [data % (i * 7_919 % 9_973, i % 97, i * i % 10_007) for i in (n, n + 1)]
            records = [Record(0, f"e{n}", "order.placed", datas[0]), Record(0, "large", "order.placed", bytes(5_000))]
            await memory.append(
                "orders", [*records, packs.write(Columns(datas[1:], "t"), "none", partition=1, id_="p")]
            )

    run(append)
    done = project("stream", "train", "orders", "--size", "4KB", "--events", "3000", "-o", "orders.dict")
    assert done.exit_code == 0, done.output
    sizes = [int(size) for size in re.findall(r" (\d+) +\d+%", done.stdout)]
    assert len(sizes) == 3 and 70 < sizes[0] < 90 and sizes[1] < sizes[0] / 2 and sizes[2] < sizes[1]
    assert "orders.dict: a dictionary of 4.0 KB, out of 3,000 events" in done.stdout
    words = zstandard.ZstdCompressionDict((project.path / "orders.dict").read_bytes())
    assert words.dict_id()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--size", "large"), "'large' is not a size: write 16KB."),
        (("--size", "1MB"), "a dictionary has from 256 to 112,640 bytes"),
        ((), "0 events are too few or too much alike"),
        (("--events", "1"), "100<=x<=100000"),
    ],
)
def test_what_cannot_become_a_dictionary_is_refused(
    memory: MemoryBroker, project: Project, words: tuple[str, ...], said: str
) -> None:
    async def declare() -> None:
        await memory.declare(SPEC)

    run(declare)
    done = project("stream", "train", "orders", "-o", "orders.dict", *words)
    assert done.exit_code != 0 and said in done.stderr
    assert not (project.path / "orders.dict").exists()
