"""Letters: dead letters of events of a pack, and what is left of the pack where there is no room for them, or parked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from msgspec.structs import replace

from millstream.brokers.base import Later, Letter, Output, Position, Settlement, Stored
from millstream.brokers.ledger import Bury, Delay, Effect, Park
from millstream.errors import WireError
from millstream.wire.packs import is_pack, part_of, part_offset, read


def buried(pack: Position, attempts: int, letters: Iterable[Letter]) -> list[Bury]:
    """The dead letters of a pack's settlement: each event alone, and where it lies."""
    return [
        Bury(
            Stored(Position(pack.partition, part_offset(pack.offset, letter.part)), letter.record),
            letter.reason,
            letter.error,
            attempts,
        )
        for letter in letters
    ]


def unburied(effects: Sequence[Effect]) -> tuple[Sequence[Output], Sequence[int]]:
    """What stays of a settlement's effects without its dead letters: the outputs of a pack, and what is left of it.

    Nothing stays, and nothing is named as left, where all of it waits, and where it is no pack.
    """
    again = [effect.left for effect in effects if isinstance(effect, Park | Delay)]
    dying = [part_of(effect.stored.position.offset)[1] for effect in effects if isinstance(effect, Bury)]
    left = {part for parts in again for part in parts}.union(part for part in dying if part is not None)
    if not left or () in again:
        return (), ()
    return [effect for effect in effects if isinstance(effect, Output)], sorted(left)


def waiting(parked: Iterable[tuple[Stored, Sequence[int]]]) -> Iterator[Stored]:
    """The events that are parked: of a pack those that are left, each where it lies; one that cannot be read as it is."""
    for stored, left in parked:
        at = stored.position
        try:
            packed = read(stored.record, at.offset) if is_pack(stored.record) else None
        except WireError:
            packed = None
        if packed is None:
            yield stored
            continue
        for part in left or range(len(packed)):
            yield Stored(Position(at.partition, packed.offset_of(part)), packed.record(part))


def put_off(settlement: Settlement, at_ms: int) -> Settlement:
    """The same without dead letters: what would have become one waits, and what is finished is."""
    outcome, letters = settlement.outcome, settlement.letters
    parts = {letter.part for letter in letters}
    if isinstance(outcome, Later):
        parts = parts.union(outcome.left) if outcome.left else set()
    later = Later(at_ms, "no room for more dead letters", counted=False, left=sorted(parts))
    return replace(settlement, outcome=later, letters=())
