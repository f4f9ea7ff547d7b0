"""Which file it is, and which it refuses."""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from millstream.brokers.base import StreamSpec
from millstream.brokers.sqlite.broker import SQLiteBroker
from millstream.brokers.sqlite.file import APPLICATION_ID, SCHEMA_VERSION
from millstream.clock import Clock
from millstream.errors import BadSetting, BrokerDown, BrokerError, BrokerRefused, StreamMismatch
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from tests.sqlite.places import ORDERS, broker_at, intact, joined, lines, opened, process, records


def sqlite_broker(url: str) -> SQLiteBroker:
    return SQLiteBroker(url, Settings(), Clock(), Telemetry())


def pragma(path: Path, name: str) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


async def refusal(path: Path) -> str:
    with pytest.raises(BrokerRefused) as caught:
        await broker_at(path).open()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_three_slashes_are_relative_and_four_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sqlite_broker("sqlite:///shop.db").url == f"sqlite:///{tmp_path}/shop.db"
    assert sqlite_broker("sqlite:///sub/shop%20two.db").url == f"sqlite:///{tmp_path}/sub/shop two.db"
    assert sqlite_broker("sqlite:////data/shop.db").url == "sqlite:////data/shop.db"


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite://shop.db",
        "sqlite://host/shop.db",
        "sqlite:///:memory:",
        "sqlite:///shop.db?mode=ro",
        "sqlite:///shop.db?synchronous=off",
        "sqlite:///shop.db?synchronous",
    ],
)
def test_a_url_that_cannot_work_is_a_bad_setting_that_shows_how_to_write_it(url: str) -> None:
    with pytest.raises(BadSetting, match=r"sqlite:///shop\.db"):
        sqlite_broker(url)


def test_only_a_file_that_is_synchronised_fully_confirms_the_disk() -> None:
    assert sqlite_broker("sqlite:///shop.db").traits.confirms == {"memory", "fsync"}
    assert sqlite_broker("sqlite:///shop.db?synchronous=full").traits.confirms == {"memory", "fsync"}
    assert sqlite_broker("sqlite:///shop.db?synchronous=normal").traits.confirms == {"memory"}


async def test_a_new_file_says_whose_it_is_and_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a directory # with signs?" / "shop.db"
    path.parent.mkdir()
    broker = broker_at(Path(str(path).replace("?", "%3F").replace("#", "%23")))
    with caplog.at_level(logging.INFO, logger="millstream"):
        await broker.open()
    await broker.close()
    assert str(path) in caplog.text
    assert pragma(path, "application_id") == APPLICATION_ID
    assert pragma(path, "user_version") == SCHEMA_VERSION
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["shop.db", "shop.db-turn"]


async def test_an_empty_file_becomes_ours(tmp_path: Path) -> None:
    (tmp_path / "shop.db").touch()
    async with opened(tmp_path / "shop.db") as broker:
        assert len(await broker.append("orders", records("a"))) == 1


async def test_what_a_process_that_was_killed_while_creating_left_is_cleared_away(tmp_path: Path) -> None:
    for rest in ("-new", "-new-journal", "-new-wal", "-new-shm"):
        (tmp_path / f"shop.db{rest}").write_bytes(b"half of something" * 300)
    async with opened(tmp_path / "shop.db") as broker:
        assert len(await broker.append("orders", records("a"))) == 1
    assert intact(tmp_path / "shop.db")
    assert not list(tmp_path.glob("shop.db-new*"))


async def test_a_file_whose_checkpoint_was_cut_off_is_opened_with_all_its_events(tmp_path: Path) -> None:
    # A checkpoint copies the first page first: it names more pages than the file has, until the others follow.
    names = [f"o-{n}" for n in range(200)]
    (tmp_path / "later").mkdir()
    async with opened(tmp_path / "shop.db") as broker:
        await broker.append("orders", records(*names, size_bytes=1_000))
        for rest in ("", "-wal"):
            (tmp_path / "later" / f"shop.db{rest}").write_bytes((tmp_path / f"shop.db{rest}").read_bytes())
    file = tmp_path / "later" / "shop.db"
    content = bytearray(file.read_bytes())
    content[28:32] = (len(content) // 4_096 + 50).to_bytes(4)
    file.write_bytes(content)
    async with opened(file) as broker:
        assert [stored.record.id for stored in await broker.read("orders", 0, None, 500)] == names
    assert intact(file)


async def test_another_programs_database_is_refused_and_left_untouched(tmp_path: Path) -> None:
    for mode in ("delete", "wal"):
        path = tmp_path / f"foreign-{mode}.db"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(f"PRAGMA journal_mode = {mode}")
            connection.execute("CREATE TABLE event (a)")
        before = path.read_bytes()
        assert "another program" in await refusal(path)
        assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["foreign-delete.db", "foreign-wal.db"]


async def test_a_file_that_is_no_database_is_refused_and_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for content in (b"x", b"dear diary " * 1_000):
        path.write_bytes(content)
        assert "name another path" in await refusal(path)
        assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


async def test_a_newer_schema_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path):
        pass
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    assert "upgrade" in await refusal(path)


async def test_a_path_that_cannot_hold_a_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "directory.db").mkdir()
    assert "is no directory" in await refusal(tmp_path / "missing" / "shop.db")
    assert "is no directory" in await refusal(tmp_path / "file" / "shop.db")
    assert "no regular file" in await refusal(tmp_path / "directory.db")
    assert "no regular file" in await refusal(Path("/dev/null"))


if sys.platform == "linux":

    async def test_a_directory_where_nobody_may_write_is_refused() -> None:
        path = Path(f"/proc/{os.getpid()}/shop.db")  # not even root may create a file there
        assert "cannot write beside it" in await refusal(path)


async def test_a_log_whose_file_is_missing_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "shop.db-wal").write_bytes(b"events that nobody has seen")
    assert "put the file back" in await refusal(tmp_path / "shop.db")
    assert (tmp_path / "shop.db-wal").read_bytes() == b"events that nobody has seen"
    assert not (tmp_path / "shop.db").exists()


async def test_a_file_that_is_taken_away_while_in_use_is_noticed(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        await broker.append("orders", records("a"))
        os.rename(tmp_path / "shop.db", tmp_path / "elsewhere.db")
        with pytest.raises(BrokerRefused, match="moved, deleted or replaced"):
            await broker.append("orders", records("b"))
        with pytest.raises(BrokerRefused, match="moved, deleted or replaced"):
            await broker.read("orders", 0, None, 10)
        os.rename(tmp_path / "elsewhere.db", tmp_path / "shop.db")
        await broker.append("orders", records("c"))
        assert [stored.record.id for stored in await broker.read("orders", 0, None, 10)] == ["a", "c"]


async def test_processes_that_open_a_new_file_at_once_do_not_clash(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    with process("create", url) as a, process("create", url) as b, process("create", url) as c:
        children = (a, b, c)
        assert [lines(child, 1) for child in children] == [["ready"]] * 3
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        assert [lines(child, 1) for child in children] == [["created"]] * 3
        assert [child.wait(20) for child in children] == [0] * 3
    assert intact(tmp_path / "shop.db")


async def test_namespaces_share_a_file_without_seeing_each_other(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as plain, opened(path, namespace="prod") as prod:
        await plain.declare(StreamSpec("bare"))
        await plain.append("orders", records("plain"))
        await prod.append("orders", records("prod"))
        assert [stored.record.id for stored in await prod.read("orders", 0, None, 10)] == ["prod"]
        assert [info.spec.name for info in await plain.admin.streams()] == ["bare", "orders"]
        assert [info.spec.name for info in await prod.admin.streams()] == ["orders"]
        consumer = await joined(prod)
        assert await plain.admin.groups("orders") == []
        assert [info.group for info in await prod.admin.groups("orders")] == ["billing"]
        await consumer.close()


async def test_a_stream_keeps_its_declaration_across_openings(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db"):
        pass
    broker = broker_at(tmp_path / "shop.db")
    await broker.open()
    try:
        with pytest.raises(StreamMismatch, match=r"partitions=2.*partitions=3"):
            await broker.declare(StreamSpec("orders", partitions=3))
        assert [info.spec for info in await broker.admin.streams()] == [ORDERS]
    finally:
        await broker.close()


async def test_a_broker_that_is_not_open_says_so(tmp_path: Path) -> None:
    broker = broker_at(tmp_path / "shop.db")
    with pytest.raises(BrokerDown, match="not open"):
        await broker.append("orders", records("a"))
    await broker.close()
    await broker.open()
    await broker.declare(ORDERS)
    consumer = await joined(broker)
    await broker.close()
    with pytest.raises(BrokerError):
        await consumer.fetch(1, 0)
    await consumer.close()
