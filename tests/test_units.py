"""Durations, sizes, names."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.errors import BadSetting
from millstream.units import MAX_NAME_CHARS, check_name, seconds, size_bytes


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("250ms", 0.25),
        ("2s", 2.0),
        (" 1.5 h ", 5_400.0),
        ("5m", 300.0),
        ("7d", 604_800.0),
        ("1w", 604_800.0),
        (0, 0.0),
        (0.1, 0.1),
        (timedelta(minutes=2), 120.0),
    ],
)
def test_a_duration_becomes_seconds(duration: str | float | timedelta, expected: float) -> None:
    assert seconds(duration) == expected


@pytest.mark.parametrize(
    "duration",
    [
        "",
        "5",
        "s",
        "-1s",
        "1 minute",
        "1S",
        "1e3s",
        "nan",
        "9" * 400 + "s",
        -1,
        -0.001,
        float("nan"),
        float("inf"),
        10**400,
        None,
        True,
        [],
        timedelta(seconds=-1),
    ],
)
def test_what_is_no_duration_is_refused_and_named(duration: Any) -> None:
    with pytest.raises(BadSetting) as refused:
        seconds(duration)
    assert repr(duration) in str(refused.value)


@pytest.mark.parametrize("duration", [None, True, [], b"5m"])
def test_what_could_never_be_a_duration_is_refused_with_what_can(duration: Any) -> None:
    with pytest.raises(BadSetting, match="write '5m', a number of seconds, or a timedelta"):
        seconds(duration)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("64KB", 65_536), ("1MB", 1_048_576), ("2 gb", 2_147_483_648), ("1.5KB", 1_536), ("7B", 7), (0, 0), (12, 12)],
)
def test_a_size_becomes_bytes(size: str | int, expected: int) -> None:
    assert size_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "1", "KB", "-1KB", "1KiB", "1 byte", "9" * 400 + "GB", -1, 1.5, True, None])
def test_what_is_no_size_is_refused_and_named(size: Any) -> None:
    with pytest.raises(BadSetting) as refused:
        size_bytes(size)
    assert repr(size) in str(refused.value)


@given(st.text(alphabet="abcXYZ019._-", min_size=1, max_size=MAX_NAME_CHARS))
def test_letters_digits_dots_dashes_and_underscores_make_a_name(name: str) -> None:
    assert check_name("stream", name) == name


@pytest.mark.parametrize(
    "name", ["", "a b", "a:b", "a/b", "{a}", "a\n", "ä", "a*", "x" * (MAX_NAME_CHARS + 1), None, 1]
)
def test_what_could_not_be_part_of_a_key_is_no_name(name: Any) -> None:
    with pytest.raises(BadSetting, match="cannot name a group"):
        check_name("group", name)
    with pytest.raises(BadSetting, match="cannot name an inbox"):
        check_name("inbox", name)


@given(st.text())
def test_no_text_makes_the_readers_raise_anything_else(text: str) -> None:
    for read in (seconds, size_bytes, lambda text: check_name("stream", text)):
        with contextlib.suppress(BadSetting):
            read(text)
