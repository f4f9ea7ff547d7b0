"""A bare connection to a Redis server: prepared bytes go out, answers come back in order, and nothing else is done.

What the engine can do through Python is measured on it. It has no deadlines and no limits: a run is short and watched.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from millstream.errors import BrokerDown, BrokerRefused

Word = bytes | str | int


def pack(*words: Word) -> bytes:
    """A command as it goes over the wire."""
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub knows commands of one word only
    return packed


@dataclass(frozen=True)
class Address:
    """What a broker URL says about its server."""

    host: str
    port: int
    path: str
    """A unix socket, in place of host and port."""
    db: int
    login: Sequence[str]
    """User and password, or the password alone, or nothing."""

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read a URL that the broker has accepted."""
        parts = urlsplit(url)
        given = {name: values[0] for name, values in parse_qs(parts.query).items()}
        words = unquote(parts.username or given.get("username", "")), unquote(parts.password or "")
        login = [word for word in (words[0], words[1] or given.get("password", "")) if word]
        at_path = parts.scheme != "redis"
        db = given.get("db") or ("" if at_path else parts.path.strip("/")) or "0"
        path = unquote(parts.path) if at_path else ""
        return cls(parts.hostname or "localhost", parts.port or 6379, path, int(db), login)


class Wire(asyncio.Protocol):
    """A connection, from `opened` to the end of its block."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(replyError=self._complain)
        self._waiting: deque[tuple[asyncio.Future[list[Any]], int]] = deque()
        self._got: list[Any] = []
        self._complaint = ""
        self._transport: asyncio.Transport | None = None

    @classmethod
    @asynccontextmanager
    async def opened(cls, url: str) -> AsyncIterator[Wire]:
        """A connection that is logged in. Raises `BrokerDown`, `BrokerRefused`."""
        wire, loop, address = cls(), asyncio.get_running_loop(), Address.parse(url)
        try:
            if address.path:
                await loop.create_unix_connection(lambda: wire, address.path)
            else:
                await loop.create_connection(lambda: wire, address.host, address.port)
        except OSError as error:
            raise BrokerDown(f"no server at {address.path or address.host}: {error}") from None
        try:
            if address.login:
                await wire.call("AUTH", *address.login)
            await wire.call("SELECT", address.db)
            yield wire
        finally:
            if wire._transport is not None:
                wire._transport.close()

    async def call(self, *words: Word) -> Any:
        """Send one command and return its answer. Raises `BrokerRefused` for an error."""
        (reply,) = await self.write(pack(*words), 1)
        return reply

    def write(self, packed: bytes, replies: int) -> asyncio.Future[list[Any]]:
        """Send prepared bytes; the answers are to be awaited. Raises `BrokerRefused` there when one is an error."""
        answers: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if self._transport is None or self._transport.is_closing():
            raise BrokerDown("the connection was lost")
        self._waiting.append((answers, replies))
        self._transport.write(packed)
        return answers

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        self._reader.feed(data)
        while self._waiting and (reply := self._reader.gets()) is not False:
            self._got.append(reply)
            answers, wanted = self._waiting[0]
            if len(self._got) == wanted:
                self._waiting.popleft()
                self._answer(answers, self._got)
                self._got = []

    def connection_lost(self, error: Exception | None) -> None:
        """Part of `asyncio.Protocol`."""
        for answers, _ in self._waiting:
            if not answers.done():
                answers.set_exception(BrokerDown(f"the connection was lost: {error or 'the server closed it'}"))
        self._waiting.clear()

    def _answer(self, answers: asyncio.Future[list[Any]], got: list[Any]) -> None:
        complaint, self._complaint = self._complaint, ""
        if answers.done():  # who awaited them was cancelled
            return
        if complaint:
            answers.set_exception(BrokerRefused(complaint))
        else:
            answers.set_result(got)

    def _complain(self, words: str) -> Exception:
        self._complaint = self._complaint or words
        return BrokerRefused(words)
