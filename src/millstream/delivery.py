"""Envelope: an event and what travels with it. Delivery: an envelope in a handler's hands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, overload

import msgspec

from millstream.errors import BadEvent
from millstream.stream import Position, Stream
from millstream.units import Duration, seconds

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    T = TypeVar("T")
    E_co = TypeVar("E_co", default=Any, covariant=True)
else:  # the default needs typing_extensions, which only checkers have to have
    from typing import TypeVar

    T = TypeVar("T")
    E_co = TypeVar("E_co", covariant=True)

_read_headers = msgspec.json.Decoder(dict[str, str]).decode


class Envelope(Generic[E_co]):
    """An event and what travels with it.

    To publish, give what should not be the default: an `id` of your own (1–64 printable ASCII characters), a `key` in
    place of the stream's, `headers` (text to text), and for an event that nobody shall see yet when it is `due`: a time with
    its zone, or how long after publishing. Reading a stream yields envelopes with everything filled in; their `due` is None.
    Raises `BadEvent` for a time without a zone.
    """

    __slots__ = ("_headers", "due", "event", "id", "key", "source", "time_ms", "type")

    def __init__(
        self,
        event: E_co,
        *,
        id: str | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        due: datetime | Duration | None = None,
    ) -> None:
        self.event = event
        self.due = _checked_due(due)
        """When it is to be published; None: at once."""
        self.id = id or ""
        """Unique; empty until Millstream has given one."""
        self.key = key
        self.type = ""
        """The type's name on the wire."""
        self.source = ""
        """The app that published it."""
        self.time_ms = 0
        """When it was published, in milliseconds since the epoch; 0 until it is."""
        self._headers: Mapping[str, str] | bytes = headers or {}

    @property
    def headers(self) -> Mapping[str, str]:
        """What travels beside the event: `causation`, `correlation`, `traceparent`, and your own."""
        if isinstance(self._headers, bytes):
            self._headers = _readable(self._headers)
        return self._headers

    @property
    def time(self) -> datetime:
        """When it was published, in UTC."""
        return datetime.fromtimestamp(self.time_ms / 1000, UTC)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.event!r}, id={self.id!r}, key={self.key!r})"


class Delivery(Envelope[E_co]):
    """An envelope in a handler's hands: where it lies, which attempt this is, until when."""

    __slots__ = ("_deadline_ms", "_stage", "attempt", "last_attempt", "position", "staged", "token")

    def __init__(  # built by the worker for every delivery that a handler asks for: positional, and nothing computed
        self,
        event: E_co,
        id: str,
        key: str | None,
        type: str,
        source: str,
        time_ms: int,
        headers: bytes,
        position: Position,
        attempt: int,
        last_attempt: bool,
        deadline_ms: int | None,
        stage: Callable[[Delivery[Any], Any, Stream[Any] | None], Any],
        token: int = 0,
    ) -> None:
        self.event = event
        self.due = None
        self.id = id
        self.key = key
        self.type = type
        self.source = source
        self.time_ms = time_ms
        self._headers = headers
        self.position = position
        self.attempt = attempt
        """1 for the first; counted before the handler runs."""
        self.last_attempt = last_attempt
        """True when a failure of this attempt makes the event a dead letter."""
        self._deadline_ms = deadline_ms
        self._stage = stage
        self.token = token
        """A fencing token: it grows whenever another process takes over the partition, so that a database can refuse what a
        process writes that was taken for dead. 0 where the group keeps no order."""
        self.staged: list[Any] = []
        """What `publish` was given so far, ready to be stored."""

    @property
    def deadline(self) -> datetime | None:
        """When this attempt times out, in UTC; None without a timeout."""
        return None if self._deadline_ms is None else datetime.fromtimestamp(self._deadline_ms / 1000, UTC)

    @overload  # without `to`, mypy would take an Envelope for one of nothing
    def publish(self, event: Envelope[Any], *, to: None = None) -> None: ...
    @overload
    def publish(self, event: T | Envelope[T], *, to: Stream[T] | None = None) -> None: ...
    def publish(self, event: Any, *, to: Stream[Any] | None = None) -> None:
        """Hand over an event to be stored together with this delivery's outcome. Does no I/O.

        Stored only when the handler ends well. Raises `Unroutable` or `TooLarge` at once.
        """
        self.staged.append(self._stage(self, event, to))


def _checked_due(due: datetime | Duration | None) -> datetime | Duration | None:
    if isinstance(due, datetime):
        if due.utcoffset() is None:
            raise BadEvent(
                f"due={due} has no time zone: write datetime(…, tzinfo=UTC), or due.astimezone() for local time"
            )
    elif due is not None:
        seconds(due)
    return due


def _readable(headers: bytes) -> Mapping[str, str]:
    """Headers that are no JSON object of text count as none: they come from a foreign producer, and the event is whole."""
    try:
        return _read_headers(headers) if headers else {}
    except msgspec.MsgspecError:
        return {}
