"""Shares: how many events each partition may keep, so that all of them keep as many together as the policy asks for."""

from __future__ import annotations

from collections.abc import Sequence


def level(counts: Sequence[int], most: int) -> int:
    """What each partition may keep at most, so that together they keep `most`; those with less stay whole.

    A partition that cannot be trimmed, since somebody still needs its events, counts with no more than this. Were shares in
    proportion to what is there, it would take the room of all others, and more with every round.
    """
    left, parts = most, len(counts)
    for count in sorted(counts):
        if count * parts > left:
            return left // parts
        left, parts = left - count, parts - 1
    return max(counts, default=0)
