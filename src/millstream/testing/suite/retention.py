"""Retention: what may go goes, what a group needs stays, what goes all the same is counted.

How many events stay may differ from what was asked for by `Place.spare` in each partition; so there are always more.
"""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import pytest

from millstream.brokers.base import (
    Consumer,
    Dead,
    Later,
    Policy,
    Position,
    StreamSpec,
    Subscription,
    Tended,
)
from millstream.errors import GroupOwned, NotSupported
from millstream.testing.suite.people import FAR_MS, left
from millstream.testing.suite.streams import later_ms
from millstream.testing.suite.trial import Trial, settle, where

retains = where(lambda traits: traits.retention)
retains_in_order = where(lambda traits: traits.retention and traits.order)

MANY = 300  # more than any broker may keep beyond what was asked for, and some
FEW = 20
KEPT = StreamSpec("kept")
FORGET_MS = 6_000  # half of it, in which a group is told to fade, is long enough for a busy machine
BRIEF_MS = 2_000  # longer than a member of these tests is silent


async def filled(trial: Trial, policy: Policy, *, count: int = MANY, group: bool = True) -> StreamSpec:
    """A stream with so many events that the group `billing`, which has no members, has all before it."""
    stream = await trial.declared(policy)
    if group:
        await create(trial, stream)
    await trial.publish(count, stream=stream)
    return stream


async def create(trial: Trial, stream: StreamSpec, group: str = "billing") -> None:
    await trial.broker.create(Subscription(stream, group, "shop", lease_s=trial.place.lease_s))


async def work_off(trial: Trial, consumer: Consumer, count: int) -> None:
    """Claim so many events and finish them."""
    while count:
        claims = await trial.claims(consumer, min(count, 100))
        assert await consumer.settle([settle(claim) for claim in claims]) == [True] * len(claims)
        count -= len(claims)


async def places(trial: Trial, stream: StreamSpec, partition: int = 0) -> list[Position]:
    return [event.position for event in await trial.stored(stream=stream, partition=partition)]


async def shrunk(trial: Trial, stream: StreamSpec, count: int, *, least: int | None = None) -> list[Position]:
    """Tend until there are no more than so many events, as nearly as the broker can; which."""

    async def stay() -> list[Position]:
        await trial.broker.tend(stream.name)
        return await places(trial, stream)

    stayed = await trial.eventually(stay, lambda found: len(found) <= count + trial.place.spare)
    assert len(stayed) >= (count if least is None else least)
    return stayed


@retains
async def test_a_stream_without_a_policy_keeps_everything(trial: Trial) -> None:
    positions = await trial.publish(FEW)
    assert await trial.broker.tend("orders") == Tended()
    assert [event.position for event in await trial.stored()] == positions


@retains
async def test_beyond_a_number_of_events_the_oldest_go(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=FEW))
    before_ms = trial.clock.now_ms()
    positions = await trial.publish(MANY, stream=stream)
    stayed = await shrunk(trial, stream, FEW)
    assert stayed == positions[-len(stayed) :]
    about = await trial.about(stream)
    assert (about.events, about.trimmed) == (len(stayed), MANY - len(stayed)) and about.added in (MANY, None)
    assert about.first_ms is not None and about.first_ms >= before_ms - 1_000
    again = await trial.publish(2, stream=stream)
    assert (await places(trial, stream))[-2:] == again and len({*positions, *again}) == MANY + 2


@retains
async def test_what_is_removed_is_told_once(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=FEW))
    await trial.publish(MANY, stream=stream)
    tended = await trial.tended(stream, lambda found: found.trimmed >= MANY - FEW - trial.place.spare)
    await trial.tended(stream, lambda found: found.trimmed == 0)
    assert tended.trimmed <= MANY - FEW and tended.lost == {} and tended.pinned_by == ""
    assert len(await places(trial, stream)) == MANY - (await trial.about(stream)).trimmed


@retains
async def test_what_stays_is_read_from_wherever_a_reader_was(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=FEW))
    positions = await trial.publish(MANY, stream=stream)
    between_ms = await later_ms(trial)
    await trial.publish(2, stream=stream)
    stayed = await shrunk(trial, stream, FEW)
    for after in (None, positions[0], positions[MANY // 2 - trial.place.spare]):
        assert (await trial.broker.read(stream.name, 0, after, 2))[0].position == stayed[0]
    assert (await trial.broker.read(stream.name, 0, stayed[0], 1))[0].position == stayed[1]
    beginning = await trial.broker.locate(stream.name, "beginning")
    assert (await trial.broker.read(stream.name, 0, beginning[0], 1))[0].position == stayed[0]
    between, now = [(await trial.broker.locate(stream.name, start))[0] for start in (between_ms, "now")]
    found = await trial.broker.read(stream.name, 0, between, 10)
    assert [event.position for event in found] == stayed[-2:]
    assert await trial.broker.read(stream.name, 0, now, 10) == []
    await trial.broker.wait(stream.name, {0: positions[0]}, 30)


@retains
async def test_of_each_partition_goes_its_share(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=150), partitions=3)
    for partition, count in ((0, 2 * MANY), (1, MANY)):
        await trial.publish(count, stream=stream, partition=partition, key="a")

    async def counts() -> list[int]:
        await trial.broker.tend(stream.name)
        return [len(await places(trial, stream, partition)) for partition in range(3)]

    spare = trial.place.spare
    found = await trial.eventually(counts, lambda found: max(found[:2]) <= 75 + spare)
    assert min(found[:2]) >= 75 and found[2] == 0


@retains
async def test_what_is_older_than_was_asked_for_goes_and_nothing_younger(trial: Trial) -> None:
    age_ms = 1_000
    stream = await trial.declared(Policy(age_ms=age_ms))
    begun_ms = []
    batches = []
    for _ in range(2):
        begun_ms.append(await later_ms(trial))
        batches.append(await trial.publish(MANY, stream=stream))

    async def stay() -> set[Position]:
        await trial.broker.tend(stream.name)
        stayed, now_ms = set(await places(trial, stream)), trial.clock.now_ms()
        for since_ms, batch in zip(begun_ms, batches, strict=True):
            assert stayed.issuperset(batch) or now_ms - since_ms >= age_ms - 50
        return stayed

    await trial.eventually(stay, lambda stayed: len(stayed) <= trial.place.spare)


@retains
async def test_beyond_a_size_the_oldest_go(trial: Trial) -> None:
    stream = await trial.declared(Policy(bytes=100_000))
    positions = await trial.broker.append(stream.name, [trial.record(b"x" * 1_000) for _ in range(400)])
    stayed = await shrunk(trial, stream, 100, least=40)  # a broker may count what it needs itself for each event
    assert stayed == positions[-len(stayed) :]


@retains
async def test_events_that_a_group_has_not_seen_stay(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW))
    await create(trial, stream, "audit")
    tended = await trial.tended(stream, lambda found: found.pinned_by != "")
    assert (tended.trimmed, tended.pinned_by in ("billing", "audit"), tended.lost) == (0, True, {})
    await work_off(trial, await trial.consumer(stream=stream), MANY)
    tended = await trial.tended(stream, lambda found: found.pinned_by == "audit")
    assert tended.trimmed == 0 and len(await places(trial, stream)) == MANY
    await work_off(trial, await trial.consumer("audit", stream=stream), MANY)
    await shrunk(trial, stream, FEW)
    await trial.tended(stream, lambda found: found.pinned_by == "")
    for group in ("billing", "audit"):
        info = await trial.info(group, stream=stream)
        assert (info.lag, info.pending, info.done, info.lost) == (0, 0, MANY, 0)


@retains
async def test_a_group_that_is_made_before_it_has_members_gets_every_event(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW))
    await create(trial, stream)  # again: it is there already
    with pytest.raises(GroupOwned):
        await trial.broker.create(Subscription(stream, "billing", "another app"))
    info = await trial.info(stream=stream)
    assert (info.owner, info.consumers, info.lag, info.pending) == ("shop", 0, MANY, 0)
    await trial.tended(stream, lambda found: found.pinned_by == "billing")
    await work_off(trial, await trial.consumer(stream=stream), MANY)
    assert (await trial.info(stream=stream)).lost == 0


@retains
async def test_a_group_that_is_made_for_now_does_not_need_what_was_before(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW), group=False)
    await trial.broker.create(Subscription(stream, "billing", "shop", "now", trial.place.lease_s))
    assert (await trial.info(stream=stream)).lag == 0
    await shrunk(trial, stream, FEW)
    later = await trial.publish(stream=stream)
    assert [(await trial.claim(await trial.consumer(stream=stream))).stored.position] == later


@retains
async def test_events_that_are_worked_on_or_wait_stay_and_so_does_what_came_later(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW))
    consumer = await trial.consumer(stream=stream)
    [first] = await trial.claims(consumer, 1)
    await work_off(trial, consumer, MANY - 1)
    await trial.tended(stream, lambda found: found.pinned_by == "billing")
    assert len(await places(trial, stream)) == MANY
    assert await consumer.settle([settle(first, Later(trial.clock.now_ms() + 500, "busy"))]) == [True]
    await trial.tended(stream, lambda found: found.pinned_by == "billing")
    assert len(await places(trial, stream)) == MANY
    again = await trial.claim(consumer)
    assert (again.stored, again.attempt) == (first.stored, 2)
    assert await consumer.settle([settle(again)]) == [True]
    await shrunk(trial, stream, FEW)
    info = await trial.info(stream=stream)
    assert (info.done, info.lost, info.lag, info.pending) == (MANY, 0, 0, 0)


@retains
async def test_a_dead_letter_can_be_replayed_whatever_went_since(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW))
    consumer = await trial.consumer(stream=stream)
    [first] = await trial.claims(consumer, 1)
    await work_off(trial, consumer, MANY - 1)
    assert await consumer.settle([settle(first, Dead("failed", "broken"))]) == [True]
    tended = await trial.tended(stream, lambda found: found.pinned_by != "" or found.trimmed > 0)
    assert tended.pinned_by in ("", "dead letters of billing")
    [letter] = await trial.broker.admin.dead(stream.name, "billing")
    assert letter.stored == first.stored
    assert await trial.broker.admin.replay([letter]) == [True]
    again = await trial.claim(consumer)
    assert (again.stored, again.attempt) == (first.stored, 1)
    assert await consumer.settle([settle(again)]) == [True]
    await shrunk(trial, stream, FEW)
    assert (await trial.info(stream=stream)).lost == 0


@retains_in_order
async def test_what_waits_of_a_key_comes_in_order_whatever_went_since(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=FEW))
    consumer = await trial.consumer(stream=stream, order=True)
    parked = await trial.publish(2, stream=stream, key="a")
    first, second = await trial.claims(consumer, 2)
    outcomes = [Later(trial.clock.now_ms() + FAR_MS, "broken"), Later(0, "", counted=False)]
    assert await consumer.settle([settle(first, outcomes[0]), settle(second, outcomes[1])]) == [True, True]
    await trial.publish(MANY, stream=stream, key="b")
    await work_off(trial, consumer, MANY)
    stayed = await shrunk(trial, stream, FEW)
    assert set(stayed).isdisjoint(parked)
    assert await trial.broker.admin.release_keys(await trial.broker.admin.keys(stream.name, "billing")) == [True]
    for position in parked:
        claim = await trial.claim(consumer)
        assert claim.position == position
        assert await consumer.settle([settle(claim)]) == [True]
    info = await trial.info(stream=stream)
    assert (info.done, info.pending, info.lag, info.lost) == (MANY + 2, 0, 0, 0)


@retains_in_order
async def test_events_that_an_ordered_group_has_not_settled_stay(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=FEW))
    consumer = await trial.consumer(stream=stream, order=True)
    await trial.publish(MANY, stream=stream, key="a")
    claims = await trial.claims(consumer, 2)
    await trial.tended(stream, lambda found: found.pinned_by == "billing")
    assert len(await places(trial, stream)) == MANY
    assert await consumer.settle([settle(claim) for claim in claims]) == [True, True]
    await work_off(trial, consumer, MANY - 2)
    await shrunk(trial, stream, FEW)
    info = await trial.info(stream=stream)
    assert (info.done, info.pending, info.lag, info.lost) == (MANY, 0, 0, 0)


@retains
async def test_who_is_there_and_does_nothing_keeps_events_however_long(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=FEW, forget_ms=BRIEF_MS))
    consumer = await trial.consumer(stream=stream)
    await trial.publish(MANY, stream=stream)
    begun_ms = trial.clock.now_ms()
    tended = await trial.tended(
        stream, lambda found: found.pinned_by == "billing" and trial.clock.now_ms() > begun_ms + 2 * BRIEF_MS
    )
    assert (tended.trimmed, tended.forgotten, tended.fading) == (0, frozenset(), {})
    seen_ms = (await trial.info(stream=stream)).seen_ms
    assert seen_ms is None or abs(seen_ms - trial.clock.now_ms()) < 5_000
    await work_off(trial, consumer, MANY)
    assert (await trial.info(stream=stream)).lost == 0


@retains
async def test_a_group_that_nobody_serves_is_told_to_fade_and_then_keeps_nothing(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=FEW, forget_ms=FORGET_MS))
    consumer = await trial.consumer(stream=stream)
    await trial.publish(MANY, stream=stream)
    await left(trial, consumer)
    seen_ms = trial.clock.now_ms()
    moments: set[int] = set()

    async def tend() -> Tended:
        found = await trial.broker.tend(stream.name)
        moments.update(found.fading.values())
        now_ms = trial.clock.now_ms()
        assert now_ms - seen_ms >= FORGET_MS - 2_000 or (found.trimmed, found.forgotten) == (0, frozenset())
        return found

    await trial.eventually(tend, lambda found: "billing" in found.forgotten, within_s=4 * FORGET_MS / 1_000)
    assert moments and all(abs(at_ms - seen_ms - FORGET_MS) < 2_000 for at_ms in moments)
    stayed = await shrunk(trial, stream, FEW)
    consumer = await trial.consumer(stream=stream)
    claims = await trial.claims(consumer, len(stayed))
    assert [claim.position for claim in claims] == stayed
    assert await consumer.settle([settle(claim) for claim in claims]) == [True] * len(claims)
    await lost(trial, stream, MANY - len(stayed))
    info = await trial.info(stream=stream)
    assert (info.lag, info.pending, info.done) == (0, 0, len(stayed))


@retains
async def test_a_group_is_announced_before_it_keeps_nothing_however_long_nobody_looked(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW, forget_ms=0))
    born_ms = (await trial.info(stream=stream)).seen_ms or 0
    await trial.tended(stream, lambda found: trial.clock.now_ms() > born_ms + 2 * BRIEF_MS)
    await trial.broker.admin.apply(stream.name, Policy(events=FEW, forget_ms=BRIEF_MS))
    before_ms = trial.clock.now_ms()
    moments: set[int] = set()

    async def tend() -> Tended:
        found = await trial.broker.tend(stream.name)
        moments.update(found.fading.values())
        assert moments, "forgotten before it was announced"
        at_ms = min(moments)
        assert at_ms >= before_ms + BRIEF_MS // 2 - 50
        assert trial.clock.now_ms() >= at_ms - 50 or (found.trimmed, found.forgotten) == (0, frozenset())
        return found

    await trial.eventually(tend, lambda found: "billing" in found.forgotten)
    assert all(at_ms < trial.clock.now_ms() + 50 for at_ms in moments)
    stayed = await shrunk(trial, stream, FEW)
    await lost(trial, stream, MANY - len(stayed))


@retains
async def test_a_group_is_announced_also_while_nothing_may_go_yet(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=2 * MANY, forget_ms=BRIEF_MS))
    tended = await trial.tended(stream, lambda found: found.fading.keys() == {"billing"})
    assert (tended.trimmed, tended.pinned_by) == (0, "")
    await trial.tended(stream, lambda found: found.forgotten == {"billing"} and not found.fading)


@retains
async def test_who_was_seen_again_is_announced_anew(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW, forget_ms=BRIEF_MS))
    [first_ms] = (await trial.tended(stream, lambda found: bool(found.fading))).fading.values()
    consumer = await trial.consumer(stream=stream)
    await trial.eventually(lambda: trial.info(stream=stream), lambda info: (info.seen_ms or 0) > first_ms)
    await left(trial, consumer)
    left_ms = trial.clock.now_ms()
    # As long as nobody tends, nothing takes away what was noted before.
    await trial.eventually(
        lambda: trial.info(stream=stream), lambda info: trial.clock.now_ms() > left_ms + 2 * BRIEF_MS
    )
    found = await trial.broker.tend(stream.name)
    assert (found.trimmed, found.forgotten) == (0, frozenset())
    assert found.fading["billing"] > left_ms + 2 * BRIEF_MS
    await trial.tended(stream, lambda found: "billing" in found.forgotten)


@retains
async def test_a_group_is_not_forgotten_where_that_was_not_asked_for(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW, forget_ms=0))
    tended = await trial.tended(stream, lambda found: found.pinned_by == "billing")
    assert (tended.fading, tended.forgotten, tended.trimmed) == ({}, frozenset(), 0)


@where(lambda traits: traits.retention and traits.dedupe)
async def test_an_id_is_remembered_when_its_event_is_gone(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=FEW, dedupe_ms=FAR_MS, dedupe_ids=2 * MANY))
    records = [trial.record() for _ in range(MANY)]
    answers = await trial.broker.append(stream.name, records)
    stayed = await shrunk(trial, stream, FEW)
    assert await trial.broker.append(stream.name, records) == answers
    assert await places(trial, stream) == stayed


@where(lambda traits: not traits.retention)
async def test_retention_is_refused_by_a_broker_that_removes_nothing(trial: Trial) -> None:
    with pytest.raises(NotSupported):
        await trial.broker.declare(KEPT, Policy(events=FEW))


async def lost(trial: Trial, stream: StreamSpec, count: int, *, group: str = "billing") -> None:
    """Wait until so many events are counted as lost, and make sure that it stays at that."""

    async def counted() -> int:
        await trial.broker.tend(stream.name)
        return (await trial.info(group, stream=stream)).lost

    await trial.eventually(counted, lambda found: found >= count)
    assert await counted() == count
