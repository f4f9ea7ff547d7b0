"""How far a worker reads ahead: as far as it may, and never further than memory allows."""

from __future__ import annotations

import pytest

from millstream.brokers.base import Claim, Position, Record, Stored
from millstream.clock import Clock
from millstream.testing import VirtualClock
from millstream.worker.ahead import MAX_AHEAD, ReadAhead


def claims(count: int, data_bytes: int = 200) -> list[Claim]:
    record = Record(0, "id", "order.placed", b"x" * data_bytes)
    return [Claim.of(Stored(Position(0, f"{number}-0"), record), 1) for number in range(count)]


def test_the_first_page_is_small_and_the_next_ones_are_half_of_what_may_be_held() -> None:
    ahead = ReadAhead(64, 1, None, Clock())
    assert (ahead.limit, ahead.wanted()) == (128, 16)
    ahead.came(claims(16))
    assert ahead.wanted() == 64
    ahead.came(claims(64))
    assert (ahead.held, ahead.wanted()) == (80, 0), "48 are free: too few to be worth a fetch"
    ahead.left(16)
    assert ahead.wanted() == 64


def test_a_page_is_never_more_than_costs_least() -> None:
    ahead = ReadAhead(64, 1, 10_000, Clock())
    ahead.came(claims(16))
    assert (ahead.limit, ahead.wanted()) == (10_000, 250)


@pytest.mark.parametrize("max_in_flight", [1, 10, 100])
def test_the_setting_is_never_exceeded(max_in_flight: int) -> None:
    ahead = ReadAhead(64, 1, max_in_flight, Clock())
    while wanted := ahead.wanted():
        ahead.came(claims(wanted))
    assert ahead.held <= max_in_flight


def test_large_events_are_held_by_their_bytes_and_forgotten_when_small_ones_come() -> None:
    ahead = ReadAhead(64, 1, None, Clock())
    ahead.came(claims(16, 1_048_576))
    assert (ahead.limit, ahead.wanted()) == (32, 16)
    ahead.came(claims(16, 1_048_576))
    assert ahead.wanted() == 0
    ahead.left(32)
    for _ in range(50):
        ahead.came(claims(1, 0))
        ahead.left(1)
    assert (ahead.limit, ahead.wanted()) == (128, 64)


def test_a_batch_has_room_however_large_its_events_are() -> None:
    ahead = ReadAhead(500, 500, None, Clock())
    ahead.came(claims(100, 1_048_576))
    assert ahead.limit == 500


@pytest.mark.parametrize("max_in_flight", [128, 500, 501, 600])
def test_who_may_hold_hardly_more_than_a_batch_still_fetches_in_large_pages(max_in_flight: int) -> None:
    ahead = ReadAhead(500, 500, max_in_flight, Clock())
    ahead.came(claims(500))
    ahead.left(500)
    assert ahead.wanted() >= 250


async def settle(ahead: ReadAhead, clock: VirtualClock, *, per_ms: int) -> None:
    """Hold and settle so many in each of a hundred milliseconds."""
    for _ in range(100):
        ahead.came(claims(per_ms))
        await clock.advance(0.001)
        ahead.left(per_ms)


async def test_who_settles_fast_holds_five_milliseconds_of_work_and_lets_go_when_it_gets_slow() -> None:
    clock = VirtualClock()
    ahead = ReadAhead(64, 1, None, clock)
    await settle(ahead, clock, per_ms=200)
    assert (ahead.limit, ahead.turn()) == (1_000, 500)
    await settle(ahead, clock, per_ms=10)
    assert (ahead.limit, ahead.turn()) == (128, 64)


async def test_a_burst_after_a_pause_is_no_pace() -> None:
    clock = VirtualClock()
    ahead = ReadAhead(64, 1, None, clock)
    await clock.advance(1.0)
    ahead.left(1_000)
    assert ahead.limit == 128


async def test_nobody_holds_more_than_the_most_however_fast_it_is() -> None:
    clock = VirtualClock()
    ahead = ReadAhead(64, 1, None, clock)
    await settle(ahead, clock, per_ms=2_000)
    assert ahead.limit == MAX_AHEAD


async def test_fast_or_not_large_events_are_held_by_their_bytes() -> None:
    clock = VirtualClock()
    ahead = ReadAhead(64, 1, None, clock)
    await settle(ahead, clock, per_ms=200)
    ahead.came(claims(16, 1_048_576))
    assert ahead.limit == 32


async def test_a_setting_is_exact_however_fast_it_is() -> None:
    clock = VirtualClock()
    ahead = ReadAhead(64, 1, 200, clock)
    await settle(ahead, clock, per_ms=200)
    assert ahead.limit == 200


def test_many_groups_share_what_a_process_may_hold() -> None:
    ahead = ReadAhead(64, 1, None, Clock(), groups=16)
    ahead.came(claims(2, 1_048_576))
    assert ahead.limit == 4
    ahead = ReadAhead(64, 1, None, Clock(), groups=1_000)
    ahead.came(claims(1, 1_048_576))
    assert ahead.limit == 1, "there is always room for one"


def test_many_groups_share_the_first_page_whose_events_may_be_large() -> None:
    assert [ReadAhead(64, 1, None, Clock(), groups=groups).wanted() for groups in (1, 2, 16, 1_000)] == [16, 8, 1, 1]


@pytest.mark.parametrize(("groups", "limit"), [(10, 1_000), (50, 250)])
async def test_each_of_many_groups_holds_five_milliseconds_of_its_own_work(groups: int, limit: int) -> None:
    clock = VirtualClock()
    ahead = ReadAhead(64, 1, None, clock, groups=groups)
    for _ in range(3):
        await settle(ahead, clock, per_ms=20)
    assert ahead.limit == pytest.approx(limit, abs=1), "fifty hold no more than 12,500 together"


async def test_one_stall_is_no_change_of_pace() -> None:
    clock = VirtualClock()
    ahead = ReadAhead(64, 1, None, clock)
    await settle(ahead, clock, per_ms=200)
    limits = []
    for _ in range(4):
        await clock.advance(0.1)
        ahead.left(1)
        limits.append(ahead.limit)
    assert limits == [500, 250, 128, 128]
