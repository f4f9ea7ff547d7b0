"""KeyOrder: of the claims of one key, one is in the lanes and the others wait for it, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from millstream.brokers.base import Claim
from millstream.wire.packs import is_pack


class KeyOrder:
    """Who waits for whom. A key is busy from its first claim's arrival until the last one has ended.

    That holds across a lost lease too: while a cancelled handler still comes to its end, events of its key that were
    claimed anew wait for it.
    """

    def __init__(self) -> None:
        self._behind: dict[str | None, deque[Claim] | None] = {}  # None, for no key, is never in it
        self.waiting = 0
        """Claims that wait for another one of their key."""

    def arrive(self, claims: Iterable[Claim]) -> list[Claim]:
        """Those of these claims that nothing keeps from starting; the others wait."""
        ready: list[Claim] = []
        behind = self._behind
        for claim in claims:
            key = claim.record.key
            if key is None:
                ready.append(claim)
            elif key not in behind:
                behind[key] = None
                ready.append(claim)
            else:
                queue = behind[key]
                if queue is None:
                    queue = behind[key] = deque()
                queue.append(claim)
                self.waiting += 1
        return ready

    def precede(self, key: str | None, claims: Sequence[Claim]) -> None:
        """Let these wait for a busy key, before all others that do."""
        if claims and key is not None:
            queue = self._behind[key] = self._behind[key] or deque()
            queue.extendleft(reversed(claims))
            self.waiting += len(claims)

    def ended(self, key: str | None) -> Claim | None:
        """A claim has ended: the next one of its key, which may start now."""
        queue = self._behind.pop(key, None)
        if not queue:
            return None
        self._behind[key] = queue
        self.waiting -= 1
        return queue.popleft()

    def join(self, key: str | None, room: int) -> list[Claim]:
        """Up to so many of those that wait for a key, to go with the claim that they wait for."""
        queue = self._behind.get(key)
        taken: list[Claim] = []
        while queue and len(taken) < room:
            if queue[0].suspect > 1 or is_pack(queue[0].record):  # who was running in a crash is called alone
                break
            taken.append(queue.popleft())
        self.waiting -= len(taken)
        return taken

    def discard(self, gone: Callable[[Claim], bool]) -> int:
        """Forget claims that wait; how many there were."""
        before = self.waiting
        for key, queue in self._behind.items():
            if queue:
                left = deque(claim for claim in queue if not gone(claim))
                self.waiting -= len(queue) - len(left)
                self._behind[key] = left
        return before - self.waiting
