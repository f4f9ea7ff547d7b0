"""Another process at the same file: `python -m tests.sqlite.process VERB URL …`. One fact per line on stdout."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from sqlite3 import Connection

from millstream.brokers.base import Consumer, Done, Policy, Record, Settlement, Slot, StreamSpec, Subscription
from millstream.brokers.sqlite.broker import SQLiteBroker
from millstream.clock import Clock
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from tests.sqlite.places import LEASE_S, ORDERS

KEPT, KEPT_POLICY = StreamSpec("kept", partitions=2), Policy(dedupe_ms=3_600_000, dedupe_ids=100_000, events=50)
PLAIN = (StreamSpec("ticks"), StreamSpec("later"))


def say(*words: object) -> None:
    print(*words, flush=True)


async def publish(broker: SQLiteBroker, prefix: str, count: str) -> None:
    """Append one by one, ten at a time; says each id whose append returned."""

    async def lane(number: int) -> None:
        for n in range(number, int(count), 10):
            name = f"{prefix}-{n}"
            await broker.append("orders", [Record(n % ORDERS.partitions, name, "order.placed", b"x" * 200)])
            say(name)

    async with asyncio.TaskGroup() as lanes:
        for number in range(10):
            lanes.create_task(lane(number))


async def consume(broker: SQLiteBroker, order: str = "") -> None:
    """Handle for ever; says the id of each event before it is settled."""
    consumer = await broker.subscribe(Subscription(ORDERS, "billing", "shop", lease_s=LEASE_S, order=bool(order)))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(beat(consumer))
        while True:
            claims = await consumer.fetch(20, 1.0)
            for claim in claims:
                say(claim.record.id)
            await consumer.settle([Settlement(claim.position, Done()) for claim in claims])


async def beat(consumer: Consumer) -> None:
    while True:
        await consumer.keep()
        await asyncio.sleep(LEASE_S / 4)


async def echo(broker: SQLiteBroker) -> None:
    """Says how many microseconds after its publication each event was fetched."""
    consumer = await broker.subscribe(Subscription(ORDERS, "echo", "shop", start="now", lease_s=60.0))
    say("ready")
    while True:
        for claim in await consumer.fetch(1, 1.0):
            say((time.monotonic_ns() - int(claim.record.data)) // 1_000)
            await consumer.settle([Settlement(claim.position, Done())])


async def contend(broker: SQLiteBroker, seconds: str) -> None:
    """Commit back to back; says how often, and the longest wait in milliseconds."""
    say("ready")
    sys.stdin.readline()
    commits, longest_s, until_s = 0, 0.0, time.monotonic() + float(seconds)
    while (began_s := time.monotonic()) < until_s:
        await broker.append("orders", [Record(0, f"c-{commits}", "order.placed", b"x" * 200)])
        commits, longest_s = commits + 1, max(longest_s, time.monotonic() - began_s)
    say(commits, round(longest_s * 1000))


async def hold(broker: SQLiteBroker) -> None:
    """Stay inside a transaction, and so inside the turnstile, until stdin ends."""

    def job(_: Connection) -> None:
        say("inside")
        sys.stdin.read()

    await broker.writer.ask(job, durable=True)


async def churn(broker: SQLiteBroker, prefix: str, begin: str) -> None:
    """For ever the same ids and slots as the others, events for later of its own, and housekeeping; says each number."""
    await broker.declare(KEPT, KEPT_POLICY)
    for stream in PLAIN:
        await broker.declare(stream)
    number = int(begin)
    while True:
        await broker.append("kept", [Record(number % 2, f"id-{number}", "order.placed", b"x" * 200)])
        await broker.append_slot("ticks", Slot("tick", number), Record(0, str(number), "order.placed", b"x"))
        due_ms = broker.clock.now_ms() + 1
        await broker.append("later", [Record(0, f"{prefix}-{number}", "order.placed", b"x", due_ms=due_ms)])
        say(number)
        for tended in ("kept", "later"):
            await broker.tend(tended)
        number += 1


VERBS: dict[str, Callable[..., Awaitable[None]]] = {
    "publish": publish,
    "churn": churn,
    "consume": consume,
    "echo": echo,
    "contend": contend,
    "hold": hold,
}


async def main(verb: str, url: str, *more: str) -> None:
    broker = SQLiteBroker(url, Settings(), Clock(), Telemetry())
    if verb == "create":
        say("ready")
        sys.stdin.readline()
    await broker.open()
    await broker.declare(ORDERS)
    if verb == "create":
        say("created")
    else:
        await VERBS[verb](broker, *more)
    await broker.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
