"""A member of an ordered group, when its ledger refuses, loses replies, or has given its partitions to somebody else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from millstream.brokers.base import Dead, Position
from millstream.brokers.ledger import Committed, Grant, State
from millstream.errors import BrokerDown, BrokerError, BrokerFull, LeaseLost
from tests.ordered.scripted import (
    LEASE_S,
    answers,
    later,
    loses_the_reply,
    opened,
    park,
    positions,
    refuses,
    settlement,
    waits,
    works,
)

DOWN = BrokerDown("nobody answers")


# Commits.


@pytest.mark.parametrize("fault", [refuses(DOWN), loses_the_reply(DOWN)])
async def test_a_commit_without_a_reply_is_sent_again_as_it_was(fault: Any) -> None:
    place = await opened()
    consumer, script = await place.member()
    await place.publish("ab")
    first, second = await consumer.fetch(10, 0)
    script.next("commit", fault)
    with pytest.raises(BrokerDown):
        await consumer.settle([settlement(first, mail="one")])
    assert await consumer.settle([settlement(first, mail="one"), settlement(second, mail="two")]) == [True, True]
    [lost], [again], [rest] = script.asked("commit")
    assert again is lost and rest.seq == lost.seq + 1
    assert await place.mails() == ["one", "two"] and place.group.count["done"] == 2
    assert await consumer.settle([settlement(first)]) == [False]


async def test_a_commit_that_is_cancelled_is_sent_again_as_it_was() -> None:
    place = await opened()
    consumer, script = await place.member()
    await place.publish("a")
    [claim] = await consumer.fetch(10, 0)
    script.next("commit", waits(asyncio.Event()))
    async with asyncio.TaskGroup() as tasks:
        settling = tasks.create_task(consumer.settle([settlement(claim, mail="one")]))
        await place.clock.advance(0)
        settling.cancel()
    assert await consumer.settle([settlement(claim, mail="one")]) == [True]
    [cancelled], [again] = script.asked("commit")
    assert again is cancelled and await place.mails() == ["one"]


async def test_a_heartbeat_stores_what_a_settling_could_not() -> None:
    place = await opened()
    consumer, script = await place.member()
    await place.publish("a")
    [claim] = await consumer.fetch(10, 0)
    script.next("commit", refuses(DOWN))
    with pytest.raises(BrokerDown):
        await consumer.settle([settlement(claim)])
    await consumer.keep()
    assert place.group.parts[0].w == 1


async def test_a_full_broker_stores_what_needs_no_room_of_all_partitions_before_it_is_told() -> None:
    place = await opened(2)
    consumer, script = await place.member()
    await place.publish("ab", 0)
    await place.publish("cd", 1)
    claims = await consumer.fetch(10, 0)
    script.next("commit", answers([Committed(State.FULL), Committed(State.FULL)]))
    mailing = [claim.record.key in ("a", "c") for claim in claims]
    settlements = [
        settlement(claim, mail="sent") if mails else later(claim) for claim, mails in zip(claims, mailing, strict=True)
    ]
    with pytest.raises(BrokerFull):
        await consumer.settle(settlements)
    assert [part.events_parked() for part in place.group.parts] == [1, 1]
    assert await place.mails() == [] and [part.w for part in place.group.parts] == [0, 0]
    assert await consumer.settle(settlements) == mailing  # what was stored already is not ours any more
    assert await place.mails() == ["sent", "sent"] and [part.w for part in place.group.parts] == [2, 2]


async def test_outputs_of_several_events_without_room_together_are_stored_event_by_event_while_there_is_some() -> None:
    place = await opened()
    consumer, script = await place.member()
    await place.publish("abc")
    claims = await consumer.fetch(10, 0)
    for fault in (answers([Committed(State.FULL)]), works, answers([Committed(State.FULL)])):
        script.next("commit", fault)
    with pytest.raises(BrokerFull):
        await consumer.settle([settlement(claim, mail=claim.record.id) for claim in claims])
    assert [commit.several for [commit] in script.asked("commit")] == [True, False, False]
    ids = [claim.record.id for claim in claims]
    assert await place.mails() == ids[:1] and place.group.parts[0].w == 1
    rest = [settlement(claim, mail=claim.record.id) for claim in claims[1:]]
    assert await consumer.settle(rest) == [True, True]
    assert await place.mails() == ids


async def test_without_room_for_dead_letters_the_event_waits_and_its_outcome_is_taken() -> None:
    place = await opened()
    consumer, script = await place.member()
    await place.publish("a")
    [claim] = await consumer.fetch(10, 0)
    script.next("commit", answers([Committed(State.DEAD_FULL)]))
    assert await consumer.settle([settlement(claim, Dead("failed"))]) == [True]
    assert place.group.dead == {}
    assert await consumer.fetch(10, 0) == []
    await place.clock.advance(300)
    await consumer.keep()
    assert [claim.attempt for claim in await consumer.fetch(10, 0)] == [1]


# What is lost.


async def test_what_somebody_else_has_is_refused_told_once_and_not_acquired_before() -> None:
    place = await opened()
    consumer, script = await place.member()
    await place.publish("abc")
    claims = await consumer.fetch(10, 0)
    place.group.parts[0].fence()
    assert await consumer.settle([settlement(claims[0])]) == [False]
    assert await consumer.settle([settlement(claims[1])]) == [False]
    await place.clock.advance(1)
    before = len(script.asked("acquire"))
    assert (await consumer.keep()).lost == {claims[1].position, claims[2].position}
    assert len(script.asked("acquire")) == before and await consumer.fetch(10, 0) == []
    assert (await consumer.keep()).lost == frozenset()
    assert len(script.asked("acquire")) == before + 1
    again = await consumer.fetch(10, 0)
    assert positions(again) == positions(claims) and again[0].token > claims[0].token


async def test_a_look_finds_what_was_lost() -> None:
    place = await opened(2)
    consumer, _ = await place.member()
    await place.publish("a", 0)
    await place.publish("b", 1)
    claims = await consumer.fetch(10, 0)
    place.group.parts[1].fence()
    await place.clock.advance(1)
    kept = await consumer.keep()
    assert kept.lost == {claim.position for claim in claims if claim.position.partition == 1}
    results = await consumer.settle([settlement(claim) for claim in claims])
    assert results == [claim.position.partition == 0 for claim in claims]


async def test_the_end_of_a_life_loses_all_and_the_next_beat_begins_another() -> None:
    place = await opened(2)
    consumer, script = await place.member()
    await place.publish("a", 0)
    await place.publish("b", 1)
    claims = await consumer.fetch(10, 0)
    script.next("beat", refuses(LeaseLost("unknown member")))
    assert (await consumer.keep()).lost == set(positions(claims))
    assert await consumer.settle([settlement(claim) for claim in claims]) == [False, False]
    assert (await consumer.keep()).lost == frozenset()
    assert len(set(script.asked("enter"))) == 2
    await place.clock.advance(LEASE_S)  # the name of the first life falls silent
    await consumer.keep()
    again = await consumer.fetch(10, 0)
    assert {claim.suspect for claim in again} == {1} and set(positions(again)) == set(positions(claims))


@pytest.mark.parametrize("step", ["commit", "read", "heads"])
async def test_the_end_of_a_life_is_noticed_wherever_it_is_said(step: str) -> None:
    place = await opened()
    consumer, script = await place.member()
    await park(place, consumer, "a")
    await place.publish("b")
    if step == "read":
        await consumer.fetch(1, 0)
    claims = await consumer.fetch(10, 0)
    script.next(step, refuses(LeaseLost("unknown member")))
    if step == "commit":
        assert await consumer.settle([settlement(claims[0])]) == [False]
    elif step == "read":
        assert await consumer.fetch(10, 0) == []
    else:
        await consumer.settle([later(claims[0])])
        assert await consumer.fetch(10, 0) == []
    await consumer.keep()
    assert await consumer.settle([settlement(claim) for claim in claims]) == [False] * len(claims)
    await consumer.keep()
    assert len(set(script.asked("enter"))) == 2


async def test_a_handler_of_a_suspect_does_not_start_without_the_lease() -> None:
    place = await opened()
    consumer, script = await place.member()
    [unknown] = await place.publish("a")
    with pytest.raises(LeaseLost):
        await consumer.begin([unknown])
    [claim] = await consumer.fetch(10, 0)
    await consumer.begin([claim.position])
    assert script.asked("begin") == [(0, ["1"])]
    place.group.parts[0].fence()
    with pytest.raises(LeaseLost):
        await consumer.begin([claim.position])
    assert (await consumer.keep()).lost == {claim.position}


async def test_a_life_that_ends_while_it_begins_is_tried_again() -> None:
    place = await opened()
    await place.publish("a")
    consumer, script = await place.member(enter=False)
    script.next("look", refuses(LeaseLost("unknown member")))
    await consumer.enter()
    script.next("enter", refuses(LeaseLost("unknown member")), refuses(LeaseLost("unknown member")))
    for attempt in (consumer.keep(), consumer.fetch(10, 0)):
        with pytest.raises(BrokerDown, match="unknown member") as told:
            await attempt
        assert told.value.retryable
    await consumer.keep()
    assert len(await consumer.fetch(10, 0)) == 1
    assert len(set(script.asked("enter"))) == 4 and len(place.group.members) == 2  # the first one falls silent


@pytest.mark.parametrize("beats", [1, 2])
async def test_no_suspect_starts_in_a_partition_that_is_lost_while_another_one_is_asked_about(beats: int) -> None:
    place = await opened(2)
    consumer, script = await place.member()
    await place.publish("a", 0)
    await place.publish("b", 1)
    held = sorted(positions(await consumer.fetch(10, 0)), key=lambda position: position.partition)
    answered = asyncio.Event()
    script.next("begin", waits(answered))
    async with asyncio.TaskGroup() as tasks:
        beginning = tasks.create_task(_refused(consumer.begin(held)))
        await place.clock.advance(0)
        place.group.parts[1].fence()
        await place.clock.advance(1)
        for _ in range(beats):  # with the second one it is acquired anew
            await consumer.keep()
        answered.set()
    assert "partition 1" in beginning.result() and script.asked("begin") == [(0, ["1"])]
    again = await consumer.fetch(10, 0)
    assert positions(again) == held[1:] * (beats - 1)
    assert await consumer.settle([settlement(claim) for claim in again]) == [True] * len(again)


async def _refused(beginning: Awaitable[None]) -> str:
    with pytest.raises(LeaseLost) as told:
        await beginning
    return str(told.value)


async def test_a_partition_whose_grant_never_came_is_acquired_again() -> None:
    place = await opened()
    await place.publish("a")
    first, _ = await place.member()
    consumer, script = await place.member()
    await first.close()
    script.next("acquire", loses_the_reply(DOWN))
    await place.clock.advance(1)
    with pytest.raises(BrokerDown):
        await consumer.keep()
    await place.clock.advance(1)
    await consumer.keep()
    assert script.asked("acquire") == [0, 0]
    assert len(await consumer.fetch(10, 0)) == 1


@pytest.mark.parametrize(("grant", "says"), [({"regressed": True}, "begins anew"), ({"lost": 7}, "7 events of")])
async def test_what_is_gone_of_the_log_is_said(
    grant: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = await opened()
    first, _ = await place.member()
    consumer, script = await place.member()
    await first.close()
    script.next("acquire", answers(Grant(0, 9, "", **grant)))
    await place.clock.advance(1)
    await consumer.keep()
    assert [record.levelname for record in caplog.records if says in record.getMessage()] == ["ERROR"]


# Giving partitions away, and leaving.


async def test_what_others_ask_for_is_told_once_and_given_to_them_after_its_progress_is_stored() -> None:
    place = await opened(2)
    first, script = await place.member()
    for partition in (0, 1):
        await place.publish("ab", partition)
    claims = await first.fetch(10, 0)
    second, theirs = await place.member()
    await place.clock.advance(1)
    [partition] = (await first.keep()).drain
    await place.publish("c", partition)
    await place.clock.advance(1)
    assert (await first.keep()).drain == frozenset()
    assert await first.fetch(10, 0) == []
    script.next("commit", refuses(DOWN))
    with pytest.raises(BrokerDown):
        await first.settle([settlement(claim) for claim in claims])
    script.calls.clear()
    await first.release(frozenset([partition]))
    assert [name for name, _ in script.calls] == ["commit", "look", "release"]
    assert script.asked("release") == [(partition, theirs.asked("enter")[0])]
    part = place.group.parts[partition]
    assert (part.owner, part.next, part.clean, part.w) == ("", theirs.asked("enter")[0], True, 2)
    await place.clock.advance(1)
    await second.keep()
    assert [claim.record.key for claim in await second.fetch(10, 0)] == ["c"]


async def test_who_leaves_looks_once_however_many_partitions_are_given_back() -> None:
    place = await opened(8)
    consumer, script = await place.member()
    script.calls.clear()
    await consumer.close()
    assert len(script.asked("release")) == 8 and len(script.asked("look")) == 1


async def test_what_is_asked_for_and_at_rest_goes_with_the_beat() -> None:
    place = await opened(2)
    first, script = await place.member()
    _, theirs = await place.member()
    await place.clock.advance(1)
    assert len((await first.keep()).drain) == 1
    assert [heir for _, heir in script.asked("release")] == theirs.asked("enter")


async def test_a_release_that_failed_is_done_with_a_later_beat() -> None:
    place = await opened(2)
    first, script = await place.member()
    await place.member()
    script.next("release", refuses(DOWN))
    await place.clock.advance(1)
    with pytest.raises(BrokerDown):
        await first.keep()
    await place.clock.advance(1)
    await first.keep()
    assert len(script.asked("release")) == 2 and [part.owner for part in place.group.parts].count("") == 1


async def test_what_is_held_of_a_released_partition_comes_to_the_next_owner_uncounted() -> None:
    place = await opened()
    first, _ = await place.member()
    parked = await park(place, first, "a")
    await place.publish("b")
    held = await first.fetch(10, 0)
    held += await first.fetch(10, 0)
    assert sorted(claim.attempt for claim in held) == [1, 2]
    second, _ = await place.member()
    await first.release(frozenset([0]))
    assert await first.settle([settlement(claim) for claim in held]) == [False, False]
    await first.close()
    await place.clock.advance(1)
    await second.keep()
    again = await second.fetch(10, 0)
    again += await second.fetch(10, 0)
    assert sorted((claim.attempt, claim.suspect) for claim in again) == [(1, 0), (2, 0)]
    assert parked[0] in positions(again)


async def test_what_is_lost_or_acquired_anew_while_it_is_released_is_left_alone() -> None:
    place = await opened(2)
    consumer, script = await place.member()
    await place.publish("a", 0)
    await place.publish("b", 1)
    claims = await consumer.fetch(10, 0)
    answered = asyncio.Event()
    script.next("release", waits(answered))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(consumer.release(frozenset([0, 1])))
        await place.clock.advance(1)
        [(released, _)] = script.asked("release")
        place.group.parts[1 - released].fence()
        assert {position.partition for position in (await consumer.keep()).lost} == {1 - released}
        [again] = await consumer.fetch(10, 0)
        assert again.position in positions(claims) and again.position.partition == released
        answered.set()
    assert script.asked("release") == [(released, "")]
    assert await consumer.settle([settlement(again)]) == [True]


async def test_a_release_whose_life_ends_begins_no_other_one() -> None:
    place = await opened(2)
    consumer, script = await place.member()
    await park(place, consumer, "a", "b")
    held = await consumer.fetch(10, 0)
    script.next("commit", refuses(LeaseLost("unknown member")))
    await consumer.release(frozenset([0, 1]))
    assert len(script.asked("enter")) == 1 and script.asked("release") == []
    assert await consumer.settle([settlement(claim) for claim in held]) == [False, False]


@pytest.mark.parametrize("step", ["commit", "look", "release", "leave"])
@pytest.mark.parametrize("error", [DOWN, LeaseLost("unknown member"), BrokerError("broken")])
async def test_closing_never_raises_and_can_be_repeated(step: str, error: BrokerError) -> None:
    place = await opened()
    consumer, script = await place.member()
    await park(place, consumer, "a")
    assert len(await consumer.fetch(10, 0)) == 1  # a head, whose end closing must store
    script.next(step, refuses(error))
    await consumer.close()
    assert script.asked(step)
    await consumer.close()


async def test_a_closed_consumer_does_not_come_to_life_again() -> None:
    place = await opened()
    consumer, _ = await place.member()
    await consumer.close()
    await place.clock.advance(1)
    with pytest.raises(BrokerError, match="closed"):
        await consumer.keep()
    assert place.group.members == {}


async def test_closing_leaves_the_group_and_its_partitions_to_others() -> None:
    place = await opened(2)
    consumer, script = await place.member()
    await consumer.close()
    assert place.group.members == {} and [part.owner for part in place.group.parts] == ["", ""]
    assert [name for name, _ in script.calls][-1] == "leave"


async def test_closing_stores_all_that_was_settled() -> None:
    place = await opened()
    first, _ = await place.member()
    await place.publish("abc")
    claims = await first.fetch(10, 0)
    await first.settle([settlement(claims[1])])
    await first.settle([settlement(claims[2])])
    await first.close()
    second, _ = await place.member()
    assert positions(await second.fetch(10, 0)) == positions(claims[:1])


async def test_finishing_tells_of_each_event_whether_it_was_ours_whichever_partition_it_lies_in() -> None:
    place = await opened(3)
    consumer, _ = await place.member()
    found = [await place.publish("ab", partition) for partition in range(3)]
    await consumer.fetch(6, 0)
    part = place.group.parts[1]
    part.owner, part.epoch = "another", part.epoch + 1
    nowhere = Position(7, "1")
    mixed = [found[0][0], found[1][0], nowhere, found[2][1], found[1][1], found[2][0]]
    assert await consumer.finish(mixed) == [True, False, False, True, False, True]
    assert await consumer.finish([found[2][0], found[0][1]]) == [False, True]
    assert [part.w for part in place.group.parts] == [2, 0, 2]


async def test_an_outcome_beyond_one_that_is_not_settled_is_refused_too_when_somebody_has_taken_over() -> None:
    place = await opened()
    consumer, _ = await place.member()
    await place.publish("abc")
    claims = await consumer.fetch(3, 0)
    assert await consumer.settle([settlement(claims[1])]) == [True]
    part = place.group.parts[0]
    part.owner, part.epoch = "another", part.epoch + 1
    assert await consumer.settle([settlement(claims[2])]) == [False]
