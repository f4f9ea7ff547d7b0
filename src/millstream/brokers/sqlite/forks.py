"""Forks: at the moment of one, no connection of ours is open in the process.

SQLite keeps what it has locked in the memory of the process, once for each file. A child inherits that memory and none of
the locks: what it opens then is not locked at all, so its parent, on closing, takes itself for the last one and deletes the
log that the child goes on writing to. That a child lets its parent's connections alone is therefore not enough.

So each thread that has a connection lets go of it before a fork, between two transactions, and opens it again when it is
needed next. The turnstile is let go of too: a child that has inherited it would keep it shut for its dead parent.
"""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from weakref import WeakSet

from millstream.telemetry import logger

WITHIN_S = 30.0  # another process that stands still inside the turnstile must not keep this one from forking for ever

_gate = threading.Lock()  # from the beginning of a fork to its end: nobody new comes, and no other fork
_holders: WeakSet[Holder] = WeakSet()
_paused: list[Holder] = []


class Holder:
    """Something with a connection."""

    def __init__(self) -> None:
        self.using = threading.Lock()
        """To be held while the connection is in use."""
        with _gate:
            _holders.add(self)

    @abstractmethod
    def let_go(self) -> None:
        """Close the connection, and what else must not be inherited. It is not in use."""


def _before() -> None:
    _gate.acquire()
    for holder in list(_holders):
        if holder.using.acquire(timeout=WITHIN_S):
            _paused.append(holder)
            holder.let_go()
        else:
            logger.warning("this process forks in the middle of a transaction: its child must not open the same file")


def _after() -> None:
    while _paused:
        _paused.pop().using.release()
    _gate.release()


def _after_in_child() -> None:
    _holders.clear()  # their threads are not there
    _after()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
