"""The app of the tests of retention: grain comes in faster than it is carted away.

    python -m tests.faults.silo work                 its handlers, until it is ended
    python -m tests.faults.silo publish COUNT RATE   so many loads, each until it is stored, at most so many a second

Environment, besides that of `shop.py`:

    FAULTS_ORDER      `key`: loads of one field are carted in their order
    FAULTS_RETENTION  `keep`, `size`: a bound and a ceiling; `least`: what nobody needs goes at once; `drop`: what is
                      beyond the bound goes whoever needs it; else everything stays
    FAULTS_ROTTEN     each so many-th load is a dead letter while there is no file `healed` in the journal's directory
    FAULTS_SECONDS    how long a load takes while there is no file `fast` in the journal's directory
    FAULTS_MUTANT     the mistake that this process makes on purpose: `careless` trims whatever a group needs

In these journals, `full` is a load that is refused, `alarm` the stream near its ceiling, and `gone` has the number of events
whose loss is told in place of an attempt.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace

import millstream.app
from millstream import App, Delivery, Envelope, Event, Retention, Retry, Stream
from millstream.brokers.base import Broker, Policy, StreamSpec
from millstream.errors import BrokerFull
from millstream.telemetry import EVENTS_LOST, FILLING, logger
from tests.faults import shop
from tests.faults.shop import Watched, die, die_with_parent

GROUP = "carts"
FIELDS = 200
EVENTS, CEILING = 500, 3_000
BYTES, CEILING_BYTES = 200_000, "1250KB"
CHAFF = "x" * 400  # of each load, so that the one ceiling is near the other
AT_ONCE = 10
FAST, HEALED = (Path(os.environ.get("FAULTS_JOURNAL", "."), name) for name in ("fast", "healed"))
ROTTEN = int(os.environ.get("FAULTS_ROTTEN", "0"))
SECONDS = float(os.environ.get("FAULTS_SECONDS", "0"))
ORDER: Literal["key", "none"] = "key" if os.environ.get("FAULTS_ORDER") == "key" else "none"
RETENTION = {
    "keep": Retention(events=EVENTS, ceiling=CEILING),
    "size": Retention(bytes=BYTES, ceiling=CEILING_BYTES),
    "least": Retention(events=1),
    "drop": Retention(events=EVENTS, unread="drop"),
}


class Load(Event, type="load"):
    field: int
    number: int
    chaff: str = CHAFF


grain = Stream(
    "grain", Load, key="field", partitions=4, retention=RETENTION.get(os.environ.get("FAULTS_RETENTION", ""))
)
silo = App("silo", streams=[grain])


def is_rotten(number: int) -> bool:
    return ROTTEN > 0 and number % ROTTEN == 0


@silo.subscriber(grain, GROUP, order=ORDER, retry=Retry(3 if ROTTEN else 1_000, first="50ms", factor=1))
async def cart(event: Load, delivery: Delivery[Load]) -> None:
    die("before")
    shop.write("run", delivery.id, delivery.attempt)
    if is_rotten(event.number) and not HEALED.exists():
        raise RuntimeError("rotten")
    if not FAST.exists():
        await asyncio.sleep(SECONDS)
    die("inside")
    shop.write("fin", delivery.id, delivery.attempt)
    die("after")


def load(number: int) -> Envelope[Load]:
    return Envelope(Load(field=number % FIELDS, number=number), id=f"g-{number}")


async def publish(count: int, rate: float) -> None:
    async def one(number: int) -> None:
        while True:
            try:
                await silo.publish(load(number), to=grain)
            except BrokerFull as error:
                shop.write("full", f"g-{number}")
                logger.warning("refused: %s", error)
                await asyncio.sleep(0.1)
            else:
                shop.write("ok", f"g-{number}")
                return

    async with silo:
        for first in range(0, count, AT_ONCE):
            await asyncio.gather(*(one(number) for number in range(first, first + AT_ONCE)))
            await asyncio.sleep(AT_ONCE / rate)


def watched(*given: Any) -> Broker:
    """A broker whose stream drops what is unread, if that is the mistake to make."""
    broker = shop.watched(*given)
    declare = broker.declare

    async def careless(stream: StreamSpec, policy: Policy | None = None) -> Policy:
        return await declare(stream, replace(policy or Policy(), keep=False, ceiling_events=0))

    if os.environ.get("FAULTS_MUTANT") == "careless":
        broker.declare = careless  # type: ignore[method-assign]
    return broker


def tell(name: str, measurements: Mapping[str, Any]) -> None:
    if name == FILLING:
        shop.write("alarm")
    elif name == EVENTS_LOST:
        shop.write("gone", attempt=measurements["count"])


def main(verb: str, *words: str) -> int:
    die_with_parent()
    logging.basicConfig(level="INFO", format="%(created).3f %(levelname)s %(message)s")
    millstream.app.broker_for = watched  # type: ignore[attr-defined, assignment]
    if verb == "publish":
        asyncio.run(publish(int(words[0]), float(words[1])))
        return 0
    Watched.mark = "token" if ORDER == "key" else "attempt"
    silo.telemetry.listen(tell)
    return 0 if silo.run() else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
