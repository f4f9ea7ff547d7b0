"""What a group in a file does beyond the suite that all brokers pass: who may judge, bounds, ties, and plans."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.brokers.base import Dead, Later, Record, Subscription
from millstream.brokers.sqlite import group, member
from millstream.brokers.sqlite.watch import Watch
from tests.sqlite.places import ORDERS, Clockwork, broker_at, eventually, ids, joined, opened, outcomes, records


def test_a_tick_seen_a_lease_ago_tells_who_is_silent() -> None:
    watch = Watch(1.0)
    for tenth in range(10):
        watch.beat(tenth / 10, tenth / 10)
        watch.saw(tenth / 10, tenth)
        assert watch.silent_at(tenth / 10) == -1
    watch.saw(1.0, 10)
    assert watch.silent_at(1.0) == 0
    assert watch.silent_at(1.45) == 4


def test_a_gap_and_a_smaller_tick_make_it_begin_anew() -> None:
    watch = Watch(1.0)
    for now_s, tick in ((0.0, 1), (0.4, 2), (0.95, 3)):
        watch.beat(now_s, now_s)
        watch.saw(now_s, tick)
    assert watch.silent_at(1.3) == -1, "between 0.4 and 0.95 it may have been stopped"
    watch.beat(1.3, 1.3)
    watch.saw(1.3, 2)
    watch.beat(1.9, 1.9)
    assert watch.silent_at(1.95) == -1, "another file's tick"
    assert watch.silent_at(2.4) == 2


def test_who_could_not_beat_itself_judges_nobody() -> None:
    watch = Watch(1.0)
    watch.beat(0.0, 0.0)
    for tenth in range(20):
        watch.saw(tenth / 10, 1)
        assert watch.silent_at(tenth / 10) == -1, "it has not beaten since, perhaps nobody could"
    watch.beat(1.95, 1.95)
    assert watch.silent_at(1.95) == -1
    for tenth in range(20, 31):
        watch.beat(tenth / 10, tenth / 10)
        watch.saw(tenth / 10, 1)
    assert watch.silent_at(3.05) == 1


@given(st.lists(st.tuples(st.floats(0, 0.8), st.integers(0, 3)), max_size=60))
def test_nobody_is_judged_by_a_tick_younger_than_a_lease(steps: list[tuple[float, int]]) -> None:
    watch, now_s, tick, history = Watch(1.0), 0.0, 0, []
    for pause_s, beats in steps:
        now_s, tick = now_s + pause_s, tick + beats
        watch.beat(now_s, now_s)
        watch.saw(now_s, tick)
        history.append((now_s, tick))
        judged = watch.silent_at(now_s)
        assert judged <= max((seen for at_s, seen in history if at_s <= now_s - 1.0), default=-1)


async def test_a_step_of_the_wall_clock_takes_nothing_from_anybody(tmp_path: Path) -> None:
    clock = Clockwork()
    broker = broker_at(tmp_path / "shop.db", clock=clock)
    await broker.open()
    await broker.declare(ORDERS)
    slow, other = await joined(broker), await joined(broker)
    await broker.append("orders", records("a"))
    claims = await slow.fetch(1, 0)
    for shift_ms in (3_600_000, -3_600_000):
        clock.shift_ms = shift_ms
        for consumer in (slow, other, slow, other):
            assert (await consumer.keep()).lost == frozenset()
    assert await slow.settle(outcomes(claims)) == [True]
    await slow.close()
    await other.close()
    await broker.close()


async def test_a_machine_that_slept_longer_than_the_lease_takes_nothing_from_anybody(tmp_path: Path) -> None:
    clock = Clockwork()
    broker = broker_at(tmp_path / "shop.db", clock=clock)
    await broker.open()
    await broker.declare(ORDERS)
    slow, other = await joined(broker), await joined(broker)
    await broker.append("orders", records("a"))
    claims = await slow.fetch(1, 0)
    await other.keep()
    await slow.keep()
    clock.shift_s = 3_600
    assert await other.fetch(1, 0.1) == []
    assert (await other.keep()).lost == (await slow.keep()).lost == frozenset()
    assert await slow.settle(outcomes(claims)) == [True]
    await slow.close()
    await other.close()
    await broker.close()


async def test_who_is_as_silent_as_those_it_judges_judges_nobody(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        subscription = Subscription(ORDERS, "billing", "shop")

        def job(db: sqlite3.Connection) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
            one, two = (member.enter(db, "orders", subscription, member.Life(n, n, 0.0, 0)) for n in ("one", "two"))
            frozen = group.evict(db, two, 2)
            beat = member.beat(db, two, 0.0, 0)
            assert beat is not None
            assert beat.tick == 3
            assert group.evict(db, one, 2) == []
            return frozen, group.evict(db, two, 2)

        assert await broker.writer.ask(job) == ([], [("one", 0)])


async def test_a_consumer_that_was_evicted_claims_nothing_before_it_told_what_it_lost(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        zombie, other = await joined(broker), await joined(broker)
        await broker.append("orders", records("a", "b"))
        held = await zombie.fetch(2, 0)
        taken = []

        async def beat() -> int:
            await other.keep()
            taken.extend(await other.fetch(1, 0.05))
            return len(taken)

        await eventually(beat, lambda count: count == 1)
        await broker.append("orders", records("c"))
        assert await zombie.fetch(5, 0.05) == []
        assert (await zombie.keep()).lost == {claim.position for claim in held}
        again, new = await zombie.fetch(5, 1.0)
        assert (again.attempt, again.suspect) == (2, 1)
        assert ids([new]) == ["c"]
        assert await zombie.settle(outcomes([again, new])) == [True, True]
        await zombie.close()
        await other.close()


async def test_when_dead_letters_have_no_room_an_event_waits_in_place_of_going_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "MAX_DEAD", 2)
    clock = Clockwork()
    broker = broker_at(tmp_path / "shop.db", clock=clock)
    await broker.open()
    await broker.declare(ORDERS)
    consumer = await joined(broker)
    await broker.append("orders", [*records("a", "b", "c"), *records("d", partition=1)])
    claims = await consumer.fetch(10, 0)
    assert await consumer.settle(outcomes(claims, Dead("failed", "no luck"))) == [True] * 4
    letters = await broker.admin.dead("orders", "billing")
    assert sorted(letter.stored.record.id for letter in letters) == ["a", "b", "d"]
    (waiting,) = await broker.admin.pending("orders", "billing", 10)
    assert waiting.due_ms is not None
    assert waiting.due_ms - clock.now_ms() > 290_000
    assert await consumer.fetch(10, 0) == []
    assert await broker.admin.drop([letter for letter in letters if letter.stored.record.id == "a"]) == [True]
    clock.shift_ms = 300_000
    claims = await consumer.fetch(10, 1.0)
    assert ids(claims) == ["c"]
    assert await consumer.settle(outcomes(claims, Dead("failed"))) == [True]
    (info,) = await broker.admin.groups("orders")
    assert (info.dead, info.dropped, info.pending) == (3, 1, 0)
    await consumer.close()
    await broker.close()


async def test_a_fetch_returns_at_most_a_few_megabytes_and_always_something(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        for n in range(6):
            await broker.append("orders", records(f"e-{n}", size_bytes=1_000_000))
        first = await consumer.fetch(10, 0)
        second = await consumer.fetch(10, 0)
        assert (len(first), len(second)) == (5, 1)
        assert await consumer.settle(outcomes(first, Later(0, "again"))) == [True] * 5
        assert len(await consumer.fetch(10, 0)) == 5
        await consumer.close()


async def test_a_busy_partition_does_not_starve_the_others(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        for partition in range(2):
            names = [f"p{partition}-{n}" for n in range(50)]
            await broker.append("orders", records(*names, partition=partition))
        seen = {claim.position.partition for _ in range(2) for claim in await consumer.fetch(10, 0)}
        assert seen == {0, 1}
        await consumer.close()


async def test_what_is_stored_is_there_as_text_that_a_person_can_read(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        await broker.append(
            "orders", [Record(1, "id-1", "order.placed", b'{"n":1}', key="käse", headers=b"{}", source="app")]
        )
    with closing(sqlite3.connect(path)) as connection:
        row = connection.execute("SELECT id, type, source, subject, CAST(data AS TEXT) FROM event").fetchone()
    assert row == ("id-1", "order.placed", "app", "käse", '{"n":1}')


async def test_no_statement_of_a_healthy_group_scans_a_table(tmp_path: Path) -> None:
    """Every statement that a consumer, a publisher and a reader run is explained by SQLite itself."""
    path = tmp_path / "shop.db"
    statements: set[str] = set()
    async with opened(path) as broker:
        for ask in (broker.writer.ask, broker.reader.ask):
            await ask(lambda db: db.set_trace_callback(statements.add))
        one, two = await joined(broker), await joined(broker)
        await broker.append("orders", records("a", "b", "c", "d"))
        claims = await one.fetch(4, 0)
        await one.begin([claims[0].position])
        await one.settle(
            [*outcomes(claims[1:2], Later(0, "x")), *outcomes(claims[2:3], Dead("failed")), *outcomes(claims[3:])]
        )
        await two.keep()
        await two.fetch(5, 0.05)
        await broker.admin.replay(await broker.admin.dead("orders", "billing"))
        await broker.admin.pending("orders", "billing", 5)
        await broker.locate("orders", 5)
        await broker.wait("orders", {0: None}, 0)
        await one.release(frozenset({0}))
        await one.close()
        await two.close()
        for ask in (broker.writer.ask, broker.reader.ask):
            await ask(lambda db: db.set_trace_callback(None))
    with closing(sqlite3.connect(path)) as connection:
        looked_at = [sql for sql in statements if sql.split()[0] in ("SELECT", "INSERT", "UPDATE", "DELETE")]
        assert len(looked_at) > 30
        for sql in looked_at:
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}")]
            assert not any(step.startswith("SCAN") and step != "SCAN CONSTANT ROW" for step in plan), (sql, plan)
            assert not any("TEMP B-TREE" in step for step in plan), (sql, plan)
