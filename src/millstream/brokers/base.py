"""The broker contract: what Millstream asks of a place that keeps events, and the values that they exchange.

Three small protocols. A `Broker` stores and reads. A `Consumer` is one running member of a group: it claims events, keeps
them alive, and settles them. An `Admin` is what people and monitoring look through. `testing.conformance` is the suite
that every broker passes; `brokers.memory` is the shortest correct one.

All methods raise `BrokerError`s: a retryable one decides nothing, the caller waits a little and calls again. All of them
survive cancellation: what was in flight may or may not have happened, and the object stays usable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from millstream.brokers.admin import Admin, DeadLetter, GroupInfo, ParkedKey, PendingInfo, StreamInfo
from millstream.brokers.values import (
    DONE,
    LATER,
    Claim,
    Confirm,
    Dead,
    Done,
    Kept,
    Later,
    Letter,
    Outcome,
    Output,
    Policy,
    Put,
    Settlement,
    Slot,
    Start,
    Stored,
    StreamSpec,
    Subscription,
    Tended,
    Traits,
    finished,
)
from millstream.errors import GroupOwned, NotSupported, StreamMismatch
from millstream.stream import Position
from millstream.wire.entry import Record

__all__ = [
    "DONE",
    "LATER",
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
    "Letter",
    "OtherOrder",
    "Outcome",
    "Output",
    "ParkedKey",
    "PendingInfo",
    "Policy",
    "Position",
    "Put",
    "Record",
    "Settlement",
    "Slot",
    "Start",
    "Stored",
    "StreamInfo",
    "StreamSpec",
    "Subscription",
    "Tended",
    "Traits",
    "check_declared",
    "check_mode",
    "check_owner",
    "finished",
]


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

    async def finish(self, positions: Sequence[Position]) -> list[bool]:
        """`settle` for events that are done, and with which nothing is stored: what most events come to, at less cost."""
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Store outcomes and outputs; for each, False when the event was not ours any more (nothing was stored then).

        An output is stored before its outcome, a dead letter in the same step as its outcome. Safe to repeat: a settlement
        that was stored already answers False and changes nothing. A dead letter past `MAX_DEAD` is not stored: its event
        waits for some minutes and is tried again; of a pack, those events that would have had one, beside those that are
        to be tried again anyway, and the others are finished. When it raises a retryable error, some may be stored:
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

    async def declare(self, stream: StreamSpec, policy: Policy | None = None) -> Policy:
        """Create the stream, or compare it with what is recorded: `StreamMismatch`. Returns the policy that holds.

        That is the one given where the stream is new, else the one that is recorded, whatever is given. Raises
        `NotSupported` for one that it cannot carry out.
        """
        ...

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        """Store records of a declared stream, in order within each partition, not atomically across them.

        One with `due_ms` is kept aside, and gets its place when it falls due: until then its offset is `LATER`. One whose id
        is remembered, as the stream's policy asks, is not stored again: its position is that of the first one.

        Raises `BrokerFull`, `BrokerDown` or `BrokerRefused` when nothing was stored; `Unconfirmed`, whose `results` say
        what is known of each record, when some are stored or in doubt; also when they are stored, and not confirmed at the
        level that was asked for.
        """
        ...

    async def append_slot(self, stream: str, slot: Slot, record: Record | None) -> bool:
        """Store the event of one slot of a schedule, and that it was, in one step; without a record, pass the slot over.

        False, and nothing is stored, when this slot or a later one was there already. Safe to repeat. Raises as `append`.
        """
        ...

    async def tend(self, stream: str) -> Tended:
        """One round of housekeeping: publish what has fallen due, remove what may go, count what is lost.

        Any process may do so at any time; of several at once one does each thing.
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

    async def policy(self, stream: str) -> Policy:
        """What holds for a declared stream, some seconds ago at most. Raises `BrokerRefused` for another one."""
        ...

    async def dictionary(self, stream: str, number: int) -> bytes | None:
        """A dictionary of a stream (trait `dictionaries`), or None. It is there before the first event that needs it."""
        ...

    async def create(self, subscription: Subscription) -> None:
        """Make a group, if it is new, without joining it: from now on it gets every event. Raises `GroupOwned`."""
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
