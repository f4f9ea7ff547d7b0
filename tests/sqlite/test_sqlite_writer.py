"""The writing thread: group commit, isolation, cancellation, faults of the file, and what is known after them."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from millstream.brokers.base import Done, Position, Settlement
from millstream.brokers.sqlite import group, storing
from millstream.brokers.sqlite import writer as writer_module
from millstream.brokers.sqlite.broker import SQLiteBroker
from millstream.brokers.sqlite.file import WAL_KEPT_BYTES, InDoubt
from millstream.errors import BrokerDown, BrokerFull, BrokerRefused, Unconfirmed
from tests.sqlite.places import eventually, ids, intact, joined, opened, outcomes, records


def fault(code: int, text: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


class Gate:
    """A job that stays in the writing thread until it is let go: what is asked for meanwhile gathers behind it."""

    def __init__(self, broker: SQLiteBroker) -> None:
        self._broker = broker
        self._inside = asyncio.Event()
        self._open = threading.Event()
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> Gate:
        self._passing = asyncio.gather(self._broker.writer.ask(self._job))
        await self._inside.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open.set()
        await self._passing

    def let_go(self) -> None:
        self._open.set()

    def _job(self, _: sqlite3.Connection) -> None:
        self._loop.call_soon_threadsafe(self._inside.set)
        assert self._open.wait(20)


class Flaky(sqlite3.Connection):
    """A connection whose next COMMIT fails: after it has happened, or in its place."""

    breaks: str = ""

    def execute(self, sql: str, *more: Any) -> sqlite3.Cursor:
        how = Flaky.breaks
        if sql == "COMMIT" and how:
            Flaky.breaks = ""
            if how == "after":
                super().execute(sql)
            raise fault(sqlite3.SQLITE_IOERR, "disk I/O error")
        return super().execute(sql, *more)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    connect = sqlite3.connect
    monkeypatch.setattr(Flaky, "breaks", "")
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **named: connect(*args, factory=Flaky, **named))
    return lambda how: setattr(Flaky, "breaks", how)


async def stored(broker: SQLiteBroker) -> list[str]:
    return [event.record.id for event in await broker.read("orders", 0, None, 1_000)]


async def test_what_is_asked_for_during_a_commit_goes_into_one_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        sizes: list[int] = []
        transact = writer_module.Reader._transact

        def counted(self: writer_module.Reader, batch: list[writer_module.Request], begin: str) -> bool:
            sizes.append(len(batch))
            return transact(self, batch, begin)

        async with asyncio.TaskGroup() as tasks, Gate(broker) as gate:
            monkeypatch.setattr(writer_module.Reader, "_transact", counted)
            for n in range(20):
                tasks.create_task(broker.append("orders", records(f"e-{n}")))
            await asyncio.sleep(0)
            gate.let_go()
        assert sizes == [20]
        assert sorted(await stored(broker)) == sorted(f"e-{n}" for n in range(20))


async def test_one_request_that_fails_undoes_none_of_its_neighbours(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await broker.append("orders", records("first"))
        claims = await consumer.fetch(1, 1.0)

        def half(db: sqlite3.Connection) -> None:
            db.execute("UPDATE log SET last = 77")
            raise fault(sqlite3.SQLITE_CONSTRAINT, "the second half failed")

        async with Gate(broker) as gate:
            answers = asyncio.gather(
                broker.append("orders", records("a")),
                broker.append("unknown", records("b")),
                broker.writer.ask(half),
                consumer.settle(outcomes(claims)),
                broker.append("orders", records("c")),
                return_exceptions=True,
            )
            await asyncio.sleep(0)
            gate.let_go()
        a, unknown, halved, settled, c = await answers
        assert isinstance(unknown, BrokerRefused)
        assert isinstance(halved, BrokerRefused)
        assert (settled, a, c) == ([True], [Position(0, "2")], [Position(0, "3")])
        assert await stored(broker) == ["first", "a", "c"]
        await consumer.close()


async def test_a_request_that_is_cancelled_while_it_waits_is_not_done(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        async with Gate(broker):
            appending = asyncio.gather(broker.append("orders", records("a")))
            await asyncio.sleep(0)
            appending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await appending
        assert await stored(broker) == []
        await broker.append("orders", records("b"))
        assert await stored(broker) == ["b"]


async def test_a_fetch_cancelled_in_the_writing_thread_leaves_its_claims_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await broker.append("orders", records("a", "b", "c"))
        taking, go_on, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()
        transact = writer_module.Reader._transact

        def slow(self: writer_module.Reader, batch: list[writer_module.Request], begin: str) -> bool:
            loop.call_soon_threadsafe(taking.set)
            assert go_on.wait(20)
            return transact(self, batch, begin)

        monkeypatch.setattr(writer_module.Writer, "_transact", slow)
        fetching = asyncio.gather(consumer.fetch(3, 10.0))
        await taking.wait()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        go_on.set()
        monkeypatch.undo()
        await broker.append("orders", records("d"))
        claims = [claim for limit in (2, 10, 10) for claim in await consumer.fetch(limit, 10.0)]
        assert ids(claims) == ["a", "b", "c", "d"]
        assert [claim.attempt for claim in claims] == [1] * 4
        assert await consumer.settle(outcomes(claims)) == [True] * 4
        assert await consumer.fetch(10, 0) == []
        await consumer.close()


async def test_an_append_whose_commit_breaks_is_unconfirmed_and_the_broker_goes_on(
    tmp_path: Path, flaky: Callable[[str], None]
) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        for how, expected in (("before", []), ("after", ["b"])):
            flaky(how)
            with pytest.raises(Unconfirmed) as caught:
                await broker.append("orders", records("a" if how == "before" else "b"))
            assert caught.value.results == [None]
            assert await stored(broker) == expected
        await broker.append("orders", records("c"))
        assert await stored(broker) == ["b", "c"]
    assert intact(tmp_path / "shop.db")


async def test_a_fetch_whose_commit_breaks_loses_no_event_and_counts_it_once(
    tmp_path: Path, flaky: Callable[[str], None]
) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await broker.append("orders", records("a", "b"))
        flaky("after")
        with pytest.raises(InDoubt):
            await consumer.fetch(1, 0)
        claims = [*await consumer.fetch(10, 0), *await consumer.fetch(10, 0)]
        assert ids(claims) == ["a", "b"]
        assert [claim.attempt for claim in claims] == [1, 1]
        await consumer.close()


async def test_a_settlement_whose_commit_breaks_can_be_sent_again(tmp_path: Path, flaky: Callable[[str], None]) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await broker.append("orders", records("a", "b"))
        first, second = await consumer.fetch(2, 0)
        for claim, how, answer in ((first, "before", True), (second, "after", False)):
            settlements = [Settlement(claim.position, Done())]
            flaky(how)
            with pytest.raises(BrokerDown):
                await consumer.settle(settlements)
            assert await consumer.settle(settlements) == [answer]
        (info,) = await broker.admin.groups("orders")
        assert (info.done, info.pending) == (2, 0)
        await consumer.close()


@pytest.mark.parametrize(
    ("code", "kind", "word"),
    [
        (sqlite3.SQLITE_FULL, BrokerFull, "disk is full"),
        (sqlite3.SQLITE_IOERR_WRITE, BrokerDown, "I/O"),
        (sqlite3.SQLITE_BUSY, BrokerDown, "locked"),
        (sqlite3.SQLITE_READONLY, BrokerRefused, "permissions"),
        (sqlite3.SQLITE_CANTOPEN, BrokerRefused, "permissions"),
        (sqlite3.SQLITE_CORRUPT, BrokerRefused, "restore"),
        (sqlite3.SQLITE_NOTADB, BrokerRefused, "restore"),
    ],
)
async def test_each_fault_has_a_name_and_a_sentence_and_ends_with_its_cause(
    tmp_path: Path, code: int, kind: type[Exception], word: str
) -> None:
    async with opened(tmp_path / "shop.db") as broker:

        def job(_: sqlite3.Connection) -> None:
            raise fault(code, "I/O error")

        for ask in (broker.writer.ask, broker.reader.ask):
            with pytest.raises(kind, match=word) as caught:
                await ask(job)
            assert str(tmp_path / "shop.db") in str(caught.value)
        await broker.append("orders", records("a"))
        assert await stored(broker) == ["a"]


async def test_a_file_without_room_says_full_loses_nothing_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)

        def pages(count: int) -> Callable[[sqlite3.Connection], object]:
            return lambda db: db.execute(f"PRAGMA max_page_count = {count}").fetchall()

        await broker.writer.ask(pages(60))
        confirmed: list[str] = []
        with pytest.raises(BrokerFull, match="disk is full"):
            for n in range(1_000):
                await broker.append("orders", records(f"e-{n}", size_bytes=2_000))
                confirmed.append(f"e-{n}")
        assert await stored(broker) == confirmed
        claims = await consumer.fetch(len(confirmed), 0)
        await broker.writer.ask(pages(1_000_000))
        await broker.append("orders", records("again"))
        claims += await consumer.fetch(10, 1.0)
        assert sorted(ids(claims)) == sorted([*confirmed, "again"])
        assert all(await consumer.settle(outcomes(claims)))
        await consumer.close()
    assert intact(tmp_path / "shop.db")


async def test_no_answer_in_time_is_an_error_that_tells_whether_anything_may_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await broker.append("orders", records("a"))
        async with Gate(broker) as gate:
            monkeypatch.setattr(writer_module, "ANSWER_WITHIN_S", 0.05)
            with pytest.raises(BrokerDown, match="no answer") as caught:
                await consumer.fetch(1, 0)
            assert not isinstance(caught.value, InDoubt), "it had not begun"
            monkeypatch.undo()
            gate.let_go()
        assert ids(await consumer.fetch(1, 0)) == ["a"]
        await consumer.close()


@pytest.mark.parametrize(("query", "level"), [("", 2), ("?synchronous=full", 2), ("?synchronous=normal", 1)])
async def test_events_and_outcomes_wait_for_the_disk_as_the_url_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str, level: int
) -> None:
    levels: list[tuple[str, int]] = []

    def spied(module: ModuleType, name: str) -> None:
        original = getattr(module, name)

        def spy(db: sqlite3.Connection, *more: Any) -> Any:
            levels.append((name, *db.execute("PRAGMA synchronous").fetchone()))
            return original(db, *more)

        monkeypatch.setattr(module, name, spy)

    for module, name in ((storing, "store"), (group, "take"), (group, "settle")):
        spied(module, name)
    async with opened(tmp_path / "shop.db", query=query) as broker:
        consumer = await joined(broker)
        await broker.append("orders", records("a"))
        await consumer.settle(outcomes(await consumer.fetch(1, 0)))
        await consumer.close()
    assert levels == [("store", level), ("take", 1), ("settle", level)]


async def test_closing_stores_what_was_asked_for_and_ends_both_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    async with opened(tmp_path / "shop.db") as broker:
        appending = asyncio.gather(*(broker.append("orders", records(f"e-{n}")) for n in range(50)))
        await asyncio.sleep(0)
        await broker.close()
        await appending
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("millstream-sqlite")]
    assert names == []
    assert threading.active_count() <= before + 1  # the loop's own executor
    async with opened(tmp_path / "shop.db") as broker:
        assert len(await stored(broker)) == 50


async def test_the_log_is_cut_once_nobody_reads_an_old_state_any_more(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    wal = path.with_name("shop.db-wal")
    async with opened(path) as broker:
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT COUNT(*) FROM event").fetchall()
            for n in range(10):
                await broker.append("orders", records(*(f"e-{n}-{m}" for m in range(100)), size_bytes=10_000))
        assert wal.stat().st_size > 6_000_000

        async def size() -> int:
            await broker.append("orders", records("small"))
            return wal.stat().st_size

        await eventually(size, lambda bytes_: bytes_ <= WAL_KEPT_BYTES)
        assert len(await broker.read("orders", 0, None, 2_000)) >= 1_000
