"""Packs in the worker: events of one entry, each with an end of its own."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from millstream import App, Batch, BatchFailed, Delivery, Event, Reject, Retry, RetryLater, Skip, Stream
from millstream.brokers.base import Position, Record, StreamSpec, Subscription
from millstream.errors import NotSupported
from millstream.handlers.subscriber import Order
from millstream.telemetry import BROKER_ERROR, HELD, TIMED_OUT
from millstream.testing import TestApp
from millstream.testing.clock import VirtualClock
from millstream.wire import compression, packs
from millstream.wire.packs import Columns
from tests.worker.place import QUICK, at_work, heard, memory, settled, until


class Seen(Event, type="bird.seen"):
    n: int


class Heard(Event, type="bird.heard"):
    n: int


class Moved(Event, type="aircraft.moved"):
    tail: str
    n: int


birds = Stream("birds", Seen | Heard)
replies = Stream("replies", Seen)
flights = Stream("flights", Moved, key="tail", partitions=2)


def app_of(**options: Any) -> App:
    return App("park", streams=[birds, replies, flights], settings=QUICK, **options)


ids = iter(range(1_000_000))


def event_of(n: int, type_: str = "bird.seen", key: str | None = None) -> Record:
    data = b'{"n":%d}' % n if key is None else b'{"tail":"%s","n":%d}' % (key.encode(), n)
    return Record(0, f"e-{n}", type_, data, key, 7, b'{"colour":"red"}')


def pack_of(records: Sequence[Record], how: compression.Compression = "none") -> Record:
    return packs.write(Columns.of(records), how, partition=0, id_=f"p-{next(ids)}", key=records[0].key)


async def put(app: App, *records: Record, stream: str = "birds") -> list[Position]:
    return [position for position in await app.broker.append(stream, list(records)) if isinstance(position, Position)]


async def test_each_event_of_a_pack_is_handled_and_the_pack_is_settled_once() -> None:
    app, seen = app_of(), list[int]()

    @app.subscriber(birds, "log")
    async def log(event: Seen) -> None:
        seen.append(event.n)

    async with TestApp(app) as t:
        await put(
            app, pack_of([event_of(n) for n in range(5)]), event_of(5), pack_of([event_of(6), event_of(7)], "zstd")
        )
        await t.idle()
        (info,) = await app.broker.admin.groups("birds")
    assert seen == list(range(8))
    assert (info.done, info.pending, info.lag) == (3, 0, 0)


async def test_a_delivery_of_an_event_has_its_own_envelope_and_position() -> None:
    app, seen = app_of(), list[Any]()

    @app.subscriber(birds, "log")
    async def log(event: Seen | Heard, d: Delivery) -> None:
        seen.append((event, d.id, d.key, d.headers, d.time_ms, d.position.offset, d.attempt, d.last_attempt, d.token))

    async with TestApp(app) as t:
        [at] = await put(app, pack_of([event_of(1), event_of(2, "bird.heard")]))
        await t.idle()
    red = {"colour": "red"}
    assert seen == [
        (Seen(n=1), "e-1", None, red, 7, f"{at.offset}.0", 1, False, 0),
        (Heard(n=2), "e-2", None, red, 7, f"{at.offset}.1", 1, False, 0),
    ]


async def test_events_of_a_pack_run_side_by_side_when_they_suspend() -> None:
    app, gate, running = app_of(), asyncio.Event(), set[int]()

    @app.subscriber(birds, "log", concurrency=3)
    async def log(event: Seen) -> None:
        running.add(event.n)
        await gate.wait()
        running.discard(event.n)

    async with at_work(app):
        await put(app, pack_of([event_of(n) for n in range(10)]))
        await until(lambda: len(running) == 3)
        gate.set()
        await settled(app.broker, "log", "birds")


@pytest.mark.parametrize("delivers", [False, True])
async def test_only_what_failed_is_tried_again_and_what_fails_for_good_is_a_dead_letter(delivers: bool) -> None:
    app, tries = app_of(), Counter[int]()

    always = {1: ValueError("no 1"), 4: Reject("bad"), 5: Skip("dull")}
    once = {3: ValueError("no 3"), 6: RetryLater("1m")}

    async def handle(n: int) -> None:
        tries[n] += 1
        if (error := always.get(n) or once.pop(n, None)) is not None:
            raise error

    if delivers:

        @app.subscriber(birds, "log", retry=Retry(3, first="1s"))
        async def with_delivery(event: Seen, d: Delivery) -> None:
            await handle(event.n)
            d.publish(Seen(n=event.n), to=replies)
    else:

        @app.subscriber(birds, "log", retry=Retry(3, first="1s"))
        async def bare(event: Seen) -> None:
            await handle(event.n)

    async with TestApp(app, raise_errors=False) as t:
        [at] = await put(app, pack_of([event_of(n) for n in range(8)]))
        await t.idle()
        await t.advance("1h")
        letters = await app.broker.admin.dead("birds", "log", "", 10)
        replied = [event.n for event in t.published(replies)]
    assert tries == {0: 1, 1: 3, 2: 1, 3: 2, 4: 1, 5: 1, 6: 2, 7: 1}
    assert [(letter.stored.position.offset, letter.stored.record.id, letter.reason) for letter in letters] == [
        (f"{at.offset}.4", "e-4", "rejected"),
        (f"{at.offset}.1", "e-1", "failed"),
    ]
    assert sorted(replied) == ([0, 2, 3, 6, 7] if delivers else [])


async def test_an_event_that_cannot_be_decoded_is_a_dead_letter_of_its_own_and_a_broken_pack_as_a_whole() -> None:
    app, seen = app_of(), list[int]()

    @app.subscriber(birds, "log")
    async def log(event: Seen) -> None:
        seen.append(event.n)

    async with TestApp(app, raise_errors=False) as t:
        bad = Record(0, "bad", "bird.seen", b"{", headers=event_of(0).headers, time_ms=7)
        broken = pack_of([event_of(3), event_of(4)])
        broken = Record(0, "broken", broken.type, broken.data[:-1], headers=broken.headers)
        await put(app, pack_of([event_of(1), bad, event_of(2)]), broken)
        await t.idle()
        letters = await app.broker.admin.dead("birds", "log", "", 10)
    assert seen == [1, 2]
    assert {(letter.stored.record.id, letter.reason) for letter in letters} == {
        ("bad", "undecodable"),
        ("broken", "undecodable"),
    }


async def test_types_that_nobody_handles_are_settled_unseen_and_unknown_ones_are_dead() -> None:
    app, seen = app_of(), list[int]()

    @app.subscriber(birds, "log")
    async def log(event: Seen) -> None:
        seen.append(event.n)

    async with TestApp(app, raise_errors=False) as t:
        await put(app, pack_of([event_of(1), event_of(2, "bird.heard"), event_of(3, "bird.smelt")]))
        await put(app, pack_of([event_of(4, "bird.heard"), event_of(5, "bird.heard")]))
        await t.idle()
        letters = await app.broker.admin.dead("birds", "log", "", 10)
        (info,) = await app.broker.admin.groups("birds")
    assert seen == [1]
    assert [(letter.stored.record.id, letter.reason) for letter in letters] == [("e-3", "unknown type")]
    assert (info.pending, info.lag) == (0, 0)


async def test_the_events_of_a_key_are_handled_in_order_and_those_behind_one_that_fails_wait_with_it() -> None:
    app, seen, failed = app_of(), list[tuple[str, int]](), set[tuple[str, int]]()

    @app.subscriber(flights, "board")
    async def board(event: Moved) -> None:
        await asyncio.sleep(0)
        if event.n % 3 == 2 and (event.tail, event.n) not in failed:
            failed.add((event.tail, event.n))
            raise ValueError
        seen.append((event.tail, event.n))

    async with TestApp(app, raise_errors=False) as t:
        for start in (0, 4):
            for tail in ("a", "b"):
                moved = [event_of(n, "aircraft.moved", tail) for n in range(start, start + 4)]
                await put(app, pack_of(moved[:3]), moved[3], stream="flights")
        await t.idle()
        await t.advance("1h")
        await t.advance("1h")
    for tail in ("a", "b"):
        assert [n for key, n in seen if key == tail] == list(range(8))


async def test_a_held_event_keeps_its_key_and_what_lies_behind_it_in_its_pack() -> None:
    app, seen = app_of(), list[int]()
    told = heard(app, HELD)

    @app.subscriber(flights, "board", retry=Retry(1, then="hold"))
    async def board(event: Moved) -> None:
        if event.n == 1:
            raise ValueError
        seen.append(event.n)

    async with TestApp(app, raise_errors=False) as t:
        [at] = await put(app, pack_of([event_of(n, "aircraft.moved", "a") for n in range(4)]), stream="flights")
        await t.advance("1h")
    assert seen == [0]
    assert [measurements["position"].offset for measurements in told] == [f"{at.offset}.1"]


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_batch_holds_events_of_packs_and_single_ones(ordered: bool) -> None:
    app, batches, failed = app_of(), list[list[int]](), list[int]()
    stream: Stream[Any] = flights if ordered else birds

    async def handle(numbers: list[int]) -> None:
        batches.append(numbers)
        if 2 in numbers and not failed:
            failed.append(2)
            raise BatchFailed({numbers.index(2): ValueError("no 2")})

    if ordered:

        @app.subscriber(flights, "log", batch=Batch(4, within="1s"))
        async def moves(events: list[Moved]) -> None:
            await handle([event.n for event in events])
    else:

        @app.subscriber(birds, "log", batch=Batch(4, within="1s"))
        async def sights(events: list[Seen]) -> None:
            await handle([event.n for event in events])

    type_, key = ("aircraft.moved", "a") if ordered else ("bird.seen", None)
    async with TestApp(app, raise_errors=False) as t:
        events = [event_of(n, type_, key) for n in range(8)]
        await put(app, events[0], pack_of(events[1:6]), *events[6:], stream=stream.name)
        await t.idle()
        await t.advance("1h")
        (info,) = await app.broker.admin.groups(stream.name)
    assert batches[0] == ([0] if ordered else [0, 1, 2, 3])  # in order, a pack begins a batch
    ended = [n for batch in batches for n in batch]
    assert set(ended) == set(range(8)) and ended.count(2) == 2
    assert (info.pending, info.lag) == (0, 0)
    if ordered:
        assert ended[-6:] == [2, 3, 4, 5, 6, 7]


async def test_a_handler_that_hangs_in_a_pack_times_out_by_itself() -> None:
    app, tries = app_of(), Counter[int]()
    told = heard(app, TIMED_OUT)

    @app.subscriber(birds, "log", timeout="10s", concurrency=1)
    async def log(event: Seen) -> None:
        tries[event.n] += 1
        if event.n == 1 and tries[1] == 1:
            await asyncio.Event().wait()

    async with TestApp(app, raise_errors=False, patience="20ms") as t:
        [at] = await put(app, pack_of([event_of(n) for n in range(3)]))
        await t.idle()
        await t.advance("1h")
    assert tries == {0: 1, 1: 2, 2: 1}
    assert [measurements["position"].offset for measurements in told] == [f"{at.offset}.1"]


async def test_a_slow_pack_is_no_slow_event() -> None:
    app, seen, go = app_of(), list[int](), asyncio.Semaphore(0)
    told = heard(app, TIMED_OUT)

    @app.subscriber(birds, "log", timeout="10s", concurrency=1)
    async def log(event: Seen) -> None:
        await go.acquire()
        seen.append(event.n)

    async with TestApp(app, patience="20ms") as t:
        await put(app, pack_of([event_of(n) for n in range(5)]))
        await t.idle()
        for _ in range(5):
            await t.advance("8s")
            go.release()
            await t.idle()
    assert seen == list(range(5)) and not told


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_cut_off_the_events_that_ended_are_done_and_the_others_left_uncounted(concurrency: int) -> None:
    app, seen, hanging = app_of(), list[tuple[int, int]](), list[int]()
    broker = memory(app)

    @app.subscriber(birds, "log", concurrency=concurrency)
    async def log(event: Seen) -> None:
        if event.n >= 2 and len(hanging) < concurrency:
            hanging.append(event.n)
            await asyncio.Event().wait()
        seen.append((event.n, 0))

    async with at_work(app, broker) as process:
        await put(app, pack_of([event_of(n) for n in range(6)]))
        await until(lambda: len(hanging) == concurrency)
        process.cut()
    assert [n for n, _ in seen] == [0, 1]
    async with at_work(app, broker):
        await settled(app.broker, "log", "birds")
        (info,) = await app.broker.admin.groups("birds")
    assert sorted(n for n, _ in seen) == list(range(6))
    assert (info.retried, info.done) == (0, 1)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_becomes_of_packs_and_single_events_each_ends_once_and_keys_keep_their_order(
    sizes: list[int], data: st.DataObject
) -> None:
    ordered, batch = data.draw(st.booleans()), data.draw(st.booleans())
    fates = data.draw(st.lists(st.lists(st.sampled_from("rrlRs"), max_size=2), min_size=48, max_size=48))
    asyncio.run(any_end(sizes, fates, ordered=ordered, batch=batch))


class Board:
    """Handles events as they are fated to end, and remembers."""

    def __init__(self, fates: list[list[str]]) -> None:
        self.begun = defaultdict[str, list[int]](list)
        self.ended = Counter[int]()
        self._fates = fates
        self._errors = {"r": ValueError(), "l": RetryLater("5s"), "R": Reject("no"), "s": Skip("no")}

    def handle(self, event: Moved) -> None:
        self.begun[event.tail].append(event.n)
        if self._fates[event.n]:
            fate = self._fates[event.n].pop(0)
            self.ended[event.n] += fate in "Rs"
            raise self._errors[fate]
        self.ended[event.n] += 1

    async def one(self, event: Moved) -> None:
        if event.n % 2:
            await asyncio.sleep(0)
        self.handle(event)

    async def many(self, events: list[Moved]) -> None:
        failed: dict[int, Exception] = {}
        for index, event in enumerate(events):
            try:
                self.handle(event)
            except Exception as error:
                failed[index] = error
        if failed:
            raise BatchFailed(failed)


async def any_end(sizes: list[int], fates: list[list[str]], *, ordered: bool, batch: bool) -> None:
    app, board = app_of(), Board(fates)
    order: Order = "key" if ordered else "none"
    if batch:
        app.subscriber(flights, "board", batch=Batch(5, within="1s"), order=order, retry=Retry(50))(board.many)
    else:
        app.subscriber(flights, "board", order=order, retry=Retry(50))(board.one)
    async with TestApp(app, raise_errors=False) as t:
        n = 0
        for size in sizes:
            moved = [event_of(n + k, "aircraft.moved", f"k{size % 2}") for k in range(size)]
            n += size
            await put(app, moved[0] if size == 1 else pack_of(moved), stream="flights")
        await t.idle()
        for _ in range(12):
            await t.advance("10m")
        (info,) = await app.broker.admin.groups("flights")
    assert (info.pending, info.lag) == (0, 0)
    assert set(board.ended) == set(range(n))
    if not (ordered and batch):  # there, what was handled behind one that fails is handled again
        assert set(board.ended.values()) == {1}
    if ordered and not batch:
        for numbers in board.begun.values():
            assert list(dict.fromkeys(numbers)) == sorted(set(numbers))


@contextmanager
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotSupported]:
    """Inside the block what packs are compressed with is not installed; yields what is said of it."""
    lacking = NotSupported("zstd compression needs a library: pip install 'millstream[zstd]'")
    with monkeypatch.context() as patched:
        patched.setattr(packs, "lacking", lambda pack: lacking)
        yield lacking


async def test_a_missing_library_makes_the_group_wait_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    app, seen = app_of(), list[int]()
    told = heard(app, BROKER_ERROR)

    @app.subscriber(birds, "log")
    async def log(event: Seen) -> None:
        seen.append(event.n)

    async with TestApp(app) as t:
        with without_library(monkeypatch) as lacking:
            await put(app, pack_of([event_of(1), event_of(2)], "zstd"))
            await t.idle()
            await t.advance("2s")
        assert not seen and told[0]["error"] is lacking
        assert not await app.broker.admin.dead("birds", "log", "", 10)
        await t.advance("2s")
    assert seen == [1, 2]


async def test_a_missing_library_makes_a_listener_wait_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    app, seen = app_of(), list[int]()
    told = heard(app, BROKER_ERROR)

    @app.listener(birds)
    async def hear(event: Seen) -> None:
        seen.append(event.n)

    async with TestApp(app) as t:
        with without_library(monkeypatch) as lacking:
            await put(app, pack_of([event_of(1), event_of(2)], "zstd"))
            await t.idle()
            await t.advance("2s")
        assert not seen and told[0]["error"] is lacking
        await t.advance("2s")
    assert seen == [1, 2]


async def test_a_broker_that_cannot_keep_what_is_left_of_a_pack_makes_it_a_dead_letter() -> None:
    app, seen = app_of(), list[int]()

    @app.subscriber(birds, "log")
    async def log(event: Seen) -> None:
        seen.append(event.n)

    broker = memory(app)
    broker.traits = replace(broker.traits, packs=False)
    async with at_work(app, broker):
        await put(app, pack_of([event_of(1), event_of(2)]), event_of(3))
        await settled(app.broker, "log", "birds")
        (letter,) = await app.broker.admin.dead("birds", "log", "", 10)
    assert seen == [3]
    assert (letter.reason, letter.error.split(",")[0]) == ("undecodable", "it is a pack")


async def test_a_pack_that_was_fetched_in_a_crash_is_run_event_by_event_and_at_last_each_event_has_its_letter() -> None:
    app, seen, clock = app_of(retry=Retry(2)), list[int](), VirtualClock()
    broker = memory(app, clock)

    @app.subscriber(birds, "log")
    async def log(event: Seen) -> None:
        seen.append(event.n)

    await broker.declare(StreamSpec("birds", 1))
    await broker.append("birds", [pack_of([event_of(1), event_of(2)])])
    for _ in range(2):
        consumer = await broker.subscribe(Subscription(StreamSpec("birds", 1), "log", "park", lease_s=1.0))
        claims = await consumer.fetch(1, 0)
        await consumer.begin([claim.position for claim in claims if claim.suspect])
        await clock.advance(1.1)
    app.clock = clock
    async with at_work(app, broker):
        await settled(broker, "log", "birds")
        letters = await broker.admin.dead("birds", "log", "", 10)
    assert not seen
    assert [(letter.stored.record.id, letter.reason) for letter in letters] == [("e-1", "crashed"), ("e-2", "crashed")]
