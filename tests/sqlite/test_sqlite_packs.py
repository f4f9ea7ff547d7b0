"""Packs in a file, beyond the suite that all brokers pass: what people give back of one that is held, room, places."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from millstream.brokers.base import (
    Claim,
    Consumer,
    Dead,
    Done,
    Later,
    Letter,
    Outcome,
    Policy,
    Position,
    Record,
    Settlement,
    Stored,
    Subscription,
)
from millstream.brokers.ledger import HELD_MS, Commit, Committed, Effect, Park, Pop, State
from millstream.brokers.sqlite import group, ordered
from millstream.brokers.sqlite.broker import SQLiteBroker
from millstream.brokers.sqlite.ledger import SQLiteLedger
from millstream.errors import BrokerFull, BrokerRefused, LeaseLost
from millstream.wire import packs
from millstream.wire.packs import Columns
from tests.sqlite.places import (
    LEASE_S,
    ORDERS,
    Clockwork,
    about,
    broker_at,
    counted,
    eventually,
    intact,
    joined,
    opened,
    outcomes,
    records,
)

EVENTS = 5


def new_pack(name: str, key: str | None = None) -> Record:
    columns = Columns([b"{}"] * EVENTS, "order.placed")
    return packs.write(columns, "none", partition=0, id_=name, key=key, source="shop")


def event(claim: Claim, part: int) -> Record:
    return packs.read(claim.record, claim.position.offset).record(part)


def place(claim: Claim, part: int) -> Position:
    return Position(0, packs.part_offset(claim.position.offset, part))


def settlement(claim: Claim, outcome: Outcome, *dying: int) -> Settlement:
    letters = [Letter(part, event(claim, part), "failed", "why") for part in dying]
    return Settlement(claim.position, outcome, letters=letters)


async def one(consumer: Consumer) -> Claim:
    [claim] = await eventually(lambda: consumer.fetch(1, 0.1), bool)
    return claim


async def settled(consumer: Consumer, claim: Claim, outcome: Outcome, *dying: int) -> None:
    assert await consumer.settle([settlement(claim, outcome, *dying)]) == [True]


async def held(broker: SQLiteBroker, consumer: Consumer, left: Sequence[int], *dying: int) -> Claim:
    """A pack that is held for the second time: this is left of it, and these have died."""
    await broker.append("orders", [new_pack("pack")])
    await settled(consumer, await one(consumer), Later(0, "busy", left=left), *dying)
    claim = await one(consumer)
    assert list(claim.left) == list(left)
    return claim


async def replay(broker: SQLiteBroker) -> int:
    """All dead letters; how many."""
    letters = await broker.admin.dead("orders", "billing")
    assert await broker.admin.replay(letters) == [True] * len(letters)
    return len(letters)


async def test_what_is_given_back_of_a_pack_that_is_held_waits_for_its_end(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        claim = await held(broker, consumer, [2, 4], 1, 3)
        assert await replay(broker) == 2
        assert await consumer.fetch(10, 0) == []
        await settled(consumer, claim, Done())
        again = await one(consumer)
        assert (again.stored, list(again.left), again.attempt) == (claim.stored, [1, 3], 1)
        await settled(consumer, again, Done())
        now = await about(broker)
        assert (now.pending, now.dead, now.replayed, now.done, now.retried) == (0, 0, 2, 2, 1)


async def test_what_is_given_back_of_a_pack_that_is_tried_again_comes_with_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        claim = await held(broker, consumer, [0, 4], 1, 3)
        assert await replay(broker) == 2
        await settled(consumer, claim, Later(0, "busy", left=[4]))
        again = await one(consumer)
        assert (list(again.left), again.attempt) == ([1, 3, 4], 3)
        await settled(consumer, again, Later(0, "busy"))
        again = await one(consumer)
        assert list(again.left) == [1, 3, 4]
        await settled(consumer, again, Done())
        assert (await about(broker)).pending == 0


async def test_what_is_given_back_of_a_pack_survives_its_consumer(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer, other = await joined(broker), await joined(broker)
        await held(broker, consumer, [4], 1)
        assert await replay(broker) == 1

        async def beat() -> list[Claim]:
            await other.keep()
            return await other.fetch(1, 0.05)

        [claim] = await eventually(beat, bool)
        assert (list(claim.left), claim.suspect) == ([1, 4], 2)
        await other.close()
        again = await one(await joined(broker))
        assert list(again.left) == [1, 4]


async def test_among_neighbours_that_are_done_one_of_which_something_is_given_back_comes_again(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await broker.append("orders", [new_pack("pack"), *records(*(f"e-{n}" for n in range(group.LEAST_RUN)))])
        first, *others = await consumer.fetch(20, 1.0)
        busy = Later(0, "busy", left=[4])
        assert all(await consumer.settle([settlement(first, busy, 0), *outcomes(others, Later(0, "busy"))]))
        claims = await consumer.fetch(20, 1.0)
        assert await replay(broker) == 1
        assert await consumer.settle(outcomes(claims)) == [True] * (group.LEAST_RUN + 1)
        again = await one(consumer)
        assert (again.stored, list(again.left)) == (first.stored, [0])
        assert (await about(broker)).done == group.LEAST_RUN + 1


async def test_of_a_pack_nothing_is_given_that_comes_by_itself(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        claim = await held(broker, consumer, [4])
        parts = [Stored(place(claim, part), event(claim, part)) for part in (3, 4)]
        assert await broker.admin.give("orders", "billing", parts) == 1
        assert await broker.admin.give("orders", "billing", [*parts, claim.stored]) == 0
        await settled(consumer, claim, Done())
        assert list((await one(consumer)).left) == [3]
        await broker.admin.seek("orders", "billing", "beginning", live=True)
        assert await broker.admin.give("orders", "billing", parts) == 0, "before it was read"
        await consumer.keep()
        assert list((await one(consumer)).left) == []
        assert await broker.admin.give("orders", "billing", parts) == 0, "while all of it is held"


async def test_of_a_pack_in_order_nothing_is_given_that_is_parked(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker, order=True)
        await broker.append("orders", [new_pack("pack", "a")])
        claim = await one(consumer)
        await settled(consumer, claim, Done())
        parts = [Stored(place(claim, part), event(claim, part)) for part in (3, 4)]
        assert await broker.admin.give("orders", "billing", [*parts, parts[0]]) == 2
        assert await broker.admin.give("orders", "billing", parts) == 0
        for part in (3, 4):
            alone = await one(consumer)
            assert (alone.stored.position, alone.stored.record) == (place(claim, part), event(claim, part))
            await settled(consumer, alone, Done())
        assert await broker.admin.give("orders", "billing", parts) == 2


async def test_an_event_of_a_pack_that_waits_alone_is_shown_at_its_own_place(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker, order=True)
        await broker.append("orders", [new_pack("pack")])
        claim = await one(consumer)
        await settled(consumer, claim, Done(), 1, 2)
        assert await replay(broker) == 2
        for part in (1, 2):
            alone = await one(consumer)
            assert alone.stored.position == place(claim, part)
            await settled(consumer, alone, Later(HELD_MS, "broken"))
        keys = await broker.admin.keys("orders", "billing")
        assert [(key.first, key.key) for key in keys] == [
            (place(claim, n), f"\0{place(claim, n).offset}") for n in (1, 2)
        ]
        assert [info.position for info in await broker.admin.pending("orders", "billing", 10)] == [
            place(claim, 1),
            place(claim, 2),
        ]
        [stored] = await broker.admin.parked(keys[0])
        assert (stored.position, stored.record.id) == (place(claim, 1), "pack.1")
        assert await broker.admin.drop_keys(keys) == [1, 1]
        assert (await about(broker)).pending == 0


async def test_of_events_of_one_pack_only_the_first_is_removed(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        ledger = SQLiteLedger(broker, Subscription(ORDERS, "billing", "shop", lease_s=LEASE_S, order=True))
        await ledger.enter()
        [position] = await broker.append("orders", [new_pack("pack", "a")])
        grant = await ledger.acquire((await ledger.look()).leases[0])
        assert grant is not None
        [record] = records("a")
        parks = [Park("a", Stored(Position(0, offset), record)) for offset in ("1.3", "1.4", position.offset)]
        steps: list[tuple[Sequence[Effect], int]] = [
            (parks, 3),
            ([Pop("a", "1.4")], 3),
            ([Pop("a", "1")], 3),
            ([Pop("a", "1.3")], 2),
        ]
        for seq, (effects, count) in enumerate(steps, 1):
            commit = Commit(0, grant.epoch, seq, "1", 1, "", (), effects, 0, 0, ())
            assert await ledger.commit([commit]) == [Committed(State.STORED, frozenset(), count)]


async def test_a_suspect_that_is_an_event_of_a_pack_is_begun(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        first, second = await joined(broker, order=True), await joined(broker, order=True)
        await broker.append("orders", [new_pack("pack")])
        taken: list[Claim] = []

        async def takes(consumer: Consumer) -> list[Claim]:
            await consumer.keep()
            taken[:] = await consumer.fetch(1, 0.05)
            return taken

        for consumer in (first, second):
            await consumer.keep()
        owner = first if await first.fetch(1, 0.5) else second
        other = second if owner is first else first
        await owner.close()
        [claim] = await eventually(lambda: takes(other), bool)
        await settled(other, claim, Done(), 1)
        assert await replay(broker) == 1
        await eventually(lambda: takes(other), bool)
        heir = await joined(broker, order=True)
        [alone] = await eventually(lambda: takes(heir), bool)
        assert (alone.stored.position, alone.suspect) == (place(claim, 1), 2)
        await heir.begin([alone.stored.position])
        await settled(heir, alone, Done())


@pytest.mark.parametrize("order", [False, True])
async def test_without_room_for_letters_of_a_pack_these_events_wait_and_the_others_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: bool
) -> None:
    for module in (group, ordered):
        monkeypatch.setattr(module, "MAX_DEAD", 3)
    clock = Clockwork()
    broker = broker_at(tmp_path / "shop.db", clock=clock)
    await broker.open()
    await broker.declare(ORDERS)
    consumer = await joined(broker, order=order)
    await broker.append("orders", [new_pack("a"), new_pack("b")])
    claims = [await one(consumer), await one(consumer)]
    await settled(consumer, claims[0], Done(), 1, 3)
    await settled(consumer, claims[1], Later(0, "busy", left=[2]), 1, 3)
    now = await about(broker)
    assert (now.dead, now.pending, now.retried) == (2, 1, 0)
    assert await consumer.fetch(2, 0) == []
    clock.shift_ms = 300_000
    again = await one(consumer)
    assert (again.stored, list(again.left), again.attempt) == (claims[1].stored, [1, 2, 3], 1)
    await consumer.close()
    await broker.close()


async def test_on_a_full_disk_only_what_has_letters_waits(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        columns = Columns([b"x" * 500_000], "order.placed")
        await broker.append(
            "orders", [packs.write(columns, "none", partition=0, id_="pack", source="shop"), *records("a")]
        )
        pack, plain = await consumer.fetch(2, 1.0)
        await broker.writer.ask(lambda db: db.execute("PRAGMA max_page_count = 1").fetchall())
        with pytest.raises(BrokerFull):
            await consumer.settle([settlement(pack, Done(), 0), settlement(plain, Done())])
        await broker.writer.ask(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchall())
        now = await about(broker)
        assert (now.done, now.pending, now.dead) == (1, 1, 0)
        await settled(consumer, pack, Done(), 0)
        assert (await about(broker)).dead == 1


async def test_a_dead_letter_of_one_event_keeps_its_pack(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    async with opened(path) as broker:
        await broker.admin.apply("orders", Policy(events=1))
        consumer = await joined(broker)
        await broker.append("orders", [new_pack("pack"), *records("a")])
        pack, plain = await consumer.fetch(2, 1.0)
        assert await consumer.settle([settlement(pack, Done(), 1, 2), settlement(plain, Done())]) == [True, True]
        letters = await broker.admin.dead("orders", "billing")
        assert [letter.stored.position for letter in letters] == [place(pack, 1), place(pack, 2)]
        assert await broker.admin.drop(letters[:1]) == [True]
        tended = await broker.tend("orders")
        assert (tended.trimmed, tended.pinned_by) == (0, "dead letters of billing")
        assert await broker.admin.replay(letters) == [False, True]
        assert list((await one(consumer)).left) == [2]
    assert intact(path) and counted(path)


async def test_a_pack_that_dies_takes_with_it_what_was_given_back(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        claim = await held(broker, consumer, [4], 1)
        assert await replay(broker) == 1
        await settled(consumer, claim, Dead("undecodable"))
        [letter] = await broker.admin.dead("orders", "billing")
        assert letter.stored == claim.stored
        assert (await about(broker)).pending == 0


async def test_who_does_not_hold_an_event_of_a_pack_settles_and_begins_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        consumer = await joined(broker)
        await broker.append("orders", [new_pack("pack")])
        claim = await one(consumer)
        assert await consumer.settle([Settlement(place(claim, 1), Done()), settlement(claim, Done())]) == [False, True]
        with pytest.raises(LeaseLost):
            await consumer.begin([place(claim, 1)])


async def test_behind_an_event_of_a_pack_lies_what_lies_behind_the_pack(tmp_path: Path) -> None:
    async with opened(tmp_path / "shop.db") as broker:
        await broker.append("orders", [new_pack("pack"), *records("a")])
        assert [stored.record.id for stored in await broker.read("orders", 0, Position(0, "1.3"), 10)] == ["a"]
        with pytest.raises(BrokerRefused, match="no position"):
            await broker.read("orders", 0, Position(0, "1-0.3"), 10)
