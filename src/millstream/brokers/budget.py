"""The budget: how much the consumers of one process may hold in the order of keys, all together.

A window may hold 2,048 events, but there is one for each partition of each group: 256 partitions, fifty groups, or events of
1 MB would take gigabytes. So what all of them may hold is divided evenly among the consumers there are, and each divides its
part among its windows. One that holds its share is not read further until some of it has passed. A share of each is kept for
it, since a slow key fills that of its own partition, and takes nothing from the others. An empty window is read in any case,
by one event at least.

Of 256 partitions those alone are worth filling that are read at this moment, and with pages of a 256th of the budget each
event would cost a third more. So a window may hold an eighth of what is left of half the part too, where that is more than
its even share: the fuller the others, the smaller it is, and all together hold half as much again as the budget at most.
"""

from __future__ import annotations

from collections import deque
from weakref import WeakSet

MAX_BYTES = 16_777_216  # one group on eight partitions gets whole windows of small events
EVENT_BYTES = 1_000  # of one event beside its data, in all the objects around it: about
_FILLED = 8  # windows that are filled at one time


class Budget:
    """That of the consumers of one broker."""

    def __init__(self) -> None:
        self._consumers = WeakSet[object]()

    def join(self, consumer: object) -> None:
        """One more takes its part."""
        self._consumers.add(consumer)

    def leave(self, consumer: object) -> None:
        """It holds nothing any more."""
        self._consumers.discard(consumer)

    def share_bytes(self, windows: int, held_bytes: int = 0) -> int:
        """What each window of a consumer may hold that has so many of them, and holds so much in them."""
        part_bytes = self._part_bytes
        return max(part_bytes // max(1, windows), (part_bytes // 2 - held_bytes) // _FILLED)

    @property
    def read_bytes(self) -> int:
        """What one read of a consumer may bring: half of its part, since the next one is on its way meanwhile."""
        return self._part_bytes // 2

    @property
    def _part_bytes(self) -> int:
        return MAX_BYTES // max(1, len(self._consumers))


class Held:
    """What one window holds: counted by the page, so never less than there is, and at no cost for each event that passes."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._event_bytes = EVENT_BYTES
        self._read = 0
        self._passed = 0
        self._pages: deque[tuple[int, int]] = deque()

    def read(self, events: int, data_bytes: int) -> None:
        """A page was read."""
        if events:
            page_bytes = data_bytes + events * EVENT_BYTES
            self.size_bytes += page_bytes
            self._event_bytes = page_bytes // events
            self._read += events
            self._pages.append((self._read, page_bytes))

    def passed(self, events: int) -> None:
        """So many more are settled, and all before them."""
        self._passed += events
        while self._pages and self._pages[0][0] <= self._passed:
            self.size_bytes -= self._pages.popleft()[1]

    def room(self, share_bytes: int) -> int:
        """How many more events of such a size there is room for; an empty one has some for one of any size."""
        return max((share_bytes - self.size_bytes) // self._event_bytes, not self.size_bytes)
