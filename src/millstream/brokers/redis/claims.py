"""An entry as a script hands it out becomes a claim. Fresh entries, the hot path, are read in `incarnation.py`."""

from __future__ import annotations

from collections.abc import Sequence

from millstream.brokers.base import Claim, Position
from millstream.brokers.redis import parts
from millstream.wire import entry


def again(
    partition: int, offset: str, count: int, note: bytes, postponed: bytes, fields: Sequence[bytes], left: bytes = b""
) -> Claim:
    """The claim of an entry that was delivered before, with what is noted about it."""
    suspect = int(note.rstrip(b"s")) + 1 if note else 0
    record, why = entry.read_or_fault(partition, offset, fields)
    return Claim(Position(partition, offset), record, count, suspect, int(postponed), why, left=parts.numbers(left))
