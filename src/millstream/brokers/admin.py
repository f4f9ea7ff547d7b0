"""Admin: what people and monitoring look through, and what they see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from millstream.brokers.values import Policy, Start, Stored, StreamSpec
from millstream.stream import Position


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
    policy: Policy = Policy()
    delayed: int = 0
    """Events that were published for later, and are not in it yet."""
    repeats: int = 0
    """Publishes that were dropped since their ids were known."""
    trimmed: int = 0
    """Events that retention has removed."""


class GroupInfo(Struct, frozen=True, gc=False):
    """A group as it is now, over all partitions of its stream."""

    stream: str
    group: str
    owner: str
    consumers: int
    """Members that beat within their lease."""
    lag: int | None
    """Events not yet delivered; None where nobody can tell, never 0 for unknown. In an ordered group: those behind its
    mark, up to which all is settled; so those that are being handled are among them."""
    pending: int
    """Delivered and not settled: being handled, or waiting. In an ordered group: parked, whatever they wait for."""
    scheduled: int
    """Of the pending ones, those that wait for their next attempt; in an ordered group all of them."""
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
    lost: int = 0
    """Events that were gone before it had settled them."""
    seen_ms: int | None = None
    """When a member of it was last seen (epoch milliseconds); None where nobody can tell."""


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
        """Give dead letters back to their own group, attempts counted anew; False where the letter or its event is gone.

        An event of a pack comes again without the others: alone, at its own position, or as what is left of its pack.
        """
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
        """The events that wait of a key, in order; of a pack those that are left of it, each at its own position."""
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

    async def apply(self, stream: str, policy: Policy) -> None:
        """Change what holds for a stream; who uses it learns so within seconds. Raises `BrokerRefused` for an unknown one,
        `NotSupported` for what the broker cannot carry out.
        """
        ...

    async def train(self, stream: str, number: int, content: bytes = b"") -> None:
        """Store a dictionary, and have publishers use it from now on; they learn so within seconds. 0: none any more.

        A dictionary stays as long as its stream, unchanged, since an old event may need it. Raises `BrokerRefused` for an
        unknown stream, for other content under a number that is taken, and for more than `MAX_DICTIONARIES`; `BadSetting`
        for one over `MAX_DICTIONARY_BYTES`.
        """
        ...

    async def discard(self, stream: str) -> None:
        """Delete a stream with all that it has: events, groups, declaration. Raises `BrokerRefused` as `seek`."""
        ...

    async def slots(self, stream: str) -> Mapping[str, int]:
        """The schedules that have published to a stream, and the last slot of each (epoch milliseconds)."""
        ...
