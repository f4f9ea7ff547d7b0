"""Acks: deliveries are finished only while they are ours.

XACK ignores who owns an entry. Our fence key is deleted before anybody takes over what we hold, so the writer keeps a WATCH
on it: the transaction that acks runs only while the fence was never touched. EXEC ends the WATCH, therefore each write ends
with the next WATCH and a GET; armed is what the *answer* of that GET shows, and there is one MULTI per arm. In a model that
leaves out the fence's deletion, consumers ack each other's work within seconds.

A script does it where there is no WATCH, or no memory for a transaction; it costs a call of its own per partition.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from millstream.brokers.redis.link import Link, ReplyError, pack
from millstream.brokers.redis.members import Place
from millstream.brokers.redis.scripts import scripts
from millstream.errors import LeaseLost

MAX_ACKS = 1_000  # ids per XACK, and per call of a script: Lua cannot pass many more

_MULTI, _EXEC = pack("MULTI"), pack("EXEC")


class Acks:
    """The acks of one incarnation, on the writer that it has now. Methods raise `LeaseLost` when its fence is gone."""

    def __init__(self, place: Place, name: str, nonce: bytes, writer: Callable[[], Link]) -> None:
        self.fenced = False
        """True when it has ended on the server, as far as we know."""
        self._place = place
        self._name = name
        self._nonce = nonce
        self._writer = writer
        self._fence = place.fence(name)
        self._rearm = pack("WATCH", self._fence) + pack("GET", self._fence)
        self._arming = asyncio.Lock()
        self._armed = False
        self._scripted = False

    async def arm(self) -> None:
        """Watch the fence, on a writer that is new."""
        async with self._arming:
            await self._arm()

    async def send(self, acks: Sequence[tuple[int, Sequence[str]]]) -> int:
        """Finish held deliveries, per partition: all of them, or none when it raises; how many were not pending."""
        commands = [
            pack("XACK", self._place.at[partition].log, self._place.group, *offsets[begin : begin + MAX_ACKS])
            for partition, offsets in acks
            for begin in range(0, len(offsets), MAX_ACKS)
        ]
        packed = b"".join([_MULTI, *commands, _EXEC, self._rearm])
        async with self._arming:
            if not (self._armed or self._scripted):
                await self._arm()
            while not self._scripted:
                self._armed = False
                replies = await self._writer().send(packed, len(commands) + 4)
                *queued, done, _, nonce = replies
                self._armed = nonce == self._nonce
                self.fenced = self.fenced or not (self._armed or isinstance(nonce, ReplyError))
                if isinstance(done, list):
                    return sum(len(offsets) for _, offsets in acks) - self._sum(done)
                if isinstance(done, ReplyError):
                    if any(str(reply).startswith("OOM") for reply in queued if isinstance(reply, ReplyError)):
                        break
                    raise self._writer().failure(_first_error(queued, done), "XACK")
                if isinstance(nonce, ReplyError):
                    raise self._writer().failure(nonce, "GET")
                if self.fenced:
                    raise self.lost()
        return await self._send_by_script(acks)

    def lost(self) -> LeaseLost:
        """The error to raise when the fence was found gone."""
        self.fenced = True
        return LeaseLost(
            f"{self._name} is no member any more: it was silent for its lease, or this is another server now"
        )

    async def _arm(self) -> None:
        self._armed = False
        watched, nonce = await self._writer().send(self._rearm, 2)
        if isinstance(nonce, ReplyError):
            raise self._writer().failure(nonce, "GET")
        if nonce != self._nonce:
            raise self.lost()
        self._scripted = isinstance(watched, ReplyError)  # a proxy without WATCH
        self._armed = not self._scripted

    def _sum(self, done: Sequence[Any]) -> int:
        for reply in done:
            if isinstance(reply, ReplyError):
                raise self._writer().failure(reply, "XACK")
        return sum(done)

    async def _send_by_script(self, acks: Sequence[tuple[int, Sequence[str]]]) -> int:
        missing = 0
        for partition, offsets in acks:
            keys = self._place.at[partition].log, self._fence
            for begin in range(0, len(offsets), MAX_ACKS):
                ids = offsets[begin : begin + MAX_ACKS]
                state, *done = await self._writer().run(scripts["ack"], keys, (self._place.group, self._nonce, *ids))
                if state != b"OK":
                    raise self.lost()
                missing += len(ids) - done[0]
        return missing


def _first_error(replies: Sequence[Any], otherwise: Exception) -> Exception:
    return next((reply for reply in replies if isinstance(reply, ReplyError)), otherwise)
