"""A group that keeps the order of keys, in one process and between two."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

from millstream import App, Batch, BatchFailed, Delivery, Event, Reject, Retry, RetryLater, Skip, Stream
from millstream.brokers.memory.ordered import OrderedGroup
from millstream.errors import BadHandler, BadSetting
from millstream.telemetry import HELD
from millstream.testing import TestApp
from tests.worker.place import QUICK, at_work, heard, memory, settled, until


class Moved(Event, type="aircraft.moved"):
    tail: str
    n: int


flights = Stream("flights", Moved, key="tail", partitions=4)
loose = Stream("loose", Moved)

TAILS = [f"N{number}" for number in range(20)]


def app_of() -> App:
    return App("tower", streams=[flights], settings=QUICK)


def moves(count: int) -> list[Moved]:
    """So many of each aircraft, interleaved."""
    return [Moved(tail=tail, n=n) for n in range(count) for tail in TAILS]


async def test_events_of_a_key_are_handled_one_at_a_time_and_in_order_and_keys_side_by_side() -> None:
    app, seen, running, most = app_of(), defaultdict[str, list[int]](list), set[str](), [0]

    @app.subscriber(flights, "board")
    async def board(event: Moved) -> None:
        assert event.tail not in running
        running.add(event.tail)
        most[0] = max(most[0], len(running))
        await asyncio.sleep(0)
        seen[event.tail].append(event.n)
        running.remove(event.tail)

    async with TestApp(app, raise_errors=False) as t:
        await app.publish_many(moves(30))
        await t.idle()
        await t.advance("1s")
    assert seen == {tail: list(range(30)) for tail in TAILS}
    assert most[0] > 4


async def test_without_order_a_slow_event_holds_up_nobody_of_its_key() -> None:
    app, seen, gate = app_of(), list[int](), asyncio.Event()

    @app.subscriber(flights, "board", order="none")
    async def board(event: Moved) -> None:
        if event.n == 0:
            await gate.wait()
        seen.append(event.n)

    async with TestApp(app, patience="50ms") as t:
        await app.publish_many([Moved(tail="N1", n=n) for n in range(5)])
        await t.idle()
        assert seen == [1, 2, 3, 4]
        gate.set()
        await t.idle()
    assert seen == [1, 2, 3, 4, 0]


async def test_a_failing_event_makes_only_its_key_wait() -> None:
    app, seen, attempts = app_of(), defaultdict[str, list[int]](list), list[int]()

    @app.subscriber(flights, "board", retry=Retry(3, first="10s", factor=1))
    async def board(event: Moved, delivery: Delivery[Moved]) -> None:
        if (event.tail, event.n) == ("N3", 2):
            attempts.append(delivery.attempt)
            if delivery.attempt < 3:
                raise RuntimeError("not yet")
        seen[event.tail].append(event.n)

    async with TestApp(app, raise_errors=False) as t:
        await app.publish_many(moves(6))
        await t.idle()
        assert seen.pop("N3") == [0, 1] and len(seen) == len(TAILS) - 1
        assert all(numbers == list(range(6)) for numbers in seen.values())
        await app.publish(Moved(tail="N3", n=6))
        await t.advance("9s")
        assert "N3" not in seen
        await t.advance("20s")
        assert seen["N3"] == [2, 3, 4, 5, 6] and attempts == [1, 2, 3]


async def test_an_event_that_is_given_up_lets_its_key_go_on() -> None:
    app, seen = app_of(), list[int]()

    @app.subscriber(flights, "board", retry=Retry(1))
    async def board(event: Moved) -> None:
        if event.n == 1:
            raise RuntimeError("broken")
        if event.n == 3:
            raise Skip("old")
        if event.n == 4:
            raise Reject("wrong")
        seen.append(event.n)

    async with TestApp(app, raise_errors=False) as t:
        await app.publish_many([Moved(tail="N1", n=n) for n in range(6)])
        await t.idle()
        assert seen == [0, 2, 5]
        assert [letter.reason for letter in t.dead("board")] == ["failed", "rejected"]


async def test_a_key_that_is_held_waits_for_a_person() -> None:
    app, seen, broken = app_of(), list[int](), [True]
    told = heard(app, HELD)

    @app.subscriber(flights, "board", retry=Retry(2, first="1s", then="hold"))
    async def board(event: Moved) -> None:
        if event.n == 1 and broken[0]:
            raise RuntimeError("broken")
        seen.append(event.n)

    async with TestApp(app, raise_errors=False) as t:
        await app.publish_many([Moved(tail="N1", n=n) for n in range(4)])
        await t.advance("3h")
        assert seen == [0] and not t.dead("board") and len(told) == 1
        broken[0] = False
        keys = await app.broker.admin.keys("flights", "board")
        assert [(key.key, key.events, key.due_ms) for key in keys] == [("N1", 3, None)]
        assert await app.broker.admin.release_keys(keys) == [True]
        await t.advance("5m")  # a heartbeat finds it, and these are far apart here
        assert seen == [0, 1, 2, 3]


async def test_retry_later_keeps_the_order_too() -> None:
    app, seen = app_of(), list[tuple[int, int]]()

    @app.subscriber(flights, "board")
    async def board(event: Moved, delivery: Delivery[Moved]) -> None:
        if event.n == 0 and len(seen) < 3:
            seen.append((-1, delivery.attempt))
            raise RetryLater("1m")
        seen.append((event.n, delivery.attempt))

    async with TestApp(app, raise_errors=False) as t:
        await app.publish_many([Moved(tail="N1", n=n) for n in range(3)])
        await t.advance("10m")
        assert seen == [(-1, 1)] * 3 + [(0, 1), (1, 1), (2, 1)]


async def test_a_batch_keeps_the_order_of_each_key() -> None:
    app, seen = app_of(), defaultdict[str, list[int]](list)

    @app.subscriber(flights, "load", batch=Batch(7), concurrency=3)
    async def load(events: list[Moved]) -> None:
        await asyncio.sleep(0.01)
        for event in events:
            seen[event.tail].append(event.n)

    async with TestApp(app, raise_errors=False) as t:
        await app.publish_many(moves(20))
        await t.advance("10s")
    assert seen == {tail: list(range(20)) for tail in TAILS}


async def test_a_batch_that_fails_in_part_leaves_later_events_of_that_key_unhandled() -> None:
    app, batches = app_of(), list[list[tuple[str, int]]]()

    @app.subscriber(flights, "load", batch=Batch(10), retry=Retry(3, first="1s"))
    async def load(events: list[Moved]) -> None:
        batches.append([(event.tail, event.n) for event in events])
        if len(batches) == 1:
            raise BatchFailed({0: RuntimeError("broken")})

    one, two = "N1", next(tail for tail in TAILS if tail != "N1")
    async with TestApp(app, raise_errors=False) as t:
        await app.publish_many([Moved(tail=tail, n=n) for n, tail in enumerate((one, two, one, one, two))])
        await t.advance("10s")
    first, *later = batches
    assert sorted(first) == sorted([(one, 0), (two, 1), (one, 2), (one, 3), (two, 4)])
    assert [event for batch in later for event in batch] == [event for event in first if event[0] == first[0][0]]


async def test_a_batch_that_fails_as_a_whole_is_tried_again_in_order() -> None:
    app, seen, failures = app_of(), list[int](), [2]

    @app.subscriber(flights, "load", batch=Batch(10), retry=Retry(5, first="1s"))
    async def load(events: list[Moved]) -> None:
        if failures[0]:
            failures[0] -= 1
            raise RuntimeError("broken")
        seen.extend(event.n for event in events)

    async with TestApp(app, raise_errors=False) as t:
        await app.publish_many([Moved(tail="N1", n=n) for n in range(6)])
        await t.advance("1m")
    assert seen == list(range(6))


async def test_a_second_process_takes_its_share_and_no_event_is_handled_twice() -> None:
    first, second = app_of(), app_of()
    broker = memory(first)
    seen: dict[App, list[tuple[str, int, int]]] = {first: [], second: []}
    for app in (first, second):

        @app.subscriber(flights, "board")
        async def board(event: Moved, delivery: Delivery[Moved], app: App = app) -> None:
            seen[app].append((event.tail, event.n, delivery.token))
            await asyncio.sleep(0.001)

    async with at_work(first, broker):
        await first.publish_many(moves(5))
        await until(lambda: len(seen[first]) > 20)
        async with at_work(second, broker):
            await until(lambda: shares(broker) == [2, 2], "the second one gets no share")
            await first.publish_many([Moved(tail=tail, n=n) for n in range(5, 10) for tail in TAILS])
            await settled(broker, "board", "flights")
        await until(lambda: shares(broker) == [4], "nobody takes what was left")
    both = seen[first] + seen[second]
    assert len(both) == len({(tail, n) for tail, n, _ in both}) == 10 * len(TAILS)
    assert seen[second] and min(token for *_, token in both) > 0
    for numbers in by_tail(seen[first]), by_tail(seen[second]):
        assert all(found == sorted(found) for found in numbers.values())


async def test_a_lease_lost_inside_a_batch_cancels_it_and_drops_what_it_published() -> None:
    app, calls, cancelled = app_of(), list[list[int]](), list[bool]()
    broker = memory(app)

    @app.subscriber(flights, "load", batch=Batch(10))
    async def load(deliveries: list[Delivery[Moved]]) -> None:
        calls.append([delivery.event.n for delivery in deliveries])
        if len(calls) > 1:
            return
        deliveries[0].publish(Moved(tail="N2", n=99))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async with at_work(app, broker):
        await app.publish_many([Moved(tail="N1", n=n) for n in range(5)])
        await until(lambda: calls)
        group = broker.logs["flights"].groups["load"]
        assert isinstance(group, OrderedGroup)
        for part in group.parts:
            part.owner, part.epoch = "", part.epoch + 1  # as somebody does who takes over, and leaves again
        await settled(broker, "load", "flights")
    assert cancelled == [True]
    assert [n for call in calls[1:] for n in call] == list(range(5))


async def test_a_slow_key_with_many_events_leaves_room_for_the_others() -> None:
    app, seen, gate = app_of(), defaultdict[str, list[int]](list), asyncio.Event()

    @app.subscriber(flights, "board", timeout="never")
    async def board(event: Moved) -> None:
        if event.tail == "N1":
            await gate.wait()
        seen[event.tail].append(event.n)

    async with TestApp(app, patience="50ms") as t:
        await app.publish_many([Moved(tail="N1", n=n) for n in range(1_000)])
        await app.publish_many([Moved(tail=tail, n=n) for n in range(5) for tail in TAILS if tail != "N1"])
        await t.idle()
        assert len(seen) == len(TAILS) - 1 and all(numbers == list(range(5)) for numbers in seen.values())
        gate.set()
        await t.idle()
        assert seen["N1"] == list(range(1_000))


async def test_an_event_that_takes_too_long_makes_its_key_wait_and_no_other() -> None:
    app, seen = app_of(), list[tuple[str, int]]()

    @app.subscriber(flights, "board", timeout="5s", retry=Retry(3, first="1m", factor=1))
    async def board(event: Moved, delivery: Delivery[Moved]) -> None:
        if (event.tail, event.n, delivery.attempt) == ("N1", 0, 1):
            await asyncio.Event().wait()
        seen.append((event.tail, event.n))

    async with TestApp(app, raise_errors=False, patience="50ms") as t:
        await app.publish_many([Moved(tail=tail, n=n) for n in range(3) for tail in ("N1", "N2")])
        await t.idle()
        assert seen == [("N2", 0), ("N2", 1), ("N2", 2)]
        await t.advance("2m")
    assert seen[3:] == [("N1", 0), ("N1", 1), ("N1", 2)]


def shares(broker: object) -> list[int]:
    owners = [part.owner for part in broker.logs["flights"].groups["board"].parts]  # type: ignore[attr-defined]
    return sorted(owners.count(owner) for owner in set(owners) if owner)


def by_tail(seen: list[tuple[str, int, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for tail, n, _ in seen:
        found[tail].append(n)
    return found


def test_an_order_that_cannot_be_kept_is_refused_at_once() -> None:
    app = app_of()

    async def handle(event: Moved) -> None:
        pass

    with pytest.raises(BadHandler, match="'loose' has no key"):
        app.subscriber(loose, "board", order="key")
    with pytest.raises(BadHandler, match="'key' or 'none'"):
        app.subscriber(flights, "board", order="fifo")  # type: ignore[arg-type]
    with pytest.raises(BadSetting, match="'skip' or 'hold'"):
        Retry(then="wait")  # type: ignore[arg-type]
    app.subscriber(loose, "board", retry=Retry(then="hold"))(handle)
    with pytest.raises(BadHandler, match="has no order of keys"):
        app.groups()
