"""Connections are cut after the write and before the reply: what is published again is there once."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from millstream import App, Envelope, Event, Settings, Stream
from millstream.errors import BrokerDown, Unconfirmed
from millstream.units import Duration
from tests.faults.conftest import LONG
from tests.faults.proxy import Proxy
from tests.servers import VERSIONS, RedisServer, Version

EVENTS = 1_000
LANES = 8
MANY = 100_000 if LONG else 60_000
CUT_EVERY_S = 0.02
SEED = 37

Told = Callable[[str, object], None]

NAME = re.compile(rb"e-(\d+)-\d+")


class Paid(Event, type="paid"):
    number: int


payments = Stream("payments", Paid, partitions=4, dedupe="1h")
forgetful = Stream("payments", Paid, partitions=4)


@pytest.fixture(params=VERSIONS)
def proxy(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """The way to a server."""
    with RedisServer.start(request.param) as server, Proxy(server.port) as between:
        yield between


def once(proxy: Proxy) -> None:
    """From now on, the answer is lost to whoever publishes an event for the first time."""
    seen = set[bytes]()

    def dooms(request: bytes) -> bool:
        new = {name[0] for name in NAME.finditer(request)} - seen
        seen.update(new)
        return bool(new)

    proxy.dooms = dooms


async def publish_all(
    url: str,
    stream: Stream[Any],
    patience: Duration,
    *,
    due: Duration | None = None,
    opened: asyncio.Barrier | None = None,
) -> int:
    """Publish all events by some apps at once, and again what is in doubt. Returns how many errors were raised."""
    errors = 0

    async def lane(first: int) -> None:
        nonlocal errors
        async with App("till", broker=url, streams=[stream], settings=Settings(publish_patience=patience)) as app:
            if opened is not None:
                await opened.wait()
            for number in range(first, EVENTS, LANES):
                again: list[Any] = [Envelope(Paid(number=number), id=f"e-{number}-{number}", due=due)]
                while again:
                    try:
                        await app.publish(again[0], to=stream)
                        again = again[1:]
                    except Unconfirmed as error:
                        errors += 1
                        again = list(error.envelopes)
                    except BrokerDown:  # the connection was cut before this one was sent
                        await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as lanes:
        for first in range(LANES):
            lanes.create_task(lane(first))
    return errors


async def stored(url: str, stream: Stream[Any]) -> tuple[Counter[int], int]:
    """How often each event is stored, and how many repeats were dropped."""
    async with App("reader", broker=url) as app:
        while (tended := await app.broker.tend(stream.name)).published or tended.due_ms is not None:
            await asyncio.sleep(0.05)
        found = Counter([envelope.event.number async for envelope in app.read(stream)])
        (info,) = await app.broker.admin.streams()
    return found, info.repeats


@pytest.mark.parametrize("due", [None, "2s"], ids=["now", "later"])
@pytest.mark.parametrize("patience", [0, "10s"], ids=["by hand", "by itself"])
async def test_a_thousand_answers_are_lost_and_a_thousand_events_are_stored(
    proxy: Proxy, record_property: Told, patience: Duration, due: Duration | None
) -> None:
    async with App("till", broker=proxy.url, streams=[payments]) as app:
        await app.publish(Envelope(Paid(number=-1), id="learn the script"), to=payments)
    once(proxy)
    errors = await publish_all(proxy.url, payments, patience, due=due)
    found, repeats = await stored(proxy.url, payments)
    print(f"\n{proxy.cuts} cuts, {errors} errors, {found.total()} stored, {repeats} repeats dropped")
    for name, value in {"cuts": proxy.cuts, "errors": errors, "repeats": repeats}.items():
        record_property(name, value)
    assert found == Counter(range(-1, EVENTS))
    assert proxy.cuts == repeats == EVENTS, "not every cut came after the write"
    assert errors == (EVENTS if patience == 0 else 0)


async def test_large_writes_that_are_cut_anywhere_are_completed_by_publishing_the_envelopes_again(
    proxy: Proxy, record_property: Told
) -> None:
    events: list[Any] = [Envelope(Paid(number=number), id=f"e-{number}") for number in range(MANY)]
    errors = stored_then = 0
    async with App("till", broker=proxy.url, streams=[payments], settings=Settings(publish_patience=0)) as app:
        proxy.every_s = CUT_EVERY_S
        while events:
            try:
                await app.publish_many(events, to=payments)
                events = []
            except Unconfirmed as error:
                errors += 1
                stored_then += len(error.results)
                events = [*error.envelopes, *events[len(error.results) + len(error.envelopes) :]]
        proxy.every_s = 0.0
    found, repeats = await stored(proxy.url, payments)
    print(f"\n{proxy.cuts} cuts, {errors} errors, {repeats} repeats dropped")
    for name, value in {"cuts": proxy.cuts, "errors": errors, "repeats": repeats}.items():
        record_property(name, value)
    assert found == Counter(range(MANY))
    assert repeats > 0 and stored_then > 0, "nothing was ever in doubt, or nothing was known"


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_server_that_dies_while_events_are_published_stores_each_once(
    version: Version, record_property: Told
) -> None:
    chance = random.Random(SEED)
    with RedisServer.start(version, appendonly="yes", appendfsync="always") as server:
        async with asyncio.TaskGroup() as tasks:
            opened, deaths = asyncio.Barrier(LANES + 1), 0
            publishing = tasks.create_task(publish_all(server.url, payments, "20s", opened=opened))
            await opened.wait()
            while not publishing.done():
                await asyncio.sleep(chance.uniform(0.0, 0.06))  # the moment is to be any
                server.kill()
                await asyncio.to_thread(server.restart)
                deaths += 1
        found, repeats = await stored(server.url, payments)
    print(f"\nseed {SEED}, {deaths} deaths, {publishing.result()} errors, {repeats} repeats dropped")
    record_property("deaths", deaths)
    record_property("repeats", repeats)
    assert found == Counter(range(EVENTS)) and deaths > 1


async def test_without_dedupe_each_lost_answer_makes_two_of_one(proxy: Proxy) -> None:
    """The judge can say no."""
    async with App("till", broker=proxy.url, streams=[forgetful]) as app:
        await app.publish(Envelope(Paid(number=-1), id="learn the script"), to=forgetful)
    once(proxy)
    assert await publish_all(proxy.url, forgetful, 0) == EVENTS
    found, _ = await stored(proxy.url, forgetful)
    assert set(found.values()) == {1, 2} and found.total() == 1 + 2 * EVENTS
