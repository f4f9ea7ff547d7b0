"""Storing in a file, beyond the suite that all brokers pass: what it costs, plans, counters, kills in the middle."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from millstream.brokers.base import LATER, Output, Policy, Position, Record, Settlement, Slot, StreamSpec
from millstream.brokers.sqlite import log, storing, verbs
from millstream.brokers.sqlite.broker import SQLiteBroker
from millstream.errors import BrokerFull, Unconfirmed
from tests.sqlite.places import (
    ORDERS,
    Clockwork,
    counted,
    intact,
    joined,
    lines,
    opened,
    outcomes,
    process,
    records,
    rest,
    tended,
)
from tests.sqlite.process import KEPT, PLAIN

HOUR_MS = 3_600_000
REMEMBERING = Policy(dedupe_ms=HOUR_MS, dedupe_ids=10_000)
ROUNDS = 6


def later(name: str, due_ms: int, *, partition: int = 0) -> Record:
    return replace(records(name, partition=partition)[0], due_ms=due_ms)


async def names(broker: SQLiteBroker, stream: str = "orders", partition: int = 0) -> list[str]:
    return [event.record.id for event in await broker.read(stream, partition, None, 10_000)]


@pytest.mark.parametrize("events", [1, storing.AT_ONCE - 1, storing.AT_ONCE, storing.AT_ONCE + 1, 3 * storing.AT_ONCE])
async def test_any_number_of_events_is_stored_in_order_each_as_it_is(tmp_path: Path, events: int) -> None:
    keys = [None, "", "k"]
    given = [
        Record(n % 2, f"e-{n}", f"type-{n}", b"x" * n, keys[n % 3], n % 4, b"{}" if n % 5 else b"", None, f"source-{n}")
        for n in range(events)
    ]
    async with opened(tmp_path / "shop.db") as broker:
        positions = await broker.append("orders", given)
        assert positions == [Position(n % 2, str(n // 2 + 1)) for n in range(events)]
        for partition in range(2):
            found = await broker.read("orders", partition, None, events)
            expected = [
                replace(record, key=record.key or None, time_ms=record.time_ms or stored.record.time_ms)
                for record, stored in zip(given[partition::2], found, strict=True)
            ]
            assert [stored.record for stored in found] == expected
    assert counted(tmp_path / "shop.db")


async def test_a_stream_without_a_policy_costs_four_kinds_of_statements(tmp_path: Path) -> None:
    statements: list[str] = []
    async with opened(tmp_path / "shop.db") as broker:
        await broker.writer.ask(lambda db: db.set_trace_callback(statements.append))
        await broker.append("orders", records(*(f"e-{n}" for n in range(1_000))))
        await broker.writer.ask(lambda db: db.set_trace_callback(None))
    kinds = Counter(statement.split()[0] for statement in statements)
    assert {kind: kinds[kind] for kind in ("SELECT", "INSERT", "UPDATE", "DELETE")} == {
        "SELECT": 2,
        "INSERT": 1_000 // storing.AT_ONCE,
        "UPDATE": 1,
        "DELETE": 0,
    }


async def test_an_append_that_is_refused_remembers_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        await broker.admin.apply("orders", replace(REMEMBERING, ceiling_events=3))
        await broker.append("orders", records("a", "b"))
        with pytest.raises(BrokerFull, match=r"orders.*2 events.*ceiling is 3"):
            await broker.append("orders", records("a", "c", "d"))
        await broker.append("orders", records("b", "c"))
        assert await names(broker) == ["a", "b", "c"]
        assert [info.repeats for info in await broker.admin.streams()] == [1]
    assert counted(tmp_path / "shop.db")


async def test_ids_whose_time_is_up_make_room_and_go(tmp_path: Path) -> None:
    clock = Clockwork()
    async with opened(tmp_path / "shop.db", clock=clock) as broker:
        await broker.admin.apply("orders", Policy(dedupe_ms=HOUR_MS, dedupe_ids=3))
        first = await broker.append("orders", records("a", "b", "c"))
        with pytest.raises(BrokerFull, match="3 ids in partition 0"):
            await broker.append("orders", records("d"))
        clock.shift_ms = HOUR_MS - 60_000
        assert await broker.append("orders", records("c", "b")) == [first[2], first[1]]
        clock.shift_ms = HOUR_MS + 60_000
        assert await broker.append("orders", records("a", "d")) == [Position(0, "4"), Position(0, "5")]
        assert counted(tmp_path / "shop.db")
        await broker.admin.apply("orders", Policy())
        await broker.tend("orders")
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        assert connection.execute("SELECT COUNT(*) FROM remembered").fetchone() == (0,)
    assert counted(tmp_path / "shop.db")


async def test_an_event_for_later_answers_where_it_lies_once_it_has_come(tmp_path: Path) -> None:
    clock = Clockwork()
    async with opened(tmp_path / "shop.db", clock=clock) as broker:
        await broker.admin.apply("orders", REMEMBERING)
        record = later("a", clock.now_ms() + HOUR_MS // 2, partition=1)
        assert await broker.append("orders", [record, record]) == [Position(1, LATER)] * 2
        assert counted(tmp_path / "shop.db")
        clock.shift_ms = HOUR_MS // 2
        assert (await broker.tend("orders")).published == 1
        assert await broker.append("orders", [record]) == [Position(1, "1")]
        assert counted(tmp_path / "shop.db")


async def test_a_thousand_events_that_fall_due_at_once_come_in_the_order_of_the_call(tmp_path: Path) -> None:
    clock = Clockwork()
    async with opened(tmp_path / "shop.db", clock=clock) as broker:
        due_ms = clock.now_ms() + HOUR_MS
        ids = [f"e-{n}" for n in range(2_500)]
        await broker.append("orders", [later(id_, due_ms) for id_ in ids])
        await broker.append("orders", [replace(later(f"large-{n}", due_ms), data=b"x" * 1_000_000) for n in range(8)])
        clock.shift_ms = HOUR_MS
        rounds = await tended(broker)
        assert [found.published for found in rounds] == [2_508, 0]
        assert await names(broker) == [*ids, *(f"large-{n}" for n in range(8))]


async def test_events_for_later_fill_a_stream_to_its_ceiling_and_wait(tmp_path: Path) -> None:
    clock = Clockwork()
    async with opened(tmp_path / "shop.db", clock=clock) as broker:
        await broker.append("orders", [later(f"e-{n}", clock.now_ms() + n + 1) for n in range(10)])
        clock.shift_ms = HOUR_MS
        for policy, stayed in ((Policy(ceiling_events=4), 4), (Policy(ceiling_bytes=110), 6)):
            await broker.admin.apply("orders", policy)
            found = (await tended(broker))[-1]
            assert await names(broker) == [f"e-{n}" for n in range(stayed)]
            assert found.due_ms is not None and found.due_ms < clock.now_ms() and found.fullness >= 1


async def test_outputs_of_one_call_are_compared_with_each_other_unless_derived(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        await broker.declare(KEPT, REMEMBERING)
        consumer = await joined(broker)
        await broker.append("orders", records("in"))
        (claim,) = await consumer.fetch(1, 1.0)
        own, derived = (records(name)[0] for name in ("own", "derived"))
        put_off = later("later", 1 << 50)
        outputs = [
            *(Output("kept", own), Output("kept", derived, derived=True), Output("kept", own)),
            *(Output("kept", derived, derived=True), Output("kept", put_off), Output("orders", own)),
        ]
        assert await consumer.settle([Settlement(claim.position, outcomes([claim])[0].outcome, outputs)])
        assert await names(broker, "kept") == ["own", "derived", "derived"]
        assert await names(broker) == ["in", "own"]
        infos = {info.spec.name: info for info in await broker.admin.streams()}
        assert (infos["kept"].delayed, infos["kept"].repeats) == (1, 1)
        await consumer.close()
    assert counted(tmp_path / "shop.db")


async def test_what_is_discarded_leaves_no_row_behind(tmp_path: Path) -> None:
    path, kept = tmp_path / "shop.db", StreamSpec("kept", partitions=2)
    async with opened(path) as broker:
        await broker.declare(kept, REMEMBERING)
        for n in range(3):
            await broker.append("kept", records(*(f"e-{n}-{m}" for m in range(1_000)), partition=n % 2))
        await broker.append("kept", [later(f"l-{n}", 1 << 50) for n in range(1_500)])
        await broker.append_slot("kept", Slot("tick", 1), None)
        await broker.append("orders", records("stays"))
        await broker.admin.discard("kept")
        assert await names(broker) == ["stays"]
    with closing(sqlite3.connect(path)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        rows = {name: connection.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0] for name in tables}
    assert {name for name, count in rows.items() if count} == {"stream", "log", "event", "sqlite_sequence"}
    assert (rows["stream"], rows["log"], rows["event"]) == (1, ORDERS.partitions, 1)


async def test_a_stream_whose_discarding_was_cut_off_goes_on_with_what_it_has(tmp_path: Path) -> None:
    spec = StreamSpec("kept")
    async with opened(tmp_path / "shop.db") as broker:
        await broker.declare(spec, replace(REMEMBERING, dedupe_ids=1_510, ceiling_bytes=40_000))
        await broker.append("kept", records(*(f"e-{n}" for n in range(1_500))))
        await broker.append("kept", [later(f"l-{n}", 1 << 50) for n in range(10)])
        for _ in range(5):  # all but the last step
            assert await broker.writer.ask(lambda db: verbs.discard(db, "kept", 0.0))
        infos = {info.spec.name: info for info in await broker.admin.streams()}
        assert (infos["kept"].events, infos["kept"].bytes, infos["kept"].delayed) == (0, 0, 0)
        assert len(await broker.append("kept", records(*(f"e-{n}" for n in range(1_500))))) == 1_500


async def test_a_slot_in_doubt_is_unconfirmed_and_safe_to_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        monkeypatch.setattr("millstream.brokers.sqlite.writer.ANSWER_WITHIN_S", 0.05)
        with process("hold", f"sqlite:///{tmp_path / 'shop.db'}") as holder:
            assert await asyncio.to_thread(lines, holder, 1) == ["inside"]
            with pytest.raises(Unconfirmed):
                await broker.append_slot("orders", Slot("tick", 1), records("a")[0])
        monkeypatch.undo()
        assert not await broker.append_slot("orders", Slot("tick", 1), records("a")[0])
        assert await names(broker) == ["a"]


async def test_no_statement_of_storing_and_housekeeping_scans_a_table(tmp_path: Path) -> None:
    path, statements, clock = tmp_path / "shop.db", set[str](), Clockwork()
    async with opened(path, clock=clock) as broker:
        for ask in (broker.writer.ask, broker.reader.ask):
            await ask(lambda db: db.set_trace_callback(statements.add))
        policy = Policy(
            dedupe_ms=1, dedupe_ids=50, events=4, bytes=10_000, age_ms=1, forget_ms=60_000, ceiling_events=9
        )
        await broker.declare(KEPT, policy)
        queue, ordered = await joined(broker), await joined(broker, "audit", order=True)
        await broker.admin.apply("orders", policy)
        await broker.append("orders", [*records(*"abcdef"), *records("g", partition=1), later("h", clock.now_ms() + 9)])
        assert await broker.append_slot("orders", Slot("tick", 1), records("i")[0])
        await queue.settle(outcomes(await queue.fetch(1, 1.0)))
        clock.shift_ms = 1_000
        with pytest.raises(BrokerFull):
            await broker.append("orders", records("j", "k"))
        await broker.tend("orders")
        await queue.close()
        await ordered.close()
        clock.shift_ms, clock.shift_s = 50_000, 50.0
        assert (await broker.tend("orders")).fading.keys() == {"billing", "audit"}
        await broker.admin.apply("orders", replace(policy, keep=False, dedupe_ms=0))
        assert (await broker.tend("orders")).trimmed == 9
        await broker.admin.streams()
        await broker.admin.groups("orders")
        await broker.admin.slots("orders")
        await broker.admin.discard("orders")
        for ask in (broker.writer.ask, broker.reader.ask):
            await ask(lambda db: db.set_trace_callback(None))
    with closing(sqlite3.connect(path)) as connection:
        looked_at = [sql for sql in statements if sql.split()[0] in ("SELECT", "INSERT", "UPDATE", "DELETE")]
        assert len(looked_at) > 60
        for sql in looked_at:
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}")]
            assert not any(step.startswith("SCAN") and "stream" not in step for step in plan), (sql, plan)
            assert not any("TEMP B-TREE" in step for step in plan), (sql, plan)


async def test_processes_that_are_killed_at_any_moment_store_each_id_each_slot_and_each_due_event_once(
    tmp_path: Path,
) -> None:
    path, chance = tmp_path / "shop.db", random.Random(11)
    said: set[str] = set()
    begin = reached = 1
    async with opened(path):
        pass
    for round_ in range(ROUNDS):
        url = f"sqlite:///{path}"
        with process("churn", url, f"a{round_}", begin) as one, process("churn", url, f"b{round_}", begin) as other:
            ends = []
            for prefix, child in (("a", one), ("b", other)):
                numbers = await asyncio.to_thread(lines, child, chance.randint(5, 40))
                child.kill()
                numbers += await asyncio.to_thread(rest, child)
                said.update(f"{prefix}{round_}-{number}" for number in numbers)
                ends.append(max(map(int, numbers)))
        begin, reached = max(ends), max(reached, *ends)
        assert intact(path) and counted(path)
    async with opened(path) as broker:
        for stream in ("kept", "later"):
            await tended(broker, stream)
        infos = {info.spec: info for info in await broker.admin.streams()}
        slots, due = await names(broker, "ticks"), await names(broker, "later")
        assert infos[PLAIN[1]].delayed == 0
    assert said <= set(due) and len(due) == len(set(due))
    assert list(map(int, slots)) == list(range(1, len(slots) + 1)) and len(slots) >= reached
    assert reached <= (infos[KEPT].added or 0) <= reached + ROUNDS
    assert infos[KEPT].events in (49, 50)  # of each of two partitions whole events


async def test_a_page_holds_fewer_events_when_they_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MAX_PAGE_BYTES", 8_388_608)
    async with opened(tmp_path / "shop.db") as broker:
        for n in range(12):
            await broker.append("orders", records(f"id-{n}", size_bytes=1_000_000))
        page = await broker.read("orders", 0, None, 100)
        assert [stored.record.id for stored in page] == [f"id-{n}" for n in range(9)]
        assert len(await broker.read("orders", 0, page[-1].position, 2)) == 2
        found = len(page)
        while page := await broker.read("orders", 0, page[-1].position, 100):
            found += len(page)
        assert found == 12
