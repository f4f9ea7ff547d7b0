"""How far a worker reads ahead: as far as it may, and never further than memory allows."""

from __future__ import annotations

import pytest

from millstream.brokers.base import Claim, Position, Record, Stored
from millstream.worker.ahead import ReadAhead


def claims(count: int, data_bytes: int = 200) -> list[Claim]:
    record = Record(0, "id", "order.placed", b"x" * data_bytes)
    return [Claim(Stored(Position(0, f"{number}-0"), record), 1) for number in range(count)]


def test_the_first_page_is_small_and_the_next_ones_are_half_of_what_may_be_held() -> None:
    ahead = ReadAhead(64, 1, None)
    assert (ahead.limit, ahead.wanted()) == (128, 16)
    ahead.came(claims(16))
    assert ahead.wanted() == 64
    ahead.came(claims(64))
    assert (ahead.held, ahead.wanted()) == (80, 0), "48 are free: too few to be worth a fetch"
    ahead.left(16)
    assert ahead.wanted() == 64


def test_a_page_is_never_more_than_costs_least() -> None:
    ahead = ReadAhead(64, 1, 10_000)
    ahead.came(claims(16))
    assert (ahead.limit, ahead.wanted()) == (10_000, 250)


@pytest.mark.parametrize("max_in_flight", [1, 10, 100])
def test_the_setting_is_never_exceeded(max_in_flight: int) -> None:
    ahead = ReadAhead(64, 1, max_in_flight)
    while wanted := ahead.wanted():
        ahead.came(claims(wanted))
    assert ahead.held <= max_in_flight


def test_large_events_are_held_by_their_bytes_and_forgotten_when_small_ones_come() -> None:
    ahead = ReadAhead(64, 1, None)
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
    ahead = ReadAhead(500, 500, None)
    ahead.came(claims(100, 1_048_576))
    assert ahead.limit == 500


@pytest.mark.parametrize("max_in_flight", [128, 500, 501, 600])
def test_who_may_hold_hardly_more_than_a_batch_still_fetches_in_large_pages(max_in_flight: int) -> None:
    ahead = ReadAhead(500, 500, max_in_flight)
    ahead.came(claims(500))
    ahead.left(500)
    assert ahead.wanted() >= 250
