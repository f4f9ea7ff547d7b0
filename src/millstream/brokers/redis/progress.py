"""Commits and grants as the scripts know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from millstream.brokers.base import Output
from millstream.brokers.ledger import Bury, Commit, Committed, Delay, Effect, Grant, Park, Pop, State
from millstream.brokers.redis import parked, parts
from millstream.brokers.redis.letters import error_text, put
from millstream.brokers.redis.members import Place
from millstream.brokers.redis.outputs import Staged, Targets
from millstream.errors import BrokerRefused
from millstream.units import MAX_DEAD

BEFORE_ALL = "0-0"

_STATES = {b"OK": State.STORED, b"FULL": State.FULL, b"DEAD_FULL": State.DEAD_FULL}
_STATES |= dict.fromkeys((b"LOST", b"GONE", b"SEQ"), State.LOST)


def grant(partition: int, answer: Sequence[Any]) -> Grant:
    """What `acquire.lua` granted."""
    epoch, w, wn, h, opened, clean, last, lost, regressed, events_parked, keys, crashes, _ = answer
    return Grant(
        partition,
        int(epoch),
        w="" if w == BEFORE_ALL.encode() else w.decode(),
        ordinal=int(wn) if wn else None,
        h=h.decode(),
        open=frozenset(opened.decode().split()),
        clean=clean == 1,
        last="" if last == BEFORE_ALL.encode() else last.decode(),
        parked=frozenset(key.decode() for key in keys),
        events_parked=events_parked,
        notes={id_.decode(): int(count) for id_, count in zip(crashes[::2], crashes[1::2], strict=True)},
        lost=lost,
        regressed=regressed == 1,
    )


def call(
    place: Place, name: str, commit: Commit, translated: Callable[[float], int], targets: Targets | None
) -> tuple[Sequence[bytes], Sequence[Any]]:
    """Keys and arguments of `commit.lua`; without targets, without outputs.

    Due times of what is parked are to be translated into the server's.
    """
    at, partition = place.at[commit.partition], commit.partition
    keys = [at.log, at.lease, at.parked, at.parkinfo, at.note, at.dead]
    lists: dict[str, int] = {}
    for effect in commit.effects:
        if isinstance(effect, Park | Delay | Pop) and effect.key not in lists:
            keys.append(place.park(partition, effect.key))
            lists[effect.key] = len(keys)
    blobs: list[bytes] = []
    effects = [_words(effect, lists, blobs, translated) for effect in commit.effects if not isinstance(effect, Output)]
    who = place.group, name, commit.epoch, commit.seq
    ordinal = "" if commit.ordinal is None else commit.ordinal
    progress = commit.w or BEFORE_ALL, ordinal, commit.h, " ".join(commit.open), commit.done, commit.retried
    packed = [_pack(effects), b""]
    if targets is not None:
        staged = Staged(targets, len(keys), blobs)
        outputs = [effect for effect in commit.effects if isinstance(effect, Output)]
        packed[1] = _pack([staged.add(output, bounded=commit.several) for output in outputs])
        keys += staged.keys
    return keys, (*who, *progress, partition, MAX_DEAD, " ".join(commit.cleared), *packed, *blobs)


def committed(state: bytes, *answer: Any) -> Committed:
    """What `commit.lua` answered."""
    if state == b"TYPE":
        raise BrokerRefused(f"the key {answer[0].decode()!r} holds something that is not Millstream's")
    if state != b"OK":
        return Committed(_STATES[state])
    events_parked, *emptied = answer
    return Committed(State.STORED, frozenset(key.decode() for key in emptied), events_parked)


def _pack(words: Sequence[Any]) -> bytes:
    return msgspec.msgpack.encode(words) if words else b""


def _words(
    effect: Effect, lists: Mapping[str, int], blobs: list[bytes], translated: Callable[[float], int]
) -> tuple[Any, ...]:
    # The scripts' MessagePack knows no bytes: they follow as arguments, and here stands which one, or how many.
    match effect:
        case Park(key=key, stored=stored, left=left):
            blobs.append(parked.encode(stored, left))
            return "park", lists[key], key, len(blobs), *_figures(effect, translated)
        case Delay(key=key, offset=offset, left=left):
            delay = "delay", lists[key], key, offset, *_figures(effect, translated)
            return (*delay, parts.text(left)) if left else delay
        case Pop(key=key, offset=offset):
            return "pop", lists[key], key, offset
        case Bury(stored=stored, reason=reason):
            dead = "dead", stored.position.offset, reason, error_text(effect.error), effect.attempts
            return *dead, *put(parked.fields(stored), blobs)
    raise AssertionError(f"{effect!r} is stored elsewhere")


def _figures(effect: Park | Delay, translated: Callable[[float], int]) -> tuple[Any, ...]:
    # The due time as text: the scripts' numbers are doubles, and would write a large one with an exponent.
    return str(translated(effect.due_ms)), effect.attempts, effect.postponed, error_text(effect.error)
