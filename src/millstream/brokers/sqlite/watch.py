"""Who is silent: judged without a wall clock, from the ticks of a group.

Every beat raises the group's tick and writes it to the member; `Watch` remembers which tick was seen when, by this
process's own clock. A member that has not gone past a tick seen a lease ago has been silent for a lease. Two races are
closed when judging: a process that was paused, or could not beat itself, must not judge (`Watch` forgets over a gap), and
the ticks are compared in the transaction that takes something away, the judge's own too.
"""

from __future__ import annotations

from collections import deque

TRUST = 0.7  # of a lease: held up this long, and having beaten a quarter before, nobody has been silent for a whole one


class Watch:
    """What this process remembers of a group's ticks, to judge who is silent."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._beat_s = 0.0
        self._answered_s = 0.0
        self._seen: deque[tuple[float, int]] = deque()

    def forget(self) -> None:
        """Begin anew: nobody is judged before another lease has passed."""
        self._seen.clear()

    def beat(self, sent_s: float, answered_s: float) -> None:
        """Remember a beat of our own. After too long a time without one, the others may have been held up like us."""
        if answered_s - self._beat_s > self._lease_s * TRUST:
            self.forget()
        self._beat_s = sent_s

    def saw(self, now_s: float, tick: int) -> None:
        """Remember an answer."""
        if self._seen and (now_s - self._answered_s > self._lease_s / 2 or tick < self._seen[-1][1]):
            self.forget()
        self._answered_s = now_s
        if not self._seen or now_s - self._seen[-1][0] >= self._lease_s / 40:
            self._seen.append((now_s, tick))

    def silent_at(self, now_s: float) -> int:
        """The newest tick that was seen a lease ago: members that have not gone past it are silent. -1: nobody is."""
        while len(self._seen) > 1 and self._seen[1][0] <= now_s - self._lease_s:
            self._seen.popleft()
        if not self._seen or self._seen[0][0] > now_s - self._lease_s or now_s - self._beat_s > self._lease_s * TRUST:
            return -1
        return self._seen[0][1]
