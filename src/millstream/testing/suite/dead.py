"""Dead letters: kept with the reason, given back to their own group, or dropped."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

from msgspec.structs import replace

from millstream.brokers.base import Consumer, Dead, DeadLetter, Later
from millstream.testing.suite.trial import ORDERS, PARTED, Trial, settle
from millstream.units import MAX_ERROR_CHARS


async def test_a_dead_letter_keeps_the_event_and_why_it_died(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish()
    claim = await trial.claim(consumer)
    await consumer.settle([settle(claim, Later(trial.clock.now_ms(), "first try"))])
    claim = await trial.claim(consumer)
    error = "ValueError: 5 € is\nnot a price"
    assert await consumer.settle([settle(claim, Dead("rejected", error))]) == [True]
    [letter] = await trial.broker.admin.dead("orders", "billing")
    assert (letter.stream, letter.group, letter.stored) == ("orders", "billing", claim.stored)
    assert (letter.reason, letter.error, letter.attempts) == ("rejected", error, 2)
    assert abs(letter.died_ms - trial.clock.now_ms()) < 10_000
    await trial.nothing(consumer)


async def test_a_long_error_is_kept_in_part(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish()
    claim = await trial.claim(consumer)
    await consumer.settle([settle(claim, Dead("failed", "e" * MAX_ERROR_CHARS))])
    [letter] = await trial.broker.admin.dead("orders", "billing")
    assert letter.error == "e" * MAX_ERROR_CHARS


async def test_dead_letters_are_read_by_pages(trial: Trial) -> None:
    consumer = await trial.consumer(stream=PARTED)
    for partition in range(3):
        await trial.publish(5, stream=PARTED, partition=partition)
    claims = await trial.claims(consumer, 15)
    await consumer.settle([settle(claim, Dead("failed", "why")) for claim in claims])
    found: list[DeadLetter] = []
    while page := await trial.broker.admin.dead("parted", "billing", found[-1].ref if found else "", 4):
        assert len(page) <= 4
        found += page
    assert len(found) == 15
    assert {letter.stored.position for letter in found} == {claim.position for claim in claims}


async def test_a_replay_gives_the_event_to_its_own_group_as_a_new_one(trial: Trial) -> None:
    consumer, other = await trial.consumer("billing"), await trial.consumer("warehouse")
    letter = await died(trial, consumer)
    assert [claim.attempt for claim in await trial.claims(other, 1)] == [1]
    assert await trial.broker.admin.replay([letter]) == [True]
    again = await trial.claim(consumer)
    assert (again.stored, again.attempt, again.suspect, again.postponed) == (letter.stored, 1, 0, 0)
    await trial.nothing(other)
    info = await trial.info()
    assert (info.dead, info.replayed, info.dropped, info.pending) == (0, 1, 0, 1)


async def test_a_replayed_event_can_be_done_or_die_again(trial: Trial) -> None:
    consumer = await trial.consumer()
    letters = [await died(trial, consumer) for _ in range(2)]
    assert await trial.broker.admin.replay(letters) == [True, True]
    first, second = await trial.claims(consumer, 2)
    assert await consumer.settle([settle(first), settle(second, Dead("failed", "again"))]) == [True, True]
    [letter] = await trial.broker.admin.dead("orders", "billing")
    assert (letter.stored, letter.error, letter.attempts) == (second.stored, "again", 1)
    info = await trial.info()
    assert (info.lag, info.pending, info.done, info.dead, info.replayed) == (0, 0, 1, 1, 2)


async def test_a_replayed_event_can_be_tried_again_like_any_other(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.broker.admin.replay([await died(trial, consumer)])
    claim = await trial.claim(consumer)
    await consumer.settle([settle(claim, Later(trial.clock.now_ms(), "busy"))])
    assert (await trial.claim(consumer)).attempt == 2


async def test_a_dead_letter_is_replayed_once(trial: Trial) -> None:
    consumer = await trial.consumer()
    letter = await died(trial, consumer)
    assert await trial.broker.admin.replay([letter, letter]) == [True, False]
    assert await trial.broker.admin.drop([letter]) == [False]
    await trial.claim(consumer)
    await trial.nothing(consumer)


async def test_a_dropped_dead_letter_is_gone_for_ever(trial: Trial) -> None:
    consumer = await trial.consumer()
    letter, kept = await died(trial, consumer), await died(trial, consumer)
    assert await trial.broker.admin.drop([letter]) == [True]
    assert await trial.broker.admin.drop([letter]) == [False]
    assert await trial.broker.admin.replay([letter]) == [False]
    assert await trial.broker.admin.dead("orders", "billing") == [kept]
    info = await trial.info()
    assert (info.dead, info.replayed, info.dropped, info.pending) == (1, 0, 1, 0)


async def test_dead_letters_belong_to_one_group(trial: Trial) -> None:
    await trial.consumer("warehouse")
    letter = await died(trial, await trial.consumer("billing"))
    assert await trial.broker.admin.dead("orders", "warehouse") == []
    assert await trial.broker.admin.dead("orders", "nobody") == []
    assert await trial.broker.admin.dead("nowhere", "billing") == []
    assert await trial.broker.admin.replay([replace(letter, group="nobody")]) == [False]
    assert await trial.broker.admin.drop([replace(letter, group="warehouse")]) == [False]
    assert await trial.broker.admin.dead("orders", "billing") == [letter]


async def died(trial: Trial, consumer: Consumer) -> DeadLetter:
    """A new event's dead letter."""
    await trial.publish(stream=ORDERS)
    claim = await trial.claim(consumer)
    assert await consumer.settle([settle(claim, Dead("failed", "broken"))]) == [True]
    return (await trial.broker.admin.dead("orders", "billing"))[-1]
