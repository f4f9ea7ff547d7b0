"""Outputs: what a handler publishes is stored with its outcome."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import pytest

from millstream.brokers.base import Dead, Later, Output, Stored
from millstream.errors import MillstreamError
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


async def parted(trial: Trial, partition: int = 1) -> list[Stored]:
    return await trial.stored(stream=PARTED, partition=partition)
