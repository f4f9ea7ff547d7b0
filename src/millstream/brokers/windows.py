"""The windows of one member, all together: what is handed out next, what there is room for, what was lost. Pure, as each is.

A fetch takes what there is of one partition, rather than a little from each: a commit of a partition costs as much as ten
events, however few it covers. The next fetch goes on there, if a few fetches take what is left. Else it begins one further,
or a busy first partition would starve the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from millstream.brokers.base import Claim, Position
from millstream.brokers.budget import Budget
from millstream.brokers.ledger import Cursor
from millstream.brokers.window import Window

MAX_CALLS = 4  # take the rest of what was read of one partition before another one has its turn
LEAST_OF_A_KEY = 8  # events are handed out at once, and more only if a fetch asks for more


class Windows(dict[int, Window]):
    """By partition, those that a member has."""

    def __init__(self, max_parked: int) -> None:
        super().__init__()
        self.lost: set[Position] = set()
        """What was handed out of windows that are ours no more, and is not told yet."""
        self._max_parked = max_parked
        self._turn = 0
        self._left_out: set[int] = set()

    def has(self, window: Window) -> bool:
        """True while this one is ours; there may be a later one of its partition."""
        return self.get(window.partition) is window

    def lose(self, window: Window) -> bool:
        """It is somebody else's. False when it was none of ours before."""
        if not self.has(window):
            return False
        del self[window.partition]
        self.lost.update(window.held())
        return True

    def holds(self, claim: Claim) -> bool:
        """True while a claim is handed out and ours to settle."""
        position = claim.position
        window = self.get(position.partition)
        return window is not None and window.epoch == claim.token and window.holds(position.offset)

    def hand_out(self, limit: int, tell_full: Callable[[Window], None]) -> list[Claim]:
        """The next claims, of each partition in order. Of one that has too much parked there are none, which is told."""
        # A worker asks for half of what it has room for: as many of one key at most, and a slow key leaves the other half.
        claims: list[Claim] = []
        windows = deque(self.values())
        windows.rotate(-self._turn)
        if windows and not 0 < windows[0].left <= MAX_CALLS * limit:
            windows.rotate(-1)
            self._turn += 1
        for step, window in enumerate(windows):
            if len(claims) >= limit:
                self._turn += step - 1
                break
            if window.events_parked >= self._max_parked:
                tell_full(window)
            elif window.ready:
                claims += window.hand_out(limit - len(claims), max(limit, LEAST_OF_A_KEY))
        return claims

    def cursors(self, budget: Budget) -> dict[int, Cursor]:
        """Where to read on, of those that have room."""
        share_bytes = self._share_bytes(budget)
        cursors = {
            partition: cursor
            for partition, window in self.items()
            if window.events_parked < self._max_parked and (cursor := window.cursor_within(share_bytes)).room > 0
        }
        self._left_out = self.keys() - cursors.keys()
        return cursors

    def offer(self, windows: Iterable[Window], budget: Budget, due_ms: float) -> bool:
        """True when one of these has something for a fetch that waits: an event, a head that is due, or room."""
        share_bytes = self._share_bytes(budget)
        return any(
            window.ready
            or (window.partition in self._left_out and window.cursor_within(share_bytes).room > 0)
            or window.due_ms < due_ms
            for window in windows
        )

    def due_ms(self) -> float:
        """When something that is parked is due."""
        return min([window.due_ms for window in self.values() if not window.draining], default=float("inf"))

    def _share_bytes(self, budget: Budget) -> int:
        return budget.share_bytes(len(self), sum([window.held_bytes for window in self.values()]))
