"""Keeper: the heartbeat. It keeps what we hold ours, and says when it is not any more.

Nobody may start a handler on the strength of an old heartbeat: a process that was stopped for a while would work on events
that somebody else has by now. So trust ends at three quarters of the lease, counted from the moment in which the last
answered heartbeat was *sent*, on a clock that goes on while the machine sleeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from millstream.brokers.base import Consumer, Kept
from millstream.clock import Clock
from millstream.errors import BrokerError
from millstream.telemetry import Telemetry
from millstream.worker.backoff import Backoff

_TRUST = 0.75  # of the lease


class Keeper:
    """Beats until it is cancelled."""

    def __init__(
        self,
        consumer: Consumer,
        group: str,
        lease_s: float,
        clock: Clock,
        telemetry: Telemetry,
        kept: Callable[[Kept], None],
    ) -> None:
        self._consumer = consumer
        self._lease_s = lease_s
        # Often enough that a takeover happens within a moment after the lease, also when the lease is long.
        self._every_s = min(lease_s / 4, max(0.5, lease_s / 20))
        self._clock = clock
        self._backoff = Backoff("keep its lease", group, clock, telemetry)
        self._kept = kept
        self._answered = asyncio.Event()
        self.trusted_until = clock.monotonic() + lease_s * _TRUST

    async def run(self) -> None:
        """Beat. Ends by cancellation only, after all else has ended: work stays ours while handlers finish."""
        while True:
            sent = self._clock.monotonic()
            try:
                kept = await self._consumer.keep()
            except BrokerError as error:
                await self._backoff.pause(error)
                continue
            self._backoff.reset()
            if kept.lost or kept.drain:
                self._kept(kept)
            self.trusted_until = sent + self._lease_s * _TRUST
            self.wake()
            await self._clock.sleep(self._every_s)

    async def answer(self) -> None:
        """Wait for the next answered heartbeat, or for `wake`."""
        await self._answered.wait()

    def wake(self) -> None:
        """Let go of all that wait for an answer."""
        self._answered.set()
        self._answered.clear()
