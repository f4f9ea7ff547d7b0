"""Changing the way in which a group consumes: the old way is finished first, and then all go on in the new one."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from millstream.brokers.base import Claim, Consumer, Dead, Done, Later, Outcome, Position, Settlement, Subscription
from millstream.testing.suite.trial import ORDERS, PARTED, Trial, where

ordered = where(lambda traits: traits.order)


async def member(trial: Trial, *, order: bool) -> Consumer:
    """A member of the group `billing` of `parted`, through a broker of its own."""
    return await trial.consumer(stream=PARTED, order=order, broker=await trial.another())


async def publish(trial: Trial, keys: str, partition: int = 0) -> list[Position]:
    """One event per letter, which is its key."""
    records = [trial.record(partition=partition, key=key) for key in keys]
    return await trial.broker.append(PARTED.name, records)


async def handle(trial: Trial, consumers: Sequence[Consumer], count: int) -> list[Claim]:
    """Claim and finish exactly so many events, whoever gets them."""
    claims: list[Claim] = []

    async def some() -> int:
        for consumer in consumers:
            found = await consumer.fetch(10, 0.1)
            claims.extend(found)
            results = await consumer.settle([Settlement(claim.position, Done()) for claim in found])
            assert results == [True] * len(found)
        return len(claims)

    await trial.eventually(some, lambda number: number >= count, within_s=30.0)
    assert len(claims) == count
    return claims


async def switched(trial: Trial, consumers: Sequence[Consumer], *, order: bool) -> None:
    """Publish and handle events until one is handled in the new way."""

    async def new_way() -> bool:
        await publish(trial, "z")
        [claim] = await handle(trial, consumers, 1)
        return (claim.token > 0) == order

    await trial.eventually(new_way, bool, within_s=40.0)


async def at_rest(trial: Trial, *, consumers: int) -> None:
    """Wait until nothing is left, and so many members are there."""

    async def seen() -> tuple[int | None, int, int, int]:
        info = await trial.info(stream=PARTED)
        return info.lag, info.pending, info.dead, info.consumers

    await trial.eventually(seen, lambda now: now == (0, 0, 0, consumers))


def offsets(claims: Sequence[Claim]) -> list[Position]:
    return [claim.position for claim in claims]


def done(*claims: Claim) -> list[Settlement]:
    return [Settlement(claim.position, Done()) for claim in claims]


@ordered
async def test_a_group_without_order_is_finished_and_then_consumes_in_the_order_of_keys(trial: Trial) -> None:
    old = await member(trial, order=False)
    positions = await publish(trial, "abcd")
    claims = await trial.claims(old, 4)
    due_ms = trial.clock.now_ms() + 1_500
    outcomes: list[Outcome] = [Dead("failed", "broken"), Later(due_ms, "busy"), Later(0, "busy")]
    settlements = [Settlement(claim.position, how) for claim, how in zip(claims, outcomes, strict=False)]
    assert await old.settle(settlements) == [True] * 3
    first, second = await member(trial, order=True), await member(trial, order=True)
    retried = await trial.claim(first)
    assert (retried.position, retried.attempt, retried.token) == (positions[2], 2, 0)
    assert await first.settle(done(retried)) == [True]
    trial.silence(old)
    await old.close()
    finished = await handle(trial, [first, second], 2)
    assert {claim.position: claim.attempt for claim in finished} == {positions[1]: 2, positions[3]: 1}
    await switched(trial, [first, second], order=True)
    [letter] = await trial.broker.admin.dead(PARTED.name, "billing")
    assert letter.stored.position == positions[0]
    assert await trial.broker.admin.replay([letter]) == [True]
    [again] = await handle(trial, [first, second], 1)
    assert again.position == positions[0] and again.token > 0
    await at_rest(trial, consumers=2)


@ordered
async def test_an_ordered_group_is_finished_and_then_consumes_without_order(trial: Trial) -> None:
    old = await member(trial, order=True)
    positions = await publish(trial, "abac")
    claims = await trial.claims(old, 4)
    behind = Settlement(positions[2], Later(0, "", counted=False))
    failed = Settlement(positions[0], Later(trial.clock.now_ms() + 1_500, "busy"))
    assert await old.settle([failed, behind, *done(claims[3])]) == [True] * 3
    first, second = await member(trial, order=False), await member(trial, order=False)
    trial.silence(old)
    await old.close()  # a key is parked, and the last event was settled before the second
    finished = await handle(trial, [first, second], 3)
    assert Counter(offsets(finished)) == Counter(positions[:3])
    assert {claim.position: claim.attempt for claim in finished}[positions[0]] == 2
    assert [claim.position for claim in finished if claim.record.key == "a"] == [
        positions[0],
        positions[2],
    ]
    await switched(trial, [first, second], order=False)
    await at_rest(trial, consumers=2)


async def test_a_member_that_takes_nothing_new_finishes_what_waits(trial: Trial) -> None:
    old = await trial.consumer()
    await trial.publish(3)
    claims = await trial.claims(old, 2)
    due_ms = trial.clock.now_ms() + 300
    settlements = [Settlement(claims[0].position, Later(due_ms, "busy")), *done(claims[1])]
    assert await old.settle(settlements) == [True, True]
    trial.silence(old)
    await old.close()
    spec = Subscription(ORDERS, "billing", "shop", lease_s=trial.place.lease_s, fresh=False)
    consumer = await trial.broker.subscribe(spec)
    trial.consumers.append(consumer)
    trial.revive(consumer)
    claim = await trial.claim(consumer)
    assert (claim.position, claim.attempt) == (claims[0].position, 2)
    assert await consumer.settle(done(claim)) == [True]
    await trial.nothing(consumer, within_s=0.3)
    info = await trial.info()
    assert (info.lag, info.pending) == (1, 0)


@ordered
async def test_an_ordered_member_that_takes_nothing_new_finishes_what_waits(trial: Trial) -> None:
    old = await member(trial, order=True)
    positions = await publish(trial, "abca")
    claims = await trial.claims(old, 4)
    due_ms = trial.clock.now_ms() + 300
    behind = Settlement(positions[3], Later(0, "", counted=False))
    assert await old.settle([Settlement(positions[0], Later(due_ms, "busy")), behind, *done(claims[2])]) == [True] * 3
    trial.silence(old)
    await old.close()
    spec = Subscription(PARTED, "billing", "shop", lease_s=trial.place.lease_s, order=True, fresh=False)
    consumer = await trial.broker.subscribe(spec)
    trial.consumers.append(consumer)
    trial.revive(consumer)
    await publish(trial, "d")
    claims = await handle(trial, [consumer], 3)
    assert Counter(offsets(claims)) == Counter([positions[0], positions[1], positions[3]])
    await trial.nothing(consumer, within_s=0.3)
    info = await trial.info(stream=PARTED)
    assert (info.lag, info.pending) == (1, 0)


@ordered
async def test_what_waits_for_its_attempts_does_not_keep_a_busy_group_from_switching(trial: Trial) -> None:
    old = await member(trial, order=False)
    [position] = await publish(trial, "a")
    claim = await trial.claim(old)
    assert await old.settle([Settlement(position, Later(trial.clock.now_ms() + 2_000, "busy"))]) == [True]
    trial.silence(old)
    await old.close()
    new = await member(trial, order=True)
    published = await publish(trial, "bcd")  # it would always have something that waits, if it took these
    [again] = await trial.claims(new, 1)
    assert (again.position, again.attempt, again.token) == (position, claim.attempt + 1, 0)
    assert await new.settle(done(again)) == [True]
    claims = await trial.claims(new, 3)
    assert offsets(claims) == published and all(claim.token for claim in claims)


@ordered
async def test_members_of_the_old_way_keep_a_group_as_it_is_until_the_last_has_gone(trial: Trial) -> None:
    old = await member(trial, order=False)
    new = await member(trial, order=True)
    published = await publish(trial, "abcdef")
    handled = await handle(trial, [old, new], 6)
    assert {claim.token for claim in handled} == {0}
    trial.silence(old)
    await old.close()
    await switched(trial, [new], order=True)
    assert sorted(map(str, offsets(handled))) == sorted(map(str, published))


@ordered
async def test_nothing_is_lost_or_repeated_while_two_processes_switch(trial: Trial) -> None:
    old = await member(trial, order=True)
    consumers = [await member(trial, order=False), await member(trial, order=False)]
    trial.silence(old)
    await old.close()
    published: list[Position] = []
    handled: list[Claim] = []

    async def some() -> bool:
        published.extend(await publish(trial, "ab", len(published) // 2 % 3))
        handled.extend(await handle(trial, consumers, 2))
        return handled[-1].token == 0

    await trial.eventually(some, bool, within_s=40.0)
    assert Counter(offsets(handled)) == Counter(published)
    await trial.nothing(consumers[0])
    await trial.nothing(consumers[1])


@ordered
async def test_what_would_wait_for_a_person_in_the_new_way_is_a_dead_letter_in_the_old_one(trial: Trial) -> None:
    old = await member(trial, order=False)
    new = await member(trial, order=True)
    trial.silence(old)
    await old.close()
    [position] = await publish(trial, "a")
    claim = await trial.claim(new)
    held = Settlement(position, Later(9_007_199_254_740_991, "broken"))
    assert await new.settle([held]) == [True]
    if claim.token == 0:
        [letter] = await trial.broker.admin.dead(PARTED.name, "billing")
        assert (letter.stored.position, letter.reason, letter.error) == (position, "failed", "broken")
    else:  # it was switched before the event came
        [key] = await trial.broker.admin.keys(PARTED.name, "billing")
        assert key.first == position and key.due_ms is None
