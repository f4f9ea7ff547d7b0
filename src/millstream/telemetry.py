"""The names of what happens, and a place to listen.

Each app has one `Telemetry`; nothing is global. Emitting costs a truth test while nobody listens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

logger = logging.getLogger("millstream")

Listener: TypeAlias = Callable[[str, Mapping[str, Any]], None]

RETRIED = "event.retried"  # group, position, attempt, delay_s, exception
POSTPONED = "event.postponed"  # group, position, attempt, delay_s
DEAD = "event.dead"  # group, position, attempt, reason, error (text), exception (None where no handler raised)
HELD = "event.held"  # as DEAD: its key waits for a person
SKIPPED = "event.skipped"  # group, position, attempt, reason
TIMED_OUT = "handler.timed_out"  # group, position, timeout_s
ACQUIRED = "partition.acquired"  # group, stream, partition, token, clean (False: its last owner crashed)
RELEASED = "partition.released"  # group, stream, partition, token, heir (empty: whoever comes)
LOST = "consumer.lost"  # group, positions: taken over by somebody else
STALE = "settle.refused"  # group, positions: settled too late, somebody else has them
BROKER_ERROR = "broker.error"  # group, doing, error: retried with back-off
LISTENER_FAILED = "listener.failed"  # stream, position, exception
FELL_DUE = "stream.fell_due"  # stream, count: events that were published for later are in the stream now
TRIMMED = "stream.trimmed"  # stream, count
FILLING = "stream.filling"  # stream, fullness, pinned_by: once, when it comes near its ceiling
EVENTS_LOST = "group.lost"  # group, stream, count: gone before the group had settled them
FADING = "group.fading"  # group, stream, at_ms: from when on nothing is kept for it, unless it runs
FORGOTTEN = "group.forgotten"  # group, stream: nothing is kept for it any more
SLOT_PUBLISHED = "schedule.published"  # schedule, stream, at_ms
SLOTS_MISSED = (
    "schedule.missed"  # schedule, stream, count, passed, first_ms, last_ms: of very many, the latest thousand
)
SLOT_FAILED = "schedule.failed"  # schedule, stream, at_ms, exception: no event could be made for it

COMPLAIN_EVERY_S = 1.0


class Telemetry:
    """What happens in one app."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._complained: dict[str, float] = {}

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call the listener with every event's name and measurements, from now on. Returns how to stop that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def emit(self, name: str, /, **measurements: Any) -> None:
        """Tell all listeners. A listener that raises is logged and does no harm."""
        for listener in self._listeners:
            try:
                listener(name, measurements)
            except Exception:
                logger.exception("a telemetry listener failed on %s", name)

    def complain(self, about: str, now_s: float, message: str, *args: Any) -> None:
        """Log a warning, one line a second about the same thing: that says as much as a thousand."""
        if now_s - self._complained.get(about, float("-inf")) >= COMPLAIN_EVERY_S:
            self._complained[about] = now_s
            logger.warning(message, *args)
