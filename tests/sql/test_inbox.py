from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from millstream import BadSetting, Envelope, MillstreamError, NotSupported
from millstream.sql import Inbox
from millstream.sql import inbox as module
from millstream.sql.connections import perform
from tests.servers import wait_until
from tests.sql.ways import Way, maybe

billing = Inbox("billing")


async def created(way: Way) -> Way:
    async with way.transaction() as connection:
        await maybe(billing.create(connection))
    return way


async def test_an_event_is_the_first_of_its_id_once(way: Way) -> None:
    await created(way)
    for expected in (True, False, False):
        async with way.transaction() as connection:
            assert await maybe(billing.first(connection, "e-1")) is expected
    async with way.transaction() as connection:
        assert await maybe(billing.first(connection, Envelope("anything", id="e-2"))) is True
        assert await maybe(Inbox("shipping").first(connection, "e-1")) is True


async def test_an_event_whose_transaction_was_rolled_back_was_not_seen(way: Way) -> None:
    await created(way)
    with pytest.raises(ZeroDivisionError):
        async with way.transaction() as connection:
            assert await maybe(billing.first(connection, "e-1"))
            raise ZeroDivisionError
    async with way.transaction() as connection:
        assert await maybe(billing.first(connection, "e-1"))


async def test_purging_forgets_the_oldest_in_steps(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PURGED", 2)
    await created(way)
    async with way.transaction() as connection:
        for number in range(3):
            await maybe(billing.first(connection, f"e-{number}"))
        await maybe(Inbox("shipping").first(connection, "e-0"))
    purged = []
    for older in ("1h", -1, -1, -1):
        async with way.transaction() as connection:
            before = 1 if older == "1h" else 10**15
            purged.append(await maybe(perform(connection, billing._purge(before))))
    assert purged == [0, 2, 1, 0]
    async with way.transaction() as connection:
        assert await maybe(billing.purge(connection, older="30d")) == 0
        assert not await maybe(Inbox("shipping").first(connection, "e-0"))


async def test_making_the_table_twice_does_no_harm(way: Way) -> None:
    await created(await created(way))


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
def test_the_statements_for_a_migration_make_the_table(dialect: str, request: pytest.FixtureRequest) -> None:
    if dialect == "sqlite":
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(Inbox.ddl(dialect))
            assert billing.first(connection, "e-1")
        return
    with psycopg.connect(request.getfixturevalue("dsn")) as postgres:
        postgres.execute(Inbox.ddl(dialect).encode())
        assert billing.first(postgres, "e-1")


def test_an_unknown_database_is_refused() -> None:
    with pytest.raises(NotSupported, match="PostgreSQL or SQLite; this is mysql"):
        Inbox.ddl("mysql")


def test_what_is_no_connection_is_refused() -> None:
    with pytest.raises(BadSetting, match="no connection: give a session"):
        billing.first(object(), "e-1")


def test_an_event_without_an_id_is_refused() -> None:
    with closing(sqlite3.connect(":memory:")) as connection, pytest.raises(BadSetting, match="without an id"):
        billing.first(connection, Envelope("anything"))


def test_outside_of_a_transaction_sqlite3_is_refused() -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        billing.create(connection)
        with pytest.raises(MillstreamError, match="not in a transaction"):
            billing.first(connection, "e-1")
        connection.execute("BEGIN")
        assert billing.first(connection, "e-1")


def test_outside_of_a_transaction_psycopg_is_refused(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        billing.create(connection)
        with pytest.raises(MillstreamError, match="not in a transaction"):
            billing.first(connection, "e-1")
        with connection.transaction():
            assert billing.first(connection, "e-1")


async def test_outside_of_a_transaction_asyncpg_is_refused(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await billing.create(connection)
        with pytest.raises(MillstreamError, match="not in a transaction"):
            await billing.first(connection, "e-1")
    finally:
        await connection.close()


def test_sqlalchemy_is_refused_where_it_commits_each_statement_by_itself() -> None:
    engine = sqlalchemy.create_engine("sqlite://", isolation_level="AUTOCOMMIT")
    option = sqlalchemy.create_engine("sqlite://").execution_options(isolation_level="AUTOCOMMIT")
    for connect in (engine.connect, option.connect, lambda: Session(engine), lambda: Session(option)):
        with connect() as connection, pytest.raises(MillstreamError, match="is not in a transaction: begin one"):
            billing.first(connection, "e-1")


async def test_sqlalchemys_asynchronous_ways_are_refused_likewise() -> None:
    engine = create_async_engine("sqlite+aiosqlite://", isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection, AsyncSession(engine) as session:
        for refused in (connection, session):
            with pytest.raises(MillstreamError, match="is not in a transaction: begin one"):
                await billing.first(refused, "e-1")
    await engine.dispose()


async def test_a_forgotten_await_is_refused_and_not_taken_for_the_first(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await billing.create(connection)
            with pytest.raises(MillstreamError, match="await the call"):
                assert billing.first(connection, "e-1")
            assert await billing.first(connection, "e-1")
    finally:
        await connection.close()


class Django:
    """As Django wraps a connection: cursors alone, parameters as `%(name)s`, committing by itself outside of `atomic`."""

    vendor = "sqlite"

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.autocommit = True

    def get_autocommit(self) -> bool:
        return self.autocommit

    def cursor(self) -> Any:
        cursor = self.connection.cursor()
        return SimpleNamespace(
            execute=lambda text, values: cursor.execute(re.sub(r"%\((\w+)\)s", r":\1", text), values),
            fetchall=cursor.fetchall,
            close=cursor.close,
            description=("one",),
        )


def test_django_is_spoken_to_through_its_cursors_and_in_a_transaction_only() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        django = Django(connection)
        billing.create(django)
        with pytest.raises(MillstreamError, match="not in a transaction"):
            billing.first(django, "e-1")
        django.autocommit = False
        assert billing.first(django, "e-1")
        assert not billing.first(django, "e-1")


class Rival(threading.Thread):
    """A second transaction for the same event, in a thread; `answer` is what it was told, or what it raised."""

    def __init__(self, dsn: str, isolation: psycopg.IsolationLevel) -> None:
        super().__init__()
        self.connection = psycopg.connect(dsn)
        self.connection.isolation_level = isolation
        self.connection.execute("SELECT 1")  # under REPEATABLE READ, its moment is now
        self.answer: Any = None

    def run(self) -> None:
        try:
            self.answer = billing.first(self.connection, "e-1")
            self.connection.commit()
        except psycopg.Error as error:
            self.answer = type(error)
            self.connection.rollback()


@pytest.mark.parametrize(
    ("isolation", "commits", "answer"),
    [
        (psycopg.IsolationLevel.READ_COMMITTED, True, False),
        (psycopg.IsolationLevel.READ_COMMITTED, False, True),
        (psycopg.IsolationLevel.REPEATABLE_READ, True, psycopg.errors.SerializationFailure),
        (psycopg.IsolationLevel.REPEATABLE_READ, False, True),
        (psycopg.IsolationLevel.SERIALIZABLE, True, psycopg.errors.SerializationFailure),
    ],
)
def test_of_two_at_once_the_second_waits_for_the_first_and_is_told_the_truth(
    dsn: str, isolation: psycopg.IsolationLevel, commits: bool, answer: Any
) -> None:
    with psycopg.connect(dsn) as setup:
        billing.create(setup)
    with psycopg.connect(dsn, autocommit=True) as watch, psycopg.connect(dsn) as first:
        assert billing.first(first, "e-1")
        rival = Rival(dsn, isolation)
        rival.start()
        wait_until(waits_for_a_lock(watch), 10, "the second does not wait")
        first.commit() if commits else first.rollback()
        rival.join(10)
        assert rival.answer == answer
        seen = billing.first(rival.connection, "e-1")  # its next attempt
        assert seen is False
        rival.connection.close()


def waits_for_a_lock(watch: psycopg.Connection[Any]) -> Callable[[], bool]:
    query = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return lambda: watch.execute(query).fetchone() is not None


def test_on_sqlite_the_second_waits_for_the_file(tmp_path: Any) -> None:
    path = f"{tmp_path}/user.db"
    with closing(sqlite3.connect(path)) as first, closing(sqlite3.connect(path, timeout=0)) as second:
        billing.create(first)
        assert billing.first(first, "e-1")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            billing.first(second, "e-1")
        first.commit()
        assert not billing.first(second, "e-1")
