"""Ids that a stream remembers: an event that is published again within the window is not stored again."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from millstream.brokers.base import Policy, Position, Record, StreamSpec
from millstream.errors import BrokerFull, NotSupported
from millstream.testing.suite.trial import ORDERS, Trial, where

remembers = where(lambda traits: traits.dedupe)

HOUR_MS = 3_600_000
SHORT_MS = 400  # a window whose end a test waits for
TICK_MS = 5  # by which the clocks of one machine may differ
IDS = 1_000


async def remembering(trial: Trial, *, ids: int = IDS, window_ms: int = HOUR_MS, partitions: int = 1) -> StreamSpec:
    return await trial.declared(Policy(dedupe_ms=window_ms, dedupe_ids=ids), partitions=partitions)


async def append(trial: Trial, *records: Record, stream: StreamSpec | None = None) -> list[Position]:
    return await trial.broker.append(stream.name if stream else "kept", records)


async def test_a_stream_that_was_not_asked_to_remember_ids_stores_every_event(trial: Trial) -> None:
    record = trial.record()
    answers = await append(trial, record, record, stream=ORDERS) + await append(trial, record, stream=ORDERS)
    assert [event.position for event in await trial.stored()] == answers and len(set(answers)) == 3
    assert (await trial.about(ORDERS)).repeats == 0


@remembers
async def test_an_event_that_is_published_again_is_not_stored_again(trial: Trial) -> None:
    stream = await remembering(trial)
    consumer = await trial.consumer(stream=stream)
    record = trial.record()
    answers = [await append(trial, some) for some in (record, record, replace(record, data=b"{}"))]
    assert answers == [answers[0]] * 3
    [stored] = await trial.stored(stream=stream)
    assert ([stored.position], stored.record.data) == (answers[0], record.data)
    about = await trial.about(stream)
    assert (about.events, about.repeats) == (1, 2) and about.added in (1, None)
    assert (await trial.claim(consumer)).stored == stored
    await trial.nothing(consumer)


@remembers
async def test_a_repeat_within_a_call_answers_where_the_first_one_lies(trial: Trial) -> None:
    stream = await remembering(trial)
    first, second, third = trial.record(), trial.record(), trial.record()
    answers = await append(trial, first, second, first)
    assert answers[0] == answers[2] != answers[1]
    again = await append(trial, second, third, first)
    assert [again[0], again[2]] == [answers[1], answers[0]]
    assert [event.record.id for event in await trial.stored(stream=stream)] == [first.id, second.id, third.id]
    assert (await trial.about(stream)).repeats == 3


@remembers
async def test_ids_are_compared_within_a_partition(trial: Trial) -> None:
    stream = await remembering(trial, partitions=3)
    record = trial.record(partition=1, key="a")
    answers = await append(trial, record, replace(record, partition=2), record)
    assert answers[0] == answers[2] and [position.partition for position in answers] == [1, 2, 1]
    assert [len(await trial.stored(stream=stream, partition=n)) for n in range(3)] == [0, 1, 1]


@remembers
async def test_an_event_is_known_to_every_process(trial: Trial) -> None:
    stream = await remembering(trial)
    other = await trial.another()
    record = trial.record()
    answers = await append(trial, record)
    assert await other.append(stream.name, [record]) == answers
    assert (await trial.about(stream)).repeats == 1


@remembers
async def test_of_an_event_that_many_publish_at_once_one_is_stored(trial: Trial) -> None:
    stream = await remembering(trial)
    brokers = [trial.broker, *[await trial.another() for _ in range(2)]]
    records = [trial.record() for _ in range(20)]
    calls = [broker.append(stream.name, records) for broker in brokers for _ in range(3)]
    answers = await asyncio.gather(*calls)
    assert answers == [answers[0]] * len(calls)
    assert [event.position for event in await trial.stored(stream=stream)] == answers[0]
    assert (await trial.about(stream)).repeats == 20 * (len(calls) - 1)


@remembers
async def test_an_id_is_forgotten_after_the_window_and_not_before(trial: Trial) -> None:
    await remembering(trial, window_ms=SHORT_MS)
    record, begun_ms = trial.record(), trial.clock.now_ms()
    [first] = await append(trial, record)

    async def again() -> Position:
        return (await append(trial, record))[0]

    second = await trial.eventually(again, lambda position: position != first)
    assert trial.clock.now_ms() - begun_ms >= SHORT_MS - TICK_MS
    assert [event.position for event in await trial.stored(stream=StreamSpec("kept"))] == [first, second]


@remembers
async def test_past_the_limit_of_ids_nothing_is_stored_and_what_is_known_is_answered(trial: Trial) -> None:
    stream = await remembering(trial, ids=5, partitions=3)
    records = [trial.record(partition=1, key="a") for _ in range(5)]
    answers = await append(trial, *records)
    for _ in range(2):
        with pytest.raises(BrokerFull, match=r"kept.*\b5\b"):
            await append(trial, trial.record(partition=1, key="a"))
    assert await append(trial, *records) == answers
    assert len(await trial.stored(stream=stream, partition=1)) == 5
    await append(trial, trial.record(partition=2, key="b"))


@remembers
async def test_there_is_room_for_new_ids_once_old_ones_are_forgotten(trial: Trial) -> None:
    stream = await remembering(trial, ids=3, window_ms=SHORT_MS)
    begun_ms, record = trial.clock.now_ms(), trial.record()
    await append(trial, *[trial.record() for _ in range(3)])

    async def stored() -> bool:
        try:
            await append(trial, record)
        except BrokerFull:
            return False
        return True

    await trial.eventually(stored, bool)
    assert trial.clock.now_ms() - begun_ms >= SHORT_MS - TICK_MS
    assert (await trial.stored(stream=stream))[3].record.id == record.id


@remembers
async def test_a_window_that_others_change_is_learnt_while_publishing(trial: Trial) -> None:
    stream = await trial.declared(Policy())
    other = await trial.another()
    policy = Policy(dedupe_ms=HOUR_MS, dedupe_ids=100_000)
    await other.admin.apply(stream.name, policy)

    async def repeated() -> bool:
        record = trial.record()
        first, second = await append(trial, record) + await append(trial, record)
        return first == second

    await trial.eventually(repeated, bool)
    assert (await trial.about(stream)).policy == policy
    await other.admin.apply(stream.name, Policy())
    await trial.eventually(repeated, lambda known: not known)


@where(lambda traits: not traits.dedupe)
async def test_a_window_is_refused_by_a_broker_that_remembers_no_ids(trial: Trial) -> None:
    with pytest.raises(NotSupported):
        await trial.broker.declare(StreamSpec("kept"), Policy(dedupe_ms=HOUR_MS, dedupe_ids=IDS))
