"""An entry as a script hands it out becomes a claim. Fresh entries, the hot path, are read in `incarnation.py`."""

from __future__ import annotations

from collections.abc import Sequence

from millstream.brokers.base import Claim, Position, Record, Stored
from millstream.errors import WireError
from millstream.wire import entry


def again(partition: int, offset: str, count: int, note: bytes, postponed: bytes, fields: Sequence[bytes]) -> Claim:
    """The claim of an entry that was delivered before, with what is noted about it."""
    suspect = int(note.rstrip(b"s")) + 1 if note else 0
    stored_ms = int(offset.partition("-")[0])
    try:
        record = entry.read(fields, partition=partition, offset=offset, stored_ms=stored_ms)
    except WireError as error:
        return fault(partition, offset, fields, count, str(error), suspect, int(postponed))
    return Claim(Stored(Position(partition, offset), record), count, suspect, int(postponed))


def fault(
    partition: int, offset: str, fields: Sequence[bytes], count: int, why: str, suspect: int = 0, postponed: int = 0
) -> Claim:
    """The claim of an entry that is no event."""
    stored_ms = int(offset.partition("-")[0])
    record = Record(partition, f"{partition}@{offset}", "", entry.preview(fields).encode(), None, stored_ms)
    return Claim(Stored(Position(partition, offset), record), count, suspect, postponed, why)
