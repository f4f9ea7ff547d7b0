"""The app of the tests of order: aircraft that move, each a key; and what a process of these tests does.

    python -m tests.faults.tower work               its handlers, until it is ended
    python -m tests.faults.tower publish N KEYS S   N events of so many keys, in turns, that take S seconds each

An event's id is `<key>.<number>`. Environment, besides that of `shop.py`:

    FAULTS_POISON   a key whose events fail while there is no file `healed` in the journal's directory; after two attempts it
                    waits for a person, and so does any other that fails
    FAULTS_OUTPUTS  every handler publishes something: what was settled is durable then, and is never given out again

In these journals `got`, `set`, `put`, `ref` and `lost` carry the token of the lease in place of an attempt.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import millstream.app
from millstream import App, Delivery, Envelope, Event, Retry, Stream
from millstream.telemetry import ACQUIRED, RELEASED
from tests.faults import shop
from tests.faults.shop import Watched, die, die_with_parent, watched

GROUP = "board"
PARTITIONS = int(os.environ.get("FAULTS_PARTITIONS", "8"))
CHUNK = 500
POISON = os.environ.get("FAULTS_POISON", "")
OUTPUTS = "FAULTS_OUTPUTS" in os.environ
RETRY = Retry(2, first="200ms", factor=1, then="hold") if POISON else Retry(1_000, first="200ms", factor=1)
HEALED = Path(os.environ.get("FAULTS_JOURNAL", ".")) / "healed"


class Moved(Event, type="aircraft.moved"):
    tail: str
    number: int
    seconds: float = 0.0


class Seen(Event, type="aircraft.seen"):
    tail: str


flights = Stream("flights", Moved, key="tail", partitions=PARTITIONS)
sightings = Stream("sightings", Seen)
tower = App("tower", streams=[flights, sightings])


@tower.subscriber(flights, GROUP, retry=RETRY)
async def board(event: Moved, delivery: Delivery[Moved]) -> None:
    die("before")
    shop.write("run", delivery.id, delivery.attempt)
    if event.tail == POISON and not HEALED.exists():
        raise RuntimeError("poisoned")
    if event.seconds:
        await asyncio.sleep(event.seconds)
    if OUTPUTS:
        delivery.publish(Seen(tail=event.tail), to=sightings)
    die("inside")
    shop.write("fin", delivery.id, delivery.attempt)
    die("after")


def tell(name: str, measurements: Mapping[str, Any]) -> None:
    """Write down who has which partition."""
    if name in (ACQUIRED, RELEASED):
        shop.write("own" if name == ACQUIRED else "gave", str(measurements["partition"]), measurements["token"])


def named(index: int, keys: int) -> tuple[str, int]:
    """The key of the nth event, and its number among those of its key."""
    return f"N{index % keys}", index // keys


async def publish(count: int, keys: int, first: int = 0, seconds: float = 0.0) -> None:
    """Publish `count` events; each key's one after the other."""
    async with tower:
        for begin in range(first, first + count, CHUNK):
            names = [named(index, keys) for index in range(begin, min(begin + CHUNK, first + count))]
            for tail, number in names:
                shop.write("try", f"{tail}.{number}")
            events = [
                Envelope(Moved(tail=tail, number=number, seconds=seconds), id=f"{tail}.{number}")
                for tail, number in names
            ]
            await tower.publish_many(events, to=flights)
            for tail, number in names:
                shop.write("ok", f"{tail}.{number}")


def main(verb: str, *words: str) -> int:
    die_with_parent()
    logging.basicConfig(level="INFO", format="%(created).3f %(levelname)s %(message)s")
    if verb == "publish":
        asyncio.run(publish(int(words[0]), int(words[1]), seconds=float(words[2])))
        return 0
    Watched.mark = "token"
    millstream.app.broker_for = watched  # type: ignore[attr-defined, assignment]
    tower.telemetry.listen(tell)
    return 0 if tower.run() else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
