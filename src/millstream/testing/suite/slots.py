"""Slots of schedules: each is published once, whoever tries and however often."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import asyncio

import pytest

from millstream.brokers.base import Policy, Slot
from millstream.errors import BrokerFull, BrokerRefused, MillstreamError, NotSupported
from millstream.testing.suite.trial import ORDERS, PARTED, Trial, where

scheduled = where(lambda traits: traits.slots)

BEGIN_MS = 1_767_225_600_000


async def slot(trial: Trial, number: int, *, schedule: str = "tick", stream: str = ORDERS.name) -> bool:
    """Publish for one slot of a schedule."""
    return await trial.broker.append_slot(stream, Slot(schedule, BEGIN_MS + number), trial.record())


@scheduled
async def test_a_slot_is_published_once_and_none_before_it_any_more(trial: Trial) -> None:
    consumer = await trial.consumer()
    record = trial.record()
    assert await trial.broker.append_slot("orders", Slot("tick", BEGIN_MS + 5), record)
    assert [await slot(trial, number) for number in (5, 4, 0, 6, 5, 60_000)] == [False, False, False, True, False, True]
    stored = await trial.stored()
    assert len(stored) == 3 and stored[0].record.id == record.id
    assert await trial.broker.admin.slots("orders") == {"tick": BEGIN_MS + 60_000}
    assert [claim.stored for claim in await trial.claims(consumer, 3)] == stored


@scheduled
async def test_a_slot_that_is_passed_over_is_not_published_any_more(trial: Trial) -> None:
    assert await trial.broker.append_slot("orders", Slot("tick", BEGIN_MS + 2), None)
    assert not await trial.broker.append_slot("orders", Slot("tick", BEGIN_MS + 1), None)
    assert [await slot(trial, number) for number in (1, 2, 3)] == [False, False, True]
    assert len(await trial.stored()) == 1


@scheduled
async def test_schedules_and_streams_do_not_disturb_each_other(trial: Trial) -> None:
    assert await slot(trial, 5)
    assert await slot(trial, 3, schedule="other") and await slot(trial, 4, stream=PARTED.name)
    assert await trial.broker.admin.slots("orders") == {"tick": BEGIN_MS + 5, "other": BEGIN_MS + 3}
    assert await trial.broker.admin.slots("parted") == {"tick": BEGIN_MS + 4}


@scheduled
async def test_a_stream_that_no_schedule_has_published_to_has_no_slots(trial: Trial) -> None:
    await trial.publish()
    assert await trial.broker.admin.slots("orders") == {}


@scheduled
async def test_of_many_processes_one_publishes_each_slot(trial: Trial) -> None:
    brokers = [trial.broker, await trial.another(), await trial.another()]
    for number in range(20):
        records = [trial.record(partition=number % 3, key=f"k{n}") for n in range(2 * len(brokers))]
        at = Slot("tick", BEGIN_MS + number)
        pairs = zip(brokers * 2, records, strict=True)
        won = await asyncio.gather(*(broker.append_slot("parted", at, record) for broker, record in pairs))
        assert sum(won) == 1
    assert sum([len(await trial.stored(stream=PARTED, partition=n)) for n in range(3)]) == 20


@scheduled
async def test_a_slot_is_published_once_however_far_processes_are_apart(trial: Trial) -> None:
    brokers = [trial.broker, await trial.another(), await trial.another()]

    async def run(place: int) -> list[int]:
        numbers = [n for n in range(30) if n % (place + 1) == 0]
        slots = [(n, Slot("tick", BEGIN_MS + n)) for n in numbers]
        return [n for n, at in slots if await brokers[place].append_slot("orders", at, trial.record())]

    won = [number for numbers in await asyncio.gather(*map(run, range(3))) for number in numbers]
    assert len(won) == len(set(won)) == len(await trial.stored()) and max(won) == 29


@where(lambda traits: traits.slots and traits.shared)
async def test_a_slot_stays_published_when_all_processes_begin_anew(trial: Trial) -> None:
    assert await slot(trial, 5)
    await trial.broker.close()
    trial.brokers.clear()
    await trial.another()
    assert await trial.broker.admin.slots("orders") == {"tick": BEGIN_MS + 5}
    assert [await slot(trial, number) for number in (4, 5, 6)] == [False, False, True]
    assert len(await trial.stored()) == 2


@scheduled
async def test_a_slot_whose_event_cannot_be_stored_is_still_to_be_published(trial: Trial) -> None:
    with pytest.raises(BrokerRefused, match="nowhere"):
        await slot(trial, 1, stream="nowhere")
    with pytest.raises(MillstreamError, match="parted"):
        await trial.broker.append_slot("parted", Slot("tick", BEGIN_MS), trial.record(partition=7))
    assert await trial.broker.admin.slots("parted") == {}
    assert await slot(trial, 0, stream=PARTED.name)


@where(lambda traits: traits.slots and traits.retention)
async def test_a_slot_that_finds_no_room_is_still_to_be_published(trial: Trial) -> None:
    stream = await trial.declared(Policy(ceiling_events=2))
    await trial.publish(2, stream=stream)
    with pytest.raises(BrokerFull, match="kept"):
        await slot(trial, 1, stream=stream.name)
    assert await trial.broker.admin.slots(stream.name) == {}
    assert await trial.broker.append_slot(stream.name, Slot("tick", BEGIN_MS + 2), None)  # which needs no room
    assert len(await trial.stored(stream=stream)) == 2


@where(lambda traits: not traits.slots)
async def test_a_slot_is_refused_by_a_broker_that_cannot_tell_whether_it_was_published(trial: Trial) -> None:
    with pytest.raises(NotSupported):
        await slot(trial, 1)
