"""What holds for a stream: recorded when it is first declared, changed by hand, gone with the stream."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import pytest

from millstream.brokers.base import LATER, Policy, Position, Slot, StreamSpec
from millstream.errors import BrokerRefused, NotSupported
from millstream.testing.suite.dedupe import HOUR_MS
from millstream.testing.suite.people import left
from millstream.testing.suite.trial import ORDERS, Trial, where

retains = where(lambda traits: traits.retention)

WEEK = Policy(age_ms=7 * 24 * HOUR_MS, events=1_000_000, ceiling_events=2_000_000, forget_ms=HOUR_MS)


@retains
async def test_what_a_stream_was_first_declared_with_holds_whatever_others_declare(trial: Trial) -> None:
    stream = await trial.declared(WEEK)
    other = await trial.another()
    for broker in (trial.broker, other):
        for policy in (None, WEEK, Policy(), Policy(events=5, keep=False)):
            assert await broker.declare(stream, policy) == WEEK
    assert (await trial.about(stream)).policy == WEEK


@retains
async def test_a_stream_that_was_declared_without_a_policy_has_an_empty_one(trial: Trial) -> None:
    assert await trial.broker.declare(ORDERS, WEEK) == Policy()
    assert (await trial.about(ORDERS)).policy == Policy()


@retains
async def test_a_policy_that_is_applied_holds_for_all(trial: Trial) -> None:
    stream, other = await trial.declared(WEEK), await trial.another()
    policy = Policy(events=20, keep=False)
    await trial.broker.admin.apply(stream.name, policy)
    assert await other.declare(stream, WEEK) == policy == (await trial.about(stream)).policy
    positions = await trial.publish(300, stream=stream)

    async def tend() -> int:
        await other.tend(stream.name)
        return len(await trial.stored(stream=stream))

    await trial.eventually(tend, lambda count: count <= 20 + trial.place.spare)
    await other.admin.apply(stream.name, Policy())
    assert await trial.broker.declare(stream) == Policy()
    assert (await trial.stored(stream=stream))[-1].position == positions[-1]


@where(lambda traits: traits.retention or traits.dedupe)
async def test_nothing_is_applied_to_an_unknown_stream(trial: Trial) -> None:
    with pytest.raises(BrokerRefused, match="nowhere"):
        await trial.broker.admin.apply("nowhere", Policy())
    assert [info.spec.name for info in await trial.broker.admin.streams()] == ["orders", "parted"]


async def test_a_policy_that_a_broker_cannot_carry_out_is_not_applied(trial: Trial) -> None:
    wishes = ((trial.traits.dedupe, Policy(dedupe_ms=HOUR_MS, dedupe_ids=5)), (trial.traits.retention, WEEK))
    for able, policy in wishes:
        if not able:
            with pytest.raises(NotSupported):
                await trial.broker.admin.apply("orders", policy)
    assert (await trial.about(ORDERS)).policy == Policy()


async def test_a_stream_that_is_discarded_leaves_nothing_behind(trial: Trial) -> None:
    stream = StreamSpec("kept", partitions=3, key="order_id")
    await trial.broker.declare(stream)
    consumer = await trial.consumer(stream=stream)
    await trial.publish(3, stream=stream, partition=1)
    await trial.claims(consumer, 2)
    with pytest.raises(BrokerRefused, match="billing"):
        await trial.broker.admin.discard("kept")
    assert len(await trial.stored(stream=stream, partition=1)) == 3
    await left(trial, consumer)
    await trial.publish(1)
    await trial.broker.admin.discard("kept")
    assert [info.spec for info in await trial.broker.admin.streams() if info.events] == [ORDERS]
    assert await trial.broker.admin.groups("kept") == []
    with pytest.raises(BrokerRefused, match="kept"):
        await trial.broker.append("kept", [trial.record()])
    anew = StreamSpec("kept")
    await trial.broker.declare(anew)
    assert await trial.stored(stream=anew) == [] and await trial.broker.admin.groups("kept") == []
    positions = await trial.publish(2, stream=anew)
    claims = await trial.claims(await trial.consumer(stream=anew), 2)
    assert [(claim.position, claim.attempt) for claim in claims] == [(place, 1) for place in positions]


async def test_an_unknown_stream_is_not_discarded(trial: Trial) -> None:
    with pytest.raises(BrokerRefused, match="nowhere"):
        await trial.broker.admin.discard("nowhere")


@where(lambda traits: traits.dedupe and traits.delayed and traits.slots)
async def test_ids_slots_and_what_is_for_later_go_with_their_stream(trial: Trial) -> None:
    stream = await trial.declared(Policy(dedupe_ms=HOUR_MS, dedupe_ids=10))
    record = trial.record()
    await trial.broker.append("kept", [record, record])
    waiting = trial.record(due_ms=trial.clock.now_ms() + HOUR_MS)
    assert await trial.broker.append("kept", [waiting]) == [Position(0, LATER)]
    assert await trial.broker.append_slot("kept", Slot("tick", 1_000), None)
    await trial.broker.admin.discard("kept")
    assert await trial.broker.declare(stream) == Policy()
    about = await trial.about(stream)
    assert (about.events, about.delayed, about.repeats, about.trimmed) == (0, 0, 0, 0)
    assert await trial.broker.admin.slots("kept") == {}
    assert await trial.broker.append_slot("kept", Slot("tick", 500), None)
    assert len(set(await trial.broker.append("kept", [record, record]))) == 2


@where(lambda traits: traits.shared)
async def test_a_stream_that_one_process_discards_is_gone_for_all(trial: Trial) -> None:
    other = await trial.another()
    await trial.publish()
    await other.admin.discard("orders")
    assert [info.spec.name for info in await trial.broker.admin.streams()] == ["parted"]
    assert await trial.broker.admin.groups("orders") == []
