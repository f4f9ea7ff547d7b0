"""`stream train --use`: what the commands say of a dictionary, and that what was written with one is shown as it was."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from contextlib import closing
from typing import Any

import pytest

from millstream.brokers.base import Dead, Later, Record, Settlement, StreamSpec, Subscription
from millstream.brokers.ledger import HELD_MS
from millstream.brokers.memory.broker import MemoryBroker
from millstream.wire import compression, packs
from millstream.wire.compression import Dictionary
from tests.cli.conftest import Project

SPEC = StreamSpec("orders")
HELD = Later(HELD_MS, "no")
CONTENT = compression.train(
    [
        packs.body_of(
            Record(0, "", "order.placed", b'{"order_id":"o-%d","n":%d}' % (n % 97, n), headers=b'{"by":"me"}')
        )
        for n in range(4_000)
    ],
    1_024,
)

SHORT = """
from millstream import App, Event, Stream

class Placed(Event, type="order.placed"):
    order_id: str
    n: int
    note: str = "to be delivered in the morning"

orders = Stream("orders", Placed, key="order_id", partitions=2)
app = App("shop", streams=[orders])
"""


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins as a process does that has met no dictionary."""
    monkeypatch.setattr(compression, "_known", {})


@pytest.fixture
def shop(project: Project) -> Project:
    """An app whose stream has five hundred small events."""
    project.write("shop.py", SHORT)
    line = '{"type": "order.placed", "order_id": "o-%d", "n": %d}'
    project.write("orders.jsonl", "\n".join(line % (n % 97, n) for n in range(500)))
    assert project("publish", "orders", "--file", "orders.jsonl").exit_code == 0
    return project


def shown(project: Project, *words: str) -> Any:
    done = project(*words, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def used(project: Project) -> int:
    """Train and use a dictionary; its number."""
    done = project("stream", "train", "orders", "--size", "1KB", "--use", "--yes")
    assert done.exit_code == 0, done.output
    [number] = re.findall(r"orders uses dictionary (\d+) now", done.stdout)
    return int(number)


def test_a_dictionary_is_used_shown_and_used_no_more(shop: Project) -> None:
    assert shown(shop, "stream", "show", "orders")["policy"]["dictionary"] == 0
    assert re.search(r"^dictionary +-$", shop("stream", "show", "orders").stdout, re.MULTILINE)
    number = used(shop)
    assert shown(shop, "stream", "show", "orders")["policy"]["dictionary"] == number
    assert re.search(rf"^dictionary +{number}$", shop("stream", "show", "orders").stdout, re.MULTILINE)
    done = shop("stream", "train", "orders", "--none")
    assert done.stdout == f"orders uses no dictionary now; {number} stays for the events that need it\n"
    assert shown(shop, "stream", "show", "orders")["policy"]["dictionary"] == 0
    assert used(shop) == number
    for words in (("apply", "--yes"), ("apply", "--exact", "--yes")):
        assert shop("stream", *words).exit_code == 0
        assert shown(shop, "stream", "show", "orders")["policy"]["dictionary"] == number


def test_nothing_is_changed_unless_it_is_asked_for(shop: Project) -> None:
    done = shop("stream", "train", "orders", "--size", "1KB")
    assert done.exit_code == 0 and "alone, with the dictionary" in done.stdout
    done = shop("stream", "train", "orders", "--size", "1KB", "--use")
    assert done.exit_code != 0 and "say --yes" in done.stderr and "needs the extra millstream[zstd]" in done.stderr
    done = shop("stream", "train", "orders", "--none", "--use")
    assert done.exit_code == 2 and "--none says to use no dictionary" in done.stderr
    assert shown(shop, "stream", "show", "orders")["policy"]["dictionary"] == 0


def test_what_was_written_with_a_dictionary_is_shown_as_it_was(shop: Project) -> None:
    used(shop)
    assert shop("publish", "orders", "order.placed", "order_id=o-1", "n:=777").exit_code == 0
    with closing(sqlite3.connect(shop.path / "shop.db")) as connection:
        types = [type_ for (type_,) in connection.execute("SELECT type FROM event")]
    assert (types.count("order.placed"), types.count(packs.TYPE)) == (500, 1)
    compression._known.clear()
    event = json.loads(shop("tail", "orders", "--limit", "1", "-o", "jsonl").stdout)
    assert (event["type"], event["key"], event["data"]["n"], "fault" in event) == ("order.placed", "o-1", 777, False)
    assert re.fullmatch(r"\d@\d+", event["position"])
    compression._known.clear()
    done = shop("tail", "orders", "--since", "today", "--type", packs.TYPE)
    assert "no events" in done.stderr


def test_dead_letters_and_keys_that_wait_show_events(memory: MemoryBroker, project: Project) -> None:
    dictionary = Dictionary(CONTENT)
    event = Record(0, "e-7", "order.placed", b'{"order_id":"o-7","n":7}', "o-7", headers=b'{"by":"me"}')
    pack = packs.one(event, dictionary)

    async def fail() -> None:
        await memory.declare(SPEC)
        await memory.admin.train("orders", dictionary.id, CONTENT)
        assert packs.is_one(pack) and await memory.append("orders", [pack])
        for group, outcome, order in (("billing", Dead("rejected", "bad"), False), ("hold", HELD, True)):
            consumer = await memory.subscribe(Subscription(SPEC, group, "shop", order=order))
            [claim] = await consumer.fetch(1, 1.0)
            assert await consumer.settle([Settlement(claim.position, outcome)]) == [True]
            await consumer.close()

    asyncio.run(fail())
    for words in (("dead", "show", "e-7"), ("key", "show", "hold", "o-7")):
        compression._known.clear()
        found = shown(project, *words)
        found = found["waiting"][0] if "waiting" in found else found
        assert (found["type"], found["position"], found["id"]) == ("order.placed", "0@1", "e-7")
        assert (found["data"], found["headers"]) == ({"order_id": "o-7", "n": 7}, {"by": "me"})
    compression._known.clear()
    assert [letter["type"] for letter in shown(project, "dead", "ls", "--type", "order.placed")] == ["order.placed"]
    assert project("dead", "replay", "--type", "order.placed", "--yes").stdout == "replayed 1 dead letter\n"
    plan = project("replay", "orders", "--since", "today", "--until", "2222-01-01", "--to-group", "hold", "--plan")
    assert "is given 1 event" in plan.stderr


def test_a_dictionary_that_is_gone_is_named(memory: MemoryBroker, project: Project) -> None:
    dictionary = Dictionary(CONTENT)
    pack = packs.one(Record(0, "e-7", "order.placed", b'{"order_id":"o-7","n":7}', headers=b'{"by":"me"}'), dictionary)
    assert packs.is_one(pack)

    async def append() -> None:
        await memory.declare(SPEC)
        await memory.append("orders", [pack])

    asyncio.run(append())
    [event] = [json.loads(line) for line in project("tail", "orders", "-o", "jsonl").stdout.splitlines()]
    assert f"compressed with dictionary {dictionary.id}, which is not known here" in event["fault"]
