"""What people do with groups: look at keys that wait, let them go on or drop them; move or forget a group."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import pytest
from msgspec.structs import replace

from millstream.brokers.base import Claim, Consumer, Dead, Done, Later, ParkedKey, Position, Start
from millstream.brokers.ledger import HELD_MS
from millstream.errors import BrokerRefused
from millstream.testing.suite.order import member, offsets, publish
from millstream.testing.suite.streams import later_ms
from millstream.testing.suite.trial import ORDERS, PARTED, Trial, settle, where

FAR_MS = 3_600_000  # so far ahead that nothing is tried again within a test

ordered = where(lambda traits: traits.order)


async def park(trial: Trial, consumer: Consumer, keys: str, due_ms: int = HELD_MS) -> list[Position]:
    """Publish events of these keys: the first of each key fails, the others wait behind it."""
    positions = await publish(trial, keys)
    claims = await trial.claims(consumer, len(keys))
    failed: set[str | None] = set()
    for claim in claims:
        key = claim.record.key
        outcome = Later(due_ms, "") if key in failed else Later(due_ms, f"{key} broke")
        outcome = replace(outcome, counted=key not in failed)
        failed.add(key)
        assert await consumer.settle([settle(claim, outcome)]) == [True]
    return positions


async def waiting(trial: Trial, group: str = "billing") -> list[ParkedKey]:
    return await trial.broker.admin.keys(PARTED.name, group)


async def worked_off(trial: Trial, consumer: Consumer, count: int) -> list[Claim]:
    """So many claims, each done before the next is asked for."""
    claims = []
    for _ in range(count):
        claims.append(await trial.claim(consumer))
        assert await consumer.settle([settle(claims[-1])]) == [True]
    return claims


async def left(trial: Trial, consumer: Consumer) -> None:
    """Let a member leave its group."""
    trial.silence(consumer)
    await consumer.close()


async def seek(trial: Trial, start: Start, *, stream: str = ORDERS.name, live: bool = False) -> None:
    await trial.broker.admin.seek(stream, "billing", start, live=live)


@ordered
async def test_keys_that_wait_are_listed_those_that_were_parked_first_first(trial: Trial) -> None:
    consumer = await member(trial)
    begun_ms = trial.clock.now_ms()
    due_ms = begun_ms + FAR_MS
    positions = await park(trial, consumer, "bab", due_ms)
    await later_ms(trial)
    held = await park(trial, consumer, "c")
    keys = await waiting(trial)
    assert {key.key for key in keys[:2]} == {"a", "b"} and keys[2].key == "c"
    [b] = [key for key in keys if key.key == "b"]
    assert (b.stream, b.group, b.partition, b.events, b.first) == ("parted", "billing", 0, 2, positions[0])
    assert (b.attempts, b.error) == (1, "b broke")
    assert b.due_ms is not None and abs(b.due_ms - due_ms) < 1_000
    assert abs(b.since_ms - begun_ms) < 10_000 and b.since_ms <= keys[2].since_ms
    assert (keys[2].due_ms, keys[2].events, keys[2].first) == (None, 1, held[0])
    assert await trial.broker.admin.keys(PARTED.name, "billing", 1) == keys[:1]


@ordered
async def test_the_events_that_wait_of_a_key_are_told_in_order(trial: Trial) -> None:
    consumer = await member(trial)
    positions = await park(trial, consumer, "abaa")
    [a] = [key for key in await waiting(trial) if key.key == "a"]
    events = await trial.broker.admin.parked(a)
    assert events == [event for event in await trial.stored(stream=PARTED) if event.record.key == "a"]
    assert [event.position for event in events] == [positions[0], positions[2], positions[3]]
    assert await trial.broker.admin.parked(a, 2) == events[:2]
    assert await trial.broker.admin.parked(replace(a, key="x")) == []


@ordered
async def test_an_event_without_a_key_waits_under_a_name_of_its_own(trial: Trial) -> None:
    consumer = await member(trial)
    [position] = await trial.publish(stream=PARTED)
    await consumer.settle([settle(await trial.claim(consumer), Later(HELD_MS, "broken"))])
    [key] = await waiting(trial)
    assert (key.key, key.first, key.events) == (f"\0{position.offset}", position, 1)
    assert await trial.broker.admin.release_keys([key]) == [True]
    assert offsets(await worked_off(trial, consumer, 1)) == [position]


@ordered
async def test_a_released_key_is_tried_at_once_as_if_for_the_first_time(trial: Trial) -> None:
    consumer = await member(trial)
    positions = await park(trial, consumer, "aba")
    await trial.nothing(consumer)
    [a] = [key for key in await waiting(trial) if key.key == "a"]
    assert await trial.broker.admin.release_keys([a]) == [True]
    claims = await worked_off(trial, consumer, 2)
    assert [(claim.position, claim.attempt) for claim in claims] == [(positions[0], 1), (positions[2], 1)]
    await trial.nothing(consumer)
    assert [key.key for key in await waiting(trial)] == ["b"]
    info = await trial.info(stream=PARTED)
    assert (info.done, info.pending, info.lag) == (2, 1, 0)


@ordered
async def test_a_key_that_is_released_before_it_is_due_need_not_wait(trial: Trial) -> None:
    consumer = await member(trial)
    positions = await park(trial, consumer, "a", trial.clock.now_ms() + FAR_MS)
    await left(trial, consumer)
    [key] = await waiting(trial)
    assert await trial.broker.admin.release_keys([key]) == [True]
    [claim] = await worked_off(trial, await member(trial), 1)
    assert (claim.position, claim.attempt) == (positions[0], 1)


@ordered
async def test_what_is_dropped_of_a_key_is_gone_and_later_events_of_it_run(trial: Trial) -> None:
    consumer = await member(trial)
    await park(trial, consumer, "aba")
    [a] = [key for key in await waiting(trial) if key.key == "a"]
    assert await trial.broker.admin.drop_keys([a]) == [2]
    assert [key.key for key in await waiting(trial)] == ["b"]
    await trial.nothing(consumer)
    info = await trial.info(stream=PARTED)
    assert (info.pending, info.lag, info.dead) == (1, 0, 0)
    again = await publish(trial, "a")
    assert offsets(await worked_off(trial, consumer, 1)) == again
    assert len(await trial.stored(stream=PARTED)) == 4


@ordered
async def test_nothing_is_done_about_keys_that_do_not_wait_any_more(trial: Trial) -> None:
    admin, consumer = trial.broker.admin, await member(trial)
    await park(trial, consumer, "ab")
    keys = await waiting(trial)
    assert await admin.drop_keys(keys[:1]) == [1]
    assert await admin.release_keys(keys) == [False, True]
    assert await admin.drop_keys([keys[0], replace(keys[1], group="nobody"), replace(keys[1], key="x")]) == [0, 0, 0]
    assert await admin.parked(keys[0]) == []
    assert await admin.release_keys([]) == [] and await admin.drop_keys([]) == []
    assert await admin.release_keys([replace(keys[1], group="nobody")]) == [False]
    assert offsets(await worked_off(trial, consumer, 1)) == [keys[1].first]


async def test_a_group_without_order_has_no_keys_that_wait(trial: Trial) -> None:
    consumer = await trial.consumer()
    [position] = await trial.publish(key="a")
    await consumer.settle([settle(await trial.claim(consumer), Later(trial.clock.now_ms() + FAR_MS, "busy"))])
    admin = trial.broker.admin
    assert await admin.keys("orders", "billing") == []
    assert await admin.keys("orders", "nobody") == await admin.keys("nowhere", "billing") == []
    key = ParkedKey("orders", "billing", 0, "a", 1, position, 1, None, "busy", 0)
    assert (await admin.parked(key), await admin.release_keys([key]), await admin.drop_keys([key])) == (
        [],
        [False],
        [0],
    )
    assert (await trial.info()).pending == 1


async def test_a_group_that_goes_back_to_the_beginning_sees_all_again_and_other_groups_do_not(trial: Trial) -> None:
    billing, other = await trial.consumer(), await trial.consumer("warehouse")
    positions = await trial.publish(4)
    claims = await trial.claims(billing, 4)
    await billing.settle([settle(claims[0], Dead("failed", "broken")), *(settle(claim) for claim in claims[1:3])])
    await other.settle([settle(claim) for claim in await trial.claims(other, 4)])
    await left(trial, billing)
    await seek(trial, "beginning")
    info = await trial.info()
    assert (info.lag, info.pending, info.dead) == (4, 0, 1)
    again = await trial.claims(await trial.consumer(), 4)
    assert sorted(offsets(again), key=str) == sorted(positions, key=str)
    assert {claim.attempt for claim in again} == {1}
    await trial.nothing(other)
    assert (await trial.info("warehouse")).lag == 0


@ordered
async def test_an_ordered_group_that_goes_back_sees_all_again_in_order(trial: Trial) -> None:
    consumer = await member(trial)
    other = await trial.consumer("warehouse", stream=PARTED, order=True)
    await park(trial, consumer, "aba")
    await publish(trial, "cd")
    await worked_off(trial, consumer, 2)
    await worked_off(trial, other, 5)
    await left(trial, consumer)
    await seek(trial, "beginning", stream=PARTED.name)
    assert await waiting(trial) == []
    info = await trial.info(stream=PARTED)
    assert (info.lag, info.pending) == (5, 0)
    again = await trial.claims(await member(trial), 5)
    assert offsets(again) == [event.position for event in await trial.stored(stream=PARTED)]
    assert {claim.attempt for claim in again} == {1}
    await trial.nothing(other)


async def test_a_group_that_goes_to_now_sees_only_what_comes_later(trial: Trial) -> None:
    await left(trial, await trial.consumer())
    await trial.publish(3)
    await seek(trial, "now")
    assert (await trial.info()).lag == 0
    consumer = await trial.consumer()
    await trial.nothing(consumer)
    later = await trial.publish()
    assert offsets([await trial.claim(consumer)]) == later


async def test_a_group_without_order_that_is_moved_forgets_all_that_is_pending(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(2)
    waiting, _ = await trial.claims(consumer, 2)
    assert await consumer.settle([settle(waiting, Later(trial.clock.now_ms(), "busy"))]) == [True]
    await left(trial, consumer)
    await seek(trial, "now")
    info = await trial.info()
    assert (info.lag, info.pending, info.scheduled) == (0, 0, 0)
    await trial.nothing(await trial.consumer())


@ordered
async def test_an_ordered_group_that_goes_to_now_keeps_what_is_parked(trial: Trial) -> None:
    consumer = await member(trial)
    parked = await park(trial, consumer, "aa")
    await left(trial, consumer)
    await publish(trial, "abc")
    before = await waiting(trial)
    await seek(trial, "now", stream=PARTED.name)
    assert await waiting(trial) == before
    info = await trial.info(stream=PARTED)
    assert (info.lag, info.pending) == (0, 2)
    consumer = await member(trial)
    await trial.nothing(consumer)
    later = await publish(trial, "a")
    assert await trial.broker.admin.release_keys(before) == [True]
    assert offsets(await worked_off(trial, consumer, 3)) == [*parked, *later]


async def test_a_group_can_go_to_a_time(trial: Trial) -> None:
    early = await trial.consumer()
    await trial.publish(2)
    await early.settle([settle(claim) for claim in await trial.claims(early, 2)])
    at_ms = await later_ms(trial)
    positions = await trial.publish(2)
    await early.settle([settle(claim) for claim in await trial.claims(early, 2)])
    await left(trial, early)
    await seek(trial, at_ms)
    consumer = await trial.consumer()
    assert offsets(await trial.claims(consumer, 2)) == positions
    await trial.nothing(consumer)


@ordered
async def test_an_ordered_group_that_goes_to_a_time_keeps_what_is_parked_before_it(trial: Trial) -> None:
    consumer = await member(trial)
    first = await park(trial, consumer, "ab")
    at_ms = await later_ms(trial)
    second = await publish(trial, "abc")
    await worked_off(trial, consumer, 1)
    await left(trial, consumer)  # which stores that the others are parked
    await seek(trial, at_ms, stream=PARTED.name)
    keys = {key.key: key for key in await waiting(trial)}
    assert {name: (key.events, key.first, key.attempts) for name, key in keys.items()} == {
        "a": (1, first[0], 1),
        "b": (1, first[1], 1),
    }
    assert await trial.broker.admin.drop_keys([keys["b"]]) == [1]
    consumer = await member(trial)
    assert sorted(offsets(await worked_off(trial, consumer, 2)), key=str) == sorted(second[1:], key=str)
    assert await trial.broker.admin.release_keys([keys["a"]]) == [True]
    assert offsets(await worked_off(trial, consumer, 2)) == [first[0], second[0]]


async def test_a_group_with_members_is_not_moved_and_nobody_moves_an_unknown_one(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(2)
    claims = await trial.claims(consumer, 2)
    for move in ("beginning", "now"):
        with pytest.raises(BrokerRefused, match="billing"):
            await seek(trial, move)
    with pytest.raises(BrokerRefused, match="nobody"):
        await trial.broker.admin.seek("orders", "nobody", "now", live=True)
    with pytest.raises(BrokerRefused, match="nowhere"):
        await trial.broker.admin.seek("nowhere", "billing", "now")
    assert await consumer.settle([settle(claim) for claim in claims]) == [True, True]


async def test_members_lose_what_they_hold_when_their_group_is_moved_all_the_same(trial: Trial) -> None:
    consumer = await trial.consumer()
    positions = await trial.publish(3)
    claims = await trial.claims(consumer, 3)
    assert await consumer.settle([settle(claims[0])]) == [True]
    await seek(trial, "beginning", live=True)
    assert await consumer.settle([settle(claims[1], Dead("failed"))]) == [False]
    lost: set[Position] = set()

    async def told() -> set[Position]:
        lost.update(trial.heard(consumer).lost)
        return lost

    await trial.eventually(told, lambda lost: positions[2] in lost)
    assert positions[0] not in lost
    assert await consumer.settle([settle(claims[2])]) == [False]
    again = await trial.claims(consumer, 3)
    assert sorted(offsets(again), key=str) == sorted(positions, key=str)
    assert {claim.attempt for claim in again} == {1}
    assert await consumer.settle([settle(claim) for claim in again]) == [True] * 3
    assert (await trial.info()).dead == 0


@ordered
async def test_owners_lose_their_partitions_when_their_group_is_moved_all_the_same(trial: Trial) -> None:
    consumer = await member(trial)
    positions = await publish(trial, "abc")
    claims = await trial.claims(consumer, 3)
    assert await consumer.settle([settle(claims[0])]) == [True]
    with pytest.raises(BrokerRefused, match="billing"):
        await seek(trial, "beginning", stream=PARTED.name)
    await seek(trial, "beginning", stream=PARTED.name, live=True)
    assert await consumer.settle([settle(claim) for claim in claims[1:]]) == [False, False]
    again = await trial.claims(consumer, 3)
    assert offsets(again) == positions
    assert {claim.attempt for claim in again} == {1} and again[0].token > claims[0].token
    assert await consumer.settle([settle(claim) for claim in again]) == [True] * 3


@ordered
async def test_a_parked_key_whose_head_runs_while_the_group_is_moved_is_lost_with_the_rest(trial: Trial) -> None:
    consumer = await member(trial)
    parked = await park(trial, consumer, "aa", 0)
    head = await trial.claim(consumer)
    assert head.stored.position == parked[0]
    await seek(trial, "now", stream=PARTED.name, live=True)
    assert await consumer.settle([settle(head)]) == [False]
    assert offsets(await worked_off(trial, consumer, 2)) == parked


async def test_a_forgotten_group_is_gone_with_its_dead_letters_and_begins_anew(trial: Trial) -> None:
    consumer, other = await trial.consumer(), await trial.consumer("warehouse")
    positions = await trial.publish(3)
    died, done, late = await trial.claims(consumer, 3)
    outcomes = settle(died, Dead("failed")), settle(done), settle(late, Later(trial.clock.now_ms() + FAR_MS, "busy"))
    assert await consumer.settle(outcomes) == [True] * 3
    with pytest.raises(BrokerRefused, match="billing"):
        await trial.broker.admin.forget("orders", "billing")
    [letter] = await trial.broker.admin.dead("orders", "billing")
    await left(trial, consumer)
    await trial.broker.admin.forget("orders", "billing")
    assert [info.group for info in await trial.broker.admin.groups("orders")] == ["warehouse"]
    assert await trial.broker.admin.dead("orders", "billing") == []
    assert await trial.broker.admin.replay([letter]) == [False]
    with pytest.raises(BrokerRefused, match="billing"):
        await trial.broker.admin.forget("orders", "billing")
    anew = await trial.consumer(owner="office")
    info = await trial.info()
    assert (info.owner, info.dead, info.done, info.pending, info.lag) == ("office", 0, 0, 0, 3)
    again = await trial.claims(anew, 3)
    assert sorted(offsets(again), key=str) == sorted(positions, key=str)
    assert {claim.attempt for claim in again} == {1}
    assert len(await trial.claims(other, 3)) == 3


@ordered
async def test_a_forgotten_ordered_group_is_gone_with_its_parked_keys(trial: Trial) -> None:
    consumer = await member(trial)
    positions = await park(trial, consumer, "aab")
    with pytest.raises(BrokerRefused, match="billing"):
        await trial.broker.admin.forget(PARTED.name, "billing")
    [key, *_] = await waiting(trial)
    await left(trial, consumer)
    await trial.broker.admin.forget(PARTED.name, "billing")
    assert await waiting(trial) == [] and await trial.broker.admin.parked(key) == []
    assert await trial.broker.admin.groups(PARTED.name) == []
    again = await trial.claims(await member(trial), 3)
    assert offsets(again) == positions and {claim.attempt for claim in again} == {1}


@ordered
async def test_a_forgotten_group_may_come_back_in_the_other_way(trial: Trial) -> None:
    consumer = await member(trial)
    positions = await park(trial, consumer, "ab")
    await left(trial, consumer)
    await trial.broker.admin.forget(PARTED.name, "billing")
    queue = await trial.consumer(stream=PARTED)
    claims = await trial.claims(queue, 2)
    assert sorted(offsets(claims), key=str) == sorted(positions, key=str)
    assert await queue.settle([settle(claim, Done()) for claim in claims]) == [True, True]


async def test_a_silent_member_of_a_forgotten_group_comes_back_to_a_new_one(trial: Trial) -> None:
    silent = await trial.consumer()
    positions = await trial.publish()
    claim = await trial.claim(silent)
    await forgotten_while_silent(trial, silent, ORDERS.name)
    assert await silent.settle([settle(claim)]) == [False]
    trial.revive(silent)
    assert offsets([await trial.claim(silent)]) == positions


@ordered
async def test_a_silent_member_of_a_forgotten_ordered_group_comes_back_to_a_new_one(trial: Trial) -> None:
    silent = await member(trial)
    positions = await publish(trial, "a")
    claim = await trial.claim(silent)
    await forgotten_while_silent(trial, silent, PARTED.name)
    assert await silent.settle([settle(claim)]) == [False]
    trial.revive(silent)
    assert offsets([await trial.claim(silent)]) == positions


async def forgotten_while_silent(trial: Trial, consumer: Consumer, stream: str) -> None:
    """Delete the group of a member that seems to be dead."""
    trial.silence(consumer)

    async def members() -> int:
        [info] = await trial.broker.admin.groups(stream)
        return info.consumers

    await trial.eventually(members, lambda count: count == 0)
    await trial.broker.admin.forget(stream, "billing")
