"""Backoff: what every loop does while the broker fails."""

from __future__ import annotations

from millstream.clock import Clock
from millstream.errors import BrokerError
from millstream.telemetry import BROKER_ERROR, Telemetry

_FIRST_S = 0.01
_LONGEST_S = 1.0


class Backoff:
    """Pauses that grow from 10 ms to 1 s, with jitter. All loops of a group together log one line a second at most."""

    def __init__(self, doing: str, group: str, clock: Clock, telemetry: Telemetry) -> None:
        self._doing = doing
        self._group = group
        self._clock = clock
        self._telemetry = telemetry
        self._delay_s = _FIRST_S

    def reset(self) -> None:
        """It worked."""
        self._delay_s = _FIRST_S

    async def pause(self, error: BrokerError) -> None:
        """Tell, wait, return to try again. Raises the error where trying again cannot help."""
        await self._clock.sleep(self.delay_s(error))

    def delay_s(self, error: BrokerError) -> float:
        """Tell, and say how long to wait before trying again. Raises the error where that cannot help."""
        if not error.retryable:
            raise error
        self._telemetry.emit(BROKER_ERROR, group=self._group, doing=self._doing, error=error)
        self._telemetry.complain(
            self._group,
            self._clock.monotonic(),
            "group %s cannot %s now and tries again: %s",
            self._group,
            self._doing,
            error,
        )
        delay_s, self._delay_s = self._delay_s, min(self._delay_s * 2, _LONGEST_S)
        return delay_s * (0.5 + self._clock.chance() / 2)
