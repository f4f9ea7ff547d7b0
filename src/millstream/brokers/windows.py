"""The windows of one member, all together: what is handed out next, what there is room for, what was lost. Pure, as each is.

A fetch takes what there is of one partition, rather than a little from each: a commit of a partition costs as much as ten
events, however few it covers. The next fetch goes on there, if a few fetches take what is left. Else it begins one further,
or a busy first partition would starve the others. Of 256 windows few hold events at a time: the others have no turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
        self._filled = deque[Window]()  # that hold events or are full; first the one whose turn it is
        self._cursors = Cursors(self, 0, 0)

    def has(self, window: Window) -> bool:
        """True while this one is ours; there may be a later one of its partition."""
        return self.get(window.partition) is window

    def begin(self, window: Window) -> None:
        """One more is ours; it may hold events already."""
        self[window.partition] = window
        self._filled.append(window)

    def end(self, window: Window) -> bool:
        """It is ours no more. False when it was not before."""
        if not self.has(window):
            return False
        del self[window.partition]
        if window in self._filled:
            self._filled.remove(window)
        return True

    def lose(self, window: Window) -> bool:
        """It is somebody else's. False when it was none of ours before."""
        if not self.end(window):
            return False
        self.lost.update(window.held())
        return True

    def holds(self, claim: Claim) -> bool:
        """True while a claim is handed out and ours to settle."""
        position = claim.position
        window = self.get(position.partition)
        return window is not None and window.epoch == claim.token and window.holds(position.offset)

    def put(self, window: Window, page: Sequence[Claim]) -> None:
        """Take in what was read of one."""
        window.put(page)
        if window not in self._filled:
            self._filled.append(window)

    def hand_out(self, limit: int, tell_full: Callable[[Window], None]) -> list[Claim]:
        """The next claims, of each partition in order. Of one that has too much parked there are none, which is told."""
        # A worker asks for half of what it has room for: as many of one key at most, and a slow key leaves the other half.
        claims: list[Claim] = []
        filled = self._filled
        if filled and not 0 < filled[0].left <= MAX_CALLS * limit:
            filled.rotate(-1)
        for _ in range(len(filled)):
            window = filled[0]
            full = window.events_parked >= self._max_parked
            if full:
                tell_full(window)
            else:
                claims += window.hand_out(limit - len(claims), max(limit, LEAST_OF_A_KEY))
            if len(claims) >= limit:
                break
            if window.held_bytes or full:
                filled.rotate(-1)
            else:
                filled.popleft()
        return claims

    def cursors(self, budget: Budget) -> Cursors:
        """Where to read on, of those that have room."""
        self._cursors = Cursors(self, self._max_parked, self._share_bytes(budget))
        return self._cursors

    def offer(self, windows: Iterable[Window], budget: Budget, due_ms: float) -> bool:
        """True when one of these has something for a fetch that waits: an event, a head that is due, or room."""
        share_bytes = self._share_bytes(budget)
        return any(
            window.ready
            or (window.partition in self._cursors.left_out and window.cursor_within(share_bytes).room > 0)
            or window.due_ms < due_ms
            for window in windows
        )

    def due_ms(self) -> float:
        """When something that is parked is due."""
        return min([window.due_ms for window in self.values() if not window.draining], default=float("inf"))

    def _share_bytes(self, budget: Budget) -> int:
        return budget.share_bytes(len(self), sum([window.held_bytes for window in self._filled]))


class Cursors(Mapping[int, Cursor]):
    """Where to read on, of each window that has room. Of 256 a read looks at a few: each is worked out when it is asked for.

    It stays so from then on, as long as the read lasts.
    """

    def __init__(self, windows: Windows, max_parked: int, share_bytes: int) -> None:
        self._windows = windows
        self._max_parked = max_parked
        self._share_bytes = share_bytes
        self._known: dict[int, Cursor] = {}
        self.left_out: set[int] = set()
        """Those that were asked for, and have no room."""

    def __getitem__(self, partition: int) -> Cursor:
        if partition not in self:
            raise KeyError(partition)
        return self._known[partition]

    def __contains__(self, partition: object) -> bool:
        if partition in self._known:
            return True
        window = self._windows.get(partition) if isinstance(partition, int) else None
        if window is None or partition in self.left_out:
            return False
        cursor = window.cursor_within(self._share_bytes)
        if window.events_parked >= self._max_parked or cursor.room <= 0:
            self.left_out.add(window.partition)
            return False
        self._known[window.partition] = cursor
        return True

    def __iter__(self) -> Iterator[int]:
        return (partition for partition in self._windows if partition in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return any(partition in self for partition in self._windows)
