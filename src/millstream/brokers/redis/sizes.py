"""Sizes: how many events one answer may bring.

A server can be asked for a number of events, not for bytes, and it gathers the whole answer before it sends any of it: 2,048
events of 1 MB are two gigabytes, which take so long that the link counts as dead. So reading begins as if all were as large
as they may be. Events that turn out small end that within three reads; a large one is remembered for some dozens.
"""

from __future__ import annotations

from millstream.units import MAX_EVENT_BYTES

MAX_REPLY_BYTES = 8_388_608  # what one read should bring at most
_TRUST = 16  # by so much less is assumed after each answer
_FORGET = 7 / 8  # of the largest event is left after each answer


class Sizes:
    """What was seen of the events of one log, or of several."""

    def __init__(self) -> None:
        self._assumed_bytes = MAX_EVENT_BYTES
        self._largest_bytes = 1

    @property
    def most(self) -> int:
        """How many events to ask for, in all."""
        return self.within(MAX_REPLY_BYTES)

    @property
    def unsure(self) -> bool:
        """True while events may be larger than all that were seen."""
        return self._assumed_bytes > self._largest_bytes

    def within(self, size_bytes: int) -> int:
        """The same, where they are to be of no more bytes than that; one at least."""
        return max(1, size_bytes // max(1, self._assumed_bytes, self._largest_bytes))

    def seen(self, largest_bytes: int) -> None:
        """An answer came, with a largest event of so many bytes."""
        self._assumed_bytes //= _TRUST
        self._largest_bytes = max(largest_bytes, int(self._largest_bytes * _FORGET))
