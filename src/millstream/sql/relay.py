"""Relay: publishes what lies in the outbox, in the order of each key, and crosses it off.

    claim a shard, read its batch  ─►  publish it, in the order of seq  ─►  cross it off, give the shard back
        one transaction                    outside of any                       one transaction

**Order.** Numbers come out of a sequence before a transaction is committed, so a smaller one may appear later than a larger
one. What matters is a key. Let T1 have ended before T2 calls `publish` for the same key. Then T1's number is the smaller
one, and every moment of the database that shows T2's row shows T1's. A batch is read in one statement, which sees one
moment, and is published by number: T1's event is before T2's. Two transactions of one key that overlap at their calls have
no order before they commit; whichever row appears first is published first. (Dropped: to wait until no older transaction
runs, by PostgreSQL's `pg_snapshot_xmin`. One forgotten transaction anywhere would stop the outbox; and it would turn round
the one case that it changes, where T1 writes its event first and then waits for a row lock until T2 has committed.)

**Nothing twice, nothing lost.** An event's id is fixed when it is written. A row goes only after the broker has confirmed
its event. Whatever is published again, since a relay or the database died in between, has an id that the stream remembers.

**Several relays** take the shards of a stream in turns, each for one batch. That a shard is taken saves work, and is not
what order rests on, so a claim that runs out is harmless. Say that A has read a batch and stands still, and B takes over:
A publishes the events of a key one after the other, each when all before it are stored, and so does B. The first time that
an event is stored, whoever does it, those before it are there. What A sends when it wakes up is stored already, since B has
crossed off nothing that was not, and is dropped. Crossing off is refused to A: the shard is not its own any more.

This holds as long as the stream remembers ids for longer than a relay stands still, or all of them and the database are
down, with a batch published and not crossed off.

One relay publishes some 15,000 small events a second, on two busy cores and with a broker that costs nothing.

**What cannot be published** (too large, of an unknown type, undecodable: rows that other code has written) is set aside with
its error, and later ones of its key behind it; all others go on. It is looked at again from time to time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from millstream.brokers.base import Policy, Record
from millstream.errors import BadSetting, BrokerError, MillstreamError, Unconfirmed, WireError
from millstream.handlers.router import Runtime
from millstream.handlers.subscriber import Subscriber
from millstream.publisher import Shortening, policy_of, spec_of
from millstream.sql import tables
from millstream.sql.connections import Row, Statement, Work
from millstream.sql.link import Link
from millstream.sql.rows import SHARDS, Line, fault_of
from millstream.stream import Stream
from millstream.telemetry import BROKER_ERROR
from millstream.units import MAX_APPEND_BYTES, MAX_APPEND_RECORDS, MAX_EVENT_BYTES, Duration, seconds
from millstream.wire import codec, packs
from millstream.wire.compression import Dictionary
from millstream.wire.partition import partition_of
from millstream.worker.threads import Threads

SET_ASIDE = "outbox.set_aside"  # stream, event_id, error

HOLD_MS = 5_000  # a batch takes some milliseconds; of a relay that takes longer, others do it again, in vain or not
STOP_S = 5.0  # a batch in hand is finished; it is no loss when it is not
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
LOOK_AGAIN_S = 5.0
LOOK_AGAIN = 20  # of what is aside, so many at a time, with their data: in turns all of them


class Batch(NamedTuple):
    """What a relay has in hand."""

    holder: str
    stream: str
    shard: int
    rows: list[Row]


class Sorted(NamedTuple):
    """A batch, looked at."""

    records: list[Record]
    published: list[int]
    """Their rows, once they are."""
    aside: dict[int, str]
    """Rows to set aside, and why; without a reason behind another one."""


class Relay:
    """Publishes the events of an outbox while a worker runs. Include it in an app."""

    def __init__(
        self, streams: Mapping[str, Stream[Any]], connect: Any, *, source: str = "", poll: Duration = "500ms"
    ) -> None:
        self._streams = dict(streams)
        self._connect = connect
        self._source = source
        self._poll_s = seconds(poll)
        if not 0 < self._poll_s <= 60:
            raise BadSetting(f"relay(poll={poll!r}): more than 0, up to 1m")
        if not callable(connect) and not hasattr(connect, "connect"):
            raise BadSetting(f"relay({connect!r}): give an engine, or a function that opens a connection")

    def subscribers(self) -> Iterable[Subscriber]:
        """It has no handlers."""
        return ()

    def streams(self) -> Iterable[Stream[Any]]:
        """Those of the outbox."""
        return self._streams.values()

    @asynccontextmanager
    async def running(self, runtime: Runtime) -> AsyncIterator[None]:
        """Publish, until the block is left. Raises `BadSetting` where a stream does not remember ids."""
        policies: dict[str, Policy] = {}
        for stream in self._streams.values():
            policy = policies[stream.name] = await runtime.broker.declare(spec_of(stream), policy_of(stream))
            if not policy.dedupe_ms:
                raise BadSetting(
                    f"outbox: stream {stream.name!r} on {runtime.broker.url} does not remember ids, so a relay that dies "
                    "would double events; run `millstream stream apply` with dedupe= in its declaration"
                )
        with Threads() as threads:
            run = _Run(runtime, self._streams, self._connect, threads, self._source, self._poll_s)
            await run.open()
            for name, policy in policies.items():
                await run.shortening.follow(name, policy)
            async with asyncio.TaskGroup() as tasks:
                task = tasks.create_task(run.loop(), name="millstream relay of the outbox")
                looking = tasks.create_task(run.shortening.run(), name="millstream look at dictionaries")
                try:
                    yield
                finally:
                    looking.cancel()
                    run.stopping.set()
                    await runtime.clock.wait(run.ended, STOP_S)
                    task.cancel()


class _Run:
    """One relay at work."""

    def __init__(
        self,
        runtime: Runtime,
        streams: Mapping[str, Stream[Any]],
        connect: Any,
        threads: Threads,
        source: str,
        poll_s: float,
    ) -> None:
        self.stopping = asyncio.Event()
        self.ended = asyncio.Event()
        self._runtime = runtime
        self._clock = runtime.clock
        self._streams = streams
        self._decoders = {
            stream.name: {name: codec.decoder(cls) for name, cls in stream.types.items()} for stream in streams.values()
        }
        self._connect = connect
        self._threads = threads
        self._source = source
        self._poll_s = poll_s
        self._link: Link | None = None
        self._rests: dict[str, float] = {}
        self._pauses: dict[str, float] = {}
        self._looked: dict[str, tuple[float, int]] = {}
        self._dictionaries: dict[str, Dictionary | None] = {}
        self.shortening = Shortening(self, runtime.broker, runtime.clock, runtime.telemetry)

    @property
    def used(self) -> Iterable[str]:
        """The streams to which something goes."""
        return self._streams

    def use(self, stream: str, dictionary: Dictionary | None) -> None:
        """From now on write small events of a stream with this dictionary, or with none."""
        self._dictionaries[stream] = dictionary

    async def open(self) -> None:
        """Connect, and see that the tables are there. Raises `BadSetting` when not."""
        try:
            self._link = await Link.open(self._connect, self._threads, self._clock)
            for stream in self._streams:
                await self._link.transact(_rows(Statement(tables.READY, {"stream": stream})))
                await self._link.transact(_prepare(stream))
        except BaseException as error:
            await self._hang_up()
            if isinstance(error, MillstreamError) or not isinstance(error, Exception):
                raise
            raise BadSetting(
                f"the outbox cannot be used: {error}. Is the database there, and were the tables made, with "
                "`outbox.create(connection)` or a migration with `outbox.ddl(dialect)`?"
            ) from error

    async def loop(self) -> None:
        """Starts with the worker; ends after `stopping`, with the batch in hand. Cancelled, what was in hand comes again."""
        pause_s = FIRST_PAUSE_S
        try:
            while not self.stopping.is_set():
                if await self._round():
                    pause_s = FIRST_PAUSE_S
                    continue
                await self._clock.wait(self.stopping, min(pause_s, self._poll_s))
                pause_s *= 2
        finally:
            await self._hang_up()
            self.ended.set()

    async def _round(self) -> bool:
        """A batch of each stream that is not at rest. True when there was something to do."""
        busy = False
        for stream in self._streams:
            if self._rests.get(stream, 0.0) > self._clock.monotonic():
                continue
            try:
                busy |= await self._serve(stream)
                self._pauses.pop(stream, None)
            except (BrokerError, Unconfirmed) as error:
                if not error.retryable:
                    raise
                self._rest(stream, f"publish to {stream}", error)
            except MillstreamError:
                raise
            except Exception as error:  # whatever a driver calls it: the next one may work
                await self._hang_up()
                self._rest(stream, "use its database", error)
        return busy

    async def _serve(self, stream: str) -> bool:
        """One batch of a stream. False where none was ready."""
        if self._link is None:
            self._link = await Link.open(self._connect, self._threads, self._clock)
        link = self._link
        await self._look_again(stream, link)
        if not await link.transact(_rows(Statement(tables.READY, {"stream": stream}))):
            return False  # looked at before anything is written: an idle relay keeps nobody from writing
        batch = await link.transact(_take(stream, self._clock.nonce(), tables.claim(link.dialect)))
        if batch is None:
            return False
        sorted_ = self._sort(batch)
        release = tables.release(link.dialect)
        try:
            if sorted_.records:
                await self._runtime.broker.append(stream, sorted_.records, self._streams[stream].confirm)
        except Exception:
            # Nothing is crossed off, not even what is known to be stored: the next one begins where this one did.
            await link.transact(_settle(batch, None, release))
            raise
        if await link.transact(_settle(batch, sorted_, release)):
            self._tell(batch, sorted_)
        return True

    def _sort(self, batch: Batch) -> Sorted:
        sorted_ = Sorted([], [], {})
        partitions, dictionary = self._streams[batch.stream].partitions, self._dictionaries.get(batch.stream)
        held: set[str | None] = set()
        for *row, behind in batch.rows:
            line = Line.read(tuple(row))
            waits = behind or line.key in held
            fault = "" if waits else self._fault(batch.stream, line)
            if waits or fault:
                sorted_.aside[line.seq] = fault
                held |= {line.key} - {None}
                continue
            _, id_, type_, key, headers, data, created_ms, due_ms = line
            partition = partition_of(id_ if key is None else key, partitions)
            record = Record(partition, id_, type_, data, key, created_ms, headers, due_ms, self._source)
            sorted_.records.append(record if dictionary is None else packs.one(record, dictionary))
            sorted_.published.append(line.seq)
        return sorted_

    def _fault(self, stream: str, line: Line) -> str:
        """Why a row cannot be published; empty when it can."""
        decode: Callable[[bytes], Any] | None = self._decoders[stream].get(line.type)
        if decode is None:
            return f"stream {stream!r} does not carry the type {line.type!r}"
        if line.due_ms is not None and not self._runtime.broker.traits.delayed:
            return f"{self._runtime.broker.url} cannot publish for later"
        fault = fault_of(line)
        if fault:
            return fault
        try:
            decode(line.data)
        except WireError as error:
            return str(error)
        return ""

    async def _look_again(self, stream: str, link: Link) -> None:
        """Put back what was set aside and can be published now: another version of the code may know its type."""
        next_s, after = self._looked.get(stream, (0.0, 0))
        if next_s > self._clock.monotonic():
            return
        values = {"stream": stream, "after": after, "bytes": MAX_EVENT_BYTES, "limit": LOOK_AGAIN}
        heads = await link.transact(_rows(Statement(tables.HEADS, values)))
        for *row, shard in heads:
            line = Line.read(tuple(row))
            if not self._fault(stream, line):
                await link.transact(_put_back(stream, shard, line))
        self._looked[stream] = (self._clock.monotonic() + LOOK_AGAIN_S, heads[-1][0] if heads else 0)

    def _tell(self, batch: Batch, sorted_: Sorted) -> None:
        for row in batch.rows:
            error = sorted_.aside.get(row[0])
            if error:
                self._runtime.telemetry.emit(SET_ASIDE, stream=batch.stream, event_id=row[1], error=error)
                self._runtime.telemetry.complain(
                    f"outbox of {batch.stream}",
                    self._clock.monotonic(),
                    "the outbox cannot publish event %s to %s and sets it aside: %s",
                    row[1],
                    batch.stream,
                    error,
                )

    def _rest(self, stream: str, doing: str, error: Exception) -> None:
        pause_s = self._pauses.get(stream, FIRST_PAUSE_S)
        self._pauses[stream] = min(pause_s * 2, LONGEST_PAUSE_S)
        now_s = self._clock.monotonic()
        self._rests[stream] = now_s + pause_s * (0.5 + self._clock.chance() / 2)
        telemetry = self._runtime.telemetry
        telemetry.emit(BROKER_ERROR, group="outbox", doing=doing, error=error)
        telemetry.complain("outbox", now_s, "the outbox cannot %s now and tries again: %s", doing, error)

    async def _hang_up(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()


def _prepare(stream: str) -> Work[None]:
    for shard in range(SHARDS):
        yield Statement(tables.SHARD, {"stream": stream, "shard": shard})


def _take(stream: str, holder: str, claim: str) -> Work[Batch | None]:
    """A shard of the stream, and its batch; None where others have all that is ready."""
    claimed = yield Statement(claim, {"stream": stream, "holder": holder, "hold_ms": HOLD_MS})
    if not claimed:
        return None
    shard = claimed[0][0]
    limits = {"limit": MAX_APPEND_RECORDS, "bytes": MAX_APPEND_BYTES}
    rows = yield Statement(tables.BATCH, {"stream": stream, "shard": shard} | limits)
    return Batch(holder, stream, shard, rows)


def _settle(batch: Batch, done: Sorted | None, release: str) -> Work[bool]:
    """Give the shard back, and cross off what is done. False, and nothing is changed, when it is not ours any more."""
    values = {"stream": batch.stream, "shard": batch.shard, "holder": batch.holder}
    if not (yield Statement(release, values)):
        return False
    if done is not None:
        for seq, error in done.aside.items():
            yield Statement(tables.PUT_ASIDE, {"seq": seq, "error": error})
        if done.published:
            yield Statement(tables.delete(done.published))
    return True


def _put_back(stream: str, shard: int, line: Line) -> Work[None]:
    yield Statement(tables.SEIZE, {"stream": stream, "shard": shard})
    yield Statement(tables.PUT_BACK, {"stream": stream, "seq": line.seq})
    yield Statement(tables.PUT_BACK_LATER, {"stream": stream, "key": line.key})


def _rows(statement: Statement) -> Work[Sequence[Row]]:
    return (yield statement)
