"""The two links of one life: a reader, which may block, and a writer, which never does.

    read ─► XREAD BLOCK on the reader ──its answer, or woken, or the time is up─► CLIENT UNBLOCK on the writer ─► its answer

One that was lost is replaced by the next call, as long as the server is in the same life (`run_id`); its old connection is
ended there, so that what still lies in a socket is not served behind our back. A read that was cancelled leaves its answer:
reading claims nothing, so the answer is dropped, and the next read waits until it has come.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from millstream.brokers.redis.link import BLOCK_MARGIN_S, BLOCK_S, Answers, Link, pack
from millstream.errors import BrokerDown, LeaseLost

if TYPE_CHECKING:
    from millstream.brokers.redis.broker import RedisBroker

_PING = pack("PING")


class Pair:
    """Made by `connect`; usable until `close`."""

    def __init__(self, broker: RedisBroker, name: str) -> None:
        self._broker = broker
        self._clock = broker.clock
        self._name = name
        self._links: dict[str, Link] = {}
        self._mending = asyncio.Lock()
        self._reading: Answers | None = None
        self._changed = asyncio.Event()
        self._closed = False

    async def connect(self) -> None:
        """Connect both. Raises `BrokerDown` when they reach two servers."""
        for side in "writer", "reader":
            self._links[side] = await self._broker.connect(f"{self._name}-{side}")
        if self._links["writer"].run_id != self._links["reader"].run_id:
            raise BrokerDown("two connections reached two servers: a failover is under way")

    async def writer(self) -> Link:
        """The link that never blocks. Raises `LeaseLost` when the server is in another life."""
        return await self._usable("writer")

    @property
    def woken(self) -> bool:
        """True when the next read is not to wait."""
        return self._changed.is_set()

    async def read(self, command: bytes, block_s: float) -> Any:
        """The answer to a command that blocks for so long; earlier, and perhaps empty, after `wake`."""
        reader = await self._usable("reader")
        if self._reading is not None:
            await self._cut(reader, self._reading)
        changed = self._changed
        answers = self._reading = await reader.post(command, 1, block_s + BLOCK_MARGIN_S)
        if block_s:
            # The server ends blocked reads every 100 ms only, so what falls due meanwhile would be late: we end them.
            answers.then(changed.set)
            await self._clock.wait(changed, block_s)
            await self._cut(reader, answers)
        (reply,) = await answers
        if self._reading is answers:  # else another read has cut this one short
            self._reading, self._changed = None, asyncio.Event()
        return reply

    async def post(self, command: bytes) -> Answers:
        """Send a command that does not block, for its answers to be awaited later."""
        reader = await self._usable("reader")
        return await reader.post(command, 1)

    def wake(self) -> None:
        """End a read that waits, or let the next one not wait."""
        self._changed.set()

    def close(self) -> None:
        """Give up both links."""
        self._closed = True
        for link in self._links.values():
            link.close()

    async def _cut(self, reader: Link, answers: Answers) -> None:
        if len(answers.got) < answers.wanted and not reader.closed:
            writer = await self.writer()
            await writer.calls([("CLIENT", "UNBLOCK", reader.client_id)])
            await reader.send(_PING, 1, BLOCK_S + BLOCK_MARGIN_S)  # is answered behind it

    async def _usable(self, side: str) -> Link:
        link = self._links.get(side)
        if link is not None and not link.closed:
            return link
        async with self._mending:
            if self._closed or link is None:
                raise BrokerDown(f"{self._name} is not connected")
            if self._links[side].closed:
                self._links[side] = await self._replaced(self._links[side], side)
            return self._links[side]

    async def _replaced(self, old: Link, side: str) -> Link:
        link = await self._broker.connect(f"{self._name}-{side}")
        try:
            if not link.run_id or link.run_id != old.run_id:
                raise LeaseLost(f"{self._name} belongs to another life of the server at {link.target.where}")
            await link.calls([("CLIENT", "KILL", "ID", old.client_id)])
        except BaseException:
            link.close()
            raise
        if side == "reader":
            self._reading = None
        return link
