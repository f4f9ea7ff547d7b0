"""Flights: what a user of Millstream would write for them. Events, streams, and three groups of handlers.

`board` keeps the departure boards of three airports, `delays` counts how late each airline is, and `alerts` publishes a
second stream. Sending alerts fails now and then, on purpose: such an event is tried again while all others go on, and one
that nothing helps becomes a dead letter. `app.py` runs all this over real events.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from zlib import crc32

from millstream import Batch, Delivery, Event, Retry, Router, Stream

MAX_ALERTS_SHOWN = 100
LATE_MIN = 15  # from here on, airlines count a flight as late
ALERT_MIN = 60


class Flight(Event):
    """What all flight events have: no type name, so it is a base class."""

    time: datetime
    flight_id: str
    carrier: str
    tailnum: str | None
    origin: str
    dest: str


class FlightDeparted(Flight, type="FlightDeparted"):
    """A flight left the gate, `delay` minutes late (negative: early)."""

    scheduled: datetime
    delay: int


class FlightLanded(Flight, type="FlightLanded"):
    """A flight arrived."""

    air_time: int
    distance: int
    delay: int | None = None


class FlightCancelled(Flight, type="FlightCancelled"):
    """A flight never left; its time is the one at which it was to."""


class Alert(Event, type="Alert"):
    """What passengers are told."""

    flight_id: str
    text: str


# One aircraft does one thing at a time, so it is the natural key; a few flights do not name theirs.
flights = Stream(
    "flights",
    FlightDeparted | FlightLanded | FlightCancelled,
    key=lambda flight: flight.tailnum or flight.flight_id,
    partitions=4,
)
alerts = Stream("alerts", Alert, key="flight_id", partitions=4)


class PagerBusy(Exception):
    """The pager did not answer: worth another try."""


@dataclass
class Airport:
    """One departure board."""

    departed: int = 0
    landed: int = 0
    cancelled: int = 0
    late: int = 0
    latest: str = ""


@dataclass
class Desk:
    """What the handlers have found out, in memory. An event that is handled twice counts twice: this is only shown."""

    seed: int = 0
    faulty: str = ""
    """The flight whose alert nothing can send, until somebody repairs that."""
    airports: dict[str, Airport] = field(default_factory=lambda: {name: Airport() for name in ("EWR", "JFK", "LGA")})
    delays: dict[str, list[int]] = field(default_factory=dict)
    """Per carrier: departures, late ones, minutes of delay in all."""
    sent: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_ALERTS_SHOWN))

    async def page(self, flight: Flight, attempt: int) -> None:
        """Send a page. Some flights' first attempts fail, always the same ones for one seed."""
        if flight.flight_id == self.faulty:
            raise LookupError(f"no pager number for {flight.flight_id}")
        if attempt <= crc32(f"{self.seed}{flight.flight_id}".encode()) % 3:
            raise PagerBusy(f"no answer for {flight.flight_id}")


def handlers(desk: Desk) -> Router:
    """The three groups. Each gets every event, at its own pace; what fails in one is no concern of the others."""
    router = Router(timeout="10s")

    @router.subscriber(flights, "board")
    async def departed(event: FlightDeparted) -> None:
        airport = desk.airports[event.origin]
        airport.departed += 1
        airport.late += event.delay >= LATE_MIN
        airport.latest = f"{event.time:%H:%M} {event.carrier} to {event.dest} {event.delay:+d} min"

    @router.subscriber(flights, "board")
    async def landed(event: FlightLanded) -> None:
        desk.airports[event.origin].landed += 1

    @router.subscriber(flights, "board")
    async def cancelled(event: FlightCancelled) -> None:
        desk.airports[event.origin].cancelled += 1

    @router.subscriber(flights, "delays", batch=Batch(200, within="50ms"))
    async def delays(events: list[FlightDeparted]) -> None:
        for event in events:
            known = desk.delays.setdefault(event.carrier, [0, 0, 0])
            known[0] += 1
            known[1] += event.delay >= LATE_MIN
            known[2] += max(event.delay, 0)

    @router.subscriber(flights, "alerts", retry=Retry(4, first="250ms", factor=2))
    async def alert(event: FlightDeparted | FlightCancelled, delivery: Delivery) -> None:
        if event.flight_id != desk.faulty and not worth_an_alert(event):
            return
        await desk.page(event, delivery.attempt)
        text = describe(event)
        desk.sent.append(text)
        # Stored with the outcome, or not at all.
        delivery.publish(Alert(flight_id=event.flight_id, text=text), to=alerts)

    return router


def worth_an_alert(event: FlightDeparted | FlightCancelled) -> bool:
    """Whether passengers should be told."""
    return isinstance(event, FlightCancelled) or event.delay >= ALERT_MIN


def describe(event: FlightDeparted | FlightCancelled) -> str:
    """The text of an alert."""
    what = "is cancelled" if isinstance(event, FlightCancelled) else f"left {event.delay} min late"
    return f"{event.time:%H:%M} {event.carrier} {event.origin} to {event.dest} {what}"
