"""Retry and Batch."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.errors import BadSetting
from millstream.retry import Batch, Retry
from millstream.units import MAX_BATCH


def test_waits_grow_by_the_factor_up_to_the_longest() -> None:
    retry = Retry(10, first="1s", factor=3, max="30s")
    assert [retry.delay_s(attempt, 0) for attempt in range(1, 7)] == [1, 3, 9, 27, 30, 30]


def test_chance_takes_off_up_to_a_quarter() -> None:
    retry = Retry(first="4s")
    assert retry.delay_s(1, 0) == 4
    assert retry.delay_s(1, 0.5) == 3.5
    assert 3 < retry.delay_s(1, 0.999_999) < 3.001


def test_the_defaults_outlive_a_deployment() -> None:
    retry = Retry()
    assert 3_600 < sum(retry.delay_s(attempt, 0) for attempt in range(1, retry.attempts)) < 4 * 3_600


@given(
    st.integers(min_value=1, max_value=100_000),
    st.floats(min_value=0, max_value=1, exclude_max=True),
    st.floats(min_value=1, max_value=1e300),
    st.floats(min_value=0, max_value=1e6),
    st.floats(min_value=0, max_value=1e6),
)
def test_a_wait_is_never_negative_and_never_over_the_longest(
    attempt: int, chance: float, factor: float, first: float, longest: float
) -> None:
    assert 0 <= Retry(first=first, factor=factor, max=longest).delay_s(attempt, chance) <= longest


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"factor": 0.5},
        {"first": "soon"},
        {"max": -1},
        {"never": ValueError},
        {"never": [ValueError()]},
        {"never": ["ValueError"]},
    ],
)
def test_an_unusable_retry_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        Retry(**options)


def test_a_batch_has_a_size_and_a_time() -> None:
    assert Batch(500, within="2s") == Batch(size=500, within="2s")
    assert (Batch().size, Batch().within) == (100, 0)
    Batch(MAX_BATCH, within=timedelta(seconds=1))


@pytest.mark.parametrize("options", [{"size": 0}, {"size": MAX_BATCH + 1}, {"within": "later"}])
def test_an_unusable_batch_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        Batch(**options)


@pytest.mark.parametrize("options", [{"factor": float("nan")}, {"never": [int]}, {"never": ValueError}])
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        Retry(**options)
