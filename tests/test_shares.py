"""How many events each partition keeps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millstream.brokers.shares import level


def test_what_is_below_the_level_stays_whole_and_leaves_its_room_to_others() -> None:
    assert level([60, 30, 1], 31) == 15
    assert level([600, 300, 0], 150) == 75
    assert level([100, 5], 50) == 45
    assert level([10, 20], 30) == 20
    assert level([], 7) == 0


def test_a_partition_that_cannot_be_trimmed_takes_no_room_of_others() -> None:
    pinned = 100_000
    for _ in range(3):
        assert level([pinned, 500], 1_000) == 500
        pinned *= 2


@given(st.lists(st.integers(0, 1_000), min_size=1, max_size=10), st.integers(0, 5_000))
def test_together_they_keep_what_is_asked_for_and_less_than_one_each_is_given_away(
    counts: list[int], most: int
) -> None:
    kept = sum(min(count, level(counts, most)) for count in counts)
    assert kept <= most or kept == sum(counts) <= most
    assert kept > min(most, sum(counts)) - len(counts)
