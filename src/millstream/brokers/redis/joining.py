"""How a group comes to be where its members consume it: made where it is new or gone, refused where it is another's.

A group consumes in one way, which is written beside each log. It may change while it is at rest: nothing is pending, waiting
or parked, and nobody lives in it.
"""

from __future__ import annotations

from typing import Literal

from millstream.brokers.base import check_mode, check_owner
from millstream.brokers.redis.link import Link
from millstream.brokers.redis.members import Place
from millstream.brokers.redis.scripts import scripts

SILENCE_MS = 1_000  # beyond the lease: so long nobody has swept a group whose members are all dead


async def join(
    link: Link, place: Place, owner: str, start: str, lease_s: float, mode: Literal["queue", "log"] = "queue"
) -> None:
    """Make sure that the group exists on all partitions. Raises `GroupOwned`, `NotSupported`."""
    for at in place.at:
        keys, args = (at.log, at.meta, at.due, at.note, at.lease), (place.group, owner, start, mode)
        state, *answer = await link.run(scripts["join"], keys, args)
        if state == b"MODE":
            await _switch(link, place, mode, lease_s)
            state, *answer = await link.run(scripts["join"], keys, args)
        if state == b"OWNER":
            check_owner(place.stream, place.group, answer[0].decode(), owner)


async def _switch(link: Link, place: Place, mode: str, lease_s: float) -> None:
    silence_ms = int(lease_s * 1000) + SILENCE_MS
    for go in 0, 1:  # all of them, or none
        for at in place.at:
            keys = at.log, at.meta, at.due, at.lease, at.parked, place.live
            if not await link.run(scripts["switch"], keys, (place.group, mode, silence_ms, go)):
                check_mode(place.stream, place.group, mode != "log", mode == "log")
