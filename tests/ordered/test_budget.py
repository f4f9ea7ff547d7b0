"""The budget: what windows may hold, whatever their number, the size of events and the slowness of handlers."""

from __future__ import annotations

import gc

import pytest

from millstream.brokers import budget
from millstream.brokers.base import Position, Record
from millstream.brokers.budget import EVENT_BYTES, MAX_BYTES, Budget, Held
from millstream.brokers.ledger import Cursor, Grant
from millstream.brokers.window import WINDOW, Window
from millstream.brokers.windows import Windows
from tests.ordered.helpers import handed_out, settle, stored
from tests.ordered.scripted import Place, opened, positions, settlement

LARGE = 1_000_000


class Consumer:
    """Stands for one."""


def test_windows_and_consumers_have_like_shares() -> None:
    whole, one, other = Budget(), Consumer(), Consumer()
    whole.join(one)
    assert (whole.share_bytes(1), whole.share_bytes(8)) == (MAX_BYTES, MAX_BYTES // 8)
    whole.join(other)
    assert whole.share_bytes(8) == MAX_BYTES // 16
    whole.leave(other)
    assert whole.share_bytes(8) == MAX_BYTES // 8


def test_a_consumer_that_never_left_takes_no_part_for_ever() -> None:
    whole, one = Budget(), Consumer()
    whole.join(one)
    whole.join(Consumer())
    gc.collect()
    assert whole.share_bytes(1) == MAX_BYTES


def test_without_windows_there_is_a_share_all_the_same() -> None:
    assert Budget().share_bytes(0) == MAX_BYTES


def test_all_that_members_read_and_read_ahead_is_within_the_budget() -> None:
    whole, members = Budget(), [Consumer() for _ in range(20)]
    for member in members:
        whole.join(member)
    assert 2 * len(members) * whole.read_bytes <= MAX_BYTES < 2 * len(members) * (whole.read_bytes + 1)


def test_one_group_on_eight_partitions_gets_whole_windows_of_small_events() -> None:
    whole, held = Budget(), Held()
    whole.join(held)
    assert held.room(whole.share_bytes(8)) >= WINDOW


def test_of_many_windows_those_that_are_read_first_may_hold_more_than_an_even_share() -> None:
    whole, windows = Budget(), 256
    assert whole.share_bytes(windows) == MAX_BYTES // 16
    assert whole.share_bytes(windows, MAX_BYTES // 4) == MAX_BYTES // 32
    assert whole.share_bytes(windows, MAX_BYTES) == MAX_BYTES // windows


def test_windows_that_are_never_settled_hold_half_as_much_again_as_the_budget_at_most() -> None:
    whole, windows = Budget(), 256
    held_bytes = 0
    for _ in range(windows):
        held_bytes += whole.share_bytes(windows, held_bytes)
    assert MAX_BYTES < held_bytes <= 1.5 * MAX_BYTES


def test_what_is_held_counts_by_the_page() -> None:
    held = Held()
    held.read(2, 300)
    held.read(3, 3_000)
    held.read(0, 0)
    first, second = 300 + 2 * EVENT_BYTES, 3_000 + 3 * EVENT_BYTES
    assert held.size_bytes == first + second
    held.passed(1)
    assert held.size_bytes == first + second
    held.passed(2)
    assert held.size_bytes == second
    held.passed(2)
    assert held.size_bytes == 0


def test_there_is_room_for_events_of_the_size_of_those_that_came_last() -> None:
    held = Held()
    held.read(10, 10 * EVENT_BYTES)
    assert held.room(30 * EVENT_BYTES) == 5
    held.read(10, 40 * EVENT_BYTES)
    assert held.room(100 * EVENT_BYTES) == 6
    assert held.room(EVENT_BYTES) <= 0


def test_one_that_is_empty_has_room_for_one_event_of_any_size() -> None:
    held = Held()
    assert held.room(0) == 1
    held.read(1, LARGE)
    assert held.room(0) <= 0
    held.passed(1)
    assert held.room(0) == 1


def test_a_window_is_not_read_beyond_its_share_until_a_page_has_passed() -> None:
    window = handed_out("abc")
    assert window.cursor_within(5 * EVENT_BYTES).room == 1
    assert window.cursor_within(3 * EVENT_BYTES).room <= 0
    for number in 1, 2, 3:
        settle(window, number)
    stored(window)
    assert window.cursor_within(3 * EVENT_BYTES).room == 2
    window.draining = True
    assert window.cursor_within(MAX_BYTES).room == 0


async def test_of_many_windows_only_those_that_are_asked_for_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, looked = Windows(max_parked=10), list[int]()
    for partition in range(256):
        windows.begin(Window(Grant(partition, 1, "")))

    def noted(window: Window, share_bytes: int) -> Cursor:
        looked.append(window.partition)
        return Cursor("", 0 if window.partition == 5 else 1, window.epoch)

    monkeypatch.setattr(Window, "cursor_within", noted)
    cursors = windows.cursors(Budget())
    assert cursors and 3 in cursors and 5 not in cursors and 300 not in cursors
    assert cursors[3].room == 1 and cursors.get(5) is None and cursors.left_out == {5}
    assert sorted(looked) == [0, 3, 5]
    assert list(cursors) == [partition for partition in range(256) if partition != 5] and len(cursors) == 255
    assert len(looked) == 256


async def large(place: Place, count: int, partition: int) -> list[Position]:
    records = [Record(partition, f"{partition}-{n}", "t", b"x" * LARGE, f"{n}") for n in range(count)]
    return await place.broker.append("orders", records)


async def test_a_partition_with_nothing_settled_takes_no_room_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_BYTES", 8 * LARGE)
    place = await opened(2)
    consumer, script = await place.member()
    await large(place, 1, 0)
    await consumer.fetch(1, 0)  # now it is known how large they are
    await large(place, 20, 0)
    held = [claim for _ in range(10) for claim in await consumer.fetch(1, 0)]
    assert len(held) == 2  # and the first one: four would be more than its half, with all that is around them
    others = await large(place, 1, 1)
    assert positions(await consumer.fetch(10, 0)) == others
    assert script.asked("read")[-1].keys() == {1}


async def test_a_fetch_goes_on_as_soon_as_what_was_held_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_BYTES", 2 * LARGE)
    place = await opened()
    consumer, _ = await place.member()
    events = await large(place, 5, 0)
    found: list[Position] = []
    while len(found) < len(events):
        claims = await consumer.fetch(10, 1)
        assert claims
        found += positions(claims)
        await consumer.settle([settlement(claim) for claim in claims])
    assert found == events


async def test_members_of_many_groups_hold_no_more_than_one() -> None:
    place = await opened()
    first, _ = await place.member()
    second, _ = await place.member()
    shared = Budget()
    for consumer in first, second:
        consumer._budget.leave(consumer)
        consumer._budget = shared
        shared.join(consumer)
    assert shared.share_bytes(1) == MAX_BYTES // 2
    await second.close()
    assert shared.share_bytes(1) == MAX_BYTES
