"""The app under test, as real processes: `python -m tests.faults.shop work [PROCESSES]`, or `publish FIRST COUNT RATE`.

Where it lives, what it writes and how it is to die comes from the environment:

    MILLSTREAM_BROKER and the other settings
    FAULTS_JOURNAL   the directory of journals; its file `enough` ends a publisher that has published its count
    FAULTS_DIE       POINT:N, to be killed by itself when it comes to that point for the N-th time
    FAULTS_ATTEMPTS  after so many an event is a dead letter
    FAULTS_SLOW      how many seconds a `slow` event takes here
    FAULTS_PACK      so many events travel as one pack, at most
    FAULTS_MUTANT    the mistake that this process makes on purpose: `ack_first`, `no_fence`, `no_hand_back`, `deaf`
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import millstream.app
from millstream import App, Delivery, Envelope, Event, Pack, Retry, Stream
from millstream.brokers.base import Broker, Claim, Consumer, Done, Kept, Later, Position, Settlement, Subscription
from millstream.brokers.urls import broker_for
from millstream.errors import BrokerError, Unconfirmed
from millstream.worker.supervisor import is_child
from tests.faults.journal import Pen

GROUP = "work"
ATTEMPTS = int(os.environ.get("FAULTS_ATTEMPTS", "10"))
PACK = int(os.environ.get("FAULTS_PACK", "0"))
LANES = max(16, 2 * PACK)  # publications under way at once

POINTS = ("before", "inside", "after", "unsettled", "settled")


class Task(Event, type="task"):
    seconds: float = 0.0
    fault: str = ""


class Block(Event, type="block"):
    """For a handler in a thread."""

    seconds: float = 0.0


packed = Pack(events=PACK, linger="20ms", codec="none") if PACK else None
tasks = Stream("tasks", Task | Block, partitions=4, pack=packed)
shop = App("shop", streams=[tasks])


@shop.subscriber(tasks, GROUP, retry=Retry(ATTEMPTS, first="50ms"))
async def work(event: Task, delivery: Delivery[Task]) -> None:
    die("before")
    write("run", delivery.id, delivery.attempt)
    die("inside")
    if event.fault == "exit":
        os._exit(7)
    if event.fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    seconds = float(os.environ.get("FAULTS_SLOW", "0")) if event.fault == "slow" else event.seconds
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        write("cut", delivery.id, delivery.attempt)
        raise
    write("fin", delivery.id, delivery.attempt)
    die("after")


@shop.subscriber(tasks, GROUP)
def block(event: Block, delivery: Delivery[Block]) -> None:
    write("run", delivery.id, delivery.attempt)
    time.sleep(event.seconds)
    write("fin", delivery.id, delivery.attempt)


class Watched:
    """A consumer whose every answer is written down, and around whose calls the process may die."""

    mark = "attempt"
    """What of a claim is written."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._claims: dict[Position, Claim] = {}
        self._up = False

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        if not self._up:
            self._up = True
            write("up")
        claims = await self._consumer.fetch(limit, wait_s)
        for claim in claims:
            self._claims[claim.position] = claim
            self._tell("got", claim.position)
        return claims

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        die("unsettled")
        answers = await self._consumer.settle(settlements)
        die("settled")
        for settlement, accepted in zip(settlements, answers, strict=True):
            word = "put" if isinstance(settlement.outcome, Later) else "set"
            self._tell(word if accepted else "ref", settlement.position)
        return answers

    async def finish(self, positions: Sequence[Position]) -> list[bool]:
        die("unsettled")
        answers = await self._consumer.finish(positions)
        die("settled")
        for position, accepted in zip(positions, answers, strict=True):
            self._tell("set" if accepted else "ref", position)
        return answers

    async def keep(self) -> Kept:
        kept = await self._consumer.keep()
        for position in kept.lost & self._claims.keys():  # others were on their way to us
            self._tell("lost", position)
        return kept

    def _tell(self, word: str, position: Position) -> None:
        claim = self._claims[position]
        write(word, claim.record.id, getattr(claim, self.mark))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)


class AckFirst(Watched):
    """A mistake: events are over as soon as they come."""

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        claims = await super().fetch(limit, wait_s)
        await self._consumer.settle([Settlement(claim.position, Done()) for claim in claims])
        return claims

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        return [True] * len(settlements)

    async def finish(self, positions: Sequence[Position]) -> list[bool]:
        return [True] * len(positions)


class Deaf(Watched):
    """A mistake: it never ends."""

    async def close(self) -> None:
        time.sleep(600)


class NoHandBack(Watched):
    """A mistake: a process that ends keeps what it holds."""

    async def close(self) -> None:
        pass


def no_fence() -> None:
    """A mistake: whoever comes with an outcome is believed."""
    from millstream.brokers.sqlite import group
    from millstream.brokers.sqlite.member import present

    group._FINISH = "DELETE FROM pending WHERE grp = ? AND ? > 0 AND row = ? AND ? > 0"
    group._FINISH_RUN = "DELETE FROM pending WHERE grp = ? AND ? > 0 AND row BETWEEN ? AND ? AND ? > 0"

    def believing(fenced: Callable[..., list[bool] | None]) -> Callable[..., list[bool] | None]:
        def believe(*given: Any) -> list[bool] | None:
            group.present = lambda db, me: True  # type: ignore[attr-defined]
            try:
                return fenced(*given)
            finally:
                group.present = present  # type: ignore[attr-defined]

        return believe

    group.finish, group.settle = believing(group.finish), believing(group.settle)


def watched(*given: Any) -> Broker:
    broker = broker_for(*given)
    subscribe = broker.subscribe
    mutant = os.environ.get("FAULTS_MUTANT", "")
    kind = {"ack_first": AckFirst, "no_hand_back": NoHandBack, "deaf": Deaf}.get(mutant, Watched)
    if mutant == "no_fence":
        no_fence()

    async def subscribed(subscription: Subscription) -> Any:
        return kind(await subscribe(subscription))

    broker.subscribe = subscribed  # type: ignore[method-assign]
    return broker


async def publish(first: int, count: int, rate: float) -> None:
    """Publish `count` events, or more until there are `enough`, at most `rate` a second; each until it is confirmed."""
    enough = Path(os.environ["FAULTS_JOURNAL"], "enough")
    began_s, number = time.monotonic(), first

    async def lane() -> None:
        nonlocal number
        while number < first + count or not enough.exists():
            mine, number = number, number + 1
            await asyncio.sleep(began_s + (mine - first) / rate - time.monotonic())
            await until_confirmed(f"e-{mine}", Task(seconds=mine % 21 / 1_000))

    async with shop, asyncio.TaskGroup() as lanes:
        for _ in range(LANES):
            lanes.create_task(lane())


async def until_confirmed(name: str, event: Task) -> None:
    write("try", name)
    while True:
        try:
            await shop.publish(Envelope(event, id=name), to=tasks)
        except (BrokerError, Unconfirmed):
            write("again", name)
            await asyncio.sleep(0.02)
        else:
            write("ok", name)
            return


def die_with_parent() -> None:
    """Ask Linux to kill us when our parent ends. Children of a supervisor end by their pipe, which is tested."""
    if sys.platform == "linux" and not is_child():
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(verb: str, *words: str) -> int:
    die_with_parent()
    logging.basicConfig(level="INFO", format="%(created).3f %(levelname)s %(message)s")
    if verb == "publish":
        asyncio.run(publish(int(words[0]), int(words[1]), float(words[2])))
        return 0
    millstream.app.broker_for = watched  # type: ignore[attr-defined, assignment]
    return 0 if shop.run(workers=int(words[0]) if words else 1) else 1


def deaths() -> Callable[[str], None]:
    point, _, count = os.environ.get("FAULTS_DIE", "").partition(":")
    left = int(count or 0)

    def die(here: str) -> None:
        nonlocal left
        if here == point:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    return die


die = deaths()
if "FAULTS_JOURNAL" in os.environ:
    write = Pen(os.environ["FAULTS_JOURNAL"]).write

if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
