"""The app under test, as real processes: `python -m tests.faults.shop publish COUNT RATE | work | supervise WORKERS`.

What a process is to do is in its environment:

    MILLSTREAM_…   as for any app        SHOP_JOURNAL   the directory of the journals
    SHOP_HANDLER   what the handler does: quick, slow:SECONDS, between:SHORTEST:LONGEST, hang, hang-sync, poison
    SHOP_DIE       PLACE:COUNT, kill yourself at the so-manieth time that you come there. The places: fetched, before,
                   inside, after (the handler), settling (its outcome is about to be sent), settled
    SHOP_MUTANT    a mistake to be found: ack-first, no-fence
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import millstream.app
from millstream import App, Delivery, Envelope, Event, Retry, Stream
from millstream.brokers.base import Broker, Claim, Consumer, Done, Kept, Position, Settlement, Subscription
from millstream.brokers.urls import broker_for
from millstream.clock import Clock
from millstream.errors import BrokerError, Unconfirmed
from millstream.settings import Settings
from millstream.telemetry import BROKER_ERROR, LOST, STALE, Telemetry
from millstream.worker.supervisor import is_child
from tests.faults.journal import Journal

LANES = 64  # publishes that wait for their confirmation at the same time


class Placed(Event, type="order.placed"):
    kind: str = ""


orders = Stream("orders", Placed, partitions=2)


class Watched:
    """A broker whose consumers write down what became of each outcome, and may kill their process."""

    def __init__(self, broker: Broker, shop: Shop) -> None:
        self._broker = broker
        self._shop = shop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def subscribe(self, subscription: Subscription) -> WatchedConsumer:
        return WatchedConsumer(await self._broker.subscribe(subscription), self._shop)


class WatchedConsumer:
    """One consumer."""

    def __init__(self, consumer: Consumer, shop: Shop) -> None:
        self._consumer = consumer
        self._shop = shop
        self._claims: dict[Position, tuple[str, int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        claims = await self._consumer.fetch(limit, wait_s)
        for claim in claims:
            self._claims[claim.stored.position] = (claim.stored.record.id, claim.attempt)
        if claims:
            self._shop.pass_by("fetched")
        if self._shop.mutant == "ack-first" and claims:
            await self._consumer.settle([Settlement(claim.stored.position, Done()) for claim in claims])
        return claims

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        self._shop.pass_by("settling")
        answers = await self._consumer.settle(settlements)
        if self._shop.mutant == "no-fence":
            answers = [answer or self._force(s.position) for s, answer in zip(settlements, answers, strict=True)]
        self._shop.pass_by("settled")
        for settlement, accepted in zip(settlements, answers, strict=True):
            if isinstance(settlement.outcome, Done):
                self._shop.journal.say("yes" if accepted else "no", *self._claims[settlement.position])
        return answers

    async def keep(self) -> Kept:
        return await self._consumer.keep()

    def _force(self, position: Position) -> bool:
        """What a settle that asks nobody would do."""
        path = os.environ["MILLSTREAM_BROKER"].removeprefix("sqlite:///")
        statement = "DELETE FROM pending WHERE row IN (SELECT row FROM event WHERE id = ?)"
        with sqlite3.connect(path, timeout=5) as db:
            return db.execute(statement, [self._claims[position][0]]).rowcount > 0


class Shop:
    """This process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.journal = Journal(Path(environment["SHOP_JOURNAL"]))
        self.mutant = environment.get("SHOP_MUTANT", "")
        self._handler = environment.get("SHOP_HANDLER", "quick").split(":")
        self._place, _, count = environment.get("SHOP_DIE", ":0").partition(":")
        self._lives = int(count)
        self._random = random.Random(os.getpid())
        self.app = App(
            "shop", streams=[orders], retry=Retry(int(environment.get("SHOP_ATTEMPTS", "10")), first="100ms")
        )
        self.app.subscriber(orders, "billing", timeout="never")(
            self.handle_sync if self._handler[0] == "hang-sync" else self.handle
        )
        self.app.telemetry.listen(self._heard)

    async def handle(self, delivery: Delivery[Placed]) -> None:
        self.pass_by("before")
        self.journal.say("run", delivery.id, delivery.attempt)
        self._poison(delivery.event.kind)
        match self._handler:
            case ["quick"]:
                await asyncio.sleep(self._random.random() * 0.002)
            case ["slow", seconds]:
                await asyncio.sleep(float(seconds))
            case ["between", shortest, longest]:
                await asyncio.sleep(self._random.uniform(float(shortest), float(longest)))
            case ["hang"]:
                await asyncio.Event().wait()
        self.pass_by("inside")
        self.journal.say("fin", delivery.id, delivery.attempt)
        self.pass_by("after")

    def handle_sync(self, delivery: Delivery[Placed]) -> None:
        self.journal.say("run", delivery.id, delivery.attempt)
        time.sleep(600)

    def pass_by(self, place: str) -> None:
        """Die here, when it is time to."""
        if place == self._place:
            self._lives -= 1
            if self._lives == 0:
                self.journal.say("died", place)
                os.kill(os.getpid(), signal.SIGKILL)

    async def publish(self, count: int, rate: float) -> None:
        """Publish events with ids 0 … count − 1, at most so many a second, each until it is confirmed."""
        prefix = os.environ.get("SHOP_PREFIX", "")
        kinds = dict(word.split("=") for word in os.environ.get("SHOP_KINDS", "").split() if word)
        ids = iter([f"{prefix}{n}" for n in range(count)])
        began_s, sent = time.monotonic(), Counter[str]()

        async def lane() -> None:
            for id_ in ids:
                sent["all"] += 1
                await asyncio.sleep(max(0, began_s + sent["all"] / rate - time.monotonic()))
                self.journal.say("try", id_)
                await self._publish(Envelope(Placed(kind=kinds.get(id_, "")), id=id_))
                self.journal.say("ok", id_)

        async with self.app, asyncio.TaskGroup() as lanes:
            for _ in range(min(LANES, count)):
                lanes.create_task(lane())

    async def _publish(self, envelope: Envelope[Placed]) -> None:
        while True:
            try:
                await self.app.publish(envelope, to=orders)
                return
            except (BrokerError, Unconfirmed) as error:
                if not error.retryable:
                    raise
                self.journal.say("told", type(error).__name__, 1)
                await asyncio.sleep(0.02 + self._random.random() * 0.05)

    def _poison(self, kind: str) -> None:
        match kind:
            case "exit":
                os._exit(7)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)

    def _heard(self, name: str, measurements: Mapping[str, Any]) -> None:
        if name in (LOST, STALE):
            self.journal.say("told", name, len(measurements["positions"]))
        elif name == BROKER_ERROR:
            self.journal.say("told", name, 1)


def die_with_parent() -> None:
    """Nothing survives a test that was killed (Linux: PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(verb: str, *words: str) -> int:
    if not is_child():  # a supervisor's children end by its pipe, which is part of what is tested
        die_with_parent()
    shop = Shop(os.environ)

    def watched(url: str, settings: Settings, clock: Clock, telemetry: Telemetry) -> Any:
        return Watched(broker_for(url, settings, clock, telemetry), shop)

    millstream.app.broker_for = watched
    match verb:
        case "publish":
            count, rate = words
            asyncio.run(shop.publish(int(count), float(rate)))
            return 0
        case "work":
            return 0 if shop.app.run() else 1
        case "supervise":
            return 0 if shop.app.run(workers=int(words[0])) else 1
    raise SystemExit(f"unknown verb {verb!r}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
