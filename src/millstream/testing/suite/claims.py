"""Groups: who gets which events, what becomes of them, and what people see of it."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import asyncio

import pytest

from millstream.brokers.base import (
    Claim,
    Consumer,
    Dead,
    Done,
    Later,
    Outcome,
    Position,
    Settlement,
    StreamSpec,
    Subscription,
)
from millstream.errors import GroupOwned, NotSupported, StreamMismatch
from millstream.testing.suite.streams import later_ms
from millstream.testing.suite.trial import ORDERS, PARTED, Trial, positions, settle, where

SOON_MS = 400


async def test_a_new_group_begins_with_the_first_event(trial: Trial) -> None:
    answers = await trial.publish(3)
    claims = await trial.claims(await trial.consumer(), 3)
    assert positions(claims) == answers
    assert [(claim.attempt, claim.suspect, claim.postponed, claim.fault) for claim in claims] == [(1, 0, 0, "")] * 3
    assert [claim.stored for claim in claims] == await trial.stored()


async def test_a_new_group_that_starts_now_gets_only_later_events(trial: Trial) -> None:
    await trial.publish(3)
    consumer = await trial.consumer(start="now")
    await trial.nothing(consumer)
    [late] = await trial.publish()
    assert (await trial.claim(consumer)).stored.position == late


async def test_a_new_group_that_starts_at_a_time_gets_what_was_stored_since(trial: Trial) -> None:
    await trial.publish(2)
    between_ms = await later_ms(trial)
    late = await trial.publish(2)
    consumer = await trial.consumer(start=between_ms)
    assert positions(await trial.claims(consumer, 2)) == late
    await trial.nothing(consumer)


async def test_the_start_counts_at_the_birth_of_a_group_only(trial: Trial) -> None:
    await trial.consumer(start="beginning")
    await trial.publish(2)
    assert len(await trial.claims(await trial.consumer(start="now"), 2)) == 2


async def test_every_group_gets_every_event(trial: Trial) -> None:
    groups = [await trial.consumer(name) for name in ("billing", "warehouse", "mail")]
    answers = await trial.publish(5)
    for consumer in groups:
        claims = await trial.claims(consumer, 5)
        assert positions(claims) == answers
        assert await consumer.settle([settle(claim) for claim in claims]) == [True] * 5


async def test_two_consumers_of_a_group_share_its_events(trial: Trial) -> None:
    first, second = await trial.consumer(), await trial.consumer(broker=await trial.another())
    answers = await trial.publish(10)
    mine, yours = await trial.claims(first, 5), await trial.claims(second, 5)
    assert sorted(map(str, positions(mine + yours))) == sorted(map(str, answers))
    await trial.nothing(first)
    await trial.nothing(second)


async def test_all_partitions_of_a_stream_are_consumed(trial: Trial) -> None:
    answers = [position for n in range(3) for position in await trial.publish(4, stream=PARTED, partition=n)]
    claims = await trial.claims(await trial.consumer(stream=PARTED), 12)
    assert set(positions(claims)) == set(answers)


async def test_a_fetch_claims_no_more_than_its_limit(trial: Trial) -> None:
    consumer = await trial.consumer(stream=PARTED)
    for partition in range(3):
        await trial.publish(5, stream=PARTED, partition=partition)
    first = await consumer.fetch(4, 1)
    assert 1 <= len(first) <= 4
    await consumer.release(frozenset(range(3)))
    assert len(await consumer.fetch(2, 1)) <= 2
    info = await trial.info(stream=PARTED)
    assert info.lag is not None and info.lag + info.pending == 15


async def test_a_fetch_never_returns_what_its_consumer_holds_already(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(3)
    held = await trial.claims(consumer, 2)
    assert (await trial.claim(consumer)).stored.position not in positions(held)
    await trial.nothing(consumer)


async def test_a_fetch_that_waits_ends_when_an_event_comes(trial: Trial) -> None:
    consumer = await trial.consumer()
    started_s = trial.clock.monotonic()
    async with asyncio.TaskGroup() as tasks:
        fetching = tasks.create_task(consumer.fetch(1, 30))
        await trial.turns()
        answers = await trial.publish()
    assert positions(fetching.result()) == answers
    assert trial.clock.monotonic() - started_s < 10


async def test_a_fetch_without_events_ends_when_its_time_is_up(trial: Trial) -> None:
    consumer = await trial.consumer()
    started_s = trial.clock.monotonic()
    assert await consumer.fetch(1, 0.2) == []
    assert 0.1 < trial.clock.monotonic() - started_s < 10


async def test_a_cancelled_fetch_loses_no_event(trial: Trial) -> None:
    consumer = await trial.consumer()
    found: list[Claim] = []
    answers: list[Position] = []
    for turns in range(12):  # each time the fetch is cut a little later
        async with asyncio.TaskGroup() as tasks:
            fetching = tasks.create_task(consumer.fetch(5, 1))
            await trial.turns(2)
            answers += await trial.publish()
            await trial.turns(turns)
            fetching.cancel()
        found += [] if fetching.cancelled() else fetching.result()
    found += await trial.claims(consumer, 12 - len(found))
    assert set(positions(found)) == set(answers)


async def test_an_event_that_is_done_never_comes_back(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(2)
    first, second = await trial.claims(consumer, 2)
    assert await consumer.settle([settle(first), settle(second, Done("not for us"))]) == [True, True]
    await trial.nothing(consumer)
    await trial.nothing(await trial.consumer())
    assert await trial.broker.admin.pending("orders", "billing", 10) == []


async def test_settling_twice_changes_nothing(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(3)
    done, late, dead = await trial.claims(consumer, 3)
    later = Later(trial.clock.now_ms() + 60_000, "not yet")
    settlements = [settle(done), settle(late, later), settle(dead, Dead("failed", "no"))]
    assert await consumer.settle(settlements) == [True, True, True]
    assert await consumer.settle(settlements) == [False, False, False]
    info = await trial.info()
    assert (info.done, info.retried, info.scheduled, info.dead, info.pending) == (1, 1, 1, 1, 1)


async def test_what_was_never_claimed_cannot_be_settled(trial: Trial) -> None:
    mine, yours = await trial.consumer(), await trial.consumer()
    [position] = await trial.publish()
    claim = await trial.claim(yours)
    assert await mine.settle([Settlement(position, Done())]) == [False]
    assert await yours.settle([settle(claim)]) == [True]


async def test_each_settlement_of_a_call_is_answered_for_itself(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(3)
    first, second, third = await trial.claims(consumer, 3)
    await consumer.settle([settle(second)])
    later = Later(trial.clock.now_ms(), "again")
    assert await consumer.settle([settle(first), settle(second, later), settle(third, later)]) == [True, False, True]
    assert positions([await trial.claim(consumer)]) == positions([third])


async def test_hundreds_of_events_of_all_outcomes_are_settled_in_one_call(trial: Trial) -> None:
    consumer = await trial.consumer(stream=PARTED)
    for partition in range(3):
        await trial.publish(250, stream=PARTED, partition=partition)
    claims = await trial.claims(consumer, 750)
    outcomes: list[Outcome] = [Done(), Later(trial.clock.now_ms() + 60_000, "later"), Dead("failed", "why")]
    settlements = [settle(claim, outcomes[n % 3]) for n, claim in enumerate(claims)]
    assert await consumer.settle(settlements) == [True] * 750
    info = await trial.info(stream=PARTED)
    assert (info.done, info.scheduled, info.dead, info.pending, info.lag) == (250, 250, 250, 250, 0)


async def test_an_event_for_later_comes_back_when_it_is_due_and_not_before(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish()
    claim = await trial.claim(consumer)
    at_ms = trial.clock.now_ms() + SOON_MS
    assert await consumer.settle([settle(claim, Later(at_ms, "busy"))]) == [True]
    await trial.nothing(consumer)
    again = await trial.claim(consumer)
    assert trial.clock.now_ms() >= at_ms - 20  # a server's clock counts other milliseconds
    assert (again.stored, again.attempt, again.suspect, again.postponed) == (claim.stored, 2, 0, 0)


async def test_an_event_that_is_due_wakes_a_fetch_that_waits(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish()
    claim = await trial.claim(consumer)
    due_s = trial.clock.monotonic() + SOON_MS / 1000
    await consumer.settle([settle(claim, Later(trial.clock.now_ms() + SOON_MS, "busy"))])
    assert positions(await consumer.fetch(1, 30)) == positions([claim])
    assert trial.clock.monotonic() - due_s < 5


async def test_an_event_put_off_does_not_use_up_an_attempt(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish()
    claim = await trial.claim(consumer)
    for times in (1, 2, 3):
        await consumer.settle([settle(claim, Later(trial.clock.now_ms(), "not open yet", counted=False))])
        claim = await trial.claim(consumer)
        assert (claim.attempt, claim.postponed) == (1, times)
    await consumer.settle([settle(claim, Later(trial.clock.now_ms(), "failed"))])
    claim = await trial.claim(consumer)
    assert (claim.attempt, claim.postponed) == (2, 3)
    assert (await trial.info()).retried == 1


async def test_an_event_that_waits_holds_up_no_other_and_no_other_group(trial: Trial) -> None:
    consumer, other = await trial.consumer("billing"), await trial.consumer("warehouse")
    await trial.publish(3)
    first, *_ = await trial.claims(consumer, 1)
    await consumer.settle([settle(first, Later(trial.clock.now_ms() + 60_000, "busy"))])
    assert len(await trial.claims(consumer, 2)) == 2
    claims = await trial.claims(other, 3)
    assert [claim.attempt for claim in claims] == [1, 1, 1]


async def test_whoever_is_free_gets_the_event_that_is_due(trial: Trial) -> None:
    first, second = await trial.consumer(), await trial.consumer(broker=await trial.another())
    await trial.publish()
    claim = await trial.claim(first)
    await first.settle([settle(claim, Later(trial.clock.now_ms(), "busy"))])
    again = await trial.claim(second)
    assert (again.stored, again.attempt) == (claim.stored, 2)
    assert await first.settle([settle(claim)]) == [False]


async def test_releasing_hands_back_one_partition_at_once_and_uncounted(trial: Trial) -> None:
    first, second = await trial.consumer(stream=PARTED), await trial.consumer(stream=PARTED)
    for partition in range(2):
        await trial.publish(2, stream=PARTED, partition=partition)
    claims = await trial.claims(first, 4)
    await first.release(frozenset({1}))
    taken = await trial.claims(second, 2)
    assert {claim.position.partition for claim in taken} == {1}
    assert [claim.attempt for claim in taken] == [1, 1]
    await trial.nothing(second)
    mine = [claim.position.partition == 0 for claim in claims]
    assert await first.settle([settle(claim) for claim in claims]) == mine


async def test_closing_hands_back_at_once_and_uncounted(trial: Trial) -> None:
    first, second = await trial.consumer(), await trial.consumer(broker=await trial.another())
    await trial.publish(3)
    await trial.claims(first, 3)
    trial.silence(first)
    await first.close()
    claims = await trial.claims(second, 3, within_s=5)
    assert [(claim.attempt, claim.suspect) for claim in claims] == [(1, 0)] * 3
    assert (await trial.info()).consumers == 1


async def test_what_is_handed_back_wakes_a_fetch_that_waits(trial: Trial) -> None:
    first, second = await trial.consumer(), await trial.consumer(broker=await trial.another())
    await trial.publish()
    held = await trial.claim(first)
    started_s = trial.clock.monotonic()
    async with asyncio.TaskGroup() as tasks:
        fetching = tasks.create_task(second.fetch(1, 30))
        await trial.turns()
        await first.release(frozenset({0}))
    assert positions(fetching.result()) == positions([held])
    assert trial.clock.monotonic() - started_s < 5


async def test_a_cancelled_settlement_can_be_sent_again(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(10)
    claims = await trial.claims(consumer, 10)
    for turns, claim in enumerate(claims):
        async with asyncio.TaskGroup() as tasks:
            settling = tasks.create_task(consumer.settle([settle(claim)]))
            await trial.turns(turns)
            settling.cancel()
        await consumer.settle([settle(claim)])
    await trial.nothing(consumer)
    info = await trial.info()
    assert (info.done, info.pending) == (10, 0)


async def test_finishing_is_settling_what_is_done(trial: Trial) -> None:
    consumer, other = await trial.consumer(stream=PARTED), await trial.consumer("warehouse", stream=PARTED)
    for partition in range(3):
        await trial.publish(2, stream=PARTED, partition=partition)
    claims = await trial.claims(consumer, 6)
    done, rest = positions(claims[:4]), positions(claims[4:])
    assert await other.finish(done) == [False] * 4
    assert await consumer.finish(done) == [True] * 4
    assert await consumer.finish([*done[:2], rest[0], *done[2:]]) == [False, False, True, False, False]
    assert await consumer.settle([settle(claim) for claim in claims]) == [*[False] * 5, True]
    await trial.nothing(consumer)
    info = await trial.info(stream=PARTED)
    assert (info.done, info.pending, info.lag) == (6, 0, 0)


async def test_what_is_tried_again_is_finished_like_all_else(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(2)
    first, second = await trial.claims(consumer, 2)
    await consumer.settle([settle(first, Later(trial.clock.now_ms(), "busy"))])
    again = await trial.claim(consumer)
    assert await consumer.finish(positions([second, again])) == [True, True]
    await trial.nothing(consumer)
    info = await trial.info()
    assert (info.done, info.pending, info.retried) == (2, 0, 1)


async def test_who_was_evicted_finishes_nothing(trial: Trial) -> None:
    silent, living = await trial.consumer(), await trial.consumer(broker=await trial.another())
    await trial.publish(2)
    held = positions(await trial.claims(silent, 2))
    trial.silence(silent)
    again = await trial.claims(living, 2)
    assert await silent.finish(held) == [False, False]
    assert await living.finish(positions(again)) == [True, True]


async def test_consumers_may_fetch_beside_settling_and_beating(trial: Trial) -> None:
    total, handled = 300, list[Position]()

    async def work(consumer: Consumer) -> None:
        while len(handled) < total:
            for claim in await consumer.fetch(20, 0.1):
                tasks.create_task(finish(consumer, claim))

    async def finish(consumer: Consumer, claim: Claim) -> None:
        await consumer.keep()
        [mine] = await consumer.settle([settle(claim)])
        assert mine and claim.attempt == 1
        handled.append(claim.position)

    consumers = [await trial.consumer(stream=PARTED, broker=await trial.another()) for _ in range(2)]
    async with asyncio.TaskGroup() as tasks:
        for consumer in consumers:
            tasks.create_task(work(consumer))
        for n in range(total // 10):
            await trial.publish(10, stream=PARTED, partition=n % 3)
    assert len(handled) == len(set(handled)) == total
    info = await trial.info(stream=PARTED)
    assert (info.done, info.pending, info.lag) == (total, 0, 0)


async def test_a_group_belongs_to_one_app_until_another_adopts_it(trial: Trial) -> None:
    await trial.consumer(owner="shop")
    with pytest.raises(GroupOwned, match="shop"):
        await trial.consumer(owner="office")
    await trial.publish(2)
    await trial.broker.admin.adopt("orders", "billing", "office")
    assert (await trial.info()).owner == "office"
    assert len(await trial.claims(await trial.consumer(owner="office"), 2)) == 2
    with pytest.raises(GroupOwned, match="office"):
        await trial.consumer(owner="shop")


async def test_nobody_joins_a_stream_that_is_declared_differently(trial: Trial) -> None:
    with pytest.raises(StreamMismatch, match="orders"):
        await trial.consumer(stream=StreamSpec("orders", partitions=2))


@where(lambda traits: not traits.order)
async def test_consuming_in_order_is_refused_by_name(trial: Trial) -> None:
    with pytest.raises(NotSupported):
        await trial.broker.subscribe(Subscription(PARTED, "billing", "shop", order=True))


async def test_the_numbers_of_a_group_add_up(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(8)
    claims = await trial.claims(consumer, 6)
    later, dead = Later(trial.clock.now_ms() + 60_000, "busy"), Dead("failed", "broken")
    outcomes: list[Outcome] = [Done(), Done("skipped"), later, dead, dead]
    settlements = [settle(claim, outcome) for claim, outcome in zip(claims, outcomes, strict=False)]
    assert await consumer.settle(settlements) == [True] * 5
    [letter, _] = await trial.broker.admin.dead("orders", "billing")
    assert await trial.broker.admin.drop([letter]) == [True]
    info = await trial.info()
    assert (info.stream, info.group, info.owner, info.consumers) == ("orders", "billing", "shop", 1)
    assert (info.lag, info.pending, info.scheduled, info.done) == (2, 2, 1, 2)
    assert (info.dead, info.retried, info.replayed, info.dropped) == (1, 1, 0, 1)


async def test_groups_are_told_by_name_and_an_unknown_stream_has_none(trial: Trial) -> None:
    await trial.consumer("warehouse")
    await trial.consumer("billing")
    assert [info.group for info in await trial.broker.admin.groups("orders")] == ["billing", "warehouse"]
    assert await trial.broker.admin.groups("parted") == []
    assert await trial.broker.admin.groups("nowhere") == []


async def test_the_admin_tells_who_holds_an_event_and_which_wait_until_when(trial: Trial) -> None:
    consumer = await trial.consumer()
    held_at, late_at, _ = await trial.publish(3)
    _, late, _ = await trial.claims(consumer, 3)
    due_ms = trial.clock.now_ms() + 60_000
    await consumer.settle([settle(late, Later(due_ms, "busy"))])
    held, waiting = await trial.broker.admin.pending("orders", "billing", 2)
    assert (held.position, held.attempt, held.due_ms) == (held_at, 1, None)
    assert held.consumer
    assert (waiting.position, waiting.consumer, waiting.attempt) == (late_at, "", 1)
    assert waiting.due_ms is not None and abs(waiting.due_ms - due_ms) < 1_000


async def test_a_group_of_a_stream_may_have_the_name_of_a_group_of_another(trial: Trial) -> None:
    orders, parted = await trial.consumer(stream=ORDERS), await trial.consumer(stream=PARTED)
    await trial.publish(2)
    assert len(await trial.claims(orders, 2)) == 2
    await trial.nothing(parted)
