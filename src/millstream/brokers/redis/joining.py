"""How a group comes to be where its members consume it: made where it is new or gone, refused where it is another's.

A group consumes in one way, which is written beside each log. It may change while it is at rest: nothing is pending, waiting
or parked, and nobody lives in it.
"""

from __future__ import annotations

from typing import Any, Literal

from millstream.brokers.base import Subscription, check_mode, check_owner
from millstream.brokers.redis.link import Link, ReplyError
from millstream.brokers.redis.members import Place, behind
from millstream.brokers.redis.scripts import scripts

SILENCE_MS = 1_000  # beyond the lease: so long nobody has swept a group whose members are all dead


async def join(
    link: Link, place: Place, owner: str, start: str, lease_s: float, mode: Literal["queue", "log"] = "queue"
) -> None:
    """Make sure that the group exists on all partitions. Raises `GroupOwned`, `OtherOrder`."""
    for at in place.at:
        keys, args = (at.log, at.meta, at.due, at.note, at.lease), (place.group, owner, start, mode)
        state, *answer = await link.run(scripts["join"], keys, args)
        if state == b"MODE":
            await _switch(link, place, mode, lease_s)
            state, *answer = await link.run(scripts["join"], keys, args)
        if state == b"MODE":  # switched back at once, by others
            check_mode(place.stream, place.group, mode != "log", mode == "log")
        if state == b"OWNER":
            check_owner(place.stream, place.group, answer[0].decode(), owner)


async def create(link: Link, place: Place, subscription: Subscription) -> None:
    """Make the group where it is missing, and leave it as it is where it is not. Raises `GroupOwned`."""
    fields = f"mode:{place.group}", f"owner:{place.group}"
    known = _good(link, await link.calls([("HMGET", at.meta, *fields) for at in place.at]))
    mode = "log" if subscription.order else "queue"
    for at, (found, owner) in zip(place.at, known, strict=True):
        if not found:
            args = place.group, subscription.owner, behind(subscription.start), mode
            keys = at.log, at.meta, at.due, at.note, at.lease
            state, *answer = await link.run(scripts["join"], keys, args)
            owner = answer[0] if state == b"OWNER" else None
        if owner:
            check_owner(place.stream, place.group, owner.decode(), subscription.owner)


async def _switch(link: Link, place: Place, mode: str, lease_s: float) -> None:
    silence_ms = int(lease_s * 1000) + SILENCE_MS
    ordered = mode == "log"
    if not ordered and await _lives(link, place, silence_ms):  # with or without a partition
        check_mode(place.stream, place.group, True, False, await _waits_until_ms(link, place))
    for go in 0, 1:  # all of them, or none
        for at in place.at:
            keys = at.log, at.meta, at.due, at.lease, at.parked, place.live
            if not await link.run(scripts["switch"], keys, (place.group, mode, silence_ms, go)):
                check_mode(place.stream, place.group, not ordered, ordered, await _waits_until_ms(link, place))


async def _lives(link: Link, place: Place, silence_ms: int) -> bool:
    """True when there are members, and somebody who would have noticed their death was there a moment ago."""
    fields = f"seen:{place.group}", f"entered:{place.group}"
    asked: list[tuple[Any, ...]] = [("TIME",), ("ZCARD", place.live), *(("HMGET", at.meta, *fields) for at in place.at)]
    time, members, *moments = _good(link, await link.calls(asked))
    newest_ms = max(float(moment or 0) for pair in moments for moment in pair)
    return bool(members) and int(time[0]) * 1000 - newest_ms < silence_ms


async def _waits_until_ms(link: Link, place: Place) -> float:
    """When the last of what waits is due, by the server's time; 0 while nothing does, 1 for what is due now."""
    asked: list[tuple[Any, ...]] = [("HGET", at.lease, "h") for at in place.at]
    asked += [("ZREVRANGE", key, 0, 0, "WITHSCORES") for at in place.at for key in (at.due, at.parked)]
    replies = _good(link, await link.calls(asked))
    count = len(place.at)
    return max((max(1.0, float(last[1])) for last in replies[count:] if last), default=float(any(replies[:count])))


async def confirm(link: Link, place: Place) -> None:
    """Make sure, as a member without order, that the group was not switched while we came. Raises `OtherOrder`.

    In the order of keys, acquiring a partition does.
    """
    asked = [("HGET", at.meta, f"mode:{place.group}") for at in place.at]
    for reply in _good(link, await link.calls(asked)):
        check_mode(place.stream, place.group, reply == b"log", False)


def _good(link: Link, replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, ReplyError):
            raise link.failure(reply, "join")
    return replies
