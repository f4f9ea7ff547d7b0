"""Outputs: what handlers published is stored with the outcome by one script, or, where that cannot be, before it.

**With it**, on one server: who was taken over stores nothing, a repeat stores nothing twice, and what is refused keeps its
outcome back. The outputs of one event go in all or none, however many they are.

**Before it** (`?outputs=before`), for a proxy that sends the keys of two streams to two servers: one that is stored twice is
an accident, one that is missing a loss. A repeat is then told by the ids that the target remembers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from millstream.brokers.base import Letter, Output, Record
from millstream.brokers.redis.appending import MAX_SCRIPT_BYTES, MAX_SCRIPT_RECORDS, Known, refusal
from millstream.brokers.redis.link import Link, ReplyError
from millstream.errors import BrokerDown, BrokerError, PublishError, Unconfirmed
from millstream.wire import entry

if TYPE_CHECKING:
    from millstream.brokers.redis.broker import RedisBroker


class Targets:
    """The streams to which outputs go, as they are known when these are sent."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._known: dict[str, Known] = {}
        self._unknown: dict[str, BrokerError] = {}

    @classmethod
    async def of(cls, broker: RedisBroker, link: Link, outputs: Iterable[Output]) -> Targets:
        """Look up what is not known yet, by the link that will be used."""
        targets = cls(link.target.where)
        for stream in {output.stream for output in outputs}:
            try:
                targets._known[stream] = known = await broker.known(stream, link)
                await known.fresh(link, broker.clock.monotonic())
            except BrokerError as error:
                if error.retryable:
                    raise
                targets._unknown[stream] = error
        return targets

    def known(self, output: Output) -> Known:
        """The stream of an output."""
        return self._known[output.stream]

    def problem(self, outputs: Iterable[Output]) -> BrokerError | None:
        """Why these cannot be sent: the stream of one is unknown, or has no such partition."""
        for output in outputs:
            if output.stream in self._unknown:
                return self._unknown[output.stream]
            try:
                self.known(output).log(output.record.partition)
            except BrokerError as error:
                return error
        return None

    def refusal(self, output: Output, why: bytes) -> BrokerError:
        """The error that a script's answer means."""
        return refusal(self.known(output), output.record.partition, ReplyError(why.decode()), self._where)


class Staged:
    """Outputs as one call of a script takes them, see `lua/lib/outputs.lua`: their keys stand behind its others."""

    def __init__(self, targets: Targets, keys_before: int, blobs: list[bytes]) -> None:
        """`blobs`: to which theirs are added."""
        self.keys: list[bytes] = []
        self._blobs = blobs
        self._targets = targets
        self._keys_before = keys_before
        self._placed: dict[tuple[str, int], tuple[int, ...]] = {}
        self._logs: dict[str, int] = {}

    def add(self, output: Output, *, bounded: bool = False) -> tuple[int | str | bool, ...]:
        """The words for one more; `bounded`: with those before it, it may not go past a ceiling."""
        record = output.record
        target = output.stream, record.partition
        placed = self._placed.get(target)
        if placed is None:
            known = self._targets.known(output)
            first = self._keys_before + len(self.keys) + 1
            self.keys += known.keys.store(record.partition)
            placed = self._placed[target] = first, *known.limits(self._counted(known))
        blob = len(self._blobs) + 1
        self._blobs += entry.write(record)[1::2]
        due = "" if record.due_ms is None else str(record.due_ms)  # scripts write a large number with an exponent
        return *placed, due, output.derived, blob, bounded

    def _counted(self, known: Known) -> int:
        """Where the logs of a stream with a ceiling begin among the keys: once for all its partitions."""
        place = self._logs.get(known.spec.name)
        if place is None:
            place = self._logs[known.spec.name] = self._keys_before + len(self.keys) + 1
            self.keys += known.counted
        return place


def fitting(events: Sequence[Sequence[Output | Letter]]) -> int:
    """How many of these events go into one call of a script, by what is stored with each: at least one, it is never parted.

    A thousand small outputs of one event hold up the server for about 4 ms, or 7 where ids are remembered.
    """
    records = size_bytes = 0
    for count, outputs in enumerate(events):
        records += len(outputs)
        size_bytes += sum(len(output.record.data) + len(output.record.headers) for output in outputs)
        if count and (records > MAX_SCRIPT_RECORDS or size_bytes > MAX_SCRIPT_BYTES):
            return count
    return len(events)


async def append(broker: RedisBroker, outputs: Sequence[Output]) -> dict[str, BrokerError]:
    """Store outputs before their outcomes; why not, for each stream of which they are not all stored."""
    streams: dict[str, list[Record]] = defaultdict(list)
    for output in outputs:
        streams[output.stream].append(output.record)
    failed: dict[str, BrokerError] = {}
    for stream, records in streams.items():
        try:
            await broker.append(stream, records)
        except BrokerError as error:
            failed[stream] = error
        except PublishError as error:
            failed[stream] = _failure(stream, error)
    return failed


def _failure(stream: str, error: PublishError) -> BrokerError:
    """Why some are not stored. What is full is no trouble of the server's: others can be settled meanwhile."""
    results = error.results if isinstance(error, Unconfirmed) else ()
    refused = [result for result in results if isinstance(result, BrokerError)]
    if refused and None not in results:
        return refused[0]
    return BrokerDown(f"outputs for {stream!r}: {error}")
