"""One stream's writer: one write at a time, tried again while those who wait for it have patience.

            publish                    a write                       stored
    caller ─────────► queue ────────────────────────► taken ──────────────────────► position
                        ▲   while a write is under      │  refused (down, full): nothing was stored
                        │   way all that comes waits    │  in doubt, and the stream remembers ids
                        │   and leaves as the next one  ▼
                        └──────────────────────── tried again, everything behind it waits: the order stays

A write that is tried again says the same with the same ids, so on a stream that remembers ids it cannot be stored twice,
as long as it still remembers them; which is asked before, since somebody may have changed it. Without that, what is in
doubt is told at once. Each record has its own patience, counted from the call that published it; what was in doubt once
stays so until it is stored. Cancelling a call takes its record out of the next try. A stream that fails holds up no other
one: each has its own writer.

A lone record is *posted*, where the broker can: with nothing under way it leaves in the step that publishes it, and its
answer needs no task either; only a failure is for `run`. All that comes meanwhile queues behind it, as behind any write.
Behind a write of many nothing is posted: those who were answered together call again together, and shall share a write.

Whoever finds the queue full stands in line, before a record is made: the bytes of those who wait are bounded too.

One of a thousand callers costs us 3 µs before the broker: 1.0 for its future and its waking up, 0.3 for the coroutines
between, 0.8 for its record, the rest for the queue, the clock and what has to be looked up. Meanwhile the broker writes
the other half.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import accumulate, islice
from typing import Any, TypeGuard

from msgspec import Struct

from millstream.brokers.base import Broker, Confirm, Policy, Position, Record
from millstream.brokers.preparing import Posted, Posting
from millstream.clock import Clock
from millstream.errors import BrokerDown, BrokerError, BrokerFull, MillstreamError, Unconfirmed
from millstream.retry import Retry
from millstream.settings import Settings
from millstream.telemetry import BROKER_ERROR, Telemetry
from millstream.units import MAX_APPEND_BYTES

MAX_TAKEN = 500  # of a thousand callers one half is answered and calls again while the other half is being written
PAUSES = Retry(first="10ms", factor=2, max="1s")
MARGIN_MS = 5_000  # so long before ids are forgotten a repeat must leave, or a tenth of the window: it has a way to go


def repeatable_ms(policy: Policy) -> int:
    """For how long after its first try a record may be repeated without being stored twice; 0 without dedupe."""
    return policy.dedupe_ms - min(MARGIN_MS, policy.dedupe_ms // 10)


def all_stored(results: Sequence[Position | Exception]) -> TypeGuard[list[Position]]:
    """Whether no record of a write has failed: as nearly always, so this is what is asked first."""
    return set(map(type, results)) <= {Position}


class _Item(Struct):
    """A record on its way."""

    record: Record
    since_s: float
    future: asyncio.Future[Position] | None = None
    doubtful: bool = False
    result: Any = None

    @property
    def gone(self) -> bool:
        return self.future is not None and self.future.done()

    def answer(self, result: Any) -> None:
        """Give the caller its position, or its error."""
        self.result = result
        if self.future is None or self.future.done():  # cancelled: the event is stored all the same
            return
        if not isinstance(result, Exception):
            self.future.set_result(result)
        elif isinstance(result, BrokerError | Unconfirmed):  # each caller gets an object of its own, for its traceback
            self.future.set_exception(type(result)(*result.args))
        else:
            self.future.set_exception(result)


class Writer:
    """Writes the records of one stream at one level of confirmation. `run` ends after `stop`, when all are written."""

    def __init__(
        self,
        stream: str,
        confirm: Confirm,
        policy: Policy,
        recorded: Callable[[], Awaitable[Policy]],
        *,
        broker: Broker,
        settings: Settings,
        clock: Clock,
        telemetry: Telemetry,
    ) -> None:
        self._stream = stream
        self._confirm = confirm
        self._broker = broker
        self._patience_s = settings.publish_patience_s
        self._doubt_s = self._repeatable_s(policy)
        self._recorded = recorded
        self._max_buffered = settings.max_buffered
        self._max_bytes = settings.max_buffered_bytes
        self._clock = clock
        self._telemetry = telemetry
        self._posting = broker if confirm == "memory" and isinstance(broker, Posting) else None
        self._queue: list[_Item] = []
        self._queue_bytes = 0
        self._taken: list[_Item] = []
        self._last = 1
        self._refused: Sequence[Position | Exception] = ()
        self._down: BrokerDown | None = None
        # Bound here, since to ask for the running loop costs more than to make a future.
        self._new_future: Callable[[], asyncio.Future[Position]] = asyncio.get_running_loop().create_future
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._line = asyncio.Lock()
        self._in_line = 0
        self._stopping = asyncio.Event()
        self._ended = False
        self.is_full = False
        """Nobody may `append` who has not waited for `room`. Kept, since to work it out for each event costs 0.2 µs."""

    async def room(self) -> None:
        """Wait in line for room. Raises `MillstreamError` when the app is closed."""
        self._in_line += 1
        self.is_full = True
        try:
            async with self._line:  # first come, first served
                while self._has_no_room and not self._ended:
                    self._room.clear()
                    await self._room.wait()
        finally:
            self._in_line -= 1
            self._look()
        if self._ended:
            raise MillstreamError("the app is closed; nothing was stored")

    def append(self, record: Record, since_s: float) -> Awaitable[Position]:
        """Store a record with the next write: now, if none is under way. `since_s`: when it was published."""
        future, queue = self._new_future(), self._queue
        item = _Item(record, since_s, future)
        if not queue:
            if self._last == 1 and not self._taken and self._post(item):
                return future
            self._wake.set()
        queue.append(item)
        self._queue_bytes += len(record.data)
        if len(queue) >= self._max_buffered or self._queue_bytes >= self._max_bytes:
            self.is_full = True
        return future

    async def append_all(self, records: Sequence[Record], since_s: float) -> Sequence[Position | Exception]:
        """Store records in a write of their own. For each its position, or why it is not known."""
        results = await self._tried(records)
        if all_stored(results):
            return results
        items = [_Item(record, since_s) for record in records]
        await self._finish(items, results)
        return [item.result for item in items]

    def stop(self) -> None:
        """Write what waits, but try nothing again."""
        self._stopping.set()
        self._wake.set()

    async def run(self) -> None:
        """Write. Whatever ends it, nobody is left to wait for an answer that will not come."""
        try:
            while self._queue or self._taken or not self._stopping.is_set():
                if self._refused:
                    await self._finish_posted()
                elif self._queue and not self._taken:
                    await self._write()
                else:
                    await self._wake.wait()
                    self._wake.clear()
        finally:
            self._ended = self.is_full = True
            unanswered, self._queue = self._taken + self._queue, []
            self._room.set()
            for item in unanswered:
                item.answer(Unconfirmed("the app has ended in the middle of this; the event may or may not be stored"))

    @property
    def _has_no_room(self) -> bool:
        return len(self._queue) >= self._max_buffered or self._queue_bytes >= self._max_bytes

    def _look(self) -> None:
        self.is_full = self._ended or self._in_line > 0 or self._has_no_room

    def _post(self, item: _Item) -> bool:
        """Let a lone record leave now, if the broker can."""
        posted = self._posting.post(self._stream, item.record) if self._posting is not None else None
        if posted is None:
            return False
        self._taken = [item]
        posted.then(partial(self._answer_posted, posted))
        return True

    def _answer_posted(self, posted: Posted) -> None:
        """Give the caller its position; what else came of it is for `run`."""
        try:
            position = posted.result()
        except Exception as error:
            self._refused = self._failed(error, 1)
        else:
            self._taken[0].answer(position)
            self._taken = []
        if self._refused or self._queue or self._stopping.is_set():
            self._wake.set()

    async def _finish_posted(self) -> None:
        refused, self._refused = self._refused, ()
        await self._finish(self._taken, refused)
        self._end_write()

    async def _write(self) -> None:
        taken = self._taken = self._take(MAX_TAKEN)
        self._last = len(taken)
        results = await self._tried([item.record for item in taken])
        if all_stored(results):
            for item, position in zip(taken, results, strict=True):
                future = item.future
                if future is not None and not future.done():
                    future.set_result(position)
        else:
            await self._finish(taken, results)
        self._end_write()

    def _end_write(self) -> None:
        self._taken = []
        if self._down is not None and self._patience_s:
            self._send_home(self._down)

    def _take(self, most: int) -> list[_Item]:
        """What is to be written next, out of the queue; so there is room for others."""
        if self._queue_bytes < MAX_APPEND_BYTES:
            return self._leave(most)
        sizes = accumulate(len(item.record.data) for item in islice(self._queue, most))
        return self._leave(max(1, sum(size < MAX_APPEND_BYTES for size in sizes)))

    def _leave(self, most: int) -> list[_Item]:
        """The head of the queue, out of it."""
        left, self._queue = self._queue[:most], self._queue[most:]
        self._queue_bytes = self._queue_bytes - sum(len(item.record.data) for item in left) if self._queue else 0
        self._look()
        self._room.set()
        return left

    async def _tried(self, records: Sequence[Record]) -> Sequence[Position | Exception]:
        """One try: for each record its position, or its error."""
        self._down = None
        try:
            return await self._broker.append(self._stream, records, self._confirm)
        except Exception as error:
            return self._failed(error, len(records))

    def _failed(self, error: Exception, count: int) -> Sequence[Position | Exception]:
        """What an error of the broker says about each of so many records."""
        self._down = error if isinstance(error, BrokerDown) else None
        if isinstance(error, Unconfirmed):
            return [result if result is not None else Unconfirmed(str(error)) for result in error.results]
        return [error] * count

    async def _finish(self, items: Sequence[_Item], results: Sequence[Position | Exception]) -> None:
        """Answer what has its result, and try the rest again until nothing is left."""
        tries = 1
        while items := self._unanswered(items, results):
            await self._pause(tries, items)
            items = [item for item in items if not item.gone]
            results = await self._tried_again(items) if items else []
            tries += 1

    async def _tried_again(self, items: Sequence[_Item]) -> Sequence[Position | Exception]:
        """One more try; not of what is in doubt where the stream remembers ids no more, or not for long enough."""
        shorter = False
        if any(item.doubtful for item in items):
            before_s = self._doubt_s
            try:
                self._doubt_s = self._repeatable_s(await self._recorded())
            except Exception as error:
                return [error] * len(items)
            shorter = self._doubt_s < before_s
        now_s = self._clock.monotonic()
        safe = [not (shorter and item.doubtful and now_s >= self._until_s(item)) for item in items]
        again = [item.record for item, is_safe in zip(items, safe, strict=True) if is_safe]
        tried = iter(await self._tried(again) if again else [])
        return [next(tried) if is_safe else item.result for item, is_safe in zip(items, safe, strict=True)]

    def _unanswered(self, items: Sequence[_Item], results: Sequence[Position | Exception]) -> list[_Item]:
        now_s = self._clock.monotonic()
        again = []
        for item, result in zip(items, results, strict=True):
            if isinstance(result, Unconfirmed):
                item.doubtful = True
            if isinstance(result, Exception) and self._may_help(item, result, now_s):
                item.result = result
                again.append(item)
            elif item.doubtful and isinstance(result, Exception):
                item.answer(Unconfirmed(str(result)))
            else:
                item.answer(result)
        return again

    def _may_help(self, item: _Item, error: Exception, now_s: float) -> bool:
        """Whether it is safe and worth while to try this record again."""
        if not isinstance(error, BrokerDown | BrokerFull | Unconfirmed) or self._stopping.is_set() or item.gone:
            return False
        return now_s < self._until_s(item)

    def _repeatable_s(self, policy: Policy) -> float:
        return min(self._patience_s, repeatable_ms(policy) / 1000)

    def _until_s(self, item: _Item) -> float:
        return item.since_s + (self._doubt_s if item.doubtful else self._patience_s)

    async def _pause(self, tries: int, items: Sequence[_Item]) -> None:
        """Tell, and wait a little. Ends early when the app is closed."""
        error, now_s = items[0].result, self._clock.monotonic()
        self._telemetry.emit(BROKER_ERROR, group="", doing=f"publish to {self._stream}", error=error)
        message = "publishing to %s fails now and is tried again: %s"
        self._telemetry.complain(f"publish to {self._stream}", now_s, message, self._stream, error)
        left_s = max(self._until_s(item) for item in items) - now_s
        await self._clock.wait(self._stopping, min(PAUSES.delay_s(tries, self._clock.chance()), left_s))

    def _send_home(self, error: BrokerDown) -> None:
        """Who has waited out its patience behind a write that failed is not made to wait for a try of its own."""
        now_s, late = self._clock.monotonic(), 0
        while late < len(self._queue) and self._until_s(self._queue[late]) <= now_s:
            late += 1
        for item in self._leave(late):
            item.answer(error)
