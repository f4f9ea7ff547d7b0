"""The ledger: what a broker writes down of a group that consumes in the order of keys.

`OrderedConsumer` is the same for all brokers. A broker brings its ledger: one member's door to the group's durable state,
in steps that are atomic, fenced by owner and epoch, and safe to repeat. Per partition that state is

    lease    who may work on it, since which epoch, and who asks for it or is promised it
    w        all up to here is settled
    h, open  all up to `h` is settled as well, except for the events in `open`
    parked   per event key a queue of whole events: the first one failed, the others came after it; and when it is due
    notes    events that a crash left behind, and how often they were running in one

*Settled* is what is done, dead, or parked. There is no list of what is being handled: that costs nothing to write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol, TypeAlias

from msgspec import Struct

from millstream.brokers.base import Claim, Output, Stored

HELD_MS = 9_007_199_254_740_991
"""A due time that never comes: the key waits for a person."""


class Lease(Struct, frozen=True, gc=False):
    """Who may work on a partition, as it was seen."""

    partition: int
    owner: str = ""
    """Empty while it is free."""
    epoch: int = 0
    want: str = ""
    """Who asks for it."""
    next: str = ""
    """Of a free one: whom it was released to."""
    due_ms: float = float("inf")
    """When the first of its parked keys is due; people may have released one."""


class View(Struct, frozen=True):
    """A group, as one of its members sees it."""

    members: frozenset[str]
    """Who is alive, as far as this member can tell; itself included."""
    leases: Sequence[Lease]
    """One per partition, in order."""


class Grant(Struct, frozen=True):
    """A partition that is ours from now on, and where its last owner left it."""

    partition: int
    epoch: int
    """Grows with every owner: the token by which others can refuse what an earlier owner still does."""
    w: str
    """Empty: before the first event."""
    ordinal: int | None = None
    """How many events were ever added up to `w`; None where nobody can tell."""
    h: str = ""
    open: frozenset[str] = frozenset()
    clean: bool = True
    """False: the last owner crashed, and may have been killed by an event."""
    last: str = ""
    """The last event that there was: what came later, the last owner has not seen."""
    parked: frozenset[str] = frozenset()
    events_parked: int = 0
    notes: Mapping[str, int] = {}
    """Of events that a crash left behind: in how many crashes each was running."""
    lost: int = 0
    """Events that are gone and were never settled: somebody trimmed the log."""
    regressed: bool = False
    """The log ends before `w`: the server came back with less than was settled. It begins anew from the first event."""


class Park(Struct, frozen=True, gc=False):
    """Set an event aside, behind all that is parked of its key."""

    key: str
    stored: Stored
    due_ms: int = 0
    """When the key is tried; only where nothing of it is parked yet."""
    attempts: int = 0
    postponed: int = 0
    error: str = ""
    left: Sequence[int] = ()
    """Of a pack, which of its events are left: kept with the event, wherever in its key it stands."""


class Delay(Struct, frozen=True, gc=False):
    """The first parked event of a key is to be tried again."""

    key: str
    offset: str
    due_ms: int
    attempts: int
    postponed: int
    error: str = ""
    left: Sequence[int] = ()
    """Of a pack, which of its events are left from now on."""


class Pop(Struct, frozen=True, gc=False):
    """The first parked event of a key is finished; the next one is due at once."""

    key: str
    offset: str
    """Nothing is removed unless it is the first one."""


class Bury(Struct, frozen=True, gc=False):
    """A dead letter. That of one event of a pack has the offset of that event, and its record alone."""

    stored: Stored
    reason: str
    error: str
    attempts: int


Effect: TypeAlias = Park | Delay | Pop | Bury | Output
NEEDS_ROOM = (Bury, Output)
"""What a full broker refuses; all else can always be stored."""


class Commit(Struct, frozen=True):
    """Progress of one partition, with all that follows from it, in one step."""

    partition: int
    epoch: int
    seq: int
    """One more than that of the last commit which was stored: a repeat is recognized."""
    w: str
    ordinal: int | None
    h: str
    open: Sequence[str]
    effects: Sequence[Effect]
    """In the order of the events; what joins a parked key comes before what leaves it."""
    done: int
    """Events that were handled, or skipped, since the last commit."""
    retried: int
    cleared: Sequence[str]
    """Events whose notes go."""
    several: bool = False
    """What needs room follows from several events: none of it is to go past a ceiling. Of one event it may, for it is never
    parted, and might fit in no other way."""


class State(Enum):
    """What became of a commit."""

    STORED = 0
    LOST = 1
    """Somebody else has the partition; nothing was stored."""
    FULL = 2
    """The broker has no room for the effects; nothing was stored."""
    DEAD_FULL = 3
    """There is no room for more dead letters of this group; nothing was stored."""


class Committed(Struct, frozen=True, gc=False):
    """The answer to a commit."""

    state: State
    emptied: frozenset[str] = frozenset()
    """Of the keys of its `Pop`s, those of which nothing is parked any more."""
    events_parked: int = 0
    why: str = ""
    """Of one that is FULL: what is full, and what to do."""


class Head(Struct, frozen=True, gc=False):
    """The first parked event of a key, due and counted as begun."""

    key: str
    claim: Claim


class Heads(NamedTuple):
    """What is due of the parked keys, and when the next one is."""

    heads: Sequence[Head]
    due_ms: float


class Cursor(NamedTuple):
    """How far a partition was read, and how much of it may be read."""

    after: str
    room: int
    epoch: int


class Ledger(Protocol):
    """One life of a member. All methods raise `BrokerError`; `LeaseLost` is the end of this life, with all its leases."""

    name: str

    @property
    def now_ms(self) -> float:
        """The time by which things are due."""
        ...

    async def enter(self) -> None:
        """Become a member of the group, which is made if it is new. Raises `GroupOwned`, `StreamMismatch`."""
        ...

    async def beat(self) -> None:
        """Say that we live."""
        ...

    async def look(self) -> View:
        """See who lives, and who has what."""
        ...

    async def acquire(self, seen: Lease) -> Grant | None:
        """Take a lease that is free, or whose owner is silent; None when it has changed since it was seen."""
        ...

    async def ask(self, seen: Lease) -> None:
        """Ask the owner of a lease for it, unless somebody does already or it has changed since it was seen."""
        ...

    async def release(self, partition: int, epoch: int, heir: str) -> None:
        """Give a lease back; to whom may be empty."""
        ...

    async def read(self, cursors: Mapping[int, Cursor], limit: int, wait_s: float) -> list[Claim]:
        """Events behind the cursors, about `limit`, in order within each partition; waits for the first one.

        Returns early when `wake` is called. Cancelling it loses nothing. Cursors are worked out when they are looked at:
        whoever reads in another thread takes a copy along.
        """
        ...

    def wake(self) -> None:
        """End a `read` that waits."""
        ...

    async def heads(self, partition: int, epoch: int, busy: Sequence[str], limit: int) -> Heads | None:
        """Begin the first events of parked keys that are due and not busy; None when the lease is not ours."""
        ...

    async def begin(self, partition: int, epoch: int, offsets: Sequence[str]) -> bool:
        """Note that the handlers of these suspects start now; False when the lease is not ours."""
        ...

    async def commit(self, commits: Sequence[Commit]) -> list[Committed]:
        """Store progress, at most one commit of each partition. A repeat of the last one stored is STORED."""
        ...

    async def leave(self) -> None:
        """Be a member no longer."""
        ...
