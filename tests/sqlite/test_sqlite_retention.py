"""Retention in a file, beyond the suite that all brokers pass: shares, steps, losses to the event, foreign hands, space."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from millstream.brokers.base import Claim, Consumer, Dead, Later, Policy, Position, Record, StreamSpec, Subscription
from millstream.brokers.sqlite import retention
from millstream.brokers.sqlite.broker import SQLiteBroker
from tests.sqlite.places import (
    LEASE_S,
    ORDERS,
    Clockwork,
    about,
    counted,
    eventually,
    ids,
    joined,
    opened,
    outcomes,
    records,
    tended,
)

DROP = Policy(events=2, keep=False)
FIRST_ROW = 1024 << 40


def by_hand(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


async def publish(broker: SQLiteBroker, count: int, *, partition: int = 0, size_bytes: int = 20) -> None:
    for begin in range(0, count, 1_000):
        some = [f"e-{n}" for n in range(begin, min(count, begin + 1_000))]
        await broker.append("orders", records(*some, partition=partition, size_bytes=size_bytes))


async def sizes(broker: SQLiteBroker, stream: StreamSpec = ORDERS) -> list[int]:
    return [len(await broker.read(stream.name, p, None, 10_000)) for p in range(stream.partitions)]


async def claimed(consumer: Consumer, limit: int) -> list[Claim]:
    """Some events, once a member has them: an ordered one takes its partitions first."""
    return await eventually(lambda: consumer.fetch(limit, 0.1), bool)


async def create(broker: SQLiteBroker, group: str = "billing", *, order: bool = False) -> None:
    await broker.create(Subscription(ORDERS, group, "shop", order=order))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Policy(events=400), [200, 200]),
        (Policy(events=1), [0, 0]),
        (Policy(bytes=8_000), [200, 200]),
        (Policy(events=3_000, bytes=8_000), [200, 200]),
        (Policy(age_ms=10_000), [3_000, 1_000]),
    ],
)
async def test_each_partition_keeps_its_share_however_many_steps_it_takes(
    tmp_path: Path, policy: Policy, kept: list[int]
) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        await publish(broker, 3_000)
        await publish(broker, 1_000, partition=1)
        await broker.admin.apply("orders", policy)
        rounds = await tended(broker)
        assert await sizes(broker) == kept
        assert sum(found.trimmed for found in rounds) == 4_000 - sum(kept)
        assert counted(tmp_path / "shop.db")


async def test_a_step_is_short_so_that_others_can_write_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[int] = []
    original = retention.trim

    def spy(db: sqlite3.Connection, name: str, now_ms: int, now_s: float) -> retention.Step:
        step = original(db, name, now_ms, now_s)
        removed.append(step.tended.trimmed)
        return step

    monkeypatch.setattr(retention, "trim", spy)
    async with opened(tmp_path / "shop.db") as broker:
        await publish(broker, 12_500)
        await broker.admin.apply("orders", Policy(events=1_000))
        assert (await broker.tend("orders")).trimmed == 10_000
        assert (await broker.tend("orders")).trimmed == 1_500
        assert max(removed) == 1_000
        removed.clear()
        for n in range(10):
            await broker.append("orders", records(f"large-{n}", partition=1, size_bytes=1_000_000))
        await broker.admin.apply("orders", Policy(bytes=1))
        await tended(broker)
        assert await sizes(broker) == [0, 0]
        assert len(removed) > 3


async def test_a_long_partition_that_is_needed_does_not_slow_down_the_others(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        await publish(broker, 200, partition=1)
        await broker.create(Subscription(ORDERS, "billing", "shop", "now"))
        await publish(broker, 30_000)
        await broker.admin.apply("orders", Policy(events=10))
        assert (await broker.tend("orders")).trimmed == 195


async def test_the_place_of_removed_events_is_used_again(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        await broker.admin.apply("orders", Policy(events=200))
        pages = []
        for _ in range(6):
            await publish(broker, 1_000, size_bytes=1_000)
            await tended(broker)
            pages.append(await broker.reader.ask(lambda db: db.execute("PRAGMA page_count").fetchone()[0]))
        assert pages[-1] <= pages[1] * 1.1


async def test_a_group_that_is_born_after_events_have_gone_has_lost_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        await publish(broker, 10)
        await broker.admin.apply("orders", DROP)
        await tended(broker)
        for group, order in (("billing", False), ("audit", True)):
            consumer = await joined(broker, group, order=order)
            claims = await claimed(consumer, 10)
            assert ids(claims) == ["e-8", "e-9"]
            await consumer.settle(outcomes(claims))
            await consumer.close()
            await broker.admin.seek("orders", group, "beginning")
            now = await about(broker, group)
            assert (now.lost, now.lag, now.done) == (0, 2, 2)
        assert (await broker.tend("orders")).lost == {}


async def test_a_time_is_found_behind_events_that_have_gone(tmp_path: Path) -> None:
    clock = Clockwork()
    async with opened(tmp_path / "shop.db", clock=clock) as broker:
        times = []
        for n in range(20):
            clock.shift_ms = n * 60_000
            times.append(clock.now_ms())
            await broker.append("orders", records(f"e-{n}"))
        await broker.admin.apply("orders", Policy(events=7))
        await tended(broker)
        for n, time_ms in enumerate(times):
            found = await broker.locate("orders", time_ms)
            read = await broker.read("orders", 0, found[0], 1)
            assert read[0].record.id == f"e-{max(n, 13)}"
        [info] = await broker.admin.streams()
        assert (info.events, info.added, info.trimmed, info.bytes) == (7, 20, 13, 140)
        assert info.first_ms is not None and abs(info.first_ms - times[13]) < 60_000
        await broker.admin.apply("orders", Policy(age_ms=1_000))
        clock.shift_ms += 60_000
        await tended(broker)
        [info] = await broker.admin.streams()
        assert (info.events, info.first_ms, info.bytes) == (0, None, 0)
        await broker.append("orders", records("new"))
        assert [event.position for event in await broker.read("orders", 0, None, 9)] == [Position(0, "21")]


async def test_what_waits_or_is_a_dead_letter_keeps_its_event_and_all_behind_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await publish(broker, 10)
        claims = await consumer.fetch(10, 1.0)
        failed = [*outcomes(claims[4:5], Dead("failed")), *outcomes(claims[5:6], Later(1 << 50, ""))]
        await consumer.settle([*outcomes(claims[:4]), *failed, *outcomes(claims[6:])])
        await broker.admin.apply("orders", Policy(events=1))
        found = (await tended(broker))[-1]
        assert (await sizes(broker), found.pinned_by) == ([6, 0], "dead letters of billing")
        assert await broker.admin.drop(await broker.admin.dead("orders", "billing")) == [True]
        found = (await tended(broker))[-1]
        assert (await sizes(broker), found.pinned_by) == ([5, 0], "billing")
        await consumer.close()
        assert (await about(broker)).lost == 0


async def test_a_dead_letter_whose_event_is_gone_keeps_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await publish(broker, 10)
        claims = await consumer.fetch(10, 1.0)
        await consumer.settle([*outcomes(claims[:1], Dead("failed")), *outcomes(claims[1:])])
        await broker.admin.apply("orders", DROP)
        await tended(broker)
        assert (await about(broker)).dead == 1
        await broker.admin.apply("orders", Policy(events=2))
        await publish(broker, 10)
        await consumer.settle(outcomes(await consumer.fetch(10, 1.0)))
        found = (await tended(broker))[-1]
        assert (await sizes(broker), found.pinned_by) == ([2, 0], "")
        await consumer.close()


async def test_an_event_that_is_given_up_and_was_gone_by_then_is_lost(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await publish(broker, 3)
        claims = await consumer.fetch(3, 1.0)
        await broker.admin.apply("orders", DROP)
        await tended(broker)
        assert await consumer.settle(outcomes(claims, Dead("failed"))) == [True, True, True]
        now, letters = await about(broker), await broker.admin.dead("orders", "billing")
        assert (now.pending, now.lost, now.dead, len(letters)) == (0, 1, 2, 2)
        await consumer.close()


async def test_what_a_living_member_holds_is_lost_only_when_it_gives_it_back(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await publish(broker, 10)
        claims = await consumer.fetch(6, 1.0)
        await broker.admin.apply("orders", DROP)
        assert (await broker.tend("orders")).lost == {"billing": 2}
        assert await consumer.settle(outcomes(claims[:2])) == [True, True]
        assert await consumer.settle(outcomes(claims[2:3], Later(0, "busy"))) == [True]
        assert ids(await consumer.fetch(10, 1.0)) == ["e-8", "e-9"]
        assert (await broker.tend("orders")).lost == {"billing": 1}
        await consumer.close()
        other = await joined(broker)
        assert ids(await other.fetch(10, 1.0)) == ["e-8", "e-9"]
        now = await about(broker)
        assert (now.done, now.lost, now.pending, now.lag) == (2, 6, 2, 0)
        await other.close()


async def test_what_a_dead_member_held_is_lost_at_once(tmp_path: Path) -> None:
    clock = Clockwork()
    async with opened(tmp_path / "shop.db", clock=clock) as broker:
        queue, ordered = await joined(broker), await joined(broker, "audit", order=True)
        await publish(broker, 10)
        held = await queue.fetch(4, 1.0)
        done = await claimed(ordered, 3)
        assert await ordered.settle(outcomes(done)) == [True] * len(done)
        going = await claimed(ordered, 2)
        await broker.admin.apply("orders", DROP)
        clock.shift_s = LEASE_S + 1
        assert (await broker.tend("orders")).lost == {"billing": 8, "audit": 8 - len(done)}
        assert await queue.settle(outcomes(held)) == [False] * 4
        assert await ordered.settle(outcomes(going)) == [False] * len(going)
        for group in ("billing", "audit"):
            now = await about(broker, group)
            assert (now.lost + (now.done or 0), now.pending, now.lag) == (8, 0, 2)
        await queue.close()
        await ordered.close()


async def test_what_an_ordered_member_leaves_unread_is_lost_when_it_goes(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker, order=True)
        await publish(broker, 2)
        claims = await eventually(lambda: consumer.fetch(2, 0.1), lambda claims: len(claims) == 2)
        await publish(broker, 500)
        await broker.admin.apply("orders", DROP)
        assert (await broker.tend("orders")).lost == {}, "it may have read them"
        assert await consumer.settle(outcomes(claims)) == [True, True]
        await consumer.close()
        assert (await broker.tend("orders")).lost == {"billing": 498}
        now = await about(broker)
        assert (now.done, now.lost, now.lag) == (2, 498, 2)


async def test_who_waits_behind_the_beginning_is_not_woken_by_what_has_gone(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        await publish(broker, 10)
        await broker.admin.apply("orders", Policy(bytes=1))
        await tended(broker)
        waiting = asyncio.ensure_future(broker.wait("orders", {0: None, 1: None}, 30.0))
        await broker.tend("orders")
        assert not waiting.done()
        await broker.append("orders", records("new"))
        await waiting
        assert [event.record.id for event in await broker.read("orders", 0, None, 9)] == ["new"]


async def test_an_ordered_member_that_reads_past_a_hole_counts_it_once(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker, order=True)
        await publish(broker, 2)
        first = await claimed(consumer, 2)
        await publish(broker, 3_000)
        await broker.admin.apply("orders", DROP)
        handled = outcomes(first)
        assert all(await consumer.settle(handled))

        async def go_on() -> str:
            await consumer.keep()
            claims = await consumer.fetch(500, 0.05)
            assert all(await consumer.settle(outcomes(claims)))
            handled.extend(outcomes(claims))
            await broker.tend("orders")
            return handled[-1].position.offset

        await eventually(go_on, lambda offset: offset == "3002")
        await consumer.close()
        now = await about(broker)
        assert (now.done, now.lost, now.lag) == (len(handled), 3_002 - len(handled), 0)
        assert (await broker.tend("orders")).lost.get("billing", 0) <= now.lost


async def test_what_somebody_else_removes_is_counted_to_the_event(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        await create(broker, "unread")
        await create(broker, "ordered", order=True)
        waits, reads = await joined(broker, "waits"), await joined(broker, "reads")
        await publish(broker, 10)
        claims = await waits.fetch(6, 1.0)
        await waits.settle([*outcomes(claims[:3]), *outcomes(claims[3:], Later(1 << 50, "busy"))])
        by_hand(path, f"DELETE FROM event WHERE row <= {FIRST_ROW | 5}")
        found = await broker.tend("orders")
        assert (found.lost, found.trimmed) == ({"unread": 5, "ordered": 5, "waits": 2, "reads": 5}, 0)
        assert counted_but_for_trimmed(path)
        by_hand(path, f"DELETE FROM event WHERE row IN ({FIRST_ROW | 8}, {FIRST_ROW | 10})")
        assert ids(await reads.fetch(10, 1.0)) == ["e-5", "e-6", "e-8"]
        assert (await broker.tend("orders")).lost == {"reads": 2}
        assert await reads.fetch(10, 0) == []
        for consumer in (waits, reads):
            await consumer.close()
        assert [(info.group, info.lost, info.lag) for info in await broker.admin.groups("orders")] == [
            ("ordered", 5, 5),
            ("reads", 7, 0),
            ("unread", 5, 5),
            ("waits", 2, 4),
        ]


def counted_but_for_trimmed(path: Path) -> bool:
    """What somebody else has removed is not what retention has."""
    by_hand(path, "UPDATE stream SET trimmed = trimmed + 5")
    return counted(path)


async def test_who_takes_a_partition_counts_what_somebody_else_has_removed(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        await create(broker, order=True)
        await publish(broker, 10)
        by_hand(path, f"DELETE FROM event WHERE row <= {FIRST_ROW | 5}")
        consumer = await joined(broker, order=True)
        assert ids(await claimed(consumer, 1)) == ["e-5"]
        assert (await about(broker)).lost == 5
        assert (await broker.tend("orders")).lost == {"billing": 5}
        await consumer.close()
        assert (await about(broker)).lost == 5


async def test_a_partition_that_somebody_has_emptied_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        consumer = await joined(broker)
        await publish(broker, 10)
        by_hand(path, "DELETE FROM event")
        assert await consumer.fetch(10, 0) == []
        assert (await broker.tend("orders")).lost == {"billing": 10}
        await broker.append("orders", [Record(0, "new", "order.placed", b"x")])
        assert ids(await consumer.fetch(10, 1.0)) == ["new"]
        now = await about(broker)
        assert (now.lost, now.lag) == (10, 0)
        await consumer.close()


async def test_a_policy_that_a_newer_version_has_written_holds_as_far_as_it_is_known(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        await publish(broker, 10)
        by_hand(tmp_path / "shop.db", """UPDATE stream SET policy = '{"events":5,"tiers":["cold"]}'""")
        assert await broker.declare(ORDERS) == Policy(events=5)
        assert (await broker.tend("orders")).trimmed == 5


async def test_a_group_is_told_to_fade_in_time_and_not_before(tmp_path: Path) -> None:
    clock, hour_ms = Clockwork(), 3_600_000
    async with opened(tmp_path / "shop.db", clock=clock) as broker:
        await create(broker)
        born_ms = (await about(broker)).seen_ms or 0
        await publish(broker, 10)
        await broker.admin.apply("orders", Policy(events=3, forget_ms=hour_ms))
        for shift_ms in (0, hour_ms // 2 - 60_000):
            clock.shift_ms = shift_ms
            found = await broker.tend("orders")
            assert (found.trimmed, found.pinned_by, found.forgotten) == (0, "billing", frozenset())
            assert found.fading == {}
        clock.shift_ms = hour_ms // 2 + 60_000
        ends_ms = (await broker.tend("orders")).fading["billing"]
        assert 60_000 <= ends_ms - born_ms - hour_ms < 90_000
    async with opened(tmp_path / "shop.db", clock=clock) as broker:
        for shift_ms in (hour_ms // 2 + 60_000, hour_ms + 30_000):
            clock.shift_ms = shift_ms
            found = await broker.tend("orders")
            assert (found.trimmed, found.pinned_by, found.forgotten) == (0, "billing", frozenset())
            assert found.fading == {"billing": ends_ms}
        clock.shift_ms = hour_ms + 90_000
        found = await broker.tend("orders")
        assert (found.trimmed, found.lost, found.forgotten) == (7, {"billing": 7}, frozenset({"billing"}))
        consumer = await joined(broker)
        await publish(broker, 10)
        found = await broker.tend("orders")
        assert (found.trimmed, found.pinned_by, found.forgotten) == (0, "billing", frozenset())
        await consumer.close()
