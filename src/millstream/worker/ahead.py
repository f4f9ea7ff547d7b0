"""ReadAhead: how many events a worker may hold, fetched and not settled.

What a worker holds nobody else can have, and a crash repeats it: so it is twice what runs at once, or what `max_in_flight`
says, and never more than 32 MB of events, however few these are. As long as nobody knows how large they are, a small page is
fetched. To hold more where handlers are fast was tried: then a process that dies has up to 86 events in hand in place of 32,
so that is for whoever sets `max_in_flight`.
"""

from __future__ import annotations

from collections.abc import Sequence

from millstream.brokers.base import Claim

_MAX_AHEAD_BYTES = 33_554_432  # of event data; what runs is there a second time, decoded
_MAX_PAGE = 250  # larger ones cost more per event, not less
_FIRST_PAGE = 16  # of events whose size is not known
_SAMPLE = 8  # of so many events one is asked for its size


class ReadAhead:
    """What is held. `running` is how many events may be in handlers at once."""

    def __init__(self, running: int, batch_size: int, max_in_flight: int | None) -> None:
        self._running = running
        self._batch_size = batch_size
        self._most = max(max_in_flight or 2 * running, batch_size)
        self._event_bytes = 0.0
        self.held = 0
        """Events fetched and not settled."""
        self.limit = self._most
        """How many events may be held now."""

    def wanted(self) -> int:
        """How many to fetch now: as soon as some room is free all of it, up to a page. 0 until then."""
        room = self.limit - self.held
        # Never do lanes that gather a batch wait for events that we do not fetch.
        worth = max(1, min(self.limit // 2, self.limit - self._running, _MAX_PAGE))
        return min(room, self._page()) if room >= worth else 0

    def came(self, claims: Sequence[Claim]) -> None:
        """These were fetched."""
        self.held += len(claims)
        sizes = [len(claim.stored.record.data) for claim in claims[::_SAMPLE]]
        self._event_bytes = max(1.0, sum(sizes) / len(sizes), self._event_bytes * 0.75)
        self.limit = min(self._most, max(self._batch_size, int(_MAX_AHEAD_BYTES / self._event_bytes)))

    def left(self, events: int) -> None:
        """So many were settled, or lost."""
        self.held -= events

    def _page(self) -> int:
        most = max(_MAX_PAGE if self._event_bytes else _FIRST_PAGE, self._batch_size)
        return max(1, min(self.limit // 2, most))  # half: a slow key may fill a page, and must leave room for others
