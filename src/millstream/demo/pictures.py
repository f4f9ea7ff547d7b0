"""What a run of the demo shows while it lasts, and what it says at its end: plain values, for whoever draws them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from millstream.demo.readback import Figures


@dataclass(frozen=True)
class AirportRow:
    """A line of the departure board: counts of flights from this airport."""

    airport: str
    departed: int
    late: int
    landed: int
    cancelled: int
    latest: str
    """The last departure, as text."""


@dataclass(frozen=True)
class CarrierRow:
    """How late an airline is."""

    carrier: str
    departures: int
    late: int
    """Departures 15 minutes late or more."""
    mean_delay_min: float
    """Minutes of delay a departure; early ones count as 0."""


@dataclass(frozen=True)
class GroupRow:
    """Where a group stands, by the broker."""

    group: str
    done: int
    lag: int | None
    """Not yet delivered; None where nobody can tell."""
    pending: int
    """Delivered and not settled, those that wait for another attempt included."""
    scheduled: int
    """Those that wait for another attempt."""
    retried: int
    dead: int
    """Dead letters now."""
    replayed: int


@dataclass(frozen=True)
class Progress:
    """A picture of a run, ten times a second."""

    phase: str
    """`publishing`, `finishing`, `replaying`."""
    time: datetime | None
    """When the flight event that was published last happened."""
    events: int
    """To be published in all."""
    published: int
    rate: float
    """Published a second, on average."""
    elapsed_s: float
    airports: list[AirportRow]
    carriers: list[CarrierRow]
    """Those with the most departures first."""
    alerts: list[str]
    """The newest first."""
    groups: list[GroupRow]


@dataclass(frozen=True)
class Summary:
    """What the second reader found."""

    published: int
    """Flight events that are stored on the broker."""
    groups: dict[str, Figures]
    alerts: int
    """Events that the group `alerts` published."""
    seconds: float
    broker: str
    """The URL, password masked."""
    keep_hint: str = ""
    """A shell line with which every other command looks at the same data; empty when it is gone."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)
