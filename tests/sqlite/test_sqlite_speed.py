"""What is done at once for many events ends as if it were done one by one, and nobody waits for long to hear of an event."""

from __future__ import annotations

import asyncio
import os
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from millstream.brokers.base import Dead, Later, Position, StreamSpec, Subscription
from millstream.brokers.ledger import Cursor
from millstream.brokers.sqlite import group, ordered, touches, writer
from millstream.brokers.sqlite.broker import SQLiteBroker
from millstream.brokers.sqlite.ledger import SQLiteLedger
from tests.sqlite.places import LEASE_S, about, ids, joined, opened, outcomes, records

WIDE = StreamSpec("wide", partitions=40)
NEVER_S = 3_600.0


@given(st.sets(st.integers(0, 30)))
def test_rows_are_cut_where_one_is_missing(rows: set[int]) -> None:
    runs = list(group._runs(sorted(rows)))
    assert [row for run in runs for row in run] == sorted(rows)
    assert all(run == list(range(run[0], run[0] + len(run))) for run in runs)
    assert all(one[-1] + 1 < other[0] for one, other in pairwise(runs))


async def test_what_is_settled_in_any_order_leaves_what_is_not(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        for partition in range(2):
            await broker.append("orders", records(*(f"{partition}-{n}" for n in range(20)), partition=partition))
        claims = await consumer.fetch(40, 1.0)
        Random(5).shuffle(claims)
        settled = [*outcomes(claims[:9]), *outcomes(claims[9:12], Later(0, "x")), *outcomes(claims[12:30])]
        assert await consumer.settle(settled) == [True] * 30
        now = await about(broker)
        assert (now.done, now.retried, now.pending, now.scheduled) == (27, 3, 13, 3)
        assert await consumer.settle([*outcomes(claims[28:]), *outcomes(claims[30:], Dead("failed"))]) == [
            *([False] * 2),
            *([True] * 10),
            *([False] * 10),
        ]
        assert sorted(ids(await consumer.fetch(40, 1.0))) == sorted(ids(claims[9:12]))


async def test_of_neighbours_one_of_which_is_gone_the_others_are_settled(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        events = group.LEAST_RUN + 2
        await broker.append("orders", records(*(f"e-{n}" for n in range(events))))
        claims = await consumer.fetch(events, 1.0)
        await broker.writer.ask(lambda db: db.execute("DELETE FROM pending WHERE grp = 1 AND row & 15 = 3").fetchall())
        expected = [True, True, False, *([True] * (events - 3))]
        assert await consumer.settle([*outcomes(claims), *outcomes(claims[:1])]) == [*expected, False]
        now = await about(broker)
        assert (now.done, now.pending) == (events - 1, 0)


async def test_what_is_finished_is_told_once_and_what_is_gone_or_held_by_nobody_is_not(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        events = group.LEAST_RUN + 2
        await broker.append("orders", records(*(f"e-{n}" for n in range(events + 1))))
        held = [claim.position for claim in await consumer.fetch(events, 1.0)]
        await broker.writer.ask(lambda db: db.execute("DELETE FROM pending WHERE grp = 1 AND row & 15 = 3").fetchall())
        expected = [True, True, False, *([True] * (events - 3))]
        others = [Position(0, str(events + 1)), Position(0, "1.0"), held[0], held[2]]
        assert await consumer.finish([*held, *others]) == [*expected, *[False] * len(others)]
        now = await about(broker)
        assert (now.done, now.pending, now.lag) == (events - 1, 0, 1)


async def test_events_of_many_partitions_are_stored_with_one_look_at_their_ends(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        await broker.declare(WIDE)
        said: list[str] = []
        await broker.writer.ask(lambda db: db.set_trace_callback(said.append))
        mixed = [records(f"{n}")[0] for n in range(3 * WIDE.partitions)]
        placed = await broker.append("wide", [replace(one, partition=n % 40) for n, one in enumerate(mixed)])
        await broker.writer.ask(lambda db: db.set_trace_callback(None))
        assert placed == [Position(n % 40, str(n // 40 + 1)) for n in range(len(mixed))]
        assert len([words for words in said if words.startswith("SELECT") and "FROM log" in words]) == 1
        for partition in range(WIDE.partitions):
            stored = await broker.read("wide", partition, None, 10)
            assert [one.record.id for one in stored] == [f"{partition + 40 * n}" for n in range(3)]


async def test_partitions_that_are_many_are_read_in_turn(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        ledger = SQLiteLedger(broker, Subscription(WIDE, "billing", "shop", lease_s=LEASE_S, order=True))
        await ledger.enter()
        for partition in range(WIDE.partitions):
            await broker.append("wide", records("a", "b", "c", partition=partition))
        cursors = {partition: Cursor("", 10, 1) for partition in range(WIDE.partitions)}
        read: list[int] = []
        while cursors:
            claims = await ledger.read(cursors, ordered.MAX_PAGES, 0)
            assert len(claims) == min(len(cursors), ordered.MAX_PAGES)
            for claim in claims:
                position = claim.position
                read.append(position.partition)
                cursors[position.partition] = Cursor(position.offset, 10, 1)
                if position.offset == "3":
                    del cursors[position.partition]
        assert read == list(range(WIDE.partitions)) * 3


async def test_who_touches_is_heard_at_once_and_who_does_not_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as here, opened(path) as there:
        with monkeypatch.context() as patch:
            if here.writer._touches is not None:
                patch.setattr(writer, "DEAF_S", NEVER_S)
            await heard(here, there, 0)
        monkeypatch.setattr(os, "utime", lambda fd: None)
        await heard(here, there, 1)


async def test_where_nobody_tells_of_touches_others_are_heard_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shop.db"
    monkeypatch.setattr(touches, "watch", lambda path: None)
    monkeypatch.setattr(writer, "DEAF_S", NEVER_S)
    async with opened(path) as here, opened(path) as there:
        await heard(here, there, 0)


async def heard(here: SQLiteBroker, there: SQLiteBroker, partition: int) -> None:
    """One broker waits for nothing but the bell, and has looked for the last time; then the other one stores an event."""
    after: dict[int, Position | None] = {partition: None}
    await here.wait("orders", after, 0.05)
    waiting = asyncio.create_task(here.wait("orders", after, NEVER_S))
    while not here.writer._listening:
        await asyncio.sleep(0)
    await here.writer.ask(lambda db: None)
    with here.writer.using:
        assert not waiting.done()
    await there.append("orders", records("a", partition=partition))
    await asyncio.wait_for(waiting, 10)


def test_a_file_that_is_not_there_is_not_watched(tmp_path: Path) -> None:
    assert touches.watch(str(tmp_path / "none")) is None
