"""Ended: the head of a parked key, and what its outcome leaves behind. It was stored before, so its event is named alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from millstream.brokers.base import Dead, Done, Later, Settlement
from millstream.brokers.ledger import Bury, Delay, Effect, Head, Pop
from millstream.brokers.letters import buried, unburied


class Ended(NamedTuple):
    """A head whose outcome is known."""

    head: Head
    effects: Sequence[Effect]
    handled: bool = False
    retried: bool = False
    given_back: bool = False

    @property
    def key(self) -> str:
        """Whose head it is."""
        return self.head.key

    @property
    def offset(self) -> str:
        """That of its event."""
        return self.head.claim.position.offset


def end(head: Head, settlement: Settlement) -> Ended:
    """It was handled, or it failed."""
    key, claim = head.key, head.claim
    offset = claim.position.offset
    dead = buried(settlement.position, claim.attempt, settlement.letters)
    stored: tuple[Effect, ...] = (*settlement.outputs, *dead)
    match settlement.outcome:
        case Done():
            return Ended(head, (*stored, Pop(key, offset)), handled=True)
        case Dead(reason=reason, error=error):
            return Ended(head, (*stored, Bury(claim.stored, reason, error, claim.attempt), Pop(key, offset)))
        case Later(at_ms=at_ms, error=error, counted=counted, left=left):
            attempts, postponed = claim.attempt - (not counted), claim.postponed + (not counted)
            again = Delay(key, offset, at_ms, attempts, postponed, error, left or claim.left)
            return Ended(head, (*stored, again), retried=counted)


def bury_later(ended: Ended, at_ms: int) -> Ended:
    """The same, with no room for a dead letter: where it would have become one, it waits."""
    if any(isinstance(effect, Bury) for effect in ended.effects):
        outputs, left = unburied(ended.effects)
        return Ended(ended.head, (*outputs, _again(ended.head, at_ms, left)))
    return ended


def give_back(head: Head) -> Ended:
    """As if it had never been begun."""
    return Ended(head, (_again(head, 0),), given_back=True)


def _again(head: Head, at_ms: int, left: Sequence[int] = ()) -> Delay:
    claim = head.claim
    offset = claim.position.offset
    return Delay(head.key, offset, at_ms, claim.attempt - 1, claim.postponed, left=left or claim.left)
