"""Janitor: publishes what has fallen due, trims what may go, and says early what will hurt.

Every process has one, and each does the same for all streams of the app: what must be done once, the broker does once,
whoever asks. So nobody is elected, and nothing waits for a process that died.

    a round of a stream ──► it published? another round at once, after the other streams
                        ├─► it trimmed? another one in a moment, which leaves the broker to others meanwhile
                        └─► else when the next event is due, and at the latest after half a second

Housekeeping may fail for as long as it likes: it complains, and tries again. Handlers go on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from millstream.brokers.base import Broker, Tended
from millstream.clock import Clock
from millstream.telemetry import (
    BROKER_ERROR,
    EVENTS_LOST,
    FADING,
    FELL_DUE,
    FILLING,
    FORGOTTEN,
    TRIMMED,
    Telemetry,
    logger,
)

DELAYED_S = 0.5  # an event that is due soon may have been published by anybody: so late it comes at most
OTHERWISE_S = 5.0
TRIMMING_S = (
    0.04  # while events keep coming there is always something to trim: a few rounds a second, not all there can be
)
LONGEST_PAUSE_S = 5.0  # so late the first delayed event comes after the broker is back
NEAR_FULL = 0.8  # of the ceiling: leaves time to act
CALM = 0.75  # below it the next alarm is a new one; without a gap, a stream at the edge would ring all the time
REMIND_S = 60.0
LOST_S = 1.0  # a group that is always behind loses something in every round: one log line tells of all of a second


class Janitor:
    """Keeps house for the streams of an app, in this process."""

    def __init__(self, streams: Iterable[str], broker: Broker, clock: Clock, telemetry: Telemetry) -> None:
        self._broker = broker
        self._clock = clock
        self._telemetry = telemetry
        self._houses = [_House(stream, clock, telemetry) for stream in streams]
        self._pace_s = DELAYED_S if broker.traits.delayed else OTHERWISE_S
        self._asked = asyncio.Event()

    async def run(self) -> None:
        """Go round. Ends by cancellation; at once where there is nothing to tend."""
        traits = self._broker.traits
        if not self._houses or not (traits.delayed or traits.retention):
            return
        while True:
            now_s = self._clock.monotonic()
            for house in self._houses:
                if house.next_s <= now_s:
                    await self._tend(house)
            next_s = min(house.next_s for house in self._houses)
            if await self._clock.wait(self._asked, max(0.0, next_s - self._clock.monotonic())):
                self._asked.clear()
                for house in self._houses:
                    house.next_s = 0.0

    def ask(self) -> None:
        """Make a round of all streams now."""
        self._asked.set()

    def only_when_asked(self) -> None:
        """From now on make a round when somebody asks, or an event is known to fall due; without that, never.

        Under virtual time, nothing happens that nobody knows of, and a clock that has to stop twice in each second is slow.
        """
        self._pace_s = 10 * 365 * 86_400.0

    async def _tend(self, house: _House) -> None:
        try:
            tended = await self._broker.tend(house.stream)
        except Exception as error:  # also one that trying again cannot mend: handlers can do without us
            house.failed(error)
            return
        house.tended(tended, self._pace_s)


class _House:
    """A stream, when it is looked after next, and what has been said about it."""

    def __init__(self, stream: str, clock: Clock, telemetry: Telemetry) -> None:
        self.stream = stream
        self.next_s = 0.0
        self._clock = clock
        self._telemetry = telemetry
        self._pause_s = DELAYED_S
        self._fading: set[str] = set()
        self._forgotten: frozenset[str] = frozenset()
        self._alarmed = False
        self._reminded_s = 0.0
        self._lost: Counter[str] = Counter()
        self._next_lost_s = 0.0

    def failed(self, error: Exception) -> None:
        """Tell, and come back later, each time after a longer pause."""
        now_s = self._clock.monotonic()
        self._telemetry.emit(BROKER_ERROR, group="", doing=f"tend {self.stream}", error=error)
        about = f"tend {self.stream}"
        self._telemetry.complain(about, now_s, "cannot tend stream %s now and tries again: %s", self.stream, error)
        self.next_s = now_s + self._pause_s * (0.5 + self._clock.chance() / 2)
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)

    def tended(self, tended: Tended, pace_s: float) -> None:
        """Tell what was done and found, and come back when there is something to do."""
        self._pause_s = DELAYED_S
        self._tell_done(tended)
        self._tell_groups(tended)
        self._tell_filling(tended)
        now_s = self._clock.monotonic()
        self.next_s = now_s + pace_s
        if tended.published:
            self.next_s = now_s
        elif tended.trimmed:
            self.next_s = now_s + TRIMMING_S
        elif tended.due_ms is not None:
            away_s = (tended.due_ms - self._clock.now_ms()) / 1000
            if away_s > 0:  # one that is past cannot be published now: the stream is full, or the server's clock behind
                self.next_s = now_s + min(away_s, pace_s)

    def _tell_done(self, tended: Tended) -> None:
        for name, count in ((FELL_DUE, tended.published), (TRIMMED, tended.trimmed)):
            if count:
                self._telemetry.emit(name, stream=self.stream, count=count)
        for group, count in tended.lost.items():
            self._telemetry.emit(EVENTS_LOST, group=group, stream=self.stream, count=count)
            self._lost[group] += count
        now_s = self._clock.monotonic()
        if not self._lost or now_s < self._next_lost_s:
            return
        for group, count in self._lost.items():
            logger.warning(
                "group %s lost %d events of stream %s: they were gone before it had settled them",
                group,
                count,
                self.stream,
            )
        self._lost.clear()
        self._next_lost_s = now_s + LOST_S

    def _tell_groups(self, tended: Tended) -> None:
        """Each group once, until it was alive again."""
        for group in tended.fading.keys() - self._fading:
            at_ms = tended.fading[group]
            self._telemetry.emit(FADING, group=group, stream=self.stream, at_ms=at_ms)
            logger.warning(
                "group %s/%s keeps events and nobody serves it: in %.1f hours they may go. Run it, or `millstream group "
                "forget %s/%s`",
                self.stream,
                group,
                (at_ms - self._clock.now_ms()) / 3_600_000,
                self.stream,
                group,
            )
        for group in tended.forgotten - self._forgotten:
            self._telemetry.emit(FORGOTTEN, group=group, stream=self.stream)
            logger.warning(
                "group %s/%s: nobody has served it for so long that its events may go now", self.stream, group
            )
        self._fading, self._forgotten = set(tended.fading), tended.forgotten

    def _tell_filling(self, tended: Tended) -> None:
        if tended.fullness < NEAR_FULL:
            self._alarmed = self._alarmed and tended.fullness >= CALM
            return
        now_s = self._clock.monotonic()
        if not self._alarmed:
            self._alarmed = True
            self._telemetry.emit(FILLING, stream=self.stream, fullness=tended.fullness, pinned_by=tended.pinned_by)
        elif now_s - self._reminded_s < REMIND_S:
            return
        self._reminded_s = now_s
        logger.warning(
            "stream %s is %.0f%% full, and at its ceiling publishing is refused: %s",
            self.stream,
            tended.fullness * 100,
            _remedy(self.stream, tended.pinned_by),
        )


def _remedy(stream: str, pinned_by: str) -> str:
    """What keeps the oldest events, and what can be done about it."""
    raise_it = "or raise the ceiling (`millstream stream apply`)"
    if not pinned_by:
        return f"nothing keeps its events but its own bounds: lower these, {raise_it}"
    group = pinned_by.removeprefix("dead letters of ")
    if group != pinned_by:
        return (
            f"dead letters of group {group} keep its oldest events: `millstream dead ls --group {stream}/{group}`, then "
            f"replay or drop them, {raise_it}"
        )
    return f"group {group} has not settled its oldest events: run it, `millstream group forget {stream}/{group}`, {raise_it}"
