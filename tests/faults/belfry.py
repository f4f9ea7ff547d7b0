"""The app of the tests of schedules: a bell that every process rings, and that is heard once for each of its moments.

    python -m tests.faults.belfry work     until it is ended

Environment, besides that of `shop.py`:

    FAULTS_MUTANT   the mistake that this process makes on purpose: `blind` publishes a slot whoever has done so before
    FAULTS_DIE      has the points `unstored` and `stored`: around the storing of a slot
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

import millstream.app
from millstream import App, Event, Stream, every
from millstream.brokers.base import Broker, Record, Slot
from millstream.brokers.urls import broker_for
from millstream.errors import BrokerDown
from tests.faults import shop
from tests.faults.shop import die, die_with_parent

POINTS = ("unstored", "stored")
INTERVAL_MS = 100


class Strike(Event, type="strike"):
    at_ms: int


def strike(at: datetime) -> Strike:
    return Strike(at_ms=round(at.timestamp() * 1_000))


strikes = Stream("strikes", Strike)
belfry = App(
    "belfry",
    streams=[strikes],
    include=[every(f"{INTERVAL_MS}ms", strike, to=strikes, name="bell", missed="all")],
)


def watched(*given: Any) -> Broker:
    broker = broker_for(*given)
    append_slot = broker.append_slot
    blind = os.environ.get("FAULTS_MUTANT") == "blind"
    up = False

    async def appended(stream: str, slot: Slot, record: Record | None) -> bool:
        nonlocal up
        if not up:
            up = True
            shop.write("up")
        die("unstored")
        if blind and record is not None:
            await broker.append(stream, [record])
            stored = True
        else:
            stored = await append_slot(stream, slot, record)
        die("stored")
        if stored and record is not None:
            shop.write("set", str(slot.at_ms))
        return stored

    broker.append_slot = appended  # type: ignore[method-assign]
    return broker


def main(verb: str) -> int:
    assert verb == "work"
    die_with_parent()
    logging.basicConfig(level="INFO", format="%(created).3f %(levelname)s %(message)s")
    millstream.app.broker_for = watched  # type: ignore[attr-defined, assignment]
    while True:  # as a service manager does, while the broker cannot be reached at the start
        with suppress(BrokerDown):
            return 0 if belfry.run() else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
