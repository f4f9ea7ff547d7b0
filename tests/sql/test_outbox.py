"""Writing into the outbox, with every driver."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing

import psycopg
import pytest

from millstream import (
    BadEvent,
    BadSetting,
    Envelope,
    Event,
    MillstreamError,
    NotSupported,
    Stream,
    TooLarge,
    Unroutable,
)
from millstream.sql import Lag, Outbox
from millstream.units import MAX_EVENT_BYTES
from tests.sql.place import Paid, Sent, created, outbox, parcels
from tests.sql.ways import Way, maybe


async def test_an_event_is_written_with_the_transaction_that_it_belongs_to(way: Way) -> None:
    await created(way)
    with pytest.raises(ZeroDivisionError):
        async with way.transaction() as connection:
            await maybe(outbox.publish(connection, Paid(order="o-1")))
            raise ZeroDivisionError
    async with way.transaction() as connection:
        assert await maybe(outbox.lag(connection)) == {}
        id_ = await maybe(outbox.publish(connection, Paid(order="o-1")))
        assert await maybe(outbox.publish(connection, Envelope(Sent(order="o-2"), id="mine"), to=parcels)) == "mine"
    assert 12 < len(id_) <= 24
    async with way.transaction() as connection:
        lags: dict[str, Lag] = await maybe(outbox.lag(connection))
    assert {stream: (lag.waiting, lag.aside) for stream, lag in lags.items()} == {"orders": (1, 0), "parcels": (1, 0)}
    oldest_ms = lags["orders"].oldest_ms
    assert oldest_ms is not None and oldest_ms > 1_700_000_000_000


async def test_making_the_tables_twice_does_no_harm(way: Way) -> None:
    await created(await created(way))


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
def test_the_statements_for_a_migration_make_the_tables(dialect: str, request: pytest.FixtureRequest) -> None:
    if dialect == "sqlite":
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(Outbox.ddl(dialect))
            outbox.publish(connection, Paid(order="o-1"))
        return
    with psycopg.connect(request.getfixturevalue("dsn")) as postgres:
        postgres.execute(Outbox.ddl(dialect).encode())
        outbox.publish(postgres, Paid(order="o-1"))


def test_a_stream_that_does_not_remember_ids_is_refused() -> None:
    with pytest.raises(BadSetting, match=r"does not remember ids.*dedupe='24h'"):
        Outbox(Stream("orders", Paid, key="order"))


def test_an_outbox_without_streams_is_refused() -> None:
    with pytest.raises(BadSetting, match="name its streams"):
        Outbox()


class Unknown(Event, type="unknown"):
    pass


def test_what_cannot_be_published_is_refused_when_it_is_written() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        outbox.create(connection)
        with pytest.raises(Unroutable, match="carry it: none"):
            outbox.publish(connection, Unknown())
        with pytest.raises(Unroutable, match="carry it: orders, parcels"):
            outbox.publish(connection, Sent(order="o-1"))
        with pytest.raises(Unroutable, match=r"Outbox\(orders, parcels, others\)"):
            outbox.publish(connection, Paid(order="o-1"), to=Stream("others", Paid))
        with pytest.raises(BadEvent, match="is no event"):
            outbox.publish(connection, "text")
        with pytest.raises(TooLarge, match="over the limit of 1,048,576"):
            outbox.publish(connection, Sent(order="x" * MAX_EVENT_BYTES), to=parcels)
        with pytest.raises(TooLarge, match="65 characters"):
            outbox.publish(connection, Envelope(Paid(order="o-1"), id="x" * 65))
        with pytest.raises(TooLarge, match="the key of Paid is over"):
            outbox.publish(connection, Envelope(Paid(order="o-1"), key="x" * 1_025))
        with pytest.raises(TooLarge, match="headers are"):
            outbox.publish(connection, Envelope(Paid(order="o-1"), headers={"a": "x" * 20_000}))
        assert outbox.lag(connection) == {}


def test_outside_of_a_transaction_it_is_refused(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        outbox.create(connection)
        with pytest.raises(MillstreamError, match=r"not in a transaction.*Nothing was stored"):
            outbox.publish(connection, Paid(order="o-1"))
        assert outbox.lag(connection) == {}


def test_an_unknown_database_is_refused() -> None:
    with pytest.raises(NotSupported, match="PostgreSQL or SQLite; this is oracle"):
        Outbox.ddl("oracle")


def test_no_driver_is_loaded_before_it_is_used() -> None:
    program = "import sys, millstream.sql; print([m for m in ('sqlalchemy', 'asyncpg', 'psycopg') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
