"""ReadAhead: how many events a worker may hold, fetched and not settled.

What a worker holds nobody else can have, and a crash repeats it: so it is twice what runs at once. Where handlers end at
once, that is too little: the server is asked for 64 events at a time, and more than a third of an event's time goes into
asking. As with every pipe, what has to be in it is the rate times the way there and back. So a worker holds what it settled
lately in 5 ms, several ways to the server and back, where that is more: a handler that takes a millisecond never gets there,
one that only counts gets to a thousand, and a crash repeats 5 ms of work. `max_in_flight` is exact.

Of a process with many groups each has its share of the time, so its 5 ms take as many times as long. Counted without that,
ten groups fetched 64 events at a time: 42,800 instructions a delivery in place of 34,600 (one group: 33,000).

Nor is there ever more than 32 MB of events, or its share of 64 MB where a process has many groups; but always room for one
event, or one batch. As long as nobody knows how large they are, a small page is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence

from millstream.brokers.base import Claim
from millstream.clock import Clock
from millstream.handlers.subscriber import Group
from millstream.settings import Settings

MAX_AHEAD = 2_000  # events, without a setting and beyond twice what runs
_MAX_SHARED = 12_500  # of all groups of a process, likewise: 250 for each of fifty
_PACE_S = 0.005
_MAX_AHEAD_BYTES = 33_554_432  # of event data; what runs is there a second time, decoded
_MAX_SHARED_BYTES = 67_108_864  # of all groups of a process
_MAX_PAGE = 250  # larger ones cost more per event, not less: they do not stay in the cache; a batch comes in several
_FIRST_PAGE = 16  # of events whose size is not known; all groups of a process share it
_SAMPLE = 8  # of so many events one is asked for its size


class ReadAhead:
    """What is held. `running` is how many events may be in handlers at once, `groups` how many share the process."""

    def __init__(
        self, running: int, batch_size: int, max_in_flight: int | None, clock: Clock, *, groups: int = 1
    ) -> None:
        self._clock = clock
        self._running = running
        self._batch_size = batch_size
        self._least = self._most = max(max_in_flight or 2 * running, batch_size)
        self._grows = max_in_flight is None
        self._settled = 0
        self._since_s = clock.monotonic()
        self._pace_s = _PACE_S * groups
        self._max_ahead = min(MAX_AHEAD, _MAX_SHARED // groups)
        self._max_bytes = min(_MAX_AHEAD_BYTES, _MAX_SHARED_BYTES // groups)
        self._first_page = max(1, _FIRST_PAGE // groups)
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
        sizes = [len(claim.record.data) for claim in claims[::_SAMPLE]]
        self._event_bytes = max(1.0, sum(sizes) / len(sizes), self._event_bytes * 0.75)
        self._set_limit()

    def left(self, events: int) -> None:
        """So many were settled, or lost."""
        self.held -= events
        if self._grows:
            self._settled += events
            now_s = self._clock.monotonic()
            passed_s = now_s - self._since_s
            if passed_s >= self._pace_s:
                pace = min(int(self._settled * self._pace_s / passed_s), self._max_ahead)
                self._most = max(self._least, pace, self._most // 2)  # one stall is no change of pace
                self._settled, self._since_s = 0, now_s
                self._set_limit()

    def turn(self) -> int:
        """How many to start before what has ended is settled: while the other half is handled."""
        return max(1, self.limit // 2)

    def _set_limit(self) -> None:
        held_by_size = int(self._max_bytes / max(1.0, self._event_bytes))
        self.limit = min(self._most, max(self._batch_size, held_by_size))

    def _page(self) -> int:
        most = _MAX_PAGE if self._event_bytes else self._first_page
        return max(1, min(self.limit // 2, most))  # half: a slow key may fill a page, and must leave room for others


def concurrency(group: Group, settings: Settings) -> int:
    """How many handlers of a group may run at once in a process."""
    if group.concurrency is not None:
        return group.concurrency
    if group.batch is not None:
        return 1  # batches in a row; a second one at a time is for whoever says so
    if all(subscriber.signature.sync for subscriber in group.subscribers):
        return settings.threads
    return settings.concurrency
