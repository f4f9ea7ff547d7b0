"""Which events of a pack are left, as scripts keep it: their numbers with commas between, `0,3`."""

from __future__ import annotations

from collections.abc import Sequence


def text(left: Sequence[int]) -> str:
    """As a script takes it; empty for all of them."""
    return ",".join(map(str, left))


def numbers(text: bytes) -> Sequence[int]:
    """As a claim tells it."""
    return tuple(sorted(map(int, text.split(b",")))) if text else ()
