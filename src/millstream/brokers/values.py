"""What brokers, consumers and workers exchange: where events lie, what becomes of them, what a broker can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from msgspec import Struct

from millstream.stream import Position
from millstream.units import FORGET_MS, MAX_PARKED
from millstream.wire.entry import Record

Confirm: TypeAlias = Literal["memory", "fsync", "replicated"]
"""How far an event has come when `append` returns: in the server's memory, on its disk, on another server."""


Start: TypeAlias = Literal["beginning", "now"] | int
"""Where a group begins at its birth: with the first event, with the next one, or at a time in epoch milliseconds."""


LATER = "later"
"""The offset of an event that is kept aside until it is due."""


class Stored(Struct, frozen=True, gc=False):
    """A record, and where it lies."""

    position: Position
    record: Record


class Claim(Struct, frozen=True, gc=False):
    """The broker's word that this consumer may work on this event."""

    position: Position
    record: Record
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
    left: Sequence[int] = ()
    """Of a pack that was tried before: which of its events are left. Empty: all of them."""

    @classmethod
    def of(
        cls,
        stored: Stored,
        attempt: int,
        suspect: int = 0,
        postponed: int = 0,
        fault: str = "",
        token: int = 0,
        left: Sequence[int] = (),
    ) -> Claim:
        """The claim of an event that is at hand with its place."""
        return cls(stored.position, stored.record, attempt, suspect, postponed, fault, token, left)

    @property
    def stored(self) -> Stored:
        """The event without what this consumer may do with it."""
        return Stored(self.position, self.record)


class Done(Struct, frozen=True, gc=False):
    """Finished. The note says why it was skipped, if it was."""

    note: str = ""


DONE = Done()


class Later(Struct, frozen=True, gc=False):
    """Try again at this time (epoch milliseconds by the caller's clock; a broker with its own clock translates)."""

    at_ms: int
    error: str
    counted: bool = True
    """False: the attempt does not count (`RetryLater`)."""
    left: Sequence[int] = ()
    """Of a pack: which of its events are to be tried again; the others are finished. Empty: all that the claim had left."""


class Dead(Struct, frozen=True, gc=False):
    """Give up: keep it as a dead letter. The reason is one of a few words, the error says the rest."""

    reason: str
    error: str = ""


Outcome: TypeAlias = Done | Later | Dead


class Output(Struct, frozen=True, gc=False):
    """An event that a handler published: stored before its outcome, with trait `atomic_outputs` in the same step."""

    stream: str
    record: Record
    derived: bool = False
    """Its id is derived from the event that was handled. Where outputs are atomic such a one is stored without a look at
    the ids that the stream remembers: it is no repeat, even when the event is handled once more on purpose."""


class Put(Struct, frozen=True, gc=False):
    """A piece of state that is stored with the outcome (pipelines; no broker has this power yet)."""

    key: bytes
    value: bytes | None


class Letter(Struct, frozen=True, gc=False):
    """An event of a pack that is given up, while the pack comes to an end of its own."""

    part: int
    """Which event of the pack."""
    record: Record
    """That event alone."""
    reason: str
    error: str = ""


class Settlement(Struct, frozen=True, gc=False):
    """What became of one claimed event. A pack is settled as one: see `Later.left` and `letters`."""

    position: Position
    outcome: Outcome
    outputs: Sequence[Output] = ()
    puts: Sequence[Put] = ()
    letters: Sequence[Letter] = ()
    """Of a pack: dead letters that are stored in the same step as the outcome."""


def finished(positions: Sequence[Position]) -> list[Settlement]:
    """What `Consumer.finish` says of these, as `settle` takes it."""
    return [Settlement(position, DONE) for position in positions]


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
    dedupe: bool = False
    retention: bool = False
    slots: bool = False
    """It can store one event per slot of a schedule."""
    packs: bool = False
    """It remembers which events of a pack are left, and keeps a dead letter of one of them."""
    dictionaries: bool = False
    """It keeps dictionaries beside a stream, for the small events in it."""


class StreamSpec(Struct, frozen=True, gc=False):
    """What decides where an event of a stream lies; recorded when the stream is first used, and compared ever after."""

    name: str
    partitions: int = 1
    key: str = ""
    """The key field's name; `()` for a function; empty without a key."""
    codec: str = "json"


class Policy(Struct, frozen=True, gc=False):
    """What holds for a stream whoever uses it: recorded when it is first declared, and changed by `Admin.apply` alone.

    0 means: not asked for.
    """

    dedupe_ms: int = 0
    """So long an id is remembered, in its partition: an event with one that is known is not stored again."""
    dedupe_ids: int = 0
    """Ids that are remembered at most, in each partition; past it, `BrokerFull`."""
    age_ms: int = 0
    """Events older than this may go."""
    events: int = 0
    """Events beyond this many may go, the oldest first."""
    bytes: int = 0
    """What is beyond this size may go; about, where a broker cannot weigh exactly."""
    keep: bool = True
    """What a group has not settled stays, and so does what a dead letter needs to be replayed. False: it goes too, and is
    counted as lost."""
    forget_ms: int = FORGET_MS
    """A group without a living member for longer than this keeps nothing; 0: it does, for ever."""
    ceiling_events: int = 0
    """With so many events in it the stream takes no more: `BrokerFull`."""
    ceiling_bytes: int = 0
    dictionary: int = 0
    """The number of the dictionary with which small events are written that travel alone: set by `Admin.train` alone."""


class Slot(Struct, frozen=True, gc=False):
    """A moment at which a schedule publishes."""

    schedule: str
    at_ms: int


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


class Tended(Struct, frozen=True):
    """What a round of housekeeping has done with a stream, and found."""

    published: int = 0
    """Delayed events that fell due."""
    due_ms: int | None = None
    """When the next one is."""
    trimmed: int = 0
    lost: Mapping[str, int] = {}
    """Per group, events that are gone and that it had not settled, found since the last round: dropped by the policy, or
    removed by somebody else."""
    fading: Mapping[str, int] = {}
    """Groups without a living member that keep events now and will soon keep none, and when (epoch milliseconds)."""
    forgotten: frozenset[str] = frozenset()
    """Groups that keep nothing any more, since nobody was seen in them for so long."""
    fullness: float = 0.0
    """How near the ceiling it is: 1 is full; 0 without one."""
    pinned_by: str = ""
    """What keeps the oldest events that might go: a group, or `dead letters of` one; empty when nothing does."""
