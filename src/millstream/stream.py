"""Stream: a named log of events, cut into partitions; and Position, a place in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from uuid import UUID

from msgspec import Struct

from millstream.errors import BadEvent, BadSetting, BadStream
from millstream.event import field_names, members, type_of
from millstream.units import (
    MAX_DEDUPE_IDS,
    MAX_DEDUPE_S,
    MAX_PACK_EVENTS,
    MAX_PARTITIONS,
    Duration,
    Size,
    check_name,
    seconds,
    size_bytes,
)

if TYPE_CHECKING:
    from typing_extensions import TypeForm

E = TypeVar("E")  # invariant on purpose: publish(to=stream) then checks the event

Key = str | int | UUID

NEVER = "never"

LEAST_DEDUPE_S = 0.001  # it is recorded in milliseconds

MAX_LINGER_S = 1.0  # who waits for `publish` waits for that too

_WORDS = {
    "others": ("dead", "skip"),
    "confirm": ("memory", "fsync", "replicated"),
    "codec": ("json", "msgpack"),
}

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


@dataclass(frozen=True)
class Dedupe:
    """How long a stream remembers the ids of its events: one that is published again within this time is not stored again.

    At most `ids` are remembered in each partition, at about 120 bytes each; past that, publishing is refused with
    `BrokerFull`, so make it what a partition gets within the window. Ids are compared within a partition: of events with a
    key, within the events of that key's partition. Raises `BadSetting`.
    """

    window: Duration
    ids: int = 1_000_000

    def __post_init__(self) -> None:
        if not LEAST_DEDUPE_S <= seconds(self.window) <= MAX_DEDUPE_S:
            raise BadSetting(
                f"dedupe={self.window!r}: from {LEAST_DEDUPE_S * 1000:.0f}ms up to {MAX_DEDUPE_S / 3600:.0f}h. What must be "
                "told apart for longer belongs into your database: see millstream.sql.Inbox"
            )
        if not _is_whole(self.ids) or not 1 <= self.ids <= MAX_DEDUPE_IDS:
            raise BadSetting(f"Dedupe(ids={self.ids!r}): from 1 to {MAX_DEDUPE_IDS:,} per partition")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What a stream keeps: events not older than `age`, at most `events` of them, at most `bytes`; whichever is less.

    With `unread="keep"`, an event stays for as long as a group has not settled it, or has a dead letter that needs it to be
    replayed. A group without a living member for longer than `forget` keeps nothing any more ("never": it does). When that
    lets the stream grow to its `ceiling`, a number of events above `events` or a size above `bytes` such as "2GB",
    publishing to it is refused with `BrokerFull`; an alarm comes before. With `unread="drop"`, what is too old or too much
    goes, and what a group had not settled is counted as lost. Raises `BadSetting`.
    """

    age: Duration | None = None
    events: int | None = None
    bytes: Size | None = None
    unread: Literal["keep", "drop"] = "keep"
    forget: Duration = "7d"
    ceiling: int | str | None = None

    def __post_init__(self) -> None:
        if self.age is None and self.events is None and self.bytes is None:
            then = "" if self.ceiling is None else f", and is full for ever at its ceiling={self.ceiling!r}"
            raise BadSetting(f"Retention() keeps everything{then}: say age=, events= or bytes=")
        if self.age is not None and seconds(self.age) < 1:
            raise BadSetting(f"Retention(age={self.age!r}): at least 1s")
        if self.events is not None and (not _is_whole(self.events) or self.events < 1):
            raise BadSetting(f"Retention(events={self.events!r}): a whole number, at least 1")
        if self.bytes is not None and size_bytes(self.bytes) < 1:
            raise BadSetting(f"Retention(bytes={self.bytes!r}): at least 1 byte")
        if self.unread not in ("keep", "drop"):
            raise BadSetting(f"Retention(unread={self.unread!r}): 'keep' or 'drop'")
        if self.forget != NEVER and seconds(self.forget) < 60:
            raise BadSetting(f"Retention(forget={self.forget!r}): at least 1m, or 'never'")
        self._check_ceiling()

    @property
    def forget_ms(self) -> int:
        """`forget` in milliseconds; 0 for never."""
        return 0 if self.forget == NEVER else int(seconds(self.forget) * 1000)

    @property
    def ceiling_events(self) -> int:
        """The ceiling as a number of events; 0 where it is a size, or there is none."""
        return self.ceiling if isinstance(self.ceiling, int) else 0

    @property
    def ceiling_bytes(self) -> int:
        """The ceiling as a size; 0 where it is a number of events, or there is none."""
        return size_bytes(self.ceiling) if isinstance(self.ceiling, str) else 0

    def _check_ceiling(self) -> None:
        if self.ceiling is None:
            return
        if isinstance(self.ceiling, bool) or not (self.ceiling_events or self.ceiling_bytes) > 0:
            raise BadSetting(f"Retention(ceiling={self.ceiling!r}): a number of events, or a size such as '2GB'")
        if self.unread == "drop":
            raise BadSetting(
                "Retention(ceiling=…) is for unread='keep': with 'drop' a stream does not outgrow its bounds"
            )
        if 0 < self.ceiling_events <= (self.events or 0):
            raise BadSetting(f"Retention(ceiling={self.ceiling!r}) is not above events={self.events!r}, which stay")
        if self.bytes is not None and 0 < self.ceiling_bytes <= size_bytes(self.bytes):
            raise BadSetting(f"Retention(ceiling={self.ceiling!r}) is not above bytes={self.bytes!r}, which stay")


@dataclass(frozen=True, kw_only=True)
class Pack:
    """How a publisher puts many events into one entry: up to `events` of them, those that are published within `linger`.

    An event takes a quarter of the room then, and far less time; a crash of a worker may repeat the events of a pack that
    it worked on. `codec` is how a pack is compressed: "zstd" and "lz4" need the extra of that name, in publishers and
    consumers. On a stream with a key a pack holds events of one key, so it helps where many follow each other. What people
    and bounds count of such a stream, its length, its lag, `Retention(events=…)`, are entries. Raises `BadSetting`.
    """

    events: int = 500  # typical ones take 28 KB; at 512 they are a little more, and Redis' allocator takes 32
    linger: Duration = "5ms"
    codec: Literal["zstd", "lz4", "none"] = "zstd"

    def __post_init__(self) -> None:
        if not _is_whole(self.events) or not 2 <= self.events <= MAX_PACK_EVENTS:
            raise BadSetting(f"Pack(events={self.events!r}): from 2 to {MAX_PACK_EVENTS:,}")
        if not seconds(self.linger) <= MAX_LINGER_S:
            raise BadSetting(f"Pack(linger={self.linger!r}): up to {MAX_LINGER_S:.0f}s, since `publish` waits for it")
        if self.codec not in ("zstd", "lz4", "none"):
            raise BadSetting(f"Pack(codec={self.codec!r}): 'zstd', 'lz4' or 'none'")


class Stream(Generic[E]):
    """A named log of events of the given types.

    With a `key` (a field's name, or a function of the event) all events of one key lie in one partition, in the order
    in which they were published. `others` says what a group does with types that the stream does not name: keep them as
    dead letters, or skip them. `retention` and `dedupe` hold for all who use the stream: they are recorded when it is first
    used, and changed by `millstream stream apply`. `codec` says how events are written, as JSON or as MessagePack; it is
    recorded too, and never changes. `confirm` and `pack` are habits of this publisher: how far an event has come when
    `publish` returns, in the server's memory, on its disk, on another server; and whether many events travel as one entry.

    Raises `BadStream`, `BadSetting`.
    """

    def __init__(
        self,
        name: str,
        events: TypeForm[E],
        *,
        key: str | Callable[[E], Key] | None = None,
        partitions: int | None = None,
        others: Literal["dead", "skip"] = "dead",
        retention: Retention | None = None,
        dedupe: Duration | Dedupe | None = None,
        confirm: Literal["memory", "fsync", "replicated"] = "memory",
        codec: Literal["json", "msgpack"] = "json",
        pack: Pack | None = None,
    ) -> None:
        self.name = check_name("stream", name)
        self.types = _types(name, events)
        """The wire name of each type, and its class."""
        self.key = key
        self.partitions = partitions if partitions is not None else DEFAULT_KEYED_PARTITIONS if key is not None else 1
        self.others = others
        if not isinstance(self.partitions, int) or not 1 <= self.partitions <= MAX_PARTITIONS:
            raise BadStream(f"stream {name!r}: partitions={partitions!r} must be from 1 to {MAX_PARTITIONS:,}")
        self.retention = retention
        self.dedupe = dedupe if isinstance(dedupe, Dedupe) or dedupe is None else Dedupe(dedupe)
        self.confirm = confirm
        self.codec = codec
        self.pack = pack
        self._check_words()
        self._check_values()
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

    def _check_words(self) -> None:
        for option, words in _WORDS.items():
            if (value := getattr(self, option)) not in words:
                possible = f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"
                raise BadStream(f"stream {self.name!r}: {option}={value!r} must be {possible}")

    def _check_values(self) -> None:
        if self.retention is not None and not isinstance(self.retention, Retention):
            raise BadStream(f"stream {self.name!r}: retention={self.retention!r}; write Retention(age='7d')")
        if self.pack is not None and not isinstance(self.pack, Pack):
            raise BadStream(f"stream {self.name!r}: pack={self.pack!r}; write Pack(events=500)")
        if self.pack is not None and self.dedupe is not None:
            raise BadStream(
                f"stream {self.name!r}: pack= with dedupe=: repeats are told apart by entry, and a pack is one entry of "
                "many events. Leave one of them out"
            )

    def _check_key(self) -> None:
        if self.key is None or callable(self.key):
            return
        for cls in self.types.values():
            if self.key not in (field_names(cls) or ()):
                raise BadStream(f"stream {self.name!r}: key={self.key!r} is not a field of {cls.__name__}")


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


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
