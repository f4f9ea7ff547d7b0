"""The sample of real flight events that travels with Millstream; README.md beside it says where they come from."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from datetime import timedelta
from importlib import resources
from itertools import count, islice
from typing import Any

import msgspec

from millstream.demo.flights import FlightCancelled, FlightDeparted, FlightLanded, flights

EVENTS = 20_000
LAP = timedelta(days=12)  # the sample's length, rounded up: each repetition goes on where the last one ended

FlightEvent = FlightDeparted | FlightLanded | FlightCancelled


class _Line(msgspec.Struct):
    type: str


def events(number: int) -> Iterator[FlightEvent]:
    """The first events of the sample; past its end it begins again, under new flight ids and on later days."""
    return islice((event for lap in count() for event in _lap(lap)), number)


def _lap(lap: int) -> Iterator[FlightEvent]:
    name_of = msgspec.json.Decoder(_Line).decode
    decoders: dict[str, Any] = {name: msgspec.json.Decoder(cls).decode for name, cls in flights.types.items()}
    sample = resources.files("millstream.demo") / "flights-2013-01.jsonl.gz"
    with sample.open("rb") as packed, gzip.open(packed) as lines:
        for line in lines:
            event: FlightEvent = decoders[name_of(line).type](line)
            if lap:
                event = event.__replace__(time=event.time + lap * LAP, flight_id=f"{event.flight_id}-{lap + 1}")
            yield event
