"""Order by key in a file, beyond the suite that all brokers pass: repeats, taken leases, foreign hands, upgrades, plans."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from millstream.brokers.base import (
    Claim,
    Dead,
    Done,
    GroupInfo,
    Later,
    Output,
    Position,
    Record,
    Settlement,
    Stored,
    Subscription,
)
from millstream.brokers.ledger import (
    HELD_MS,
    Bury,
    Commit,
    Committed,
    Cursor,
    Delay,
    Effect,
    Grant,
    Lease,
    Park,
    Pop,
    State,
)
from millstream.brokers.sqlite import file, ordered
from millstream.brokers.sqlite.broker import SQLiteBroker
from millstream.brokers.sqlite.consumer import SQLiteConsumer
from millstream.brokers.sqlite.file import APPLICATION_ID, SCHEMA_VERSION
from millstream.brokers.sqlite.ledger import SQLiteLedger
from millstream.errors import BrokerFull, BrokerRefused, LeaseLost, NotSupported
from tests.sqlite.places import LEASE_S, ORDERS, eventually, ids, intact, joined, lines, opened, outcomes, process, rest

IN_ORDER = Subscription(ORDERS, "billing", "shop", lease_s=LEASE_S, order=True)
VERSION_1 = Path(__file__).with_name("version_1.sql")


def of_keys(keys: str, partition: int = 0) -> list[Record]:
    """One event per letter, which is its key."""
    return [Record(partition, f"{key}{n}", "order.placed", b"x", key) for n, key in enumerate(keys)]


async def entered(broker: SQLiteBroker) -> SQLiteLedger:
    ledger = SQLiteLedger(broker, IN_ORDER)
    await ledger.enter()
    return ledger


async def granted(ledger: SQLiteLedger, partition: int = 0) -> Grant:
    """The partition, whoever had it: he must have left."""
    lease = (await ledger.look()).leases[partition]
    grant = await ledger.acquire(lease)
    assert grant is not None
    return grant


async def stored(broker: SQLiteBroker, keys: str, partition: int = 0) -> list[Stored]:
    await broker.append("orders", of_keys(keys, partition))
    return await broker.read("orders", partition, None, 100)


def progress(grant: Grant, seq: int, w: str, *effects: Effect, h: str = "", open: tuple[str, ...] = ()) -> Commit:
    return Commit(grant.partition, grant.epoch, seq, w, int(w or 0), h, open, effects, 1, 0, ())


async def info(broker: SQLiteBroker) -> GroupInfo:
    return (await broker.admin.groups("orders"))[0]


def rows(path: Path, table: str) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


def by_hand(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


async def test_a_repeat_of_a_commit_answers_the_same_and_changes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        ledger = await entered(broker)
        a, b, _ = await stored(broker, "aba")
        grant = await granted(ledger)
        assert (grant.epoch, grant.w, grant.ordinal, grant.clean, grant.last) == (1, "", 0, True, "3")
        output = Output("orders", Record(1, "more", "order.placed", b"x"))
        first = progress(grant, 1, "2", Park("a", a, HELD_MS, 1), Bury(b, "failed", "why", 1), output)
        for _ in range(2):
            assert await ledger.commit([first]) == [Committed(State.STORED, frozenset(), 1)]
        now = await info(broker)
        assert (now.lag, now.pending, now.scheduled, now.dead, now.done) == (2, 1, 1, 1, 1)
        assert len(await broker.read("orders", 1, None, 10)) == 1
        second = progress(grant, 2, "2", Pop("a", "1"))
        for _ in range(2):
            assert await ledger.commit([second]) == [Committed(State.STORED, frozenset("a"), 0)]
        assert (await info(broker)).done == 2


async def test_only_the_first_event_of_a_key_is_delayed_or_removed(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        ledger = await entered(broker)
        one, two = await stored(broker, "aa")
        grant = await granted(ledger)
        await ledger.commit([progress(grant, 1, "2", Park("a", one, HELD_MS, 1), Park("a", two))])
        wrong = (Pop("a", "2"), Pop("b", "1"), Delay("a", "2", 0, 7, 7), Delay("b", "1", 0, 7, 7))
        assert await ledger.commit([progress(grant, 2, "2", *wrong)]) == [Committed(State.STORED, frozenset("b"), 2)]
        [key] = await broker.admin.keys("orders", "billing")
        assert (key.events, key.first, key.attempts, key.due_ms) == (2, one.position, 1, None)
        assert await ledger.heads(0, grant.epoch, [], 10) == ([], HELD_MS)
        await ledger.commit([progress(grant, 3, "2", Pop("a", "1"))])
        assert await ledger.heads(0, grant.epoch, ["a"], 10) == ([], float("inf"))
        heads = await ledger.heads(0, grant.epoch, [], 10)
        assert heads is not None
        assert [(head.key, head.claim) for head in heads.heads] == [("a", Claim.of(two, 1, token=1))]


async def test_who_had_a_lease_before_changes_nothing_any_more(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as one, opened(tmp_path / "shop.db") as two:
        former, latter = await entered(one), await entered(two)
        a, b = await stored(one, "ab")
        old = await granted(former)
        await former.commit([progress(old, 1, "1", Park("a", a, 0, 1))])
        assert await former.heads(0, old.epoch, [], 1) is not None
        assert await former.begin(0, old.epoch, ["2"])
        seen = (await latter.look()).leases[0]
        assert await latter.acquire(seen) is None, "its owner lives"
        await former.leave()
        grant = await latter.acquire(seen)
        assert grant is not None
        assert (grant.epoch, grant.w, grant.clean, grant.last) == (2, "1", False, "2")
        assert (grant.parked, grant.events_parked, grant.notes) == (frozenset("a"), 1, {"2": 1})
        assert await former.commit([progress(old, 2, "2", Bury(b, "failed", "", 1))]) == [Committed(State.LOST)]
        assert await former.heads(0, old.epoch, [], 1) is None
        assert not await former.begin(0, old.epoch, ["2"])
        await former.release(0, old.epoch, "")
        with pytest.raises(LeaseLost):
            await former.beat()
        with pytest.raises(LeaseLost):
            await former.acquire(seen)
        assert (await latter.look()).leases[0].owner == latter.name
        assert (await info(two)).dead == 0
        heads = await latter.heads(0, grant.epoch, [], 1)
        assert heads is not None
        assert [(head.claim.attempt, head.claim.suspect) for head in heads.heads] == [(3, 2)]


async def test_the_row_of_a_silent_member_goes_when_it_owns_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        silent, living = await entered(broker), await entered(broker)
        grant = await granted(silent)
        me = living._me
        assert await broker.writer.ask(lambda db: ordered.tidy(db, me, 2)) == [], "it is as silent itself"
        await living.beat()
        assert await broker.writer.ask(lambda db: ordered.tidy(db, me, 2)) == [], "it owns a partition"
        await silent.release(0, grant.epoch, living.name)
        assert await broker.writer.ask(lambda db: ordered.tidy(db, me, 2)) == [silent.name]
        view = await living.look()
        assert view.members == {living.name}
        assert view.leases[0] == Lease(0, "", grant.epoch, "", living.name)
        with pytest.raises(LeaseLost):
            await silent.beat()


async def test_a_file_that_came_back_with_less_begins_anew_from_its_first_event(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        ledger = await entered(broker)
        await stored(broker, "abcde")
        grant = await granted(ledger)
        await ledger.begin(0, grant.epoch, ["5"])
        await ledger.commit([progress(grant, 1, "3", h="5", open=("4",))])
        await ledger.leave()
        by_hand(path, f"DELETE FROM event WHERE row & {2**40 - 1} > 2", "UPDATE log SET last = 2 WHERE last = 5")
        heir = await entered(broker)
        again = await granted(heir)
        assert (again.regressed, again.w, again.ordinal, again.h, again.open) == (True, "", 0, "", frozenset())
        assert (again.last, again.notes, again.lost) == ("2", {}, 0)
        assert len(await heir.read({0: Cursor("", 10, 2)}, 10, 0)) == 2


async def test_events_that_somebody_deleted_unsettled_are_counted_once_and_passed(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        ledger = await entered(broker)
        await stored(broker, "abcdefgh")
        grant = await granted(ledger)
        await ledger.commit([progress(grant, 1, "1", h="6", open=("2", "5"))])
        await ledger.release(0, grant.epoch, "")
        by_hand(path, f"DELETE FROM event WHERE row & {2**40 - 1} <= 3")
        grant = await granted(ledger)
        assert (grant.lost, grant.w, grant.h, set(grant.open)) == (1, "3", "6", {"5"})
        await ledger.release(0, grant.epoch, "")
        by_hand(path, "DELETE FROM event")
        grant = await granted(ledger)
        assert (grant.lost, grant.w, grant.h, grant.open) == (3, "8", "", frozenset())
        assert (await info(broker)).lag == 0
        await ledger.release(0, grant.epoch, "")
        assert (await granted(ledger)).lost == 0


async def test_when_dead_letters_have_no_room_nothing_of_the_commit_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered, "MAX_DEAD", 1)
    async with opened(tmp_path / "shop.db") as broker:
        ledger = await entered(broker)
        a, b = await stored(broker, "ab")
        grant = await granted(ledger)
        await ledger.commit([progress(grant, 1, "1", Bury(a, "failed", "", 1))])
        full = progress(grant, 2, "2", Park("b", b), Bury(b, "failed", "", 1))
        assert await ledger.commit([full]) == [Committed(State.DEAD_FULL)]
        now = await info(broker)
        assert (now.lag, now.pending, now.dead, now.done) == (1, 0, 1, 1)
        assert (await ledger.commit([progress(grant, 2, "2", Park("b", b))]))[0].state is State.STORED


async def test_on_a_full_disk_what_needs_no_room_is_stored_all_the_same(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await broker.subscribe(IN_ORDER)
        big = [Record(partition, f"p{partition}", "order.placed", b"x" * 300_000) for partition in range(2)]
        await broker.append("orders", big)
        claims = await eventually(lambda: consumer.fetch(2, 0.1), bool)
        claims += await consumer.fetch(2, 0.1) if len(claims) < 2 else []
        await broker.writer.ask(lambda db: db.execute("PRAGMA max_page_count = 1").fetchall())
        dead, done = sorted(claims, key=lambda claim: claim.position.partition)
        settlements = [*outcomes([dead], Dead("failed")), *outcomes([done])]
        with pytest.raises(BrokerFull):
            await consumer.settle(settlements)
        now = await info(broker)
        assert (now.done, now.dead, now.lag) == (1, 0, 1)
        await broker.writer.ask(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchall())
        await consumer.keep()
        now = await info(broker)
        assert (now.done, now.dead, now.lag) == (1, 1, 0)
        await consumer.close()


async def test_waking_ends_a_read_that_waits(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        ledger = await entered(broker)
        reading = asyncio.create_task(ledger.read({0: Cursor("", 10, 1)}, 10, 60.0))
        await asyncio.sleep(0)
        ledger.wake()
        assert await asyncio.wait_for(reading, 10) == []
    ledger.wake()  # also of a broker that is closed


async def test_a_partition_with_much_to_read_leaves_room_for_the_others(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        ledger = await entered(broker)
        for partition in range(2):
            await stored(broker, "a" * 50, partition)
        claims = await ledger.read({0: Cursor("", 100, 1), 1: Cursor("45", 100, 2)}, 20, 0)
        assert [claim.position.partition for claim in claims] == [0] * 10 + [1] * 5
        assert [claim.token for claim in claims] == [1] * 10 + [2] * 5
        assert claims[-1].position == Position(1, "50")


async def test_what_a_killed_process_had_goes_on_in_order_in_another_one(tmp_path: Path) -> None:
    path, url = tmp_path / "shop.db", f"sqlite:///{tmp_path}/shop.db"
    async with opened(path) as broker:
        with process("consume", url, "ordered") as child:
            for n in range(30):
                more = [Record(p, f"{p}.{key}.{n}", "order.placed", b"x", key) for p in range(2) for key in "abc"]
                await broker.append("orders", more)
            handled = await asyncio.to_thread(lines, child, 50)
            child.kill()
            handled += await asyncio.to_thread(rest, child)
        consumer = await broker.subscribe(IN_ORDER)

        async def left() -> GroupInfo:
            await consumer.keep()
            claims = await consumer.fetch(20, 0.1)
            handled.extend(ids(claims))
            await consumer.settle(outcomes(claims))
            return await info(broker)

        await eventually(left, lambda now: now.lag == 0)
        await consumer.close()
        for partition in range(2):
            published = [event.record.id for event in await broker.read("orders", partition, None, 1_000)]
            first_handled = dict.fromkeys(name for name in handled if name.startswith(f"{partition}."))
            assert list(first_handled) == published
    assert intact(path)


async def test_the_next_member_begins_where_the_last_one_left_off(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as one, opened(tmp_path / "shop.db") as two:
        first = await one.subscribe(IN_ORDER)
        await one.append("orders", [*of_keys("aab"), *of_keys("c", 1)])
        claims: list[Claim] = []

        async def fetched() -> list[Claim]:
            claims.extend(await first.fetch(10, 0.1))
            return claims

        await eventually(fetched, lambda claims: len(claims) == 4)
        by_id = {claim.record.id: claim for claim in claims}
        failed = Settlement(by_id["a0"].stored.position, Later(0, "busy"))
        behind = Settlement(by_id["a1"].stored.position, Later(0, "", counted=False))
        done = outcomes([by_id["b2"]])
        assert await first.settle([failed, behind, *done]) == [True] * 3
        await first.close()
        second = await two.subscribe(IN_ORDER)
        again: list[Claim] = []

        async def handled() -> list[Claim]:
            await second.keep()
            got = await second.fetch(10, 0.1)
            await second.settle(outcomes(got))
            again.extend(got)
            return again

        await eventually(handled, lambda again: len(again) == 3)
        assert {(claim.record.id, claim.attempt, claim.suspect) for claim in again} == {
            ("a0", 2, 0),
            ("a1", 1, 0),
            ("c0", 1, 0),
        }
        assert [name for name in ids(again) if name.startswith("a")] == ["a0", "a1"]
        assert {claim.token for claim in again} == {2}
        await second.close()


async def test_a_group_with_nothing_to_finish_changes_its_way_and_keeps_its_place(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        queue = await joined(broker)
        await broker.append("orders", of_keys("ab"))
        [a, b] = await queue.fetch(2, 0)
        with pytest.raises(NotSupported, match="without order"):
            await entered(broker)
        assert await queue.settle(outcomes([a])) == [True]
        await queue.close()
        with pytest.raises(NotSupported, match="without order"):
            await entered(broker)
        queue = await joined(broker)
        assert await queue.settle(outcomes(await queue.fetch(2, 1.0))) == [True]
        await queue.close()
        await broker.append("orders", of_keys("cd"))
        ledger = await entered(broker)
        grant = await granted(ledger)
        assert (grant.epoch, grant.w) == (1, b.stored.position.offset)
        with pytest.raises(NotSupported, match="order of keys"):
            await SQLiteConsumer(broker, Subscription(ORDERS, "billing", "shop", lease_s=LEASE_S)).enter()
        [c, d] = await ledger.read({0: Cursor("2", 10, 1)}, 10, 0)
        await ledger.commit([progress(grant, 1, "3", Park("c", c.stored, HELD_MS, 1))])
        await ledger.leave()
        with pytest.raises(NotSupported, match="order of keys"):
            await SQLiteConsumer(broker, Subscription(ORDERS, "billing", "shop", lease_s=LEASE_S)).enter()
        [key] = await broker.admin.keys("orders", "billing")
        assert await broker.admin.drop_keys([key]) == [1]
        by_hand(path, "UPDATE member SET beat_s = -1000")
        queue = await joined(broker)
        assert ids(await queue.fetch(10, 1.0)) == [d.stored.record.id]
        assert await ledger.commit([progress(grant, 2, "4")]) == [Committed(State.LOST)]
        await queue.close()


async def test_a_silent_member_does_not_keep_a_group_from_changing_its_way_and_is_fenced(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        silent = await joined(broker)
        by_hand(path, "UPDATE member SET beat_s = beat_s - 1000")
        ledger = await entered(broker)
        assert (await ledger.look()).members == {ledger.name}
        assert await silent.settle([Settlement(Position(0, "1"), Done())]) == [False]
        with pytest.raises(NotSupported):
            await silent.keep()
        await silent.close()


async def test_a_replayed_letter_that_comes_again_by_itself_comes_once(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await broker.append("orders", of_keys("ab"))
        assert await consumer.settle(outcomes(await consumer.fetch(2, 0), Dead("failed"))) == [True, True]
        letters = await broker.admin.dead("orders", "billing")
        await consumer.close()
        await broker.admin.seek("orders", "billing", "beginning")
        consumer = await joined(broker)
        [held] = await consumer.fetch(1, 0)
        assert await broker.admin.replay(letters) == [True, True]
        rest_ = await consumer.fetch(5, 1.0)
        assert ids([held, *rest_]) == ["a0", "b1"]
        assert await consumer.settle(outcomes([held, *rest_])) == [True, True]
        now = await info(broker)
        assert (now.lag, now.pending, now.dead, now.done, now.replayed) == (0, 0, 0, 2, 2)
        await consumer.close()


async def test_keys_that_are_released_dropped_or_passed_by_a_seek_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        ledger = await entered(broker)
        events = await stored(broker, "aabbc")
        grant = await granted(ledger)
        parks = [Park(event.record.key or "", event, HELD_MS, 3, 2, "why") for event in events]
        await ledger.commit([progress(grant, 1, "5", *parks)])
        a, b, c = await broker.admin.keys("orders", "billing")
        assert await broker.admin.release_keys([a]) == [True]
        assert (await ledger.look()).leases[0].due_ms == 0
        heads = await ledger.heads(0, grant.epoch, [], 5)
        assert heads is not None
        assert [(head.key, head.claim.attempt, head.claim.postponed) for head in heads.heads] == [("a", 1, 0)]
        assert heads.due_ms == HELD_MS
        assert await broker.admin.drop_keys([b]) == [2]
        with pytest.raises(BrokerRefused, match="members"):
            await broker.admin.seek("orders", "billing", "beginning")
        by_hand(path, "UPDATE event SET stored_ms = row & 7", "UPDATE log SET last_ms = 9")
        await broker.admin.seek("orders", "billing", 5, live=True)
        assert [key.key for key in await broker.admin.keys("orders", "billing")] == ["a"]
        assert await broker.admin.parked(c) == []
        assert await ledger.commit([progress(grant, 2, "5")]) == [Committed(State.LOST)]
        again = await granted(ledger)
        assert (again.epoch, again.w, again.clean) == (3, "4", True)
        assert (again.parked, again.events_parked) == (frozenset("a"), 2)
        assert (await info(broker)).pending == 2


async def test_when_a_seek_removes_the_head_of_a_key_the_next_one_begins_anew(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        ledger = await entered(broker)
        one, two = await stored(broker, "aa")
        grant = await granted(ledger)
        replayed = Park("a", one)  # behind a later event, as a replayed dead letter is
        await ledger.commit([progress(grant, 1, "2", Park("a", two, HELD_MS, 3, 2, "why"), replayed)])
        await broker.admin.seek("orders", "billing", "beginning", live=True)
        assert await broker.admin.keys("orders", "billing") == []
        again = await granted(ledger)
        await ledger.commit([progress(again, 1, "2", Park("a", two, HELD_MS, 3, 2, "why"), replayed)])
        await broker.writer.ask(lambda db: db.execute("UPDATE event SET stored_ms = row & 7").rowcount)
        await broker.admin.seek("orders", "billing", 2, live=True)
        [key] = await broker.admin.keys("orders", "billing")
        assert (key.first, key.events, key.attempts, key.due_ms, key.error) == (one.position, 1, 0, 0, "")


async def test_nothing_is_left_of_a_forgotten_group(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    tables = ("grp", "cursor", "member", "pending", "dead", "lease", "parked", "parked_key", "note")
    async with opened(path) as broker:
        ledger = await entered(broker)
        a, b = await stored(broker, "ab")
        grant = await granted(ledger)
        await ledger.begin(0, grant.epoch, ["2"])
        await ledger.commit([progress(grant, 1, "1", Park("a", a, HELD_MS, 1), Bury(b, "failed", "", 1))])
        with pytest.raises(BrokerRefused, match="has 1 members"):
            await broker.admin.forget("orders", "billing")
        by_hand(path, "UPDATE member SET beat_s = beat_s - 1000")
        await broker.admin.forget("orders", "billing")
        assert [rows(path, table) for table in tables] == [0] * len(tables)
        assert await ledger.commit([progress(grant, 2, "2")]) == [Committed(State.LOST)]
        for call in (ledger.beat, ledger.look):
            with pytest.raises(LeaseLost):
                await call()
        assert rows(path, "event") == 2


async def test_no_statement_of_an_ordered_group_scans_a_table(tmp_path: Path) -> None:
    path, statements = tmp_path / "shop.db", set[str]()
    async with opened(path) as broker:
        for ask in (broker.writer.ask, broker.reader.ask):
            await ask(lambda db: db.set_trace_callback(statements.add))
        ledger, other = await entered(broker), await entered(broker)
        a, b = await stored(broker, "ab")
        grant = await granted(ledger)
        await ledger.beat()
        await ledger.begin(0, grant.epoch, ["1"])
        await ledger.commit([progress(grant, 1, "2", Park("a", a), Park("b", b, HELD_MS))])
        await ledger.heads(0, grant.epoch, [], 5)
        await ledger.commit(
            [progress(grant, 2, "2", Delay("a", "1", 0, 1, 0), Pop("b", "2"), Bury(b, "failed", "", 1))]
        )
        await ledger.read({0: Cursor("", 10, 1), 1: Cursor("", 10, 1)}, 10, 0)
        await other.ask((await other.look()).leases[0])
        me = ledger._me
        await broker.writer.ask(lambda db: ordered.tidy(db, me, 0))
        await ledger.release(0, grant.epoch, other.name)
        await broker.admin.replay(await broker.admin.dead("orders", "billing"))
        await broker.admin.groups("orders")
        [key, _] = await broker.admin.keys("orders", "billing")
        await broker.admin.parked(key)
        await broker.admin.release_keys([key])
        await broker.admin.seek("orders", "billing", "now", live=True)
        await ledger.leave()
        for ask in (broker.writer.ask, broker.reader.ask):
            await ask(lambda db: db.set_trace_callback(None))
    with closing(sqlite3.connect(path)) as connection:
        looked_at = [sql for sql in statements if sql.split()[0] in ("SELECT", "INSERT", "UPDATE", "DELETE")]
        assert len(looked_at) > 40
        for sql in looked_at:
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}")]
            assert not any(step.startswith("SCAN") and "(subquery" not in step for step in plan), (sql, plan)


def version_1(path: Path) -> None:
    """A file as the first version made it: two events in a partition, the first one done, a third one put off."""
    base = 1024 << 40
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_1.read_text("utf-8"))
        for pragma in (f"application_id = {APPLICATION_ID}", "user_version = 1", "journal_mode = WAL"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("INSERT INTO stream VALUES (1, 'orders', 2, '', 'json')")
        connection.execute("INSERT INTO log VALUES (1024, 3, 5, 3), (1025, 0, 0, 0)")
        for n in (1, 2, 3):
            event = (base | n, f"e-{n}", "order.placed", "shop", n, None, "a", None, b"x")
            connection.execute("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", event)
        connection.execute("INSERT INTO grp (id, stream, name, owner, done) VALUES (1, 1, 'billing', 'shop', 1)")
        connection.execute("INSERT INTO cursor (grp, log, seq) VALUES (1, 1024, 2), (1, 1025, 0)")
        connection.execute(
            "INSERT INTO pending (grp, consumer, row, attempt, due_ms) VALUES (1, 0, ?, 1, 0)", (base | 2,)
        )
        connection.commit()


def shape(path: Path) -> dict[str, object]:
    with closing(sqlite3.connect(path)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master ORDER BY name")]
        return {name: connection.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in names}


async def test_a_file_of_the_first_version_is_upgraded_and_keeps_all_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    version_1(path)
    async with opened(path) as broker, opened(path) as beside:
        assert [event.record.id for event in await beside.read("orders", 0, None, 10)] == ["e-1", "e-2", "e-3"]
        now = await info(broker)
        assert (now.group, now.owner, now.lag, now.pending, now.done) == ("billing", "shop", 1, 1, 1)
        with pytest.raises(NotSupported, match="without order"):
            await entered(broker)
        consumer = await joined(broker)
        claims = await consumer.fetch(10, 1.0)
        assert [(claim.record.id, claim.attempt) for claim in claims] == [("e-2", 2), ("e-3", 1)]
        assert await consumer.settle(outcomes(claims)) == [True, True]
        await consumer.close()
        ledger = await entered(beside)
        assert (await granted(ledger)).w == "3"
        await ledger.leave()
    async with opened(tmp_path / "new.db"):
        pass
    assert shape(path) == shape(tmp_path / "new.db")
    assert path.read_bytes()[60:64] == SCHEMA_VERSION.to_bytes(4)
    assert intact(path)


async def test_an_upgrade_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shop.db"
    version_1(path)
    before = shape(path)
    whole = file._schema(1)
    monkeypatch.setattr(file, "_schema", lambda version: whole.replace("CREATE TABLE note", "CREATE TABLE grp"))
    with pytest.raises(BrokerRefused, match="grp"):
        async with opened(path):
            pass
    assert shape(path) == before
    monkeypatch.undo()
    async with opened(path) as broker:
        assert (await info(broker)).pending == 1
