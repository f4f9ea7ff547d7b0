"""A file of an earlier version: upgraded when it is opened, as a whole or not at all."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from millstream.brokers.base import Later, Letter, Policy, Position, Settlement, Slot, StreamInfo
from millstream.brokers.sqlite import file
from millstream.brokers.sqlite.file import APPLICATION_ID, SCHEMA_VERSION
from millstream.errors import BrokerRefused
from tests.sqlite.places import (
    ORDERS,
    about,
    broker_at,
    counted,
    eventually,
    ids,
    intact,
    joined,
    opened,
    outcomes,
    records,
)

VERSION_2 = Path(__file__).with_name("version_2.sql")
VERSION_3 = Path(__file__).with_name("version_3.sql")
VERSION_4 = Path(__file__).with_name("version_4.sql")
ROW = 1024 << 40


def version_2(path: Path) -> None:
    """Three events, of which a group has the second one as a dead letter, and an ordered one has settled two."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_2.read_text("utf-8"))
        for pragma in (f"application_id = {APPLICATION_ID}", "user_version = 2", "journal_mode = WAL"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("INSERT INTO stream VALUES (1, 'orders', 2, '', 'json')")
        connection.execute("INSERT INTO log VALUES (1024, 3, 5, 3), (1025, 0, 0, 0)")
        for n in (1, 2, 3):
            event = (ROW | n, f"e-{n}", "order.placed", "shop", n, None, "a", b"", b"x")
            connection.execute("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", event)
        connection.execute(
            "INSERT INTO grp (id, stream, name, owner, ordered) "
            "VALUES (1, 1, 'billing', 'shop', 0), (2, 1, 'audit', 'shop', 1)"
        )
        connection.execute(
            "INSERT INTO cursor VALUES (1, 1024, 3, 1), (1, 1025, 0, 0), (2, 1024, 2, 0), (2, 1025, 0, 0)"
        )
        connection.execute("INSERT INTO lease (grp, log) VALUES (2, 1024), (2, 1025)")
        connection.execute(
            "INSERT INTO dead VALUES "
            "(1, 1, ?, 'failed', 'why', 3, 9, 'e-2', 'order.placed', 'shop', 2, NULL, 'a', x'', 'x')",
            (ROW | 2,),
        )
        connection.commit()


def version_3(path: Path) -> None:
    """Three events: one group has put off the first, and the second is dead; in an ordered one the first is parked."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_3.read_text("utf-8"))
        for pragma in (f"application_id = {APPLICATION_ID}", "user_version = 3", "journal_mode = WAL"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("INSERT INTO stream (id, name, partitions, key, codec) VALUES (1, 'orders', 2, '', 'json')")
        connection.execute("INSERT INTO log (id, last, last_ms, bytes) VALUES (1024, 3, 5, 3), (1025, 0, 0, 0)")
        for n in (1, 2, 3):
            event = (ROW | n, f"e-{n}", "order.placed", "shop", n, None, "a", b"", b"x")
            connection.execute("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", event)
        connection.execute(
            "INSERT INTO grp (id, stream, name, owner, ordered) "
            "VALUES (1, 1, 'billing', 'shop', 0), (2, 1, 'audit', 'shop', 1)"
        )
        connection.execute(
            "INSERT INTO cursor VALUES (1, 1024, 3, 1), (1, 1025, 0, 0), (2, 1024, 3, 0), (2, 1025, 0, 0)"
        )
        connection.execute("INSERT INTO pending VALUES (1, 0, ?, 4, 0, 0, 0, 1)", (ROW | 1,))
        connection.execute(
            "INSERT INTO dead VALUES "
            "(1, 1, ?, 'failed', 'why', 3, 9, 'e-2', 'order.placed', 'shop', 2, NULL, 'a', x'', 'x')",
            (ROW | 2,),
        )
        connection.execute("INSERT INTO lease (grp, log, parked) VALUES (2, 1024, 1), (2, 1025, 0)")
        connection.execute("INSERT INTO parked_key VALUES (2, 1024, 'a', 0, 2, 0, 0, 0, 'why', 9)")
        connection.execute(
            "INSERT INTO parked VALUES (1, 2, 1024, 'a', ?, 'e-1', 'order.placed', 'shop', 1, 'a', x'', 'x')",
            (ROW | 1,),
        )
        connection.commit()


def version_4(path: Path) -> None:
    """An event, and a policy."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_4.read_text("utf-8"))
        for pragma in (f"application_id = {APPLICATION_ID}", "user_version = 4", "journal_mode = WAL"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute(
            "INSERT INTO stream (id, name, partitions, key, codec, policy) "
            "VALUES (1, 'orders', 2, '', 'json', '{\"events\":9}')"
        )
        connection.execute("INSERT INTO log (id, last, last_ms, bytes) VALUES (1024, 1, 5, 1), (1025, 0, 0, 0)")
        event = (ROW | 1, "e-1", "order.placed", "shop", 1, None, "a", b"", b"x")
        connection.execute("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", event)
        connection.commit()


def shape(path: Path) -> dict[str, object]:
    with closing(sqlite3.connect(path)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master ORDER BY name")]
        return {name: connection.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in names}


async def stream(path: Path) -> StreamInfo:
    async with opened(path) as broker:
        return (await broker.admin.streams())[0]


async def test_a_file_of_the_second_version_is_upgraded_and_keeps_all_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    version_2(path)
    async with opened(path) as broker:
        info = (await broker.admin.streams())[0]
        assert (info.events, info.added, info.policy, info.trimmed, info.first_ms) == (3, 3, Policy(), 0, 1)
        now = await about(broker)
        assert (now.dead, now.lag, now.lost) == (1, 0, 0)
        assert abs((now.seen_ms or 0) - time.time() * 1_000) < 20_000, "as if it were born with the upgrade"
        assert await broker.declare(ORDERS, Policy(events=1)) == Policy()
    async with opened(tmp_path / "new.db"):
        pass
    assert shape(path) == shape(tmp_path / "new.db")
    assert path.read_bytes()[60:64] == SCHEMA_VERSION.to_bytes(4)
    assert intact(path) and counted(path)


async def test_what_version_three_adds_works_in_an_upgraded_file(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    version_2(path)
    async with opened(path) as broker:
        await broker.admin.apply("orders", Policy(events=1, dedupe_ms=60_000, dedupe_ids=10))
        found = await broker.tend("orders")
        assert (found.trimmed, found.pinned_by) == (1, "dead letters of billing")
        assert await broker.admin.replay(await broker.admin.dead("orders", "billing")) == [True]
        consumer = await joined(broker)
        claims = await consumer.fetch(5, 1.0)
        assert ids(claims) == ["e-2"]
        assert await consumer.settle(outcomes(claims)) == [True]
        await consumer.close()
        found = await broker.tend("orders")
        assert (found.trimmed, found.pinned_by) == (1, "")
        assert await broker.append("orders", records("a")) == await broker.append("orders", records("a"))
        assert await broker.append_slot("orders", Slot("tick", 1), records("b")[0])
        assert [(info.repeats, info.added) for info in await broker.admin.streams()] == [(1, 5)]
    assert counted(path)


async def test_a_file_of_the_third_version_is_upgraded_and_what_waits_in_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    version_3(path)
    async with opened(path) as broker:
        [letter] = await broker.admin.dead("orders", "billing")
        assert (letter.stored.position, letter.stored.record.id) == (Position(0, "2"), "e-2")
        assert await broker.admin.replay([letter]) == [True]
        consumer, audit = await joined(broker), await joined(broker, "audit", order=True)
        claims = await consumer.fetch(5, 1.0)
        assert sorted((claim.record.id, claim.attempt) for claim in claims) == [("e-1", 5), ("e-2", 1)]
        parked = await eventually(lambda: audit.fetch(5, 0.1), bool)
        assert [(claim.record.id, claim.attempt) for claim in parked] == [("e-1", 3)]
        assert [list(claim.left) for claim in (*claims, *parked)] == [[]] * 3
        assert await consumer.settle(outcomes(claims)) == [True, True]
        assert await audit.settle(outcomes(parked)) == [True]
        assert [(await about(broker, name)).pending for name in ("billing", "audit")] == [0, 0]
    async with opened(tmp_path / "new.db"):
        pass
    assert shape(path) == shape(tmp_path / "new.db")
    assert path.read_bytes()[60:64] == SCHEMA_VERSION.to_bytes(4)
    assert intact(path) and counted(path)


async def test_what_version_four_adds_works_in_an_upgraded_file(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    version_3(path)
    async with opened(path) as broker:
        consumer = await joined(broker)
        [claim] = await consumer.fetch(5, 1.0)
        again = Later(0, "busy", left=[2])
        letter = Letter(1, claim.record, "failed")
        assert await consumer.settle([Settlement(claim.position, again, letters=[letter])]) == [True]
        [claim] = await consumer.fetch(5, 1.0)
        assert list(claim.left) == [2]
        found = await broker.admin.dead("orders", "billing")
        assert [letter.stored.position.offset for letter in found] == ["2", "1.1"]
        assert await broker.admin.replay(found) == [True, True]
        assert await consumer.settle(outcomes([claim])) == [True]
        assert sorted(list(claim.left) for claim in await consumer.fetch(5, 1.0)) == [[], [1]]


async def test_a_file_of_the_fourth_version_is_upgraded_and_can_keep_dictionaries(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    version_4(path)
    async with opened(path) as broker:
        assert [info.events for info in await broker.admin.streams()] == [1]
        assert await broker.declare(ORDERS) == Policy(events=9)
        await broker.admin.train("orders", 7, b"words")
        assert await broker.dictionary("orders", 7) == b"words"
        assert await broker.policy("orders") == Policy(events=9, dictionary=7)
    async with opened(tmp_path / "new.db"):
        pass
    assert shape(path) == shape(tmp_path / "new.db")
    assert path.read_bytes()[60:64] == SCHEMA_VERSION.to_bytes(4)
    assert intact(path) and counted(path)


async def test_processes_that_upgrade_at_once_do_not_clash(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    version_2(path)
    brokers = [broker_at(path) for _ in range(4)]
    await asyncio.gather(*(broker.open() for broker in brokers))
    for broker in brokers:
        assert [info.events for info in await broker.admin.streams()] == [3]
        await broker.close()
    assert intact(path)


async def test_an_upgrade_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shop.db"
    version_2(path)
    before = shape(path)
    whole = file._schema(2)
    monkeypatch.setattr(file, "_schema", lambda version: whole.replace("CREATE TABLE slot", "CREATE TABLE grp"))
    with pytest.raises(BrokerRefused, match="grp"):
        await stream(path)
    assert shape(path) == before
    monkeypatch.undo()
    assert (await stream(path)).events == 3
