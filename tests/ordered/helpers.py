"""What the tests of consuming in the order of keys share: claims, windows and outcomes in a few letters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from millstream.brokers.base import Claim, Dead, Done, Later, Outcome, Output, Position, Record, Settlement, Stored
from millstream.brokers.ledger import Bury, Commit, Committed, Delay, Effect, Grant, Head, Park, Pop, State
from millstream.brokers.window import WINDOW, Window

PUT_BACK = Later(0, "", counted=False)


def event(number: int, key: str | None = None, partition: int = 0) -> Stored:
    """An event; its number is its offset, and its id."""
    return Stored(Position(partition, str(number)), Record(partition, str(number), "order.placed", b"{}", key))


def claims(keys: str, first: int = 1) -> list[Claim]:
    """One claim per letter, which is its key; a hyphen is an event without one."""
    return [Claim.of(event(number, None if key == "-" else key), 1) for number, key in enumerate(keys, first)]


def opened(keys: str = "", *, size: int = WINDOW, **grant: Any) -> Window:
    """A window that has read these events."""
    given: dict[str, Any] = {"partition": 0, "epoch": 1, "w": ""} | grant
    window = Window(Grant(**given), size)
    window.put(claims(keys))
    return window


def handed_out(keys: str, **grant: Any) -> Window:
    """A window that has handed out these events."""
    window = opened(keys, **grant)
    window.hand_out(len(keys))
    return window


def parking(key: str = "a", **grant: Any) -> Window:
    """A window whose grant says that events of a key are parked."""
    return opened(parked=frozenset([key]), events_parked=1, **grant)


def head(number: int, key: str, attempt: int = 2, postponed: int = 0) -> Head:
    return Head(key, Claim.of(event(number, key), attempt, 0, postponed))


def output(number: int) -> Output:
    """What the handler of an event published."""
    return Output("mails", Record(0, str(number), "mail.sent", b"{}"))


def settle(window: Window, number: int, outcome: Outcome | None = None, outputs: Sequence[Output] = ()) -> bool:
    return window.settle(Settlement(Position(0, str(number)), outcome or Done(), outputs))


def dead(reason: str = "failed") -> Dead:
    return Dead(reason, "broken")


def stored(window: Window, *, emptied: str = "", room: bool = True, alone: bool = False) -> Commit:
    """What there is to commit, stored."""
    commit = window.commit(room=room, alone=alone)
    assert commit is not None
    window.answered(Committed(State.STORED, frozenset(emptied)))
    return commit


def numbers(some: Iterable[Claim]) -> list[int]:
    return [int(claim.position.offset) for claim in some]


def written(effects: Iterable[Effect]) -> list[str]:
    """Effects as words."""
    return [_word(effect) for effect in effects]


def _word(effect: Effect) -> str:
    match effect:
        case Output(record=record):
            return f"output {record.id}"
        case Park(stored=stored) | Bury(stored=stored):
            return f"{type(effect).__name__.lower()} {stored.position.offset}"
        case Pop(offset=offset) | Delay(offset=offset):
            return f"{type(effect).__name__.lower()} {offset}"
