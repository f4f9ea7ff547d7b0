"""Events in one SQLite file, shared by all processes of a machine. The URL, publishing and reading.

`file.py` finds the file, `writer.py` has the threads, `storing.py` stores events, `log.py` finds them, `retention.py`
removes them, `consumer.py` has the groups without order, `ledger.py` those with; the schemas have all tables.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from sqlite3 import Connection
from typing import cast
from urllib.parse import parse_qsl, unquote

from msgspec.structs import replace

from millstream.brokers.base import (
    Confirm,
    Consumer,
    Policy,
    Position,
    Record,
    Slot,
    Start,
    Stored,
    StreamSpec,
    Subscription,
    Tended,
    Traits,
)
from millstream.brokers.budget import Budget
from millstream.brokers.ordered import OrderedConsumer
from millstream.brokers.sqlite import log, member, retention, storing
from millstream.brokers.sqlite.admin import SQLiteAdmin
from millstream.brokers.sqlite.consumer import SQLiteConsumer
from millstream.brokers.sqlite.file import File, InDoubt, Synchronous
from millstream.brokers.sqlite.ledger import SQLiteLedger
from millstream.brokers.sqlite.writer import Reader, Writer
from millstream.brokers.switching import subscribed
from millstream.clock import Clock
from millstream.errors import BadSetting, BrokerDown, NotSupported, Unconfirmed
from millstream.settings import Settings
from millstream.telemetry import Telemetry, logger

MAX_READ = 10_000  # events in one answer: the reader's transaction must stay short
MAX_STEPS = 10  # of one round of housekeeping, each a transaction of its own


class SQLiteBroker:
    """Keeps events in a file. Belongs to the event loop that opened it; a forked child opens one of its own, see `forks.py`.

    An event whose `append` returned survives a crash of all processes; with `synchronous=full`, the default, it survives a
    power cut too. Processes of other machines cannot share the file: its locks do not reach over a network.
    """

    def __init__(self, url: str, settings: Settings, clock: Clock, telemetry: Telemetry) -> None:
        path, self._synchronous = _parse(url)
        self._path = path
        self._prefix = f"{settings.namespace}:" if settings.namespace else ""
        self._writer: Writer | None = None
        self._reader: Reader | None = None
        self.clock = clock
        self._telemetry = telemetry
        self._budget = Budget()
        self.url = f"sqlite:///{os.path.abspath(path)}"
        self.admin = SQLiteAdmin(self)
        confirms: set[Confirm] = {"memory", "fsync"} if self._synchronous == "full" else {"memory"}
        self.traits = Traits(
            order=True,
            delayed=True,
            atomic_outputs=True,
            confirms=frozenset(confirms),
            dedupe=True,
            retention=True,
            slots=True,
            packs=True,
            dictionaries=True,
        )

    async def open(self) -> None:
        """Find or create the file. Raises `BrokerRefused` for one that is not ours, and leaves it untouched."""
        if self._writer is not None:
            return
        file = File(self._path, self._synchronous)
        await asyncio.to_thread(file.open)
        writer, reader = Writer(file, self.clock), Reader(file, self.clock)
        await writer.start()
        try:
            await reader.start()
        except BaseException:
            await writer.close()
            raise
        self._writer, self._reader = writer, reader
        logger.info("events are in %s", file.path)

    async def close(self) -> None:
        """Store what was asked for, end both threads."""
        writer, reader, self._writer, self._reader = self._writer, self._reader, None, None
        if reader is not None:
            await reader.close()
        if writer is not None:
            await writer.close()

    @property
    def writer(self) -> Writer:
        """The thread that writes. Raises `BrokerDown` while the broker is not open."""
        if self._writer is None:
            raise BrokerDown(f"{self.url} is not open")
        return self._writer

    @property
    def reader(self) -> Reader:
        """The thread that reads. Raises `BrokerDown` while the broker is not open."""
        if self._reader is None:
            raise BrokerDown(f"{self.url} is not open")
        return self._reader

    def inside(self, stream: str) -> str:
        """A stream's name inside the file: several namespaces share it."""
        return self._prefix + stream

    def outside(self, name: str) -> str | None:
        """A stream's name as users know it; None when it belongs to another namespace."""
        namespace, separator, stream = name.rpartition(":")
        return stream if namespace + separator == self._prefix else None

    async def declare(self, stream: StreamSpec, policy: Policy | None = None) -> Policy:
        """Create the stream, or compare it with what is recorded: `StreamMismatch`. Returns the policy that holds."""
        name = self.inside(stream.name)
        return await self.writer.ask(lambda db: log.declare(db, name, stream, policy).policy, durable=True)

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        """Store the records in one transaction: all of them or none. They are on the disk when this returns."""
        if confirm not in self.traits.confirms:
            raise NotSupported(f"{self.url} cannot confirm {confirm!r}, only {', '.join(sorted(self.traits.confirms))}")
        if not records:
            return []
        name, now_ms = self.inside(stream), self.clock.now_ms()

        def job(db: Connection) -> list[Position]:
            return storing.store(db, log.known_as(db, name), records, now_ms)

        try:
            return await self.writer.ask(job, durable=True, rings=True)
        except InDoubt as error:
            raise Unconfirmed(str(error), results=[None] * len(records)) from error

    async def append_slot(self, stream: str, slot: Slot, record: Record | None) -> bool:
        """Store the event of a slot, and that it was, in one transaction; False when it was there already."""
        name, now_ms = self.inside(stream), self.clock.now_ms()
        try:
            return await self.writer.ask(
                lambda db: storing.store_slot(db, name, slot, record, now_ms), durable=True, rings=True
            )
        except InDoubt as error:
            raise Unconfirmed(str(error), results=[None]) from error

    async def tend(self, stream: str) -> Tended:
        """Publish what has fallen due, remove what may go, count what is lost, in a few short transactions."""
        published, due_ms = await self._ripen(stream)
        tended = await self._trim(stream)
        return replace(tended, published=published, due_ms=due_ms)

    async def read(self, stream: str, partition: int, after: Position | None, limit: int) -> list[Stored]:
        """Up to `limit` events behind a position, fewer when they are large; an empty list is the end."""
        name, limit = self.inside(stream), min(limit, MAX_READ)
        return await self.reader.ask(lambda db: log.read(db, name, partition, after, limit))

    async def locate(self, stream: str, start: Start) -> dict[int, Position | None]:
        """For each partition, the position behind which `read` begins. A time is that of storing."""
        name = self.inside(stream)

        def job(db: Connection) -> dict[int, Position | None]:
            known = log.known_as(db, name)
            found = {p: log.locate(db, known.log(p), start) for p in range(known.partitions)}
            return {p: Position(p, str(seq)) if seq else None for p, seq in found.items()}

        return await self.reader.ask(job)

    async def policy(self, stream: str) -> Policy:
        """What holds for a declared stream."""
        name = self.inside(stream)
        return await self.reader.ask(lambda db: log.known_as(db, name).policy)

    async def dictionary(self, stream: str, number: int) -> bytes | None:
        """A dictionary of a stream, or None."""
        name = self.inside(stream)
        return await self.reader.ask(lambda db: log.dictionary(db, log.known_as(db, name), number))

    async def wait(self, stream: str, after: Mapping[int, Position | None], wait_s: float) -> None:
        """Return when there is an event behind one of these positions, or the time is up."""
        name = self.inside(stream)

        def job(db: Connection) -> bool:
            known = log.known_as(db, name)
            return any(log.ends_behind(db, known.log(p), log.seq_of(position)) for p, position in after.items())

        until_s = self.clock.monotonic() + wait_s
        while True:
            bell = self.writer.bell
            if await self.reader.ask(job):
                return
            left_s = until_s - self.clock.monotonic()
            if left_s <= 0 or not await self.writer.listen(bell, left_s):
                return

    async def create(self, subscription: Subscription) -> None:
        """Make a group, if it is new, without joining it."""
        name, now_ms = self.inside(subscription.stream.name), self.clock.now_ms()
        await self.writer.ask(lambda db: member.create(db, name, subscription, now_ms), durable=True)

    async def subscribe(self, subscription: Subscription) -> Consumer:
        """Join a group, which is made if it is new. One that has nothing to finish may change its way to consume."""
        return await subscribed(self._member, subscription, self.clock)

    async def _ripen(self, stream: str) -> storing.Ripe:
        name, published = self.inside(stream), 0
        for _ in range(MAX_STEPS):
            now_ms = self.clock.now_ms()
            ripe = await self.writer.ask(lambda db: storing.ripen(db, name, now_ms), durable=True)  # noqa: B023 - awaited
            published += ripe.published
            if not ripe.published:
                break
            self.writer.ring()
        return storing.Ripe(published, ripe.due_ms)

    async def _trim(self, stream: str) -> Tended:
        name, trimmed, lost = self.inside(stream), 0, Counter[str]()
        for _ in range(MAX_STEPS):
            now_ms, now_s = self.clock.now_ms(), self.clock.monotonic()
            step = await self.writer.ask(lambda db: retention.trim(db, name, now_ms, now_s))  # noqa: B023 - awaited
            trimmed += step.tended.trimmed
            lost.update(step.tended.lost)
            if not step.more:
                break
        return replace(step.tended, trimmed=trimmed, lost=dict(lost))

    async def _member(self, subscription: Subscription) -> Consumer:
        consumer = (
            OrderedConsumer(
                lambda: SQLiteLedger(self, subscription), subscription, self.clock, self._telemetry, self._budget
            )
            if subscription.order
            else SQLiteConsumer(self, subscription)
        )
        await consumer.enter()
        return consumer


def _parse(url: str) -> tuple[str, Synchronous]:
    """The path and the option of a URL, or `BadSetting`."""
    rest, _, query = url.removeprefix("sqlite://").partition("?")
    host, slash, path = rest.partition("/")
    path = unquote(path)
    if host or not slash or not path or path.startswith(":"):
        raise BadSetting(
            f"{url!r}: write sqlite:///shop.db for a file here, or sqlite:////data/shop.db for a full path"
        )
    options: dict[str, str] = {"synchronous": "full"}
    with suppress(ValueError):
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else {}
        if given.keys() <= options.keys() and given.get("synchronous", "full") in ("full", "normal"):
            return path, cast("Synchronous", (options | given)["synchronous"])
    raise BadSetting(f"{url!r}: the only option is synchronous, full or normal")
