"""Publisher: an envelope becomes a record (id, key, partition, bytes), and records become few large writes.

Each stream has one writer. While a write of its is under way, everything that others publish waits in a list and leaves as
the next one: a thousand `await publish()` at once cost three writes, a lone one goes out at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

from millstream.brokers.base import Broker, Confirm, Output, Policy, Position, Slot
from millstream.brokers.preparing import Preparing
from millstream.clock import Clock
from millstream.delivery import Delivery, Envelope
from millstream.errors import BadEvent, BrokerError, MillstreamError, NotSupported, TooLarge, Unconfirmed, Unroutable
from millstream.publisher.chunks import Ahead, Chunk, chunks, sources
from millstream.publisher.declared import check_confirm, declare, policy_of, spec_of
from millstream.publisher.gathering import Gathering
from millstream.publisher.records import Records, Repeat, derived_id
from millstream.publisher.shortening import Shortening
from millstream.publisher.writer import Writer, all_stored, repeatable_ms
from millstream.settings import Settings
from millstream.stream import Stream
from millstream.telemetry import Telemetry, logger

CAUSATION = "causation"  # id of the event whose handler published this one
CORRELATION = "correlation"  # id of the event with which it all began
SCHEDULE = "schedule"  # the schedule that published this one


class Publisher:
    """Publishes for one app. Knows its streams; others are declared on first use."""

    def __init__(
        self,
        broker: Broker,
        streams: Iterable[Stream[Any]],
        *,
        source: str,
        settings: Settings,
        clock: Clock,
        telemetry: Telemetry,
    ) -> None:
        self._broker = broker
        self._preparing = broker if isinstance(broker, Preparing) else None
        self._settings = settings
        self._clock = clock
        self._telemetry = telemetry
        self._records = Records(streams, source=source, broker=broker, clock=clock)
        self._shortening = Shortening(self._records, broker, clock, telemetry)
        self.policies: dict[str, Policy] = {}
        """What holds for each stream that is declared, as it was then, or when something of it was last in doubt."""
        self._writers: dict[tuple[str, Confirm], Writer] = {}
        self._warned: set[str] = set()
        self._tasks: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Declares the streams, owns the writers, and lets them finish at the end."""
        for stream in list(self._records.streams.values()):
            await self.declare(stream)
        async with asyncio.TaskGroup() as self._tasks:
            looking = self._tasks.create_task(self._shortening.run(), name="millstream look at dictionaries")
            try:
                yield
            finally:
                looking.cancel()
                for writer in self._writers.values():
                    writer.stop()
                self._writers.clear()
                self._tasks = None

    async def declare(self, stream: Stream[Any]) -> Policy:
        """Declare a stream where that is not done yet; what holds for it."""
        if stream.name not in self.policies:
            policy = self.policies[stream.name] = await declare(self._broker, stream)
            await self._shortening.follow(stream.name, policy)
        return self.policies[stream.name]

    async def publish(self, event: Any, to: Stream[Any] | None, confirm: Confirm | None = None) -> Position:
        """Store one event; see `App.publish`."""
        since_s = self._clock.monotonic()
        route = self._records.route(event, to)
        writer = self._writers.get((route.stream.name, confirm or route.stream.confirm))
        if writer is None:
            writer = await self._new_writer(route.stream, confirm)
        if writer.is_full:
            await writer.room()
        record = route.record(event)  # not before: those in line hold no bytes
        try:
            return await writer.append(record, since_s)
        except Unconfirmed as error:
            self._doubt(error, route.stream, [Repeat(event, record, self._wall_ms(since_s))])
            raise

    async def publish_many(
        self,
        events: Iterable[Any] | AsyncIterable[Any],
        to: Stream[Any] | None,
        confirm: Confirm | None = None,
        stored: Sequence[Position] = (),
    ) -> list[Position]:
        """Store many events, in chunks; see `App.publish_many`. `stored` are the positions of those before them."""
        positions = list(stored)
        try:
            async for source in sources(events, self._clock):
                ahead = Ahead(map(self._prepared, chunks(self._records, source, to)))
                for chunk in ahead:
                    looking = asyncio.get_running_loop().call_soon(ahead.look)  # the bytes of this one leave before
                    try:
                        positions += await self._append(await chunk.packed(), confirm, positions)
                    finally:
                        looking.cancel()
        except (BadEvent, TooLarge, Unroutable) as error:
            error.add_note(f"The first {len(positions):,} events are stored, and no other.")
            raise
        return positions

    async def publish_slot(self, event: Any, to: Stream[Any], slot: Slot) -> bool:
        """Store the event of one slot of a schedule, once; see `Runtime.publish_slot`."""
        if not self._broker.traits.slots:
            raise NotSupported(f"{self._broker.url} cannot publish on a schedule: use another broker")
        await self.declare(to)
        record = None
        if event is not None:
            envelope = Envelope(event, id=derived_id(slot.schedule, str(slot.at_ms)), headers={SCHEDULE: slot.schedule})
            envelope.time_ms = slot.at_ms
            record = self._records.record(self._records.route(envelope, to), envelope)
        return await self._broker.append_slot(to.name, slot, record)

    def stage(self, stream: str, group: str, delivery: Delivery[Any], event: Any, to: Stream[Any] | None) -> Output:
        """The output for `delivery.publish()`: carries on the correlation, names its cause, does no I/O.

        Its id is made of where the input lies and who handles it, so that the same handling gives the same output.
        """
        route = self._records.route(event, to)
        name = route.stream.name
        if name not in self.policies:
            raise Unroutable(f"this app does not know {route.stream!r}; add it: App(…, streams=[{name}])")
        correlation = delivery.headers.get(CORRELATION, delivery.id)
        id_ = derived_id(stream, group, str(delivery.position), delivery.id, str(len(delivery.staged)))
        headers = {CAUSATION: delivery.id, CORRELATION: correlation}
        record = self._records.record(route, event, id_=id_, headers=headers)
        if not self._broker.traits.atomic_outputs and not self.policies[name].dedupe_ms:
            self._warn(name)
        return Output(name, record, record.id == id_)

    def _prepared(self, chunk: Chunk) -> Chunk:
        if self._preparing is None or chunk.packing is not None:
            return chunk
        return chunk._replace(records=self._preparing.prepared(chunk.stream.name, chunk.records))

    async def _append(self, chunk: Chunk, confirm: Confirm | None, stored: list[Position]) -> list[Position]:
        stream, since_s = chunk.stream, self._clock.monotonic()
        writer = self._writers.get((stream.name, confirm or stream.confirm))
        if writer is None:
            writer = await self._new_writer(stream, confirm)
        results = await writer.append_all(chunk.records, since_s)
        if chunk.bundle is not None:
            results = chunk.bundle.spread(results)
        if all_stored(results):
            return results
        errors = [result for result in results if isinstance(result, Exception)]
        positions = [result for result in results if not isinstance(result, Exception)]
        cause = next((error for error in errors if isinstance(error, Unconfirmed)), errors[0])
        if not isinstance(cause, BrokerError | Unconfirmed):
            raise cause
        tried_ms = self._wall_ms(since_s)
        records = chunk.records if chunk.bundle is None else chunk.bundle.events()
        triples = zip(chunk.events, records, results, strict=True)
        again = [Repeat(event, record, tried_ms) for event, record, result in triples if isinstance(result, Exception)]
        if isinstance(cause, Unconfirmed):
            incomplete = Unconfirmed(str(cause), results=stored + positions)
            self._doubt(incomplete, stream, again)
        else:
            reason = f"{cause}; none of these was stored"
            incomplete = Unconfirmed(reason, envelopes=again, results=stored + positions)
        raise incomplete from cause

    async def _new_writer(self, stream: Stream[Any], confirm: Confirm | None) -> Writer:
        self._open_tasks()
        if confirm is not None:
            check_confirm(self._broker, confirm, f"publishing to {stream.name!r}")
        policy = await self.declare(stream)
        tasks = self._open_tasks()  # it may have been closed meanwhile
        level = confirm or stream.confirm
        writer = self._writers.get((stream.name, level))
        if writer is None:
            packer, recorded = self._records.packer(stream), partial(self._recorded, stream)
            new = Writer if packer is None else partial(Gathering, packer=packer)
            writer = self._writers[stream.name, level] = new(
                stream.name,
                level,
                policy,
                recorded,
                broker=self._broker,
                settings=self._settings,
                clock=self._clock,
                telemetry=self._telemetry,
            )
            tasks.create_task(writer.run(), name=f"millstream writer of {stream.name}")
        return writer

    async def _recorded(self, stream: Stream[Any]) -> Policy:
        """What holds for a stream now: it may have been changed since it was declared."""
        self.policies[stream.name] = await self._broker.declare(spec_of(stream), policy_of(stream))
        return self.policies[stream.name]

    def _open_tasks(self) -> asyncio.TaskGroup:
        if self._tasks is None:
            raise MillstreamError("the app is not open: publish inside `async with app:` or `async with app.worker():`")
        return self._tasks

    def _doubt(self, error: Unconfirmed, stream: Stream[Any], again: Sequence[Repeat]) -> None:
        """Complete an error with what to publish again, and until when a repeat is told from a second event."""
        error.envelopes = again
        # A repeat would travel in another pack, and ids are remembered of packs.
        window_ms = 0 if stream.pack is not None else repeatable_ms(self.policies[stream.name])
        if window_ms:
            error.retry_until = datetime.fromtimestamp((min(e.tried_ms for e in again) + window_ms) / 1000, UTC)
            advice = f"publishing the envelopes again is safe until {error.retry_until:%H:%M:%S} UTC"
        else:
            advice = f"stream {stream.name!r} has no dedupe, so publishing the envelopes again may store an event twice"
        error.args = (f"{error}; {advice}",)

    def _wall_ms(self, at_s: float) -> int:
        """What the wall clock showed at this monotonic time."""
        return self._clock.now_ms() - int((self._clock.monotonic() - at_s) * 1000)

    def _warn(self, stream: str) -> None:
        if stream not in self._warned:
            self._warned.add(stream)
            logger.warning(
                "%s cannot store what handlers publish together with their outcomes: when an event is handled again, what "
                "it published to %s is there twice. Give that stream dedupe=, and `millstream stream apply %s`",
                self._broker.url,
                stream,
                stream,
            )
