"""What handling an event costs the server's disk, in both ways to consume."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Literal

from millstream import App, Event, Stream
from tests.redis.brokers import run_in
from tests.servers import RedisServer

EVENTS, KEYS = 20_000, 500
HANDLED_WITHIN_S = 50


class Moved(Event, type="aircraft.moved"):
    tail: str


flights = Stream("flights", Moved, key="tail", partitions=4)


def aof_bytes(server: RedisServer) -> int:
    return int(re.findall(r"aof_current_size:(\d+)", run_in(server, "INFO", "persistence").decode())[0])


async def handled(server: RedisServer, order: Literal["key", "none"]) -> float:
    """How many bytes an event adds to the append-only file when it is handled."""
    app, left, done = App("tower", broker=server.url), [EVENTS], asyncio.Event()

    @app.subscriber(flights, order, order=order)
    async def board(event: Moved) -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    before = aof_bytes(server)
    async with asyncio.timeout(HANDLED_WITHIN_S), app.worker():
        await done.wait()
    return (aof_bytes(server) - before) / EVENTS


async def test_in_order_an_event_costs_the_append_only_file_a_twentieth(
    record_property: Callable[[str, object], None],
) -> None:
    with RedisServer.start("7", appendonly="yes") as server:
        async with App("tower", broker=server.url, streams=[flights]) as client:
            await client.publish_many([Moved(tail=f"N{n % KEYS}") for n in range(EVENTS)])
        ordered, unordered = await handled(server, "key"), await handled(server, "none")
    print(f"\nbytes of the append-only file per handled event: {ordered:.1f} in order, {unordered:.1f} without")
    record_property("in order", ordered)
    record_property("without", unordered)
    assert 0 < ordered <= unordered / 20
