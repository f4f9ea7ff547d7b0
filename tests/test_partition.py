"""The fixed hash from keys to partitions."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.units import MAX_PARTITIONS
from millstream.wire.partition import partition_of


@pytest.mark.parametrize(
    ("key", "partitions", "expected"),
    [
        ("", 8, 0),
        ("123456789", 1_024, 0xCBF43926 % 1_024),  # the check value that is published with CRC-32
        ("123456789", 7, 0xCBF43926 % 7),
        ("a", 1_000, 0xE8B7BE43 % 1_000),
        ("The quick brown fox jumps over the lazy dog", 512, 0x414FA339 % 512),
        ("Zoë €", 8, 4),
    ],
)
def test_the_partition_of_a_key_never_changes(key: str, partitions: int, expected: int) -> None:
    assert partition_of(key, partitions) == expected


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, MAX_PARTITIONS))
def test_every_key_has_a_partition_and_always_the_same(key: str, partitions: int) -> None:
    assert 0 <= partition_of(key, partitions) < partitions
    assert partition_of(key, partitions) == partition_of(key, partitions)
    assert partition_of(key, 1) == 0


def test_numbered_keys_spread_evenly() -> None:
    found = Counter(partition_of(f"order-{n}", 8) for n in range(8_000))
    assert min(found.values()) > 850
    assert max(found.values()) < 1_150
