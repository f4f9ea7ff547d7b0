"""Prose: text that compresses as people's text does, the same in every run. A row of dashes would make packs look free."""

from __future__ import annotations

from hashlib import blake2b
from itertools import count

VARIANTS = 1_009  # more than a pack holds, so that it holds none twice; a prime, so that nothing else repeats with them
MAX_CHARS = 8_000_000  # of all texts: of large ones fewer are made, since few fit into a pack, and they take memory

_WORDS = (  # noqa: SIM905 - as prose it stays short
    "the a of to for in with at from by not late early again gate belt door truck crew delay weather bag box crate scale "
    "north south east west left right first last next open closed full empty heavy light cold warm red blue green grey "
    "paid due sent kept lost found moved turned checked sealed signed Anna Ben Chloe Dave Eve Finn"
).split()


def texts(chars: int) -> list[str]:
    """Texts of so many characters each, as different as these allow."""
    return [_text(f"{variant} ", chars) for variant in range(min(VARIANTS, 1 + MAX_CHARS // max(1, chars)))]


def _text(begin: str, chars: int) -> str:
    text = begin
    for block in count():
        if len(text) >= chars:
            return text[:chars]
        picks = blake2b(f"{begin}{block}".encode()).digest()
        text += " ".join(_WORDS[pick % len(_WORDS)] for pick in picks) + " "
    raise AssertionError
