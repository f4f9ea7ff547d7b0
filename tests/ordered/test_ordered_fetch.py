"""What a member of an ordered group fetches, what wakes it, and what it does not lose."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest

from millstream.brokers.base import Claim, Dead, Position
from millstream.brokers.ordered import OrderedConsumer
from millstream.brokers.window import WINDOW
from millstream.errors import BrokerDown, LeaseLost
from millstream.telemetry import BROKER_ERROR
from tests.ordered.scripted import (
    LEASE_S,
    Place,
    later,
    loses_the_reply,
    opened,
    park,
    positions,
    refuses,
    settlement,
    waits,
    works,
)

DOWN = BrokerDown("nobody answers")


# Fetching.


async def waiting(place: Place, consumer: OrderedConsumer, happens: Any) -> list[Claim]:
    """What a fetch that waits for an hour returns without a second passing, when this happens meanwhile."""
    async with asyncio.TaskGroup() as tasks:
        fetching = tasks.create_task(consumer.fetch(10, 3_600))
        await place.clock.advance(0)
        assert not fetching.done()
        await happens()
        await place.clock.advance(0)
        woken = fetching.done()
        fetching.cancel()
    return fetching.result() if woken else []


async def test_a_fetch_wakes_when_a_partition_is_acquired() -> None:
    place = await opened()
    first, _ = await place.member()
    second, _ = await place.member()
    await place.publish("a")
    await first.close()
    await place.clock.advance(1)
    assert len(await waiting(place, second, second.keep)) == 1


async def test_a_fetch_wakes_when_an_event_comes() -> None:
    place = await opened()
    consumer, _ = await place.member()
    assert len(await waiting(place, consumer, lambda: place.publish("a"))) == 1


async def test_a_fetch_wakes_when_the_next_head_is_due() -> None:
    place = await opened()
    consumer, _ = await place.member()
    events = await park(place, consumer, "aa")
    [head] = await consumer.fetch(10, 0)
    [following] = await waiting(place, consumer, lambda: consumer.settle([settlement(head)]))
    assert positions([head, following]) == events


async def test_a_fetch_wakes_when_an_event_must_be_tried_again_soon() -> None:
    place = await opened()
    consumer, _ = await place.member()
    await place.publish("a")
    claims = await consumer.fetch(10, 0)
    again = await waiting(place, consumer, lambda: consumer.settle([later(claims[0], place.clock.now_ms())]))
    assert positions(again) == positions(claims)


async def test_a_fetch_wakes_when_a_full_window_has_room_again() -> None:
    place = await opened()
    consumer, _ = await place.member()
    await place.publish("a" + "b" * WINDOW)
    slow, *others = [claim for _ in range(3) for claim in await consumer.fetch(WINDOW, 0)]
    assert len(others) == WINDOW - 1
    await consumer.settle([settlement(claim) for claim in others])
    last = await waiting(place, consumer, lambda: consumer.settle([settlement(slow)]))
    assert positions(last) == [Position(0, str(WINDOW + 1))]


async def test_a_fetch_wakes_when_what_waited_behind_may_go_on() -> None:
    place = await opened()
    consumer, _ = await place.member()
    await place.publish("abaa")
    [claim] = await consumer.fetch(1, 0)
    await consumer.settle([settlement(claim, Dead("failed"))])
    _, second = await consumer.fetch(2, 0)  # the slow one, and the second of its key; the third is read and not out
    await place.broker.admin.replay(await place.broker.admin.dead("orders", "billing"))
    await place.clock.advance(1)
    await consumer.keep()
    [head] = await consumer.fetch(1, 0)
    assert await consumer.fetch(10, 0) == []
    await consumer.settle([settlement(head)])
    third = await waiting(place, consumer, lambda: consumer.settle([settlement(second)]))
    assert positions(third) == [Position(0, "4")]


async def test_a_fetch_that_is_cancelled_loses_nothing() -> None:
    place = await opened()
    consumer, _ = await place.member()
    async with asyncio.TaskGroup() as tasks:
        fetching = tasks.create_task(consumer.fetch(10, 3_600))
        await place.clock.advance(0)
        await place.publish("a")
        fetching.cancel()
    assert len(await consumer.fetch(10, 0)) == 1


async def test_every_partition_has_its_turn() -> None:
    place = await opened(3)
    consumer, _ = await place.member()
    for partition in range(3):
        await place.publish("abcdef", partition)
    await consumer.fetch(1, 0)
    assert {claim.position.partition for _ in range(3) for claim in await consumer.fetch(1, 0)} == {0, 1, 2}


async def test_what_a_few_fetches_take_of_a_partition_goes_out_together() -> None:
    place = await opened(3)
    consumer, _ = await place.member()
    for partition in range(3):
        await place.publish("abcdef", partition)
    claims = [claim for _ in range(9) for claim in await consumer.fetch(2, 0)]
    found = [claim.position.partition for claim in claims]
    changes = sum(one != other for one, other in pairwise(found))
    assert (len(found), set(found), changes) == (18, {0, 1, 2}, 2)


@pytest.mark.parametrize("fault", [refuses(DOWN), loses_the_reply(DOWN)])
async def test_heads_are_asked_for_again_when_no_answer_came(fault: Any) -> None:
    place = await opened()
    consumer, script = await place.member()
    events = await park(place, consumer, "a")
    script.next("heads", fault)
    with pytest.raises(BrokerDown):
        await consumer.fetch(10, 0)
    assert positions(await consumer.fetch(10, 0)) == events


async def test_heads_that_were_begun_are_handed_out_although_another_partition_failed() -> None:
    place = await opened(2)
    consumer, script = await place.member()
    events = await park(place, consumer, "a", "b")
    script.next("heads", works, refuses(DOWN))
    claims: list[Claim] = []
    for _ in range(2):
        with suppress(BrokerDown):
            claims += await consumer.fetch(10, 0)
    assert sorted(map(str, positions(claims))) == sorted(map(str, events))


async def test_heads_of_a_partition_that_was_released_meanwhile_are_not_handed_out() -> None:
    place = await opened()
    consumer, script = await place.member()
    await park(place, consumer, "a")
    answered = asyncio.Event()
    script.next("heads", waits(answered))
    async with asyncio.TaskGroup() as tasks:
        fetching = tasks.create_task(consumer.fetch(10, 0))
        releasing = asyncio.Event()
        script.next("look", waits(releasing))
        await place.clock.advance(0)
        given = tasks.create_task(consumer.release(frozenset([0])))
        await place.clock.advance(0)
        answered.set()
        await place.clock.advance(0)
        releasing.set()
    assert given.done() and place.group.parts[0].owner == ""
    assert set(positions(fetching.result())) <= (await consumer.keep()).lost


# Who was silent for long asks before it hands out.


@pytest.mark.parametrize("step", ["beat", "look"])
async def test_what_could_not_be_asked_about_is_handed_out_later(step: str) -> None:
    place = await opened()
    consumer, script = await place.member()
    events = await place.publish("ab")
    await place.clock.advance(LEASE_S)
    script.next(step, refuses(DOWN))
    with pytest.raises(BrokerDown):
        await consumer.fetch(10, 0)
    assert positions(await consumer.fetch(10, 0)) == events


@pytest.mark.parametrize("step", ["beat", "look"])
async def test_a_fetch_that_is_cancelled_while_it_asks_loses_nothing(step: str) -> None:
    place = await opened()
    consumer, script = await place.member()
    events = await park(place, consumer, "a") + await place.publish("bc")
    await place.clock.advance(LEASE_S)
    script.next(step, waits(asyncio.Event()))
    async with asyncio.TaskGroup() as tasks:
        fetching = tasks.create_task(consumer.fetch(10, 0))
        await place.clock.advance(0)
        fetching.cancel()
    found = [position for _ in range(2) for position in positions(await consumer.fetch(10, 0))]
    assert found == events


@pytest.mark.parametrize("first", ["fetch", "keep"])
async def test_who_asks_for_a_life_that_ends_meanwhile_goes_on_with_the_next_one(first: str) -> None:
    place = await opened()
    consumer, script = await place.member()
    events = await place.publish("a")
    await place.clock.advance(LEASE_S)
    ended = asyncio.Event()

    async def cut_off(_: Any) -> None:
        await ended.wait()
        raise DOWN

    script.next("beat", cut_off, refuses(LeaseLost("unknown member")))
    calls: list[Coroutine[Any, Any, Any]] = [consumer.fetch(10, 0), consumer.keep()]
    async with asyncio.TaskGroup() as tasks:
        for call in calls if first == "fetch" else reversed(calls):
            tasks.create_task(call)
            await place.clock.advance(0)
        ended.set()
    await place.clock.advance(LEASE_S)  # the name of the first life falls silent
    await consumer.keep()
    assert positions(await consumer.fetch(10, 0)) == events


async def test_a_heartbeat_alone_is_no_leave_to_hand_out_what_others_may_have_by_now() -> None:
    place = await opened()
    consumer, script = await place.member()
    await place.publish("abc")
    await consumer.fetch(1, 0)
    await place.clock.advance(LEASE_S)
    place.group.parts[0].fence()
    looked = asyncio.Event()
    script.next("look", waits(looked))
    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(consumer.keep())
        await place.clock.advance(0)
        assert await consumer.fetch(10, 0) == []
        looked.set()
    assert keeping.result().lost == {Position(0, "1")}


# Too much is parked.


async def test_a_partition_waits_when_too_much_of_it_is_parked_and_says_so_once_a_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = await opened()
    consumer, _ = await place.member(max_parked=2)
    soon = place.clock.now_ms() + 5_000
    await place.publish("ab")
    await consumer.settle([later(claim, soon) for claim in await consumer.fetch(10, 0)])
    await place.publish("cd")
    for _ in range(5):
        assert await consumer.fetch(10, 0) == []
    assert [record.getMessage().count("2 of its events are parked") for record in caplog.records] == [1]
    await place.clock.advance(1)
    assert await consumer.fetch(10, 0) == []
    assert len(caplog.records) == 2
    await place.clock.advance(5)
    heads = await consumer.fetch(1, 0)
    assert [claim.record.key for claim in heads] == ["a"]
    assert await consumer.settle([settlement(heads[0])]) == [True]
    found = [claim.record.key for _ in range(2) for claim in await consumer.fetch(10, 0)]
    assert sorted(filter(None, found)) == ["b", "c", "d"]


async def test_that_a_partition_waits_is_emitted_once_a_second() -> None:
    place = await opened()
    consumer, _ = await place.member(max_parked=1)
    await place.publish("a")
    await consumer.settle([later(claim, place.clock.now_ms() + 5_000) for claim in await consumer.fetch(10, 0)])
    told: list[str] = []
    place.telemetry.listen(lambda name, _: told.append(name))
    for _ in range(5):
        assert await consumer.fetch(10, 0) == []
    assert told.count(BROKER_ERROR) == 1
