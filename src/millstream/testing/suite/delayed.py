"""Events that are published for later: kept aside, and in their stream when they are due."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from millstream.brokers.base import LATER, Policy, Position, Record
from millstream.errors import BrokerRefused, MillstreamError, NotSupported
from millstream.testing.suite.trial import ORDERS, PARTED, Trial, where

delayed = where(lambda traits: traits.delayed)

FAR_MS = 3_600_000
TICK_MS = 50  # by which two clocks of one machine may differ


def due(trial: Trial, after_ms: int, *, partition: int = 0, key: str | None = None) -> Record:
    """A record that is due so much later than now."""
    return trial.record(partition=partition, key=key, due_ms=trial.clock.now_ms() + after_ms)


@delayed
async def test_an_event_for_later_is_kept_aside(trial: Trial) -> None:
    consumer = await trial.consumer()
    record = due(trial, FAR_MS)
    plain = trial.record()
    answers = await trial.broker.append("orders", [record, plain])
    assert answers[0] == Position(0, LATER) != answers[1]
    assert [event.record.id for event in await trial.stored()] == [plain.id]
    assert (await trial.claim(consumer)).stored.record.id == plain.id
    tended = await trial.broker.tend("orders")
    assert tended.published == 0 and tended.due_ms is not None
    assert abs(tended.due_ms - (record.due_ms or 0)) <= TICK_MS
    about = await trial.about(ORDERS)
    assert (about.delayed, about.events) == (1, 1)
    info = await trial.info()
    assert (info.lag, info.pending) == (0, 1)
    await trial.nothing(consumer)


@delayed
async def test_events_for_later_come_when_they_are_due_and_in_that_order(trial: Trial) -> None:
    records = [due(trial, ms) for ms in (500, 100, 300)]
    await trial.broker.append("orders", records)
    moments = {record.id: record.due_ms or 0 for record in records}

    async def arrived() -> list[str]:
        await trial.broker.tend("orders")
        ids = [event.record.id for event in await trial.stored()]
        assert all(moments[id_] <= trial.clock.now_ms() + TICK_MS for id_ in ids)
        return ids

    ids = await trial.eventually(arrived, lambda ids: len(ids) == 3)
    assert ids == [records[n].id for n in (1, 2, 0)]
    tended = await trial.broker.tend("orders")
    assert (tended.published, tended.due_ms) == (0, None)
    assert (await trial.about(ORDERS)).delayed == 0


@delayed
async def test_an_event_for_later_comes_back_as_it_was_published_with_the_time_at_which_it_came(trial: Trial) -> None:
    record = due(trial, 100, partition=2, key="Zoë\x00")
    own = replace(record, id="own-time", data=bytes(range(256)), headers=b'{"a":"b"}', time_ms=1_700_000_000_123)
    await trial.broker.append("parted", [record, own])
    await trial.tended(PARTED, lambda tended: tended.published == 2)
    stored = {event.record.id: event for event in await trial.stored(stream=PARTED, partition=2)}
    assert stored["own-time"].record == replace(own, due_ms=None)
    first = stored[record.id]
    assert replace(first.record, time_ms=0) == replace(record, due_ms=None)
    assert (record.due_ms or 0) - TICK_MS <= first.record.time_ms <= trial.clock.now_ms() + TICK_MS
    found = await trial.broker.locate("parted", (record.due_ms or 0) - TICK_MS)
    assert len(await trial.broker.read("parted", 2, found[2], 10)) == 2


@delayed
async def test_an_event_that_was_due_before_is_stored_at_once(trial: Trial) -> None:
    record = due(trial, -5_000)
    [position] = await trial.broker.append("orders", [record])
    [stored] = await trial.stored()
    assert (stored.position, stored.record.id, stored.record.due_ms) == (position, record.id, None)
    assert (await trial.about(ORDERS)).delayed == 0


@delayed
async def test_who_waits_for_events_gets_those_that_fall_due(trial: Trial) -> None:
    consumer = await trial.consumer()
    record = due(trial, 100)
    await trial.broker.append("orders", [record])

    async def tend() -> None:
        await trial.tended(ORDERS, lambda tended: tended.published == 1)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(tend())
        claim = await trial.claim(consumer)
    assert claim.record.id == record.id


@delayed
async def test_whoever_tends_publishes_each_event_once(trial: Trial) -> None:
    brokers = [trial.broker, await trial.another(), await trial.another()]
    records = [due(trial, 100, partition=n % 3, key=f"k{n}") for n in range(30)]
    await trial.broker.append("parted", records)
    published = 0

    async def tend() -> int:
        nonlocal published
        rounds = await asyncio.gather(*(broker.tend("parted") for broker in brokers for _ in range(3)))
        published += sum(found.published for found in rounds)
        return published

    await trial.eventually(tend, lambda count: count >= 30)
    assert await tend() == 30
    ids = [event.record.id for n in range(3) for event in await trial.stored(stream=PARTED, partition=n)]
    assert sorted(ids) == sorted(record.id for record in records)


@where(lambda traits: traits.delayed and traits.shared)
async def test_what_one_process_publishes_for_later_another_one_brings(trial: Trial) -> None:
    record = due(trial, 200)
    await trial.broker.append("orders", [record])
    await trial.broker.close()
    trial.brokers.clear()
    await trial.another()
    await trial.tended(ORDERS, lambda tended: tended.published == 1)
    assert [event.record.id for event in await trial.stored()] == [record.id]


@where(lambda traits: traits.delayed and traits.dedupe)
async def test_an_event_that_is_published_for_later_twice_comes_once(trial: Trial) -> None:
    stream = await trial.declared(Policy(dedupe_ms=FAR_MS, dedupe_ids=100))
    record = due(trial, 200)
    later = Position(0, LATER)
    assert await trial.broker.append(stream.name, [record, record]) == [later, later]
    assert (await trial.about(stream)).delayed == 1
    await trial.tended(stream, lambda tended: tended.published == 1)
    [stored] = await trial.stored(stream=stream)
    for again in (record, replace(record, due_ms=None), replace(record, due_ms=trial.clock.now_ms() + FAR_MS)):
        [position] = await trial.broker.append(stream.name, [again])
        assert position in (later, stored.position)
    about = await trial.about(stream)
    assert (about.events, about.delayed, about.repeats) == (1, 0, 4)


@where(lambda traits: traits.delayed and traits.dedupe)
async def test_an_id_that_was_forgotten_meanwhile_does_not_hold_back_an_event_that_falls_due(trial: Trial) -> None:
    stream = await trial.declared(Policy(dedupe_ms=1, dedupe_ids=100))
    records = [due(trial, 200), trial.record()]
    await trial.broker.append(stream.name, records)
    await trial.tended(stream, lambda tended: tended.published == 1)
    assert [event.record.id for event in await trial.stored(stream=stream)] == [records[1].id, records[0].id]


@delayed
async def test_an_event_for_later_is_refused_where_any_other_would_be(trial: Trial) -> None:
    with pytest.raises(BrokerRefused, match="nowhere"):
        await trial.broker.append("nowhere", [due(trial, FAR_MS)])
    with pytest.raises(MillstreamError, match="parted"):
        await trial.broker.append("parted", [due(trial, FAR_MS, partition=7)])
    assert (await trial.broker.tend("parted")).due_ms is None
    with pytest.raises(BrokerRefused, match="nowhere"):
        await trial.broker.tend("nowhere")


@where(lambda traits: not traits.delayed)
async def test_an_event_for_later_is_refused_by_a_broker_that_cannot_delay(trial: Trial) -> None:
    with pytest.raises(NotSupported):
        await trial.broker.append("orders", [due(trial, FAR_MS)])
