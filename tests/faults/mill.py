"""The app of the tests of outputs: sacks come in, and of each the mill makes some bags, which another stream must hold once.

    python -m tests.faults.mill work                 its handlers, until it is ended
    python -m tests.faults.mill publish COUNT RATE   so many sacks, or more until there are `enough`; RATE a second

Sack N makes N % 4 bags, the last of three of them for later. Environment, besides that of `shop.py`:

    FAULTS_ORDER    `key`: sacks of one farm are handled in their order
    FAULTS_DEDUPE   the stream of bags remembers ids
    FAULTS_CEILING  of the stream of bags, which a slow handler ships: a journal's `ship` has a sack and the bag's number
    FAULTS_SECONDS  how long a sack takes
    FAULTS_MUTANT   the mistake that this process makes on purpose: `apart` stores bags and outcome one after the other
    FAULTS_DIE      has the points `unstored` and `stored` besides: around what a worker stores before an outcome
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace

import millstream.app
from millstream import App, Delivery, Envelope, Event, Retention, Retry, Stream
from millstream.brokers.base import Broker, Confirm, Position, Record, Settlement, Subscription
from millstream.brokers.urls import broker_for
from millstream.errors import BrokerDown
from tests.faults import shop
from tests.faults.shop import Watched, die, die_with_parent

POINTS = (*shop.POINTS, "unstored", "stored")
GROUP, SHIPPING = "mill", "ship"
SHIP_S = 0.01
FARMS = 40
CHUNK = 50
SECONDS = float(os.environ.get("FAULTS_SECONDS", "0"))
ORDER: Literal["key", "none"] = "key" if os.environ.get("FAULTS_ORDER") == "key" else "none"


class Sack(Event, type="sack"):
    farm: int
    number: int


class Bag(Event, type="bag"):
    sack: int
    number: int


sacks = Stream("sacks", Sack, key="farm", partitions=4)
bags = Stream(
    "bags",
    Bag,
    partitions=4,
    dedupe="1h" if "FAULTS_DEDUPE" in os.environ else None,
    retention=Retention(events=100, ceiling=int(os.environ["FAULTS_CEILING"]))
    if "FAULTS_CEILING" in os.environ
    else None,
)
mill = App("mill", streams=[sacks, bags])


def bags_of(sack: int) -> int:
    """How many bags a sack makes."""
    return sack % 4


@mill.subscriber(sacks, GROUP, order=ORDER, retry=Retry(1_000, first="50ms", factor=1))
async def grind(event: Sack, delivery: Delivery[Sack]) -> None:
    die("before")
    shop.write("run", delivery.id, delivery.attempt)
    for number in range(bags_of(event.number)):
        delivery.publish(Envelope(Bag(sack=event.number, number=number), due="300ms" if number == 2 else None), to=bags)
    await asyncio.sleep(SECONDS or event.number % 7 / 1_000)
    die("inside")
    shop.write("fin", delivery.id, delivery.attempt)
    die("after")


async def ship(event: Bag) -> None:
    await asyncio.sleep(SHIP_S)
    shop.write("ship", f"s-{event.sack}", event.number)


if "FAULTS_CEILING" in os.environ:
    mill.subscriber(bags, SHIPPING, concurrency=4)(ship)


class Apart(Watched):
    """A mistake: bags are stored, and then the outcome."""

    def __init__(self, consumer: Any, broker: Broker) -> None:
        super().__init__(consumer)
        self._broker = broker

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        for output in [output for settlement in settlements for output in settlement.outputs]:
            await self._broker.append(output.stream, [output.record])
        return await super().settle([replace(settlement, outputs=()) for settlement in settlements])


def watched(*given: Any) -> Broker:
    broker = broker_for(*given)
    subscribe, append = broker.subscribe, broker.append

    async def subscribed(subscription: Subscription) -> Any:
        consumer = await subscribe(subscription)
        return Apart(consumer, broker) if os.environ.get("FAULTS_MUTANT") == "apart" else Watched(consumer)

    async def appended(stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        die("unstored")
        positions = await append(stream, records, confirm)
        die("stored")
        return positions

    broker.subscribe = subscribed  # type: ignore[method-assign]
    broker.append = appended  # type: ignore[method-assign]
    return broker


def sack(number: int) -> Envelope[Sack]:
    return Envelope(Sack(farm=number % FARMS, number=number), id=f"s-{number}")


async def publish(count: int, rate: float) -> None:
    enough, number = Path(os.environ["FAULTS_JOURNAL"], "enough"), 0
    async with mill:
        while number < count or not enough.exists():
            chunk = range(number, number + CHUNK)
            await mill.publish_many([sack(n) for n in chunk], to=sacks)
            for n in chunk:
                shop.write("ok", f"s-{n}")
            number += CHUNK
            await asyncio.sleep(CHUNK / rate)


def main(verb: str, *words: str) -> int:
    die_with_parent()
    logging.basicConfig(level="INFO", format="%(created).3f %(levelname)s %(message)s")
    if verb == "publish":
        asyncio.run(publish(int(words[0]), float(words[1])))
        return 0
    Watched.mark = "token" if ORDER == "key" else "attempt"
    millstream.app.broker_for = watched  # type: ignore[attr-defined, assignment]
    return 0 if run() else 1


def run() -> bool:
    """Start again while the broker cannot be reached at the start, as a service manager does."""
    while True:
        with suppress(BrokerDown):
            return mill.run()


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
