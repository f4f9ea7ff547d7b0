"""Gathering: who publishes at the same time shares a pack, and waits a moment for others to join.

            publish              linger over, or a pack is full                  stored
    caller ─────────► queue ───────────────────────────────────► packs in a write ─────► position of each event
                        ▲                                               │
                        └── while it is under way, all that comes gathers here: it need not linger again

An event whose call was cancelled before is left out; in a pack it is stored all the same. A pack that is tried again is
tried as it is, and has the patience of its last event, so an event may wait for up to twice as long. Where publishing has
no patience it does not linger either: a test moves the time itself, and only after `publish` has returned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from millstream.brokers.base import Broker, Confirm, Policy, Position, Record
from millstream.clock import Clock
from millstream.publisher.packing import Packer
from millstream.publisher.writer import Writer
from millstream.settings import Settings
from millstream.telemetry import Telemetry


class Gathering(Writer):
    """The writer of a stream with packs."""

    def __init__(
        self,
        stream: str,
        confirm: Confirm,
        policy: Policy,
        recorded: Callable[[], Awaitable[Policy]],
        *,
        packer: Packer,
        broker: Broker,
        settings: Settings,
        clock: Clock,
        telemetry: Telemetry,
    ) -> None:
        super().__init__(
            stream, confirm, policy, recorded, broker=broker, settings=settings, clock=clock, telemetry=telemetry
        )
        self._posting = None  # one that lingers does not leave at once
        self._packer = packer
        self._linger_s = packer.linger_s if settings.publish_patience_s else 0.0
        self._full = asyncio.Event()

    def append(self, record: Record, since_s: float) -> Awaitable[Position]:
        """As `Writer.append`, with the next pack."""
        stored = super().append(record, since_s)
        if len(self._queue) >= self._packer.events:
            self._full.set()
        return stored

    def stop(self) -> None:
        """Write what waits at once, but try nothing again."""
        super().stop()
        self._full.set()

    async def _write(self) -> None:
        await self._gather()
        self._taken = [item for item in self._take(self._packer.write_events) if not item.gone]
        if self._taken:
            bundle = self._packer.bundle([item.record for item in self._taken])
            results = bundle.spread(await self.append_all(bundle.records, self._taken[-1].since_s))
            for item, result in zip(self._taken, results, strict=True):
                item.answer(result)
        self._taken = []

    async def _gather(self) -> None:
        """Wait for more, until there is a pack full or the first one has lingered. Ends early when the app is closed."""
        left_s = self._queue[0].since_s + self._linger_s - self._clock.monotonic()
        if left_s > 0 and len(self._queue) < self._packer.events and not self._stopping.is_set():
            self._full.clear()
            await self._clock.wait(self._full, left_s)
