"""What goes although a group had not settled it is counted, to the event, and once."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

from millstream.brokers.base import Claim, Consumer, Later, Policy, Position, StreamSpec
from millstream.testing.suite.people import FAR_MS, left
from millstream.testing.suite.retention import (
    FEW,
    MANY,
    filled,
    lost,
    places,
    retains,
    retains_in_order,
    shrunk,
    work_off,
)
from millstream.testing.suite.trial import Trial, settle


@retains
async def test_what_goes_all_the_same_is_counted_for_each_group(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW, keep=False))
    consumer, busy = await trial.consumer("mail", stream=stream), await trial.consumer("audit", stream=stream)
    await work_off(trial, consumer, MANY)
    claims = await trial.claims(busy, 7)
    at_ms = trial.clock.now_ms() + FAR_MS
    outcomes = [settle(claim, Later(at_ms, "busy")) for claim in claims[:3]] + [settle(claim) for claim in claims[3:]]
    assert await busy.settle(outcomes) == [True] * 7
    await left(trial, busy)
    tended = await trial.tended(stream, lambda found: found.trimmed >= MANY - FEW - trial.place.spare)
    gone = MANY - len(await places(trial, stream))
    assert (tended.trimmed, tended.pinned_by) == (gone, "")
    await lost(trial, stream, gone)
    await lost(trial, stream, gone - 4, group="audit")
    assert (await trial.info("mail", stream=stream)).lost == 0
    for group, count in (("billing", MANY - gone), ("audit", MANY - gone)):
        await work_off(trial, await trial.consumer(group, stream=stream), count)
        info = await trial.info(group, stream=stream)
        assert (info.lag, info.pending) == (0, 0)
    assert (await trial.info(stream=stream)).lost == gone
    assert (await trial.info("audit", stream=stream)).lost == gone - 4


@retains
async def test_losses_are_told_once_by_whoever_tends(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW, keep=False))
    await shrunk_and_told(trial, stream)
    tended = await trial.broker.tend(stream.name)
    assert (tended.lost, tended.trimmed) == ({}, 0)


@retains
async def test_what_is_held_while_it_goes_is_either_handled_or_lost(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW, keep=False))
    consumer = await trial.consumer(stream=stream)
    held = await trial.claims(consumer, 5)
    gone = MANY - len(await shrunk(trial, stream, FEW))
    results = await consumer.settle([settle(claim) for claim in held])
    await work_off(trial, consumer, MANY - gone)
    await lost(trial, stream, gone - sum(results))
    info = await trial.info(stream=stream)
    assert (info.done, info.lag, info.pending) == (MANY - gone + sum(results), 0, 0)


@retains_in_order
async def test_what_an_ordered_group_had_not_settled_is_counted_when_it_goes(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=FEW, keep=False))
    consumer = await trial.consumer(stream=stream, order=True)
    await trial.publish(10, stream=stream, key="a")
    await work_off(trial, consumer, 10)
    await left(trial, consumer)
    await trial.publish(MANY, stream=stream, key="a")
    stayed = await shrunk(trial, stream, FEW)
    consumer = await trial.consumer(stream=stream, order=True)
    await work_off(trial, consumer, len(stayed))
    await lost(trial, stream, MANY - len(stayed))
    info = await trial.info(stream=stream)
    assert (info.done, info.lag, info.pending) == (10 + len(stayed), 0, 0)


@retains_in_order
async def test_what_goes_before_an_ordered_member_has_read_it_is_counted_once(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=FEW, keep=False))
    consumer = await trial.consumer(stream=stream, order=True)
    await trial.publish(2, stream=stream, key="a")
    claims = await trial.claims(consumer, 2)
    await trial.publish(MANY, stream=stream, key="b")
    stayed = await shrunk(trial, stream, FEW)
    assert await consumer.settle([settle(claim) for claim in claims]) == [True, True]
    handled = await rest(trial, consumer, stayed[-1])
    assert set(stayed) <= {claim.position for claim in handled}
    await left(trial, consumer)
    await lost(trial, stream, MANY - len(handled))
    await trial.nothing(await trial.consumer(stream=stream, order=True))
    info = await trial.info(stream=stream)
    assert (info.done, info.lag, info.pending, info.lost) == (2 + len(handled), 0, 0, MANY - len(handled))


async def shrunk_and_told(trial: Trial, stream: StreamSpec) -> None:
    """Tend until all that may go is gone, and as many are told as lost."""
    least = MANY - FEW - trial.place.spare
    tended = await trial.tended(stream, lambda found: found.lost.get("billing", 0) >= max(least, found.trimmed, 1))
    assert tended.trimmed == tended.lost["billing"] == MANY - len(await places(trial, stream))
    assert tended.lost.keys() == {"billing"}


async def rest(trial: Trial, consumer: Consumer, last: Position) -> list[Claim]:
    """Finish what comes, up to the last event."""
    handled: list[Claim] = []

    async def some() -> bool:
        claims = await consumer.fetch(100, 0.1)
        assert await consumer.settle([settle(claim) for claim in claims]) == [True] * len(claims)
        handled.extend(claims)
        return any(claim.position == last for claim in claims)

    await trial.eventually(some, bool)
    return handled
