"""Listeners: handlers without a group. Every running process calls them, from its start on; nothing is kept."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from math import isinf

from millstream.brokers.base import Broker, Claim, Position, Stored
from millstream.clock import Clock
from millstream.errors import BrokerError, Skip
from millstream.handlers.subscriber import Subscriber
from millstream.publisher import unpacked
from millstream.telemetry import LISTENER_FAILED, Telemetry, logger
from millstream.worker.backoff import Backoff
from millstream.worker.call import Route
from millstream.worker.gate import Gate
from millstream.worker.runs import until_readable

_PAGE = 500
_WAIT_S = 5.0


class Listener:
    """One listener in this process: its events one after the other, in the order of each partition."""

    def __init__(
        self, subscriber: Subscriber, route: Route, broker: Broker, gate: Gate, clock: Clock, telemetry: Telemetry
    ) -> None:
        self._subscriber = subscriber
        self._route = route
        self._stream = subscriber.stream.name
        self._broker = broker
        self._gate = gate
        self._clock = clock
        self._telemetry = telemetry
        self.joined = asyncio.Event()
        """Set when all that is published from then on will be heard."""

    async def run(self) -> None:
        """Read from now on. Ends by cancellation."""
        who = f"(listener {self._subscriber.signature.name})"
        backoff = Backoff("listen", who, self._clock, self._telemetry)
        places: dict[int, Position | None] | None = None
        while True:
            try:
                if places is None:
                    places = dict(await self._broker.locate(self._stream, "now"))
                    self.joined.set()
                for partition, place in places.items():
                    page = await self._broker.read(self._stream, partition, place, _PAGE)
                    await until_readable(self._broker, self._stream, page, who, self._clock, self._telemetry)
                    for stored in page:
                        places[partition] = stored.position
                        for event in unpacked((stored,)):
                            await self._handle(event)
                await self._broker.wait(self._stream, places, _WAIT_S)
            except BrokerError as error:
                await backoff.pause(error)
            else:
                backoff.reset()

    async def _handle(self, stored: Stored) -> None:
        if stored.record.type not in self._subscriber.signature.types:
            return
        while self._gate.closed:
            await self._gate.opened()
        self._gate.running += 1
        try:
            limit = nullcontext() if isinf(self._route.timeout_s) else self._clock.timeout(self._route.timeout_s)
            async with limit:
                await self._route.call(Claim.of(stored, 1))
        except Skip:
            pass
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, KeyboardInterrupt | GeneratorExit) or (task is not None and task.cancelling()):
                raise
            position = stored.position
            self._telemetry.emit(LISTENER_FAILED, stream=self._stream, position=position, exception=error)
            logger.exception("listener %s failed on %s at %s", self._subscriber.signature.name, self._stream, position)
        finally:
            self._gate.leave()
