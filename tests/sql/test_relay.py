"""The relay: order, repeats, sharing, what cannot be published, and what is broken."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import closing
from typing import Any

import psycopg
import pytest

from millstream import BadSetting, BrokerFull, BrokerRefused, Envelope, MillstreamError, Stream, Unconfirmed
from millstream.brokers.base import Policy
from millstream.sql import Outbox, tables
from millstream.sql import relay as module
from millstream.sql.connections import Statement, drive
from millstream.sql.rows import SHARDS
from millstream.units import MAX_APPEND_BYTES
from millstream.wire.partition import partition_of
from tests.sql.place import Gate, Log, Paid, Sent, created, down, orders, outbox, parcels, relaying, until_empty
from tests.sql.ways import Way, maybe

POLL = "20ms"


@pytest.fixture
def sqlite(tmp_path: Any) -> Way:
    return Way("sqlite3", f"{tmp_path}/user.db")


@pytest.fixture
def postgresql(dsn: str) -> Way:
    return Way("psycopg", dsn)


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest) -> Way:
    way: Way = request.getfixturevalue(request.param)
    return way


async def write(way: Way, *events: Any, to: Stream[Any] = orders) -> None:
    """In one transaction."""
    async with way.transaction() as connection:
        for event in events:
            await maybe(outbox.publish(connection, event, to=to))


async def say(way: Way, text: str, *values: Any) -> None:
    """What other code than ours does to the table."""
    async with way.transaction() as connection:
        connection.execute(text if "sqlite" in way.name else text.replace("?", "%s"), values)


async def test_what_was_committed_is_published_in_order_and_crossed_off(way: Way) -> None:
    await created(way)
    log = Log()
    await write(way, *(Paid(order=f"o-{number % 3}", number=number) for number in range(30)))
    relay = outbox.relay(way.connect(), poll=POLL)
    async with relaying(relay, log):
        await write(way, Envelope(Sent(order="late"), id="mine", headers={"a": "b"}), to=parcels)
        await write(way, Envelope(Sent(order="later"), id="due", due="1h"), to=parcels)
        await log.until(lambda: len(log.stored) == 32)
        await until_empty(way)
    assert [log.numbers(f"o-{key}") for key in range(3)] == [list(range(key, 30, 3)) for key in range(3)]
    stream, record = log.stored["mine"]
    assert (stream, record.type, record.headers, record.source) == ("parcels", "sent", b'{"a":"b"}', "shop")
    assert record.time_ms > 1_700_000_000_000 and record.due_ms is None
    later = log.stored["due"][1]
    assert later.due_ms is not None and abs(later.due_ms - later.time_ms - 3_600_000) < 100
    if "sqlalchemy" in way.name:
        await maybe(relay._connect.dispose())


async def test_a_batch_is_limited_in_bytes_and_one_large_event_goes(either: Way) -> None:
    await created(either)
    log = Log()
    large = "x" * (MAX_APPEND_BYTES // 5)
    await write(either, *(Envelope(Paid(order=large + str(number)), key="k") for number in range(12)))
    async with relaying(outbox.relay(either.connect(), poll=POLL), log):
        await until_empty(either)
    assert log.calls == 3 and len(log.stored) == 12


async def test_an_event_that_was_committed_after_a_later_one_is_not_lost(postgresql: Way) -> None:
    await created(postgresql)
    log = Log()
    with psycopg.connect(postgresql.address) as slow:
        outbox.publish(slow, Paid(order="a", number=1))  # has the smaller number
        async with relaying(outbox.relay(postgresql.connect(), poll=POLL), log):
            await write(postgresql, *(Paid(order=key, number=2) for key in "abcdefgh"))
            await until_empty(postgresql)
            assert log.numbers("a") == [2] and len(log.stored) == 8
            slow.commit()
            await log.until(lambda: log.numbers("a") == [2, 1])
            await until_empty(postgresql)


async def test_transactions_of_a_key_that_wait_for_one_another_are_published_in_their_order(postgresql: Way) -> None:
    writers, each, keys = 6, 25, "abc"
    await created(postgresql)
    with psycopg.connect(postgresql.address) as setup:
        setup.execute("CREATE TABLE account (id TEXT PRIMARY KEY, number INT)")
        setup.execute("INSERT INTO account SELECT unnest(%s::text[]), 0", (list(keys),))

    def work(seed: int) -> None:
        with psycopg.connect(postgresql.address) as connection:
            for turn in range(each):
                key = keys[(seed + turn) % len(keys)]
                row = connection.execute(
                    "UPDATE account SET number = number + 1 WHERE id = %s RETURNING number", (key,)
                ).fetchone()
                assert row is not None
                outbox.publish(connection, Paid(order=key, number=row[0]))
                connection.commit()

    log = Log()
    relays = [outbox.relay(postgresql.connect(), poll=POLL) for _ in range(3)]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(writers)]
    async with relaying(relays[0], log), relaying(relays[1], log), relaying(relays[2], log):
        for thread in threads:
            thread.start()
        await log.until(lambda: len(log.stored) == writers * each)
        await until_empty(postgresql)
    for thread in threads:
        thread.join()
    assert [log.numbers(key) for key in keys] == [list(range(1, writers * each // 3 + 1))] * 3


async def test_a_relay_that_stands_still_is_taken_over_and_does_no_harm_when_it_wakes_up(either: Way) -> None:
    await created(either)
    log = Log()
    stalled = Gate(log)
    await write(either, *(Paid(order="a", number=number) for number in range(1, 4)))
    async with relaying(outbox.relay(either.connect(), poll=POLL), stalled):
        await stalled.waits.wait()
        await say(either, "UPDATE millstream_relay SET until_ms = 0")  # it has been silent for too long
        async with relaying(outbox.relay(either.connect(), poll=POLL), log):
            await write(either, Paid(order="a", number=4))
            await log.until(lambda: log.numbers("a") == [1, 2, 3, 4])
            await until_empty(either)
            calls = log.calls
            stalled.open.set()
            await log.until(lambda: log.calls > calls)
            await write(either, Paid(order="a", number=5))
            await log.until(lambda: len(log.stored) == 5)
    assert log.numbers("a") == [1, 2, 3, 4, 5]


async def test_a_relay_whose_shard_was_taken_over_crosses_nothing_off(
    either: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_S", 0.2)
    await created(either)
    log, first, second = Log(), Gate(Log()), Gate(Log())
    await write(either, Paid(order="a", number=1))
    async with relaying(outbox.relay(either.connect(), poll=POLL), first):
        await first.waits.wait()
        await say(either, "UPDATE millstream_relay SET until_ms = 0")
        async with relaying(outbox.relay(either.connect(), poll=POLL), second):
            await second.waits.wait()
            first.open.set()
        # The second one was cut off with its batch in hand: only the first one could have crossed it off.
    await say(either, "UPDATE millstream_relay SET until_ms = 0")
    async with relaying(outbox.relay(either.connect(), poll=POLL), log):
        await until_empty(either)
    assert log.numbers("a") == [1]


async def test_a_relay_that_died_with_a_batch_in_hand_is_followed_by_another(
    either: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HOLD_MS", 300)
    monkeypatch.setattr(module, "STOP_S", 0.01)
    await created(either)
    log = Log()
    dead = Gate(log)
    await write(either, Paid(order="a", number=1))
    async with relaying(outbox.relay(either.connect(), poll=POLL), dead):
        await dead.waits.wait()
    async with relaying(outbox.relay(either.connect(), poll=POLL), log):
        await log.until(lambda: log.numbers("a") == [1])


async def test_a_relay_that_stands_still_inside_a_transaction_is_cut_off(
    postgresql: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = tables._GUARD["postgresql"].replace(str(tables.MAX_IDLE_MS), "200")
    monkeypatch.setitem(tables._GUARD, "postgresql", guard)
    await created(postgresql)
    log = Log()
    await write(postgresql, Paid(order="a", number=1))
    async with relaying(outbox.relay(postgresql.connect(), poll=POLL), Gate(log)):
        pass  # has made the rows of the shards
    with closing(psycopg.connect(postgresql.address)) as still:
        await say(postgresql, "UPDATE millstream_relay SET until_ms = 0")
        values = {"stream": "orders", "holder": "still", "hold_ms": 1}
        assert drive(still, module._rows(Statement(tables.claim("postgresql"), values)))
        async with relaying(outbox.relay(postgresql.connect(), poll=POLL), log):
            await log.until(lambda: log.numbers("a") == [1])
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            still.execute("SELECT 1")


async def put_raw(way: Way, key: str, type_: str, data: bytes, id_: str) -> None:
    text = (
        "INSERT INTO millstream_outbox (stream, shard, event_id, type, key, headers, data, created_ms) "
        "SELECT 'orders', ?, ?, ?, ?, ?, ?, 1"
    )
    shard = partition_of(key, SHARDS)
    await say(way, text, shard, id_, type_, key, b"", data)


@pytest.mark.parametrize(
    ("type_", "data", "error"),
    [
        ("paid", b"no json", "Paid: JSON is malformed"),
        ("paid", b'{"order":1}', "Paid: Expected `str`, got `int`"),
        ("refunded", b"{}", "does not carry the type 'refunded'"),
        ("paid", b'{"order":"' + b"x" * 1_048_576 + b'"}', "over the limit of 1,048,576"),
    ],
)
async def test_what_cannot_be_published_is_set_aside_with_the_later_ones_of_its_key(
    either: Way, type_: str, data: bytes, error: str
) -> None:
    await created(either)
    log = Log()
    await write(either, Paid(order="a", number=1))
    await put_raw(either, "a", type_, data, "bad")
    await write(either, Paid(order="a", number=2), Paid(order="b", number=1))
    async with relaying(outbox.relay(either.connect(), poll=POLL), log) as place:
        await until_empty(either)
        await write(either, Paid(order="a", number=3), Paid(order="b", number=2))
        await until_empty(either)
        assert log.numbers("a") == [1] and log.numbers("b") == [1, 2]
        async with either.transaction() as connection:
            assert outbox.lag(connection)["orders"].aside == 3
            (stuck,) = outbox.stuck(connection)
        assert (stuck.stream, stuck.id, stuck.type, stuck.key) == ("orders", "bad", type_, "a") and error in stuck.error
        told = [measured for name, measured in place.told if name == module.SET_ASIDE]
        assert [(one["stream"], one["event_id"]) for one in told] == [("orders", "bad")]
        async with either.transaction() as connection:
            assert outbox.discard(connection, stuck)
            assert not outbox.discard(connection, stuck)
        await log.until(lambda: log.numbers("a") == [1, 2, 3])
        await until_empty(either)
    async with either.transaction() as connection:
        assert outbox.lag(connection) == {} and outbox.stuck(connection) == []


async def test_what_was_set_aside_goes_on_when_its_type_becomes_known(
    either: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(module, "LOOK_AGAIN", 1)
    await created(either)
    log = Log()
    old = Outbox(Stream("orders", Paid, key="order", partitions=4, dedupe="1h"))
    await put_raw(either, "b", "paid", b"no json", "worse")
    await put_raw(either, "a", "sent", b'{"order":"a"}', "bad")
    await write(either, Paid(order="a", number=2))
    async with relaying(old.relay(either.connect(), poll=POLL), log):
        await until_empty(either)
        assert not log.stored
    async with relaying(outbox.relay(either.connect(), poll=POLL), log):
        await log.until(lambda: len(log.stored) == 2)
        await until_empty(either)
    assert [record.type for _, record in log.of("a")] == ["sent", "paid"]
    async with either.transaction() as connection:
        assert [stuck.id for stuck in outbox.stuck(connection)] == ["worse"]


async def test_events_of_a_stream_that_nobody_relays_are_seen_and_stop_no_others(either: Way) -> None:
    await created(either)
    log = Log()
    await write(either, Sent(order="a"), to=parcels)
    only = Outbox(orders)
    await write(either, Paid(order="a", number=1))
    async with relaying(only.relay(either.connect(), poll=POLL), log):
        await log.until(lambda: log.numbers("a") == [1])
    async with either.transaction() as connection:
        (stuck,) = only.stuck(connection)
        assert (stuck.stream, stuck.error) == ("parcels", "its stream is not one of this outbox")
        assert only.discard(connection, stuck)
        assert outbox.lag(connection) == {}


@pytest.mark.parametrize("error", [down(), BrokerFull("full"), Unconfirmed("perhaps", results=[None])])
async def test_while_the_broker_fails_nothing_is_crossed_off_and_it_is_tried_again(
    sqlite: Way, error: Exception
) -> None:
    await created(sqlite)
    log = Log()
    log.errors = [error] * 3
    await write(sqlite, Paid(order="a", number=1), Paid(order="a", number=2))
    async with relaying(outbox.relay(sqlite.connect(), poll=POLL), log) as place:
        await until_empty(sqlite)
    assert log.numbers("a") == [1, 2] and log.calls == 4
    told = [measured for name, measured in place.told if name == "broker.error"]
    assert [(one["group"], one["doing"], one["error"]) for one in told] == [("outbox", "publish to orders", error)] * 3


async def test_a_stream_that_is_full_does_not_stop_another(sqlite: Way) -> None:
    await created(sqlite)
    log = Log()

    class Full(Log):
        async def append(self, stream: str, records: Any, confirm: str = "memory") -> Any:
            if stream == "orders":
                raise BrokerFull("full")
            return await log.append(stream, records, confirm)

    await write(sqlite, Paid(order="a"))
    await write(sqlite, Sent(order="a"), to=parcels)
    async with relaying(outbox.relay(sqlite.connect(), poll=POLL), Full()):
        await log.until(lambda: len(log.stored) == 1)


async def test_a_broker_that_refuses_ends_the_relay(sqlite: Way) -> None:
    await created(sqlite)
    log = Log()
    log.errors = [BrokerRefused("no permission")]
    await write(sqlite, Paid(order="a"))
    with pytest.raises(ExceptionGroup) as raised:
        async with relaying(outbox.relay(sqlite.connect(), poll=POLL), log):
            await asyncio.Event().wait()
    assert raised.group_contains(BrokerRefused, match="no permission")


async def test_a_database_that_was_away_is_connected_to_again(postgresql: Way) -> None:
    await created(postgresql)
    log = Log()
    async with relaying(outbox.relay(postgresql.connect(), poll=POLL), log) as place:
        with psycopg.connect(postgresql.address, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                "AND datname = current_database()"
            )
        await write(postgresql, Paid(order="a", number=1))
        await log.until(lambda: log.numbers("a") == [1])
    assert [measured["doing"] for name, measured in place.told if name == "broker.error"] == ["use its database"]


async def test_missing_tables_are_told_at_the_start(sqlite: Way) -> None:
    with pytest.raises(MillstreamError, match=r"no such table.*outbox\.create"):
        async with relaying(outbox.relay(sqlite.connect(), poll=POLL), Log()):
            pass


async def test_a_stream_that_remembers_no_ids_on_the_broker_is_refused_at_the_start(sqlite: Way) -> None:
    await created(sqlite)
    log = Log()
    log.policy = Policy()
    with pytest.raises(BadSetting, match=r"on log:// does not remember ids.*millstream stream apply"):
        async with relaying(outbox.relay(sqlite.connect(), poll=POLL), log):
            pass


@pytest.mark.parametrize(
    ("connect", "poll"), [("sqlite:///x.db", "1s"), (sqlite3.connect, "0s"), (sqlite3.connect, "2m")]
)
def test_a_relay_that_cannot_work_is_refused(connect: Any, poll: str) -> None:
    with pytest.raises(BadSetting, match=r"relay\("):
        outbox.relay(connect, poll=poll)


def test_looking_for_work_does_not_read_past_what_was_there_once(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        for statement in tables.tables("postgresql"):
            connection.execute(statement)
        connection.execute(
            "INSERT INTO millstream_outbox (stream, shard, event_id, type, headers, data, created_ms) "
            "SELECT 'orders', n % 16, n, 'paid', '', '', 0 FROM generate_series(1, 20000) n"
        )
        connection.execute("ANALYZE millstream_outbox")  # now it knows a table full of work
        look = tables.READY.replace(":stream", "'orders'")
        plan = "".join(line for (line,) in connection.execute(f"EXPLAIN {look}").fetchall())
    assert "Scan using millstream_outbox_ready" in plan


async def test_an_idle_relay_does_not_write(sqlite: Way) -> None:
    await created(sqlite)
    await put_raw(sqlite, "a", "paid", b"no json", "bad")
    said: list[str] = []

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(sqlite.address, timeout=0)
        connection.set_trace_callback(said.append)
        return connection

    async with relaying(outbox.relay(connect, poll="1ms"), Log()) as place:
        await until_empty(sqlite)
        with closing(sqlite3.connect(sqlite.address, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")  # nobody else could write now
            said.clear()
            async with asyncio.timeout(20):
                while len(said) < 20:
                    await asyncio.sleep(0.001)
        assert {name for name, _ in place.told} == {module.SET_ASIDE}
