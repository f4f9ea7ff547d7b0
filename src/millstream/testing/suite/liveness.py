"""Silence: what a consumer that stopped beating held moves on, and only then; it settles nothing afterwards."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

from itertools import pairwise

import pytest

from millstream.brokers.base import Claim, Consumer, Dead, Later, Output, Position
from millstream.errors import LeaseLost
from millstream.testing.suite.trial import PARTED, Trial, positions, settle, where


async def test_what_a_silent_consumer_held_moves_on_within_its_lease_and_a_moment(trial: Trial) -> None:
    silent, living = await pair(trial)
    await trial.publish(2)
    held = await trial.claims(silent, 2)
    taken = await taken_over(trial, silent, by=living, count=2)
    assert set(positions(taken)) == set(positions(held))
    assert [(claim.attempt, claim.suspect) for claim in taken] == [(2, 1), (2, 1)]


async def test_of_a_silent_consumer_that_held_one_event_only_that_one_is_to_blame(trial: Trial) -> None:
    silent, living = await pair(trial)
    await trial.publish()
    await trial.claim(silent)
    [claim] = await taken_over(trial, silent, by=living, count=1)
    assert (claim.attempt, claim.suspect) == (2, 2)


async def test_a_second_crash_blames_what_had_been_started(trial: Trial) -> None:
    first, second, third = *await pair(trial), await trial.consumer()
    await trial.publish(3)
    await trial.claims(first, 3)
    started, waiting, _ = await taken_over(trial, first, by=second, count=3)
    await second.begin(positions([started]))
    found = {claim.position: claim for claim in await taken_over(trial, second, by=third, count=3)}
    blamed, spared = found[started.stored.position], found[waiting.stored.position]
    assert (blamed.attempt, blamed.suspect) == (3, 2)
    assert (spared.attempt, spared.suspect) == (3, 1)


async def test_a_suspect_that_came_through_is_none_any_more(trial: Trial) -> None:
    silent, living = await pair(trial)
    await trial.publish(2)
    await trial.claims(silent, 2)
    first, second = await taken_over(trial, silent, by=living, count=2)
    await living.begin(positions([first, second]))
    later = Later(trial.clock.now_ms(), "busy")
    assert await living.settle([settle(first, later), settle(second)]) == [True, True]
    again = await trial.claim(living)
    assert (again.stored, again.attempt, again.suspect) == (first.stored, 3, 0)


async def test_who_was_taken_over_settles_nothing(trial: Trial) -> None:
    silent, living = await pair(trial)
    await trial.publish(3)
    held = await trial.claims(silent, 3)
    taken = await taken_over(trial, silent, by=living, count=3)
    outcomes = [None, Later(trial.clock.now_ms(), "busy"), Dead("failed", "late")]
    late = [settle(claim, outcome) for claim, outcome in zip(held, outcomes, strict=True)]
    assert await silent.settle(late) == [False, False, False]
    info = await trial.info()
    assert (info.pending, info.scheduled, info.done, info.dead) == (3, 0, 0, 0)
    assert await living.settle([settle(claim) for claim in taken]) == [True, True, True]


@where(lambda traits: traits.atomic_outputs)
async def test_who_was_taken_over_stores_no_output(trial: Trial) -> None:
    silent, living = await pair(trial)
    await trial.publish()
    held = await trial.claim(silent)
    await taken_over(trial, silent, by=living, count=1)
    assert await silent.settle([settle(held, None, Output("parted", trial.record(partition=1)))]) == [False]
    assert await trial.stored(stream=PARTED, partition=1) == []


async def test_who_was_taken_over_cannot_begin(trial: Trial) -> None:
    silent, living = await pair(trial)
    await trial.publish()
    held = await trial.claim(silent)
    await taken_over(trial, silent, by=living, count=1)
    with pytest.raises(LeaseLost):
        await silent.begin(positions([held]))


async def test_who_was_taken_over_is_told_and_goes_on_with_new_events(trial: Trial) -> None:
    silent, living = await pair(trial)
    await trial.publish(2)
    held = await trial.claims(silent, 2)
    taken = await taken_over(trial, silent, by=living, count=2)
    lost: set[Position] = set()

    async def told() -> set[Position]:
        lost.update((await silent.keep()).lost)
        return lost

    await trial.eventually(told, lambda lost: lost == set(positions(held)))
    assert await living.settle([settle(claim) for claim in taken]) == [True, True]
    [fresh] = await trial.publish()
    trial.revive(silent)
    claim = await trial.claim(silent)
    assert (claim.position, claim.attempt) == (fresh, 1)
    assert await silent.settle([settle(claim)]) == [True]


async def test_a_slow_consumer_that_beats_keeps_what_it_holds(trial: Trial) -> None:
    slow, other = await pair(trial)
    await trial.publish()
    claim = await trial.claim(slow)
    await trial.nothing(other, within_s=2.5 * trial.place.lease_s)
    await trial.eventually(trial.info, lambda info: info.consumers == 2)  # a beat may be late just now
    assert await slow.settle([settle(claim)]) == [True]


async def test_what_waits_outlives_the_consumer_that_tried_it(trial: Trial) -> None:
    silent, living = await pair(trial)
    await trial.publish()
    claim = await trial.claim(silent)
    await silent.settle([settle(claim, Later(trial.clock.now_ms() + 300, "busy"))])
    trial.silence(silent)
    again = await trial.claim(living)
    assert (again.stored, again.attempt, again.suspect) == (claim.stored, 2, 0)


async def test_a_silent_consumer_is_not_counted_among_the_living(trial: Trial) -> None:
    silent, _ = await pair(trial)
    await trial.eventually(trial.info, lambda info: info.consumers == 2)
    trial.silence(silent)
    await trial.eventually(trial.info, lambda info: info.consumers == 1)


async def test_a_silent_consumer_without_events_harms_nobody(trial: Trial) -> None:
    silent, living = await pair(trial)
    trial.silence(silent)
    await trial.eventually(trial.info, lambda info: info.consumers == 1)
    await trial.publish(2)
    claims = await trial.claims(living, 2)
    assert [(claim.attempt, claim.suspect) for claim in claims] == [(1, 0), (1, 0)]


async def test_many_consumers_fall_silent_one_after_another_and_nothing_is_lost(trial: Trial) -> None:
    consumers = [await trial.consumer(broker=await trial.another()) for _ in range(3)]
    answers = await trial.publish(30)
    for silent, living in pairwise(consumers):
        await trial.claims(silent, 10)
        trial.silence(silent)
        await living.keep()
    last = consumers[-1]
    done: set[Position] = set()
    async with trial.clock.timeout(30):
        while len(done) < 30:
            claims = await last.fetch(10, 0.25)
            mine = await last.settle([settle(claim) for claim in claims])
            done |= {claim.position for claim, ours in zip(claims, mine, strict=True) if ours}
    assert done == set(answers)
    info = await trial.info()
    assert (info.done, info.pending, info.lag) == (30, 0, 0)


async def pair(trial: Trial) -> tuple[Consumer, Consumer]:
    """Two members of a group, as of two processes."""
    return await trial.consumer(), await trial.consumer(broker=await trial.another())


async def taken_over(trial: Trial, silent: Consumer, *, by: Consumer, count: int) -> list[Claim]:
    """Let one fall silent; what another then gets, within a lease and a moment."""
    trial.silence(silent)
    return await trial.claims(by, count, within_s=trial.place.lease_s + trial.place.moment_s)
