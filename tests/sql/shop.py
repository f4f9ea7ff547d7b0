"""A shop with a database, as real processes: `python -m tests.sql.shop relay`, `write SEED`, or `handle`.

MILLSTREAM_BROKER   where its events go
SHOP_DATABASE       where its accounts are: a file, or `postgresql://…`
SHOP_ENOUGH         a writer ends when this file is there
SHOP_DIE            POINT:N, to be killed at that point for the N-th time: `before` or `after` a relay's write to the
                    broker, `inside` of a handler's transaction, or once that is `committed`
FAULTS_JOURNAL      the directory of journals
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg

import millstream.app
from millstream import App, Delivery, Event, Position, Retry, Stream
from millstream.brokers.base import Record
from millstream.brokers.urls import broker_for
from millstream.sql import Inbox, Outbox
from tests.faults.journal import Pen

KEYS = "abcdefgh"
POINTS = ("before", "after")
HANDLER_POINTS = ("inside", "committed")

BROKEN = (sqlite3.OperationalError, psycopg.OperationalError, psycopg.InterfaceError)


class Booked(Event, type="booked"):
    account: str
    number: int


class Task(Event, type="task"):
    number: int


bookings = Stream("bookings", Booked, key="account", partitions=4, dedupe="1h")
tasks = Stream("tasks", Task, partitions=4)
outbox = Outbox(bookings)
inbox = Inbox("work")

_point, _, _left = os.environ.get("SHOP_DIE", "").partition(":")
_left_of = {_point: int(_left or 0)}


def die(point: str) -> None:
    """The process ends here, or stands still, if it is its time."""
    if point in _left_of:
        _left_of[point] -= 1
        if not _left_of[point]:
            os.kill(os.getpid(), signal.SIGSTOP if point == "still" else signal.SIGKILL)


def connect() -> Any:
    """A blocking connection to the database."""
    address = os.environ["SHOP_DATABASE"]
    return psycopg.connect(address) if "://" in address else sqlite3.connect(address, timeout=20)


def prepare() -> None:
    """All tables."""
    connection = connect()
    outbox.create(connection)
    inbox.create(connection)
    connection.execute("CREATE TABLE account (id TEXT PRIMARY KEY, number BIGINT NOT NULL)")
    connection.execute("CREATE TABLE effect (event_id TEXT NOT NULL)")
    for key in KEYS:
        connection.execute(f"INSERT INTO account VALUES ('{key}', 0)")
    connection.commit()
    connection.close()


def query(text: str) -> list[tuple[Any, ...]]:
    connection = connect()
    rows: list[tuple[Any, ...]] = connection.execute(text).fetchall()
    connection.close()
    return rows


class Mortal:
    """A broker around whose writes the process may die."""

    def __init__(self, broker: Any) -> None:
        self._broker = broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def append(self, stream: str, records: Sequence[Record], *rest: Any, **named: Any) -> list[Position]:
        die("before")
        die("still")
        positions: list[Position] = await self._broker.append(stream, records, *rest, **named)
        die("after")
        return positions


def write(seed: int) -> None:
    """Book on accounts, each in a transaction with its event, until it is enough. What goes wrong is begun anew."""
    chance, enough = random.Random(seed), Path(os.environ["SHOP_ENOUGH"])
    connection = None
    while not enough.exists():
        try:
            connection = connection or connect()
            book(connection, chance.choice(KEYS))
        except BROKEN:
            connection = None
            time.sleep(0.05)
        time.sleep(0.002)  # leaves the file to others


def book(connection: Any, key: str) -> None:
    """The next number of an account; the row that it writes keeps others out of this account until it commits."""
    ((number,),) = connection.execute(
        f"UPDATE account SET number = number + 1 WHERE id = '{key}' RETURNING number"
    ).fetchall()
    outbox.publish(connection, Booked(account=key, number=number))
    connection.commit()


@asynccontextmanager
async def joined(_: App) -> AsyncIterator[None]:
    """From here on a signal drains the process."""
    Pen(os.environ["FAULTS_JOURNAL"]).write("up")
    yield


def relay() -> None:
    App("shop", include=[outbox.relay(connect, poll="50ms")], lifespan=joined).run()


def handle() -> None:
    app, pen = App("workers", lifespan=joined), Pen(os.environ["FAULTS_JOURNAL"])

    @app.subscriber(tasks, "work", retry=Retry(1_000, first="20ms", max="200ms"))
    def work(event: Task, delivery: Delivery[Task]) -> None:
        pen.write("run", delivery.id, delivery.attempt)
        connection = connect()
        try:
            if inbox.first(connection, delivery):
                connection.execute(f"INSERT INTO effect VALUES ('{delivery.id}')")
                die("inside")
            connection.commit()
            die("committed")
        finally:
            connection.close()

    app.run()


if __name__ == "__main__":
    millstream.app.broker_for = lambda *given: Mortal(broker_for(*given))  # type: ignore[attr-defined,assignment,return-value,unused-ignore]
    match sys.argv[1]:
        case "relay":
            relay()
        case "write":
            write(int(sys.argv[2]))
        case "handle":
            handle()
