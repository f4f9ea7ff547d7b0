"""The demo: real flight events run through the three groups of `flights.py`, while somebody watches.

`play` publishes and handles in one process, replays the one dead letter at the end, and lets a second reader, with a broker
connection of its own, say what became of every event. `app` is the same app for the command line:
`MILLSTREAM_APP=millstream.demo.app:app` looks at what a kept run has left.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime

from millstream import App, BadSetting, BrokerError
from millstream.brokers.base import GroupInfo
from millstream.brokers.urls import mask
from millstream.clock import Clock
from millstream.demo import place, sample
from millstream.demo.flights import Desk, FlightCancelled, alerts, flights, handlers
from millstream.demo.pictures import AirportRow, CarrierRow, GroupRow, Progress, Summary
from millstream.demo.readback import Witness, read_back

__all__ = ["DemoOptions", "Progress", "Summary", "app", "play"]

DEFAULT_SPEED = 10_000.0  # the default run's 28 hours pass in ten seconds
CHUNK = 500  # events in one publish_many: small enough for ten pictures a second at full speed
PICTURE_S = 0.1
POLL_S = 0.02
STALL_S = 30.0  # groups that settle nothing for so long will not end by themselves
FAULTY_WITHIN = 1_000  # the event that nothing helps is among the first: its attempts should end before the run does

app = App("demo", include=[handlers(Desk())], streams=[alerts])


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What is played, and where."""

    events: int = 2_000
    broker: str | None = None
    """A broker URL. None: a new SQLite file in a temporary folder."""
    speed: float | None = DEFAULT_SPEED
    """Times real time; None: as fast as it goes."""
    keep: bool = False
    """Leave all on the broker, and say in `Summary.keep_hint` how to look at it. A named SQLite file stays in any case."""
    seed: int = 0
    """Decides which alerts fail at first."""

    def __post_init__(self) -> None:
        if self.events < 1 or (self.speed is not None and not self.speed > 0):
            raise BadSetting(f"events={self.events!r}, speed={self.speed!r}: both must be more than zero")


async def play(options: DemoOptions, show: Callable[[Progress], None]) -> Summary:
    """Publish and handle flight events, showing a picture about ten times a second; return what became of them.

    Removes all that it has stored, unless it is to be kept; also when it is cancelled. What goes wrong with the broker is
    raised as it is; so is a `BrokerError` when the groups come to a standstill.
    """
    clock = Clock()
    started = clock.monotonic()
    async with place.found(options.broker, keep=options.keep) as here:
        desk, witness = Desk(seed=options.seed, faulty=_faulty(options.events)), Witness()
        played = App(
            "demo",
            broker=here.url,
            include=[handlers(desk)],
            streams=[alerts],
            middleware=[witness],
            settings=here.settings,
        )
        async with played.worker():
            here.reached, broker = True, played.broker
            await _Run(played, clock, options, desk, witness, show).play()
        if broker.traits.shared:
            async with here.opened() as reader:
                found = await read_back(reader, played.groups(), witness)
        else:  # what lives inside of one broker object can be read through that one only
            found = await read_back(broker, played.groups(), witness)
        published, groups, sent = found
        hint = here.hint if options.keep and broker.traits.shared else ""
        return Summary(published, groups, sent, round(clock.monotonic() - started, 3), mask(here.url), hint)


def _faulty(events: int) -> str:
    """The flight whose alert nothing helps: the first cancelled one, else simply the first."""
    early = list(sample.events(min(events, FAULTY_WITHIN)))
    return next((event.flight_id for event in early if isinstance(event, FlightCancelled)), early[0].flight_id)


class _Run:
    """One run, from the first event to the last."""

    def __init__(
        self,
        app: App,
        clock: Clock,
        options: DemoOptions,
        desk: Desk,
        witness: Witness,
        show: Callable[[Progress], None],
    ) -> None:
        self._app = app
        self._clock = clock
        self._options = options
        self._desk = desk
        self._witness = witness
        self._show = show
        self._started = clock.monotonic()
        self._shown = 0.0
        self._phase = "publishing"
        self._time: datetime | None = None
        self._published_s = 0.0

    async def play(self) -> None:
        """Publish everything, wait for the groups, repair the cause of the dead letter, replay it, wait again."""
        async for chunk in self._paced():
            self._witness.confirmed.update(await self._app.publish_many(chunk, to=flights))
            self._time, self._published_s = chunk[-1].time, self._elapsed_s()
            await self._picture()
        await self._idle("finishing")
        self._desk.faulty = ""
        admin = self._app.broker.admin
        await admin.replay(await admin.dead(flights.name, "alerts"))
        await self._idle("replaying")

    async def _paced(self) -> AsyncIterator[list[sample.FlightEvent]]:
        """The events, each when its time has come; those that are due at once come together."""
        chunk: list[sample.FlightEvent] = []
        first: datetime | None = None
        for event in sample.events(self._options.events):
            first = first or event.time
            while self._options.speed is not None:
                due_s = (event.time - first).total_seconds() / self._options.speed
                left_s = due_s - self._elapsed_s()
                if left_s <= 0:
                    break
                if chunk:
                    yield chunk
                    chunk = []
                    continue
                await self._clock.sleep(min(left_s, PICTURE_S))
                await self._picture()
            chunk.append(event)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    async def _idle(self, phase: str) -> None:
        """Wait until no group has anything left to do."""
        self._phase = phase
        settled, since = -1, self._clock.monotonic()
        while True:
            groups = await self._groups()
            await self._picture(groups)
            if len(groups) == len(self._app.groups()) and all(row.lag == row.pending == 0 for row in groups):
                await self._picture(groups, now=True)
                return
            so_far = sum(row.done + row.retried + row.dead for row in groups)
            if so_far != settled:
                settled, since = so_far, self._clock.monotonic()
            elif self._clock.monotonic() - since > STALL_S:
                raise BrokerError(f"nothing was settled for {STALL_S:g} s, and these are not done: {groups}")
            await self._clock.sleep(POLL_S)

    async def _picture(self, groups: list[GroupRow] | None = None, *, now: bool = False) -> None:
        """Show how far it is, when the last picture is old enough."""
        elapsed_s = self._elapsed_s()
        if not now and elapsed_s - self._shown < PICTURE_S:
            return
        self._shown = elapsed_s
        published = len(self._witness.confirmed)
        self._show(
            Progress(
                self._phase,
                self._time,
                self._options.events,
                published,
                published / self._published_s if published else 0.0,
                elapsed_s,
                [AirportRow(name, **vars(airport)) for name, airport in self._desk.airports.items()],
                self._carriers(),
                list(reversed(self._desk.sent)),
                groups or await self._groups(),
            )
        )

    def _carriers(self) -> list[CarrierRow]:
        rows = [
            CarrierRow(carrier, departures, late, round(minutes / departures, 1))
            for carrier, (departures, late, minutes) in self._desk.delays.items()
        ]
        return sorted(rows, key=lambda row: -row.departures)

    async def _groups(self) -> list[GroupRow]:
        found = {info.group: info for info in await self._app.broker.admin.groups(flights.name)}
        return [_row(found[group.name]) for group in self._app.groups() if group.name in found]

    def _elapsed_s(self) -> float:
        return self._clock.monotonic() - self._started


def _row(info: GroupInfo) -> GroupRow:
    return GroupRow(
        info.group,
        info.done or 0,
        info.lag,
        info.pending,
        info.scheduled,
        info.retried,
        info.dead,
        info.replayed,
    )
