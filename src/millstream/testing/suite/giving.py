"""What people give a group once more: events of its stream that it has settled."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

from collections.abc import Sequence

import pytest

from millstream.brokers.base import Dead, Later, Stored
from millstream.errors import BrokerRefused
from millstream.testing.suite.order import member, offsets, publish
from millstream.testing.suite.people import FAR_MS, left, ordered, park, waiting, worked_off
from millstream.testing.suite.trial import ORDERS, PARTED, Trial, settle


async def give(trial: Trial, events: Sequence[Stored], stream: str = ORDERS.name) -> int:
    return await trial.broker.admin.give(stream, "billing", events)


async def test_what_a_group_is_given_it_handles_again_and_other_groups_do_not(trial: Trial) -> None:
    billing, other = await trial.consumer(), await trial.consumer("warehouse")
    positions = await trial.publish(3)
    claims = await trial.claims(billing, 3)
    await billing.settle([settle(claims[0], Dead("failed")), settle(claims[1]), settle(claims[2])])
    await other.settle([settle(claim) for claim in await trial.claims(other, 3)])
    events = await trial.stored()
    assert [await give(trial, some) for some in (events[:2], [*events[1:], events[2]], [])] == [2, 1, 0]
    again = await trial.claims(billing, 3)
    assert sorted(offsets(again), key=str) == sorted(positions, key=str)
    assert {(claim.attempt, claim.suspect, claim.postponed) for claim in again} == {(1, 0, 0)}
    assert await billing.settle([settle(claim) for claim in again]) == [True] * 3
    info = await trial.info()
    assert (info.pending, info.lag, info.dead) == (0, 0, 1) and info.done in (5, None)
    await trial.nothing(other)
    for stream, group in (("orders", "nobody"), ("nowhere", "billing")):
        with pytest.raises(BrokerRefused, match=f"{stream}.*{group}"):
            await trial.broker.admin.give(stream, group, events)


async def test_what_a_group_has_not_settled_yet_is_not_given(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(3)
    held, waiting, done = await trial.claims(consumer, 3)
    assert (
        await consumer.settle([settle(waiting, Later(trial.clock.now_ms() + FAR_MS, "")), settle(done)]) == [True] * 2
    )
    later = await trial.publish()
    assert await give(trial, await trial.stored()) == 1
    assert set(offsets(await trial.claims(consumer, 2))) == {done.stored.position, *later}
    assert await consumer.settle([settle(held)]) == [True]


@ordered
async def test_what_an_ordered_group_is_given_comes_in_order_behind_what_waits_of_its_key(trial: Trial) -> None:
    consumer, other = await member(trial), await trial.consumer("warehouse", stream=PARTED, order=True)
    done = await publish(trial, "aba") + await trial.publish(stream=PARTED)
    await worked_off(trial, consumer, 4)
    await worked_off(trial, other, 4)
    parked = await park(trial, consumer, "aa")
    events = await trial.stored(stream=PARTED)
    assert [await give(trial, some, PARTED.name) for some in (events[:2], events[1:])] == [2, 2]
    await trial.broker.admin.release_keys(await waiting(trial))
    again = await worked_off(trial, consumer, 6)
    assert [claim.position for claim in again if claim.record.key == "a"] == [*parked, done[0], done[2]]
    assert set(offsets(again)) == {*parked, *done} and {claim.attempt for claim in again} == {1}
    info = await trial.info(stream=PARTED)
    assert (info.pending, info.lag, info.done) == (0, 0, 10)
    assert set(offsets(await trial.claims(other, 2))) == set(parked)


@ordered
async def test_what_an_ordered_group_has_not_settled_yet_is_not_given(trial: Trial) -> None:
    consumer = await member(trial)
    await park(trial, consumer, "aab")
    positions = await publish(trial, "cde")
    claims = await trial.claims(consumer, 3)
    assert await consumer.settle([settle(claims[1])]) == [True]
    await left(trial, consumer)  # which stores what is settled behind one that is not
    assert await give(trial, await trial.stored(stream=PARTED), PARTED.name) == 1
    assert {key.key: key.events for key in await waiting(trial)} == {"a": 2, "b": 1, "d": 1}
    assert set(offsets(await worked_off(trial, await member(trial), 3))) == set(positions)
