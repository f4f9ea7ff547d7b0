"""Outputs: what a handler publishes is stored with its outcome."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import pytest

from millstream.brokers.base import Dead, Later, Output, Policy, Stored
from millstream.errors import BrokerFull, MillstreamError
from millstream.testing.suite.dedupe import HOUR_MS
from millstream.testing.suite.trial import PARTED, Trial, settle, where


async def test_outputs_are_stored_with_their_outcome_in_the_order_of_the_call(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(2)
    claims = await trial.claims(consumer, 2)
    records = [trial.record(partition=1, key="a") for _ in range(4)]
    pairs = [[Output("parted", record) for record in records[n : n + 2]] for n in (0, 2)]
    settlements = [settle(claim, None, *outputs) for claim, outputs in zip(claims, pairs, strict=True)]
    assert await consumer.settle(settlements) == [True, True]
    assert [event.record.id for event in await parted(trial)] == [record.id for record in records]
    assert (await trial.info()).done == 2


async def test_outputs_reach_the_groups_of_their_stream_and_may_lie_on_their_own(trial: Trial) -> None:
    consumer, other = await trial.consumer(), await trial.consumer("mail", stream=PARTED)
    await trial.publish()
    claim = await trial.claim(consumer)
    here, there = Output("orders", trial.record()), Output("parted", trial.record(partition=2))
    assert await consumer.settle([settle(claim, None, here, there)]) == [True]
    assert (await trial.claim(other)).stored.record.id == there.record.id
    assert (await trial.claim(consumer)).stored.record.id == here.record.id


async def test_outputs_of_a_retry_and_of_a_dead_letter_are_stored_too(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(2)
    first, second = await trial.claims(consumer, 2)
    later = settle(first, Later(trial.clock.now_ms() + 60_000, "busy"), Output("parted", trial.record()))
    dead = settle(second, Dead("failed"), Output("parted", trial.record()))
    assert await consumer.settle([later, dead]) == [True, True]
    assert len(await parted(trial, 0)) == 2


@where(lambda traits: traits.atomic_outputs)
async def test_a_settlement_sent_again_stores_no_output_again(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish()
    claim = await trial.claim(consumer)
    settlement = settle(claim, None, Output("parted", trial.record(partition=1)))
    assert await consumer.settle([settlement]) == [True]
    assert await consumer.settle([settlement]) == [False]
    assert len(await parted(trial)) == 1


@where(lambda traits: traits.atomic_outputs)
async def test_who_does_not_hold_an_event_stores_no_output(trial: Trial) -> None:
    consumer, other = await trial.consumer(), await trial.consumer()
    await trial.publish()
    claim = await trial.claim(consumer)
    assert await other.settle([settle(claim, None, Output("parted", trial.record(partition=1)))]) == [False]
    assert await parted(trial) == []


@where(lambda traits: traits.atomic_outputs)
async def test_an_outcome_whose_output_cannot_be_stored_is_not_stored_either(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish()
    claim = await trial.claim(consumer)
    with pytest.raises(MillstreamError, match="nowhere"):
        await consumer.settle([settle(claim, None, Output("nowhere", trial.record()))])
    info = await trial.info()
    assert (info.pending, info.done) == (1, 0)
    assert await consumer.settle([settle(claim)]) == [True]


@where(lambda traits: traits.atomic_outputs)
async def test_an_output_and_its_outcome_are_stored_together_or_not_at_all(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(2)
    first, second = await trial.claims(consumer, 2)
    outputs = [Output("parted", trial.record(partition=n % 3)) for n in range(100)]
    assert await consumer.settle([settle(first, None, *outputs)]) == [True]
    assert [len(await parted(trial, n)) for n in range(3)] == [34, 33, 33]
    bad = Output("parted", trial.record(partition=7))
    with pytest.raises(MillstreamError, match="parted"):
        await consumer.settle([settle(second, None, *outputs[:3], bad)])
    assert [len(await parted(trial, n)) for n in range(3)] == [34, 33, 33]
    info = await trial.info()
    assert (info.pending, info.done) == (1, 1)


@where(lambda traits: traits.atomic_outputs and traits.order)
async def test_who_lost_an_ordered_partition_stores_no_output(trial: Trial) -> None:
    silent = await trial.consumer(stream=PARTED, order=True, broker=await trial.another())
    await trial.publish(2, stream=PARTED, key="a")
    claims = await trial.claims(silent, 2)
    trial.silence(silent)
    living = await trial.consumer(stream=PARTED, order=True, broker=await trial.another())
    again = await trial.claims(living, 2, within_s=trial.place.lease_s + trial.place.moment_s)
    late = [settle(claim, None, Output("orders", trial.record())) for claim in claims]
    assert await silent.settle(late) == [False, False]
    await living.begin([claim.position for claim in again])
    ours = [settle(claim, None, Output("orders", trial.record())) for claim in again]
    assert await living.settle(ours) == [True, True] and await living.settle(ours) == [False, False]
    ids = [event.record.id for event in await trial.stored()]
    assert ids == [output.record.id for settlement in ours for output in settlement.outputs]


@where(lambda traits: traits.dedupe)
async def test_an_output_with_an_id_of_the_users_own_is_stored_once(trial: Trial) -> None:
    stream = await trial.declared(Policy(dedupe_ms=HOUR_MS, dedupe_ids=100))
    for order in {False, trial.traits.order}:
        consumer = await trial.consumer(f"billing-{order}", order=order, start="now")
        await trial.turns()
        await trial.publish(2)
        first, second = await trial.claims(consumer, 2)
        output = Output(stream.name, trial.record())
        assert await consumer.settle([settle(first, None, output)]) == [True]
        assert await consumer.settle([settle(second, None, output)]) == [True]
        assert [event.record.id for event in await trial.stored(stream=stream)][int(order) :] == [output.record.id]
    assert (await trial.about(stream)).repeats == len({False, trial.traits.order})


@where(lambda traits: traits.dedupe and traits.atomic_outputs)
async def test_a_derived_output_is_stored_whatever_ids_are_remembered(trial: Trial) -> None:
    stream = await trial.declared(Policy(dedupe_ms=HOUR_MS, dedupe_ids=100))
    output = Output(stream.name, trial.record(), derived=True)
    await trial.broker.append(stream.name, [output.record])
    for order in {False, trial.traits.order}:
        consumer = await trial.consumer(f"billing-{order}", order=order)
        if not await trial.stored():
            await trial.publish()
        assert await consumer.settle([settle(await trial.claim(consumer), None, output)]) == [True]
    assert len(await trial.stored(stream=stream)) == 1 + len({False, trial.traits.order})


@where(lambda traits: traits.delayed)
async def test_an_output_may_be_for_later(trial: Trial) -> None:
    for order in {False, trial.traits.order}:
        consumer = await trial.consumer(f"billing-{order}", order=order)
        if not await trial.stored():
            await trial.publish()
        record = trial.record(partition=1, key="a", due_ms=trial.clock.now_ms() + 300)
        before = await parted(trial)
        assert await consumer.settle([settle(await trial.claim(consumer), None, Output("parted", record))]) == [True]
        assert await parted(trial) == before
        assert (await trial.about(PARTED)).delayed == 1
        await trial.tended(PARTED, lambda tended: tended.published == 1)
        assert (await parted(trial))[-1].record.id == record.id


@where(lambda traits: traits.retention)
async def test_an_outcome_waits_while_there_is_no_room_for_its_output(trial: Trial) -> None:
    stream = await trial.declared(Policy(ceiling_events=3))
    await trial.publish(3, stream=stream)
    consumer = await trial.consumer()
    await trial.publish(2)
    first, second = await trial.claims(consumer, 2)
    full = settle(first, None, Output(stream.name, trial.record()))
    with pytest.raises(BrokerFull, match="kept"):
        await consumer.settle([full, settle(second)])
    info = await trial.info()
    assert (info.done, info.pending) == (1, 1)
    await trial.broker.admin.apply(stream.name, Policy())

    async def stored() -> bool:
        try:
            return await consumer.settle([full]) == [True]
        except BrokerFull:
            return False

    await trial.eventually(stored, bool)
    assert len(await trial.stored(stream=stream)) == 4


@where(lambda traits: traits.retention and traits.order)
async def test_an_ordered_outcome_waits_while_there_is_no_room_for_its_output(trial: Trial) -> None:
    stream = await trial.declared(Policy(ceiling_events=3))
    await trial.publish(3, stream=stream)
    consumer = await trial.consumer(order=True)
    await trial.publish()
    settlement = settle(await trial.claim(consumer), None, Output(stream.name, trial.record()))
    with pytest.raises(BrokerFull):
        await consumer.settle([settlement])
    assert (await trial.info()).done == 0
    await trial.broker.admin.apply(stream.name, Policy())

    async def stored() -> bool:
        try:
            await consumer.settle([settlement])
        except BrokerFull:
            return False
        return (await trial.info()).done == 1  # a beat may have stored it before

    await trial.eventually(stored, bool)
    assert len(await trial.stored(stream=stream)) == 4


async def parted(trial: Trial, partition: int = 1) -> list[Stored]:
    return await trial.stored(stream=PARTED, partition=partition)
