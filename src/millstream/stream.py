"""Stream: a named log of events, cut into partitions; and Position, a place in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from uuid import UUID

from msgspec import Struct

from millstream.errors import BadEvent, BadStream
from millstream.event import field_names, members, type_of
from millstream.units import MAX_PARTITIONS, check_name

if TYPE_CHECKING:
    from typing_extensions import TypeForm

E = TypeVar("E")  # invariant on purpose: publish(to=stream) then checks the event

Key = str | int | UUID

DEFAULT_KEYED_PARTITIONS = 8  # enough for eight workers; growing later is a migration


class Position(Struct, frozen=True, gc=False):
    """A place in a stream. Ordered inside its partition only; the offset is opaque text."""

    partition: int
    offset: str

    def __str__(self) -> str:
        return f"{self.partition}@{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read `3@1693-0`. Raises `ValueError`."""
        partition, at, offset = text.partition("@")
        if not at or not offset or not partition.isdecimal():
            raise ValueError(f"{text!r} is not a position: write partition@offset, as in 3@1693-0")
        return cls(int(partition), offset)


class Stream(Generic[E]):
    """A named log of events of the given types.

    With a `key` (a field's name, or a function of the event) all events of one key lie in one partition, in the order
    in which they were published. `others` says what a group does with types that the stream does not name: keep them as
    dead letters, or skip them.

    Raises `BadStream`.
    """

    def __init__(
        self,
        name: str,
        events: TypeForm[E],
        *,
        key: str | Callable[[E], Key] | None = None,
        partitions: int | None = None,
        others: Literal["dead", "skip"] = "dead",
    ) -> None:
        self.name = check_name("stream", name)
        self.types = _types(name, events)
        """The wire name of each type, and its class."""
        self.key = key
        self.partitions = partitions if partitions is not None else DEFAULT_KEYED_PARTITIONS if key is not None else 1
        self.others = others
        if not isinstance(self.partitions, int) or not 1 <= self.partitions <= MAX_PARTITIONS:
            raise BadStream(f"stream {name!r}: partitions={partitions!r} must be from 1 to {MAX_PARTITIONS:,}")
        if others not in ("dead", "skip"):
            raise BadStream(f"stream {name!r}: others={others!r} must be 'dead' or 'skip'")
        self._check_key()

    def __repr__(self) -> str:
        return f"Stream({self.name!r}, {' | '.join(cls.__name__ for cls in self.types.values())})"

    @property
    def key_name(self) -> str:
        """How the key is recorded with the stream: the field's name, `()` for a function, empty without a key."""
        return self.key if isinstance(self.key, str) else "()" if self.key is not None else ""

    def key_of(self, event: Any) -> str | None:
        """The event's key as text. Raises `BadEvent` for a key that is not a string, an integer or a UUID."""
        if self.key is None:
            return None
        value = getattr(event, self.key) if isinstance(self.key, str) else self.key(event)
        if isinstance(value, str):
            return value
        if isinstance(value, int | UUID) and not isinstance(value, bool):
            return str(value)
        raise BadEvent(
            f"stream {self.name!r}: the key of {type(event).__name__} is {value!r}; it must be a string, an integer or "
            "a UUID"
        )

    def _check_key(self) -> None:
        if self.key is None or callable(self.key):
            return
        for cls in self.types.values():
            if self.key not in (field_names(cls) or ()):
                raise BadStream(f"stream {self.name!r}: key={self.key!r} is not a field of {cls.__name__}")


def _types(name: str, events: Any) -> dict[str, type]:
    types: dict[str, type] = {}
    for cls in members(events):
        if not isinstance(cls, type):
            raise BadStream(f"stream {name!r}: {cls!r} is not an event class; write Stream({name!r}, OrderPlaced)")
        mark = type_of(cls)
        if mark is None:
            raise BadStream(
                f"stream {name!r}: {cls.__name__} has no type name; write class {cls.__name__}(Event, type='…') or put "
                "@event('…') on it"
            )
        if types.setdefault(mark.wire, cls) is not cls:
            raise BadStream(
                f"stream {name!r}: {types[mark.wire].__name__} and {cls.__name__} are both named {mark.wire!r}; give "
                "one another name or version"
            )
    return types
