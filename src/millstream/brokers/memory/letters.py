"""The dead letters of a group of the memory broker, whichever way it consumes."""

from __future__ import annotations

from millstream.brokers.base import DeadLetter
from millstream.brokers.ledger import Bury
from millstream.units import MAX_DEAD, MAX_ERROR_CHARS


class Letters(dict[str, DeadLetter]):
    """By reference, in the order in which they died; and how many there ever were."""

    def __init__(self, stream: str, group: str) -> None:
        super().__init__()
        self.replayed = 0
        self.dropped = 0
        self._stream = stream
        self._group = group
        self._buried = 0

    def full(self, partition: int, more: int = 1) -> bool:
        """True when there is no room for so many more of this partition."""
        if len(self) + more <= MAX_DEAD:
            return False
        return sum(letter.stored.position.partition == partition for letter in self.values()) + more > MAX_DEAD

    def bury(self, letter: Bury, now_ms: int) -> None:
        """Keep an event that was given up."""
        self._buried += 1
        ref = f"{self._buried:012}"
        what = self._stream, self._group, letter.stored, letter.reason, letter.error[:MAX_ERROR_CHARS]
        self[ref] = DeadLetter(*what, letter.attempts, now_ms, ref)

    def take(self, ref: str, *, replay: bool) -> DeadLetter | None:
        """Remove a letter, to replay or to drop it; None when it is gone."""
        letter = self.pop(ref, None)
        if letter is not None:
            self.replayed += replay
            self.dropped += not replay
        return letter
