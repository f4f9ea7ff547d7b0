"""In the order of keys: leases, parked keys, takeover, hand-over; and all of it at once, by chance."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

from collections.abc import Sequence

from millstream.brokers.base import Claim, Consumer, Dead, Done, Later, Output, Position, Settlement
from millstream.testing.suite.chaos import Chaos
from millstream.testing.suite.trial import ORDERS, PARTED, Trial, where

ordered = where(lambda traits: traits.order)


async def member(trial: Trial) -> Consumer:
    """A member of the ordered group `billing` of `parted`, through a broker of its own."""
    return await trial.consumer(stream=PARTED, order=True, broker=await trial.another())


async def publish(trial: Trial, keys: str, partition: int = 0) -> list[Position]:
    """One event per letter, which is its key."""
    records = [trial.record(partition=partition, key=key) for key in keys]
    return await trial.broker.append(PARTED.name, records)


def offsets(claims: Sequence[Claim]) -> list[Position]:
    return [claim.position for claim in claims]


def done(claim: Claim) -> Settlement:
    return Settlement(claim.position, Done())


def later(claim: Claim, at_ms: int = 0) -> Settlement:
    return Settlement(claim.position, Later(at_ms, "busy"))


@ordered
async def test_events_of_a_partition_come_in_order_and_no_place_is_lost(trial: Trial) -> None:
    consumer = await member(trial)
    positions = await publish(trial, "abacab")
    claims = await trial.claims(consumer, 6)
    assert offsets(claims) == positions
    assert {(claim.attempt, claim.suspect, claim.postponed) for claim in claims} == {(1, 0, 0)}
    assert len({claim.token for claim in claims}) == 1 and claims[0].token > 0
    assert await consumer.settle([done(claim) for claim in claims]) == [True] * 6
    assert await consumer.settle([done(claims[0])]) == [False]
    await trial.nothing(consumer)
    info = await trial.info(stream=PARTED)
    assert (info.lag, info.pending, info.done, info.consumers) == (0, 0, 6, 1)


@ordered
async def test_a_group_begins_where_it_was_told_and_goes_on_where_it_was(trial: Trial) -> None:
    positions = await publish(trial, "abc")
    first = await member(trial)
    claims = await trial.claims(first, 3)
    assert await first.settle([done(claim) for claim in claims[:2]]) == [True, True]
    trial.silence(first)
    await first.close()
    second = await member(trial)
    [claim] = await trial.claims(second, 1)
    assert claim.position == positions[2] and (claim.attempt, claim.suspect) == (1, 0)
    assert claim.token > claims[0].token


@ordered
async def test_partitions_are_shared_and_handed_over_without_a_repeat(trial: Trial) -> None:
    first = await member(trial)
    for partition in range(3):
        await publish(trial, "ab", partition)
    held = await trial.claims(first, 6)
    second = await member(trial)
    asked: set[int] = set()

    async def drained() -> set[int]:
        asked.update(trial.heard(first).drain)
        return asked

    await trial.eventually(drained, bool)
    await trial.nothing(second)
    assert await first.settle([done(claim) for claim in held]) == [True] * 6
    await first.release(frozenset(asked))
    for partition in range(3):
        await publish(trial, "ab", partition)
    theirs = await trial.claims(second, 2)
    assert {claim.position.partition for claim in theirs} <= asked
    assert {(claim.attempt, claim.suspect) for claim in theirs} == {(1, 0)}
    ours = await trial.claims(first, 4)
    assert {claim.position.partition for claim in ours}.isdisjoint(asked)


@ordered
async def test_a_failed_event_makes_only_its_key_wait_and_keeps_its_order(trial: Trial) -> None:
    consumer = await member(trial)
    positions = await publish(trial, "abaab")
    claims = await trial.claims(consumer, 5)
    due_ms = trial.clock.now_ms() + 300
    behind = [Settlement(claims[n].position, Later(0, "", counted=False)) for n in (2, 3)]
    settlements = [later(claims[0], due_ms), done(claims[1]), done(claims[4]), *behind]
    assert await consumer.settle(settlements) == [True] * 5
    more = await publish(trial, "ab")
    [other] = await trial.claims(consumer, 1)
    assert other.stored.position == more[1]
    info = await trial.info(stream=PARTED)
    assert info.pending >= 3 and info.lag is not None and info.lag + info.pending >= 4
    assert await consumer.settle([done(other)]) == [True]
    order = []
    for _ in range(4):
        [claim] = await trial.claims(consumer, 1)
        assert trial.clock.now_ms() >= due_ms - 1
        order.append((claim.position, claim.attempt))
        await trial.nothing(consumer)
        assert await consumer.settle([done(claim)]) == [True]
    assert order == [(positions[0], 2), (positions[2], 1), (positions[3], 1), (more[0], 1)]
    info = await trial.info(stream=PARTED)
    assert (info.lag, info.pending, info.done, info.retried) == (0, 0, 7, 1)


@ordered
async def test_what_comes_behind_a_failed_event_waits_for_all_that_is_handed_out_before_it(trial: Trial) -> None:
    consumer = await member(trial)
    positions = await publish(trial, "aaaa")
    first, second = await trial.claims(consumer, 2)  # the third and fourth are read by now, and not handed out
    assert await consumer.settle([later(first)]) == [True]
    await trial.nothing(consumer)
    assert await consumer.settle([Settlement(second.stored.position, Later(0, "", counted=False))]) == [True]
    order = []
    for _ in range(4):
        [claim] = await trial.claims(consumer, 1)
        order.append(claim.position)
        assert await consumer.settle([done(claim)]) == [True]
    assert order == positions


@ordered
async def test_events_without_a_key_wait_for_nobody(trial: Trial) -> None:
    consumer = await member(trial)
    positions = await trial.publish(2, stream=PARTED)
    first, second = await trial.claims(consumer, 2)
    assert await consumer.settle([later(first, trial.clock.now_ms() + 100), done(second)]) == [True, True]
    [again] = await trial.claims(consumer, 1)
    assert (again.position, again.attempt) == (positions[0], 2)


@ordered
async def test_a_parked_key_is_the_next_owners_too(trial: Trial) -> None:
    first = await member(trial)
    positions = await publish(trial, "abab")
    claims = await trial.claims(first, 4)
    await first.settle([later(claims[0]), Settlement(claims[2].position, Later(0, "", counted=False))])
    [head] = await trial.claims(first, 1)
    assert head.attempt == 2
    trial.silence(first)
    await first.close()  # hands the head back, uncounted
    second = await member(trial)
    claims = await trial.claims(second, 3)
    assert sorted(map(str, offsets(claims))) == sorted(map(str, [positions[0], positions[1], positions[3]]))
    [again] = [claim for claim in claims if claim.position == positions[0]]
    assert (again.attempt, again.suspect) == (2, 0)
    await second.settle([done(claim) for claim in claims])
    [last] = await trial.claims(second, 1)
    assert (last.stored.position, last.attempt) == (positions[2], 1)


@ordered
async def test_a_silent_owner_is_taken_over_and_only_what_was_not_settled_comes_again(trial: Trial) -> None:
    silent = await member(trial)
    positions = await publish(trial, "abcdef")
    claims = await trial.claims(silent, 6)
    output = Output(ORDERS.name, trial.record())
    settlements = [done(claims[0]), Settlement(claims[3].position, Done(), [output])]
    assert await silent.settle(settlements) == [True, True]
    living = await member(trial)
    trial.silence(silent)
    again = await trial.claims(living, 4, within_s=trial.place.lease_s + trial.place.moment_s)
    assert offsets(again) == [positions[1], positions[2], positions[4], positions[5]]
    assert {claim.suspect for claim in again} == {1} and {claim.attempt for claim in again} == {1}
    assert {claim.token for claim in again} > {claims[0].token} or again[0].token > claims[0].token
    assert await silent.settle([done(claim) for claim in claims[1:3]]) == [False, False]
    lost: set[Position] = set()

    async def told() -> set[Position]:
        lost.update((await silent.keep()).lost)
        return lost

    await trial.eventually(told, lambda lost: lost >= {positions[4], positions[5]})
    await living.begin(offsets(again))
    assert await living.settle([done(claim) for claim in again]) == [True] * 4
    assert len(await trial.stored()) == 1


@ordered
async def test_who_was_running_in_a_crash_is_found_out(trial: Trial) -> None:
    positions = await publish(trial, "ab")
    first = await member(trial)
    await trial.claims(first, 2)
    trial.silence(first)
    second = await member(trial)
    claims = await trial.claims(second, 2)
    assert [(claim.attempt, claim.suspect) for claim in claims] == [(1, 1), (1, 1)]
    await second.begin([positions[0]])
    trial.silence(second)
    third = await member(trial)
    claims = await trial.claims(third, 2)
    assert [(claim.attempt, claim.suspect) for claim in claims] == [(2, 2), (1, 1)]
    assert await third.settle([done(claim) for claim in claims]) == [True, True]


@ordered
async def test_a_dead_letter_goes_with_its_outcome_and_comes_back_when_it_is_replayed(trial: Trial) -> None:
    consumer = await member(trial)
    positions = await publish(trial, "ab")
    first, second = await trial.claims(consumer, 2)
    dead = Settlement(first.stored.position, Dead("failed", "broken"))
    assert await consumer.settle([dead, done(second)]) == [True, True]
    [letter] = await trial.broker.admin.dead(PARTED.name, "billing")
    assert (letter.stored.position, letter.reason, letter.attempts) == (positions[0], "failed", 1)
    info = await trial.info(stream=PARTED)
    assert (info.lag, info.pending, info.dead, info.done) == (0, 0, 1, 1)
    assert await trial.broker.admin.replay([letter]) == [True]
    [again] = await trial.claims(consumer, 1)
    assert (again.position, again.attempt) == (positions[0], 1)
    assert await consumer.settle([done(again)]) == [True]


@ordered
async def test_order_and_delivery_hold_whatever_happens(trial: Trial) -> None:
    chaos = Chaos(trial, seed=20)
    await chaos.run(400)
    await chaos.calm_down()
    assert chaos.first_done == chaos.published
