"""The broker contract: what Millstream asks of a place that keeps events, and the values that they exchange.

Three small protocols. A `Broker` stores and reads. A `Consumer` is one running member of a group: it claims events, keeps
them alive, and settles them. An `Admin` is what people and monitoring look through. `testing.conformance` is the suite
that every broker passes; `brokers.memory` is the shortest correct one.

All methods raise `BrokerError`s: a retryable one decides nothing, the caller waits a little and calls again. All of them
survive cancellation: what was in flight may or may not have happened, and the object stays usable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

from msgspec import Struct

from millstream.errors import GroupOwned, NotSupported, StreamMismatch
from millstream.stream import Position
from millstream.units import MAX_PARKED
from millstream.wire.entry import Record

__all__ = [
    "Admin",
    "Broker",
    "Claim",
    "Confirm",
    "Consumer",
    "Dead",
    "DeadLetter",
    "Done",
    "GroupInfo",
    "Kept",
    "Later",
    "OtherOrder",
    "Outcome",
    "Output",
    "ParkedKey",
    "PendingInfo",
    "Position",
    "Put",
    "Record",
    "Settlement",
    "Start",
    "Stored",
    "StreamInfo",
    "StreamSpec",
    "Subscription",
    "Traits",
    "check_declared",
    "check_mode",
    "check_owner",
]

Confirm: TypeAlias = Literal["memory", "fsync", "replicated"]
"""How far an event has come when `append` returns: in the server's memory, on its disk, on another server."""

Start: TypeAlias = Literal["beginning", "now"] | int
"""Where a group begins at its birth: with the first event, with the next one, or at a time in epoch milliseconds."""


WAYS = {True: "in the order of keys", False: "without order"}
"""How a group consumes, in words."""


class OtherOrder(NotSupported):
    """The group consumes in the other way, with order or without, and has something to finish in it.

    `until_ms`: when the last of the events that wait for another attempt is due, which may be past; 0 while none waits, so
    that only members stand in the way.
    """

    def __init__(self, message: str, until_ms: float = 0.0) -> None:
        super().__init__(message)
        self.until_ms = until_ms


class Stored(Struct, frozen=True, gc=False):
    """A record, and where it lies."""

    position: Position
    record: Record


class Claim(Struct, frozen=True, gc=False):
    """The broker's word that this consumer may work on this event."""

    stored: Stored
    attempt: int
    """1 for the first. Counted before the handler runs, so that a handler that kills its process is counted too."""
    suspect: int = 0
    """How a crash left it behind: 0 not at all; 1 it was fetched when a process crashed; n > 1 it had been *started* in
    n − 1 crashes. `begin` must be called before a suspect's handler starts; from 2 on it runs with nothing beside it."""
    postponed: int = 0
    """How often `RetryLater` put it off; these are not attempts."""
    fault: str = ""
    """Not empty: the entry is no event, and why. Its record has an empty type, and a preview as its data."""
    token: int = 0
    """In the order of keys: the epoch of the partition's lease. It grows with every owner. 0 without order."""


class Done(Struct, frozen=True, gc=False):
    """Finished. The note says why it was skipped, if it was."""

    note: str = ""


class Later(Struct, frozen=True, gc=False):
    """Try again at this time (epoch milliseconds by the caller's clock; a broker with its own clock translates)."""

    at_ms: int
    error: str
    counted: bool = True
    """False: the attempt does not count (`RetryLater`)."""


class Dead(Struct, frozen=True, gc=False):
    """Give up: keep it as a dead letter. The reason is one of a few words, the error says the rest."""

    reason: str
    error: str = ""


Outcome: TypeAlias = Done | Later | Dead


class Output(Struct, frozen=True, gc=False):
    """An event that a handler published: stored before its outcome, with trait `atomic_outputs` in the same step."""

    stream: str
    record: Record


class Put(Struct, frozen=True, gc=False):
    """A piece of state that is stored with the outcome (pipelines; no broker has this power yet)."""

    key: bytes
    value: bytes | None


class Settlement(Struct, frozen=True, gc=False):
    """What became of one claimed event."""

    position: Position
    outcome: Outcome
    outputs: Sequence[Output] = ()
    puts: Sequence[Put] = ()


class Kept(Struct, frozen=True, gc=False):
    """The answer to a heartbeat."""

    lost: frozenset[Position] = frozenset()
    """Taken from us, of what we held: cancel and discard."""
    drain: frozenset[int] = frozenset()
    """Partitions that another consumer asks for: finish, then release."""


class Traits(Struct, frozen=True, gc=False):
    """The powers of a broker, known once it is open."""

    order: bool = False
    delayed: bool = False
    atomic_outputs: bool = False
    confirms: frozenset[Confirm] = frozenset({"memory"})
    shared: bool = True
    """Several processes can use it at once."""


class StreamSpec(Struct, frozen=True, gc=False):
    """What decides where an event of a stream lies; recorded when the stream is first used, and compared ever after."""

    name: str
    partitions: int = 1
    key: str = ""
    """The key field's name; `()` for a function; empty without a key."""
    codec: str = "json"


class Subscription(Struct, frozen=True, gc=False):
    """What a consumer is to consume, and how."""

    stream: StreamSpec
    group: str
    owner: str
    """The app. A group belongs to one app, from its birth on."""
    start: Start = "beginning"
    lease_s: float = 10.0
    order: bool = False
    fresh: bool = True
    """False: take what waits, or was left behind by others, and nothing new."""
    max_parked: int = MAX_PARKED
    """Of an ordered group: events that may wait with their keys, a like share in each partition; past it, that one waits."""


class Consumer(Protocol):
    """One running member of a group. `fetch` may run beside `settle` and `keep`."""

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        """Claim up to `limit` events: new ones, those due again, those that a dead consumer left.

        Waits up to `wait_s` for the first one; an empty list is no error. The group and what it needs are made again when
        they vanished. Never returns an event that this consumer holds already.
        """
        ...

    async def begin(self, positions: Sequence[Position]) -> None:
        """Note durably that the handlers of these suspects start now. Raises `LeaseLost` when they are not ours."""
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Store outcomes and outputs; for each, False when the event was not ours any more (nothing was stored then).

        An output is stored before its outcome, a dead letter in the same step as its outcome. Safe to repeat: a settlement
        that was stored already answers False and changes nothing. A dead letter past `MAX_DEAD` is not stored: its event
        waits for some minutes and is tried again. When it raises a retryable error, some may be stored:
        send the same again. `BrokerFull` means that all were settled that need no room.
        """
        ...

    async def keep(self) -> Kept:
        """Heartbeat. To be called at least every quarter of the lease, also while nothing is held."""
        ...

    async def release(self, partitions: frozenset[int]) -> None:
        """Hand back, at once and not counted as an attempt, all that is held of these partitions."""
        ...

    async def close(self) -> None:
        """Hand back all that is held, and leave the group. Never raises for a broker that is gone."""
        ...


class StreamInfo(Struct, frozen=True, gc=False):
    """A stream as it is now."""

    spec: StreamSpec
    events: int
    """Events in it now."""
    added: int | None
    """Events that were ever added; None where the broker does not know."""
    bytes: int | None
    """What it takes up; None where the broker does not know."""
    first_ms: int | None
    last_ms: int | None


class GroupInfo(Struct, frozen=True, gc=False):
    """A group as it is now, over all partitions of its stream."""

    stream: str
    group: str
    owner: str
    consumers: int
    """Members that beat within their lease."""
    lag: int | None
    """Events not yet delivered; None where nobody can tell, never 0 for unknown."""
    pending: int
    """Delivered and not settled: being handled, or waiting."""
    scheduled: int
    """Of the pending ones, those that wait for their next attempt."""
    dead: int
    """Dead letters kept now."""
    done: int | None
    """Settled as done or skipped."""
    retried: int
    """How often an attempt failed and was scheduled again."""
    replayed: int
    """How often a dead letter was given back to the group."""
    dropped: int
    """Dead letters that a person dropped."""


class PendingInfo(Struct, frozen=True, gc=False):
    """An event that is delivered and not settled."""

    position: Position
    consumer: str
    """Empty while it waits."""
    attempt: int
    due_ms: int | None
    """When its next attempt is due; None while somebody works on it."""


class DeadLetter(Struct, frozen=True, gc=False):
    """An event given up for one group."""

    stream: str
    group: str
    stored: Stored
    """The event and its position; an entry that is no event has an empty type, and a preview as its data."""
    reason: str
    """`failed`, `rejected`, `never`, `crashed`, `unknown type`, `undecodable`."""
    error: str
    attempts: int
    died_ms: int
    ref: str
    """Where the broker keeps it: opaque."""


class ParkedKey(Struct, frozen=True, gc=False):
    """A key of an ordered group whose events wait behind one that failed."""

    stream: str
    group: str
    partition: int
    key: str
    """Of an event without a key: NUL and its offset."""
    events: int
    first: Position
    attempts: int
    """Of the first event."""
    due_ms: int | None
    """When that is tried again; None while the key waits for a person."""
    error: str
    since_ms: int
    """When the key was parked."""


class Admin(Protocol):
    """What people and monitoring look through. Nothing here needs the code of an app."""

    async def streams(self) -> list[StreamInfo]:
        """All declared streams, by name."""
        ...

    async def groups(self, stream: str) -> list[GroupInfo]:
        """All groups of a stream, by name. Empty for an unknown stream."""
        ...

    async def pending(self, stream: str, group: str, limit: int) -> list[PendingInfo]:
        """The oldest pending events of each partition."""
        ...

    async def dead(self, stream: str, group: str, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Dead letters in the order of their references, behind `after`."""
        ...

    async def replay(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Give dead letters back to their own group, attempts counted anew; False where the letter or its event is gone."""
        ...

    async def give(self, stream: str, group: str, events: Sequence[Stored]) -> int:
        """Let a group handle events of its stream once more, attempts counted anew; how many were given.

        Those that it has not settled yet are left out, since they come anyway; so nothing is given twice while it waits. In
        an ordered group, events of a key come in the order in which they stand here, behind all that is parked of the key;
        without order, one that is gone from the stream is left out too. Settled is what is stored as settled: a member of an
        ordered group stores every few seconds what it has settled behind an event that still runs. When it raises, some may
        have been given: give the same again. Raises `BrokerRefused` for an unknown group.
        """
        ...

    async def drop(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Discard dead letters for ever; False where the letter is gone."""
        ...

    async def adopt(self, stream: str, group: str, owner: str) -> None:
        """Make another app the owner of a group; it keeps its place."""
        ...

    async def keys(self, stream: str, group: str, limit: int = 100) -> list[ParkedKey]:
        """The keys that wait, those that were parked first first."""
        ...

    async def parked(self, key: ParkedKey, limit: int = 100) -> list[Stored]:
        """The events that wait of a key, in order."""
        ...

    async def release_keys(self, keys: Sequence[ParkedKey]) -> list[bool]:
        """Let keys be tried at once, attempts counted anew; False where nothing is parked any more."""
        ...

    async def drop_keys(self, keys: Sequence[ParkedKey]) -> list[int]:
        """Discard all that is parked of these keys, for ever; how many events each."""
        ...

    async def seek(self, stream: str, group: str, start: Start, *, live: bool = False) -> None:
        """Move a group to another place. Events behind it come (again), whatever became of them; dead letters stay.

        What is pending, or parked, behind that place is forgotten, since it comes again; in an ordered group, what is parked
        before it stays. Raises `BrokerRefused` for an unknown group, and for one with members, unless `live`: then these
        lose what they hold.
        """
        ...

    async def forget(self, stream: str, group: str) -> None:
        """Delete a group with all that it has: its place, what waits, its dead letters. Raises `BrokerRefused` as `seek`."""
        ...


class Broker(Protocol):
    """A place that keeps events."""

    @property
    def traits(self) -> Traits:
        """Its powers; known once it is open."""
        ...

    @property
    def admin(self) -> Admin:
        """What people and monitoring look through."""
        ...

    @property
    def url(self) -> str:
        """Where it is, for people: without a password."""
        ...

    async def open(self) -> None:
        """Connect. Raises `BrokerDown`, `BrokerRefused`, or `ConfigError` for a URL that cannot work."""
        ...

    async def close(self) -> None:
        """Give up all connections. Consumers are closed before."""
        ...

    async def declare(self, stream: StreamSpec) -> None:
        """Create the stream, or compare it with what is recorded: `StreamMismatch`."""
        ...

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        """Store records of a declared stream, in order within each partition, not atomically across them.

        Raises `BrokerFull`, `BrokerDown` or `BrokerRefused` when nothing was stored; `Unconfirmed`, whose `results` say
        what is known of each record, when some are stored or in doubt.
        """
        ...

    async def read(self, stream: str, partition: int, after: Position | None, limit: int) -> list[Stored]:
        """Up to `limit` events behind a position (None: from the first), in order; an empty list is the end.

        An entry that is no event comes with an empty type and a preview as its data.
        """
        ...

    async def locate(self, stream: str, start: Start) -> Mapping[int, Position | None]:
        """For each partition, the position behind which `read` begins: None for the beginning."""
        ...

    async def wait(self, stream: str, after: Mapping[int, Position | None], wait_s: float) -> None:
        """Return when there may be an event behind one of these positions, or the time is up."""
        ...

    async def subscribe(self, subscription: Subscription) -> Consumer:
        """Join a group, which is made if it is new. Raises `GroupOwned`, `StreamMismatch`, `NotSupported`.

        One that has to finish in the other way, with order or without, is joined in that way and switched later: see
        `brokers.switching`.
        """
        ...


def check_declared(recorded: StreamSpec, declared: StreamSpec, where: str) -> None:
    """Raise `StreamMismatch` when a stream is declared differently from how it was first used."""
    if recorded != declared:
        raise StreamMismatch(
            f"stream {declared.name!r} on {where} exists with {_declaration(recorded)}; here it is declared with "
            f"{_declaration(declared)}. Events lie where the first declaration put them: declare it like that, or use "
            "another name"
        )


def check_owner(stream: str, group: str, owner: str, ours: str) -> None:
    """Raise `GroupOwned` when the group belongs to another app."""
    if owner != ours:
        raise GroupOwned(
            f"group {group!r} of stream {stream!r} belongs to the app {owner!r}, not to {ours!r}: use another name, or run "
            f"`millstream group adopt {group}`"
        )


def check_mode(stream: str, group: str, ordered: bool, ours: bool, until_ms: float = 0.0) -> None:
    """Raise `OtherOrder` when the group consumes in the other way."""
    if ordered != ours:
        raise OtherOrder(
            f"group {group!r} of stream {stream!r} consumes {WAYS[ordered]}, and this app asks for {WAYS[ours]}: "
            f"write order={'key' if ordered else 'none'!r} at its subscribers, or use another name",
            until_ms,
        )


def _declaration(spec: StreamSpec) -> str:
    key = {"": "no key", "()": "a function as key"}.get(spec.key, f"key={spec.key!r}")
    return f"partitions={spec.partitions}, {key}, codec={spec.codec!r}"
