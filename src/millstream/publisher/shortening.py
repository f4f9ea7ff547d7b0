"""Shortening: with which dictionary the small events of each stream are written that travel alone.

What holds for a stream names it, and the broker has it. Both are looked at when the stream is declared, and again every few
seconds while events go to it. Whatever goes wrong meanwhile, events are written as they are: that is always right.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from millstream.brokers.base import Broker, Policy
from millstream.brokers.dictionaries import learn
from millstream.clock import Clock
from millstream.errors import MillstreamError, NotSupported
from millstream.telemetry import BROKER_ERROR, Telemetry, logger
from millstream.wire.compression import Dictionary

LOOK_S = 10.0


class Writing(Protocol):
    """Who makes records."""

    @property
    def used(self) -> Iterable[str]:
        """The streams to which something goes."""
        ...

    def use(self, stream: str, dictionary: Dictionary | None) -> None:
        """From now on write small events of a stream that travel alone with this dictionary, or with none."""
        ...


class Shortening:
    """Tells who makes records which dictionaries to use."""

    def __init__(self, records: Writing, broker: Broker, clock: Clock, telemetry: Telemetry) -> None:
        self._records = records
        self._broker = broker
        self._clock = clock
        self._telemetry = telemetry
        self._used: dict[str, Dictionary | None] = {}
        self._unable = False

    async def run(self) -> None:
        """Learn what has changed. Ends by cancellation."""
        while self._broker.traits.dictionaries:
            await self._clock.sleep(LOOK_S)
            for stream in {*self._records.used, *self._used}:
                try:
                    policy = await self._broker.policy(stream)
                except MillstreamError as error:
                    self._tell(stream, error)
                else:
                    await self.follow(stream, policy)

    async def follow(self, stream: str, policy: Policy) -> None:
        """Use the dictionary that is named there."""
        number, used = policy.dictionary, self._used.get(stream)
        if number == (used.id if used else 0) or self._unable:
            return
        try:
            if used is not None and await self._broker.dictionary(stream, used.id) is None:
                # It was lost, with the stream or alone: what we wrote since then cannot be read without it.
                self._use(stream, None)
                await self._broker.admin.train(stream, used.id, used.content)
                return
            dictionary = await learn(self._broker, stream, number) if number else None
        except NotSupported as error:
            self._unable = True
            logger.warning("stream %s has a dictionary, and this process writes without: %s", stream, error)
        except MillstreamError as error:
            self._tell(stream, error)
        else:
            self._use(stream, dictionary)

    def _use(self, stream: str, dictionary: Dictionary | None) -> None:
        self._used[stream] = dictionary
        self._records.use(stream, dictionary)

    def _tell(self, stream: str, error: MillstreamError) -> None:
        self._telemetry.emit(BROKER_ERROR, group="", doing=f"look at the dictionary of {stream}", error=error)
