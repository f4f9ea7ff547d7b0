"""Refused: what had no room in one round of commits, and what is tried for it next.

What needs room follows from several events, and together they may have none: then one of them is tried at a time. Where that
has none either, only what needs no room is stored of that partition.
"""

from __future__ import annotations

from millstream.brokers.ledger import Commit
from millstream.brokers.window import Window


class Refused:
    """That of one round."""

    def __init__(self) -> None:
        self.full: dict[Window, str] = {}
        """Only what needs no room is stored of these; and why."""
        self._alone: set[Window] = set()

    def commit(self, window: Window) -> Commit | None:
        """What is to be stored next."""
        return window.commit(room=window not in self.full, alone=window in self._alone)

    def add(self, window: Window, commit: Commit, why: str) -> bool:
        """A commit had no room. False when there is none for anything at all."""
        if commit.several:
            self._alone.add(window)
        elif window in self.full:
            return False
        else:
            self.full[window] = why
        return True
