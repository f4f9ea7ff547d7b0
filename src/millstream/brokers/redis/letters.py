"""Dead letters as scripts take them: their MessagePack knows no bytes, so the fields of an event follow as arguments."""

from __future__ import annotations

from collections.abc import Sequence

from millstream.brokers.base import Letter
from millstream.units import MAX_ERROR_CHARS
from millstream.wire import entry


def given_up(letter: Letter, blobs: list[bytes]) -> tuple[int | str, ...]:
    """The words for an event of a pack, as `settle.lua` takes them."""
    return letter.part, letter.reason, error_text(letter.error), *put(entry.write(letter.record), blobs)


def put(fields: Sequence[bytes], blobs: list[bytes]) -> tuple[int, int]:
    """Which of the arguments that follow is the first of these fields, and how many they are."""
    blobs.extend(fields)
    return len(blobs) - len(fields) + 1, len(fields)


def error_text(error: str) -> str:
    """So much of an error as is kept, in characters that can be written."""
    return error[:MAX_ERROR_CHARS].encode("utf-8", "backslashreplace").decode()
