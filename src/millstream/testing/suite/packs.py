"""Packs: stored, read, claimed and settled as one; what is left of one, and dead letters of its events.

A replayed event of a pack may come alone, at its own position, or as what is left of its pack: both are right.
"""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from millstream.brokers.base import (
    Claim,
    Consumer,
    Dead,
    DeadLetter,
    Done,
    Later,
    Letter,
    Outcome,
    Output,
    Position,
    Settlement,
)
from millstream.brokers.ledger import HELD_MS
from millstream.testing.suite.trial import ORDERS, PARTED, Trial, settle, where
from millstream.wire import packs
from millstream.wire.entry import Record
from millstream.wire.packs import Columns

packed = where(lambda traits: traits.packs)
ordered = where(lambda traits: traits.packs and traits.order)

EVENTS = 5
SOON_MS = 400
FAR_MS = 3_600_000


async def test_a_pack_is_stored_read_and_claimed_as_one_event(trial: Trial) -> None:
    pack = new_pack(trial)
    [position] = await trial.broker.append(ORDERS.name, [pack])
    [stored] = await trial.stored()
    assert (stored.position, replace(stored.record, time_ms=0)) == (position, pack)
    assert list(packs.read(stored.record, position.offset)) == [
        replace(event, time_ms=stored.record.time_ms) for event in packs.read(pack, "")
    ]
    consumer = await trial.consumer()
    claim = await trial.claim(consumer)
    assert (claim.stored, claim.attempt, claim.fault, list(claim.left)) == (stored, 1, "", [])
    assert await consumer.settle([settle(claim)]) == [True]
    info = await trial.info()
    assert (info.lag, info.pending, info.done) == (0, 0, 1)


async def is_tried_again(trial: Trial, *, order: bool) -> None:
    consumer = await member(trial, order=order)
    position = await publish(trial)
    lefts: list[list[int]] = []
    for left in ([1, 3], [3], []):
        claim = await trial.claim(consumer)
        assert (claim.position, claim.attempt) == (position, len(lefts) + 1)
        lefts.append(list(claim.left))
        assert await consumer.settle([settle(claim, Later(trial.clock.now_ms(), "busy", left=left))]) == [True]
    assert lefts == [[], [1, 3], [3]]
    claim = await trial.claim(consumer)
    assert (list(claim.left), claim.attempt) == ([3], 4)
    assert await consumer.settle([settle(claim)]) == [True]
    await trial.nothing(consumer)
    info = await trial.info(stream=PARTED)
    assert (info.lag, info.pending, info.done, info.retried) == (0, 0, 1, 3)


@packed
async def test_of_a_pack_only_what_is_left_is_tried_again(trial: Trial) -> None:
    await is_tried_again(trial, order=False)


@ordered
async def test_of_a_pack_only_what_is_left_is_tried_again_in_order(trial: Trial) -> None:
    await is_tried_again(trial, order=True)


async def is_taken_over(trial: Trial, *, order: bool) -> None:
    silent = await member(trial, order=order)
    await publish(trial)
    await waits(trial, silent, left=[2, 4])
    claim = await trial.claim(silent)
    trial.silence(silent)
    living = await member(trial, order=order)
    again = await trial.claim(living)
    assert (list(again.left), again.attempt, again.suspect > 0) == ([2, 4], 3, True)
    late = Settlement(claim.position, Done(), letters=[letter(claim, 2)])
    assert await silent.settle([late]) == [False]
    assert await dead(trial) == []
    assert await living.settle([settle(again)]) == [True]


@packed
async def test_what_is_left_of_a_pack_survives_its_consumer_and_who_was_taken_over_stores_no_letter(
    trial: Trial,
) -> None:
    await is_taken_over(trial, order=False)


@ordered
async def test_what_is_left_of_a_pack_survives_the_owner_of_its_partition(trial: Trial) -> None:
    await is_taken_over(trial, order=True)


async def is_handed_back(trial: Trial, hand_back: Callable[[Consumer], Awaitable[None]], *, order: bool) -> None:
    first = await member(trial, order=order)
    await publish(trial)
    await waits(trial, first, left=[0, 3])
    claim = await trial.claim(first)
    trial.silence(first)
    await hand_back(first)
    again = await trial.claim(await member(trial, order=order))
    assert (list(again.left), again.attempt, again.suspect) == ([0, 3], claim.attempt, 0)


@packed
async def test_what_is_left_of_a_pack_survives_a_release(trial: Trial) -> None:
    await is_handed_back(trial, lambda consumer: consumer.release(frozenset(range(3))), order=False)


@packed
async def test_what_is_left_of_a_pack_survives_the_leave_of_its_consumer(trial: Trial) -> None:
    await is_handed_back(trial, lambda consumer: consumer.close(), order=False)


@ordered
async def test_what_is_left_of_a_pack_survives_a_release_in_order(trial: Trial) -> None:
    async def release(consumer: Consumer) -> None:
        await consumer.release(frozenset(range(3)))
        await consumer.close()

    await is_handed_back(trial, release, order=True)


@ordered
async def test_what_is_left_of_a_pack_survives_the_leave_of_its_owner(trial: Trial) -> None:
    await is_handed_back(trial, lambda consumer: consumer.close(), order=True)


async def is_switched(trial: Trial, *, order: bool) -> None:
    old = await member(trial, order=not order)
    await publish(trial)
    await waits(trial, old, left=[1])
    trial.silence(old)
    await old.close()
    consumer = await member(trial, order=order)
    claim = await trial.claim(consumer)
    assert (list(claim.left), claim.attempt) == ([1], 2)
    assert await consumer.settle([settle(claim)]) == [True]


@ordered
async def test_what_is_left_of_a_pack_survives_the_change_to_the_order_of_keys(trial: Trial) -> None:
    await is_switched(trial, order=True)


@ordered
async def test_what_is_left_of_a_pack_survives_the_change_to_no_order(trial: Trial) -> None:
    await is_switched(trial, order=False)


@ordered
async def test_what_is_left_of_a_pack_and_waits_for_a_person_dies_in_a_group_that_is_still_without_order(
    trial: Trial,
) -> None:
    old = await member(trial, order=False)
    position = await publish(trial)
    await waits(trial, old, left=[1, 3])
    consumer = await member(trial, order=True)
    claim = await trial.claim(consumer)
    assert (claim.token, list(claim.left)) == (0, [1, 3])
    assert await consumer.settle([settle(claim, Later(HELD_MS, "broken", left=[3]))]) == [True]
    [found] = await dead(trial)
    assert found.stored == replace(claim.stored, position=part(position, 3), record=event(claim, 3))
    assert (found.reason, found.error, found.attempts) == ("failed", "broken", 2)


async def gives_up_some(trial: Trial, *, order: bool) -> None:
    consumer = await member(trial, order=order)
    position = await publish(trial)
    claim = await trial.claim(consumer)
    again = Later(trial.clock.now_ms(), "busy", left=[0, 4])
    assert await consumer.settle([settlement(claim, again, letter(claim, 1), letter(claim, 3, "rejected"))]) == [True]
    found = await dead(trial)
    assert [one.stored for one in found] == [
        replace(claim.stored, position=part(position, k), record=event(claim, k)) for k in (1, 3)
    ]
    assert [(one.reason, one.error, one.attempts) for one in found] == [
        ("failed", "event 1", 1),
        ("rejected", "event 3", 1),
    ]
    claim = await trial.claim(consumer)
    assert (claim.position, list(claim.left), claim.attempt) == (position, [0, 4], 2)
    done = settlement(claim, Done(), letter(claim, 4))
    assert await consumer.settle([done]) == [True]
    assert await consumer.settle([done]) == [False]
    assert [(one.stored.position, one.attempts) for one in (await dead(trial))[2:]] == [(part(position, 4), 2)]
    await trial.nothing(consumer)
    info = await trial.info(stream=PARTED)
    assert (info.lag, info.pending, info.dead) == (0, 0, 3)
    assert await trial.broker.admin.drop(found) == [True, True]


@packed
async def test_events_of_a_pack_die_alone_and_the_others_go_on(trial: Trial) -> None:
    await gives_up_some(trial, order=False)


@ordered
async def test_events_of_a_pack_die_alone_and_the_others_go_on_in_order(trial: Trial) -> None:
    await gives_up_some(trial, order=True)


async def has_outputs(trial: Trial, *, order: bool) -> None:
    consumer = await member(trial, order=order)
    await publish(trial)
    claim = await trial.claim(consumer)
    outputs = [Output(ORDERS.name, trial.record()) for _ in range(2)]
    again = Later(trial.clock.now_ms(), "busy", left=[4])
    assert await consumer.settle([settle(claim, again, *outputs)]) == [True]
    assert [one.record.id for one in await trial.stored()] == [output.record.id for output in outputs]
    claim = await trial.claim(consumer)
    assert list(claim.left) == [4]
    assert await consumer.settle([settle(claim)]) == [True]
    assert len(await trial.stored()) == 2


@packed
async def test_what_the_finished_events_of_a_pack_published_is_stored_while_others_wait(trial: Trial) -> None:
    await has_outputs(trial, order=False)


@ordered
async def test_what_the_finished_events_of_a_pack_published_is_stored_while_others_wait_in_order(trial: Trial) -> None:
    await has_outputs(trial, order=True)


async def is_replayed_in_part(trial: Trial, *, order: bool) -> None:
    consumer, other = await member(trial, order=order), await trial.consumer("warehouse", stream=PARTED)
    position = await publish(trial)
    await trial.claim(other)
    claim = await trial.claim(consumer)
    again = Later(trial.clock.now_ms() + SOON_MS, "busy", left=[0, 1])
    assert await consumer.settle([settlement(claim, again, letter(claim, 2), letter(claim, 3))]) == [True]
    replayed, kept = await dead(trial)
    assert await trial.broker.admin.replay([replayed]) == [True]
    assert await trial.broker.admin.replay([replayed]) == [False]
    assert await finished(trial, consumer, 3) == Counter(part(position, k) for k in (0, 1, 2))
    await trial.nothing(consumer)
    await trial.nothing(other)
    assert await dead(trial) == [kept]
    info = await trial.info(stream=PARTED)
    assert (info.lag, info.pending, info.dead, info.replayed) == (0, 0, 1, 1)


@packed
async def test_one_event_of_a_pack_is_replayed_while_others_wait(trial: Trial) -> None:
    await is_replayed_in_part(trial, order=False)


@ordered
async def test_one_event_of_a_pack_is_replayed_while_others_wait_in_order(trial: Trial) -> None:
    await is_replayed_in_part(trial, order=True)


async def is_replayed_at_work(trial: Trial, *, order: bool) -> None:
    consumer = await member(trial, order=order)
    position = await publish(trial)
    claim = await trial.claim(consumer)
    again = Later(trial.clock.now_ms(), "busy", left=[0])
    assert await consumer.settle([settlement(claim, again, letter(claim, 2))]) == [True]
    claim = await trial.claim(consumer)
    assert await trial.broker.admin.replay(await dead(trial)) == [True]
    assert await consumer.settle([settle(claim)]) == [True]
    assert await finished(trial, consumer, 1) == Counter([part(position, 2)])
    await trial.nothing(consumer)


@packed
async def test_an_event_of_a_pack_that_is_replayed_while_others_are_at_work_is_not_lost(trial: Trial) -> None:
    await is_replayed_at_work(trial, order=False)


@ordered
async def test_an_event_of_a_pack_that_is_replayed_while_others_are_at_work_is_not_lost_in_order(trial: Trial) -> None:
    await is_replayed_at_work(trial, order=True)


async def is_replayed_alone(trial: Trial, *, order: bool) -> None:
    consumer = await member(trial, order=order)
    position = await publish(trial)
    claim = await trial.claim(consumer)
    assert await consumer.settle([settlement(claim, Done(), letter(claim, 4))]) == [True]
    [first] = await dead(trial)
    assert await trial.broker.admin.replay([first]) == [True]
    again = await trial.claim(consumer)
    assert (events_of(again), again.attempt, again.suspect, again.postponed) == ([part(position, 4)], 1, 0, 0)
    assert await consumer.settle([settle(again, Later(trial.clock.now_ms(), "busy", left=again.left))]) == [True]
    again = await trial.claim(consumer)
    assert (events_of(again), again.attempt) == ([part(position, 4)], 2)
    alone = again.record.type != packs.TYPE
    dies = settle(again, Dead("failed", "event 4")) if alone else settlement(again, Done(), letter(again, 4))
    assert await consumer.settle([dies]) == [True]
    [second] = await dead(trial)
    assert (second.stored, second.attempts) == (first.stored, 2)
    await trial.nothing(consumer)


@packed
async def test_an_event_of_a_pack_that_is_replayed_is_tried_and_dies_again_like_any_other(trial: Trial) -> None:
    await is_replayed_alone(trial, order=False)


@ordered
async def test_an_event_of_a_pack_that_is_replayed_is_tried_and_dies_again_like_any_other_in_order(
    trial: Trial,
) -> None:
    await is_replayed_alone(trial, order=True)


async def begins_anew(trial: Trial, *, order: bool) -> None:
    consumer = await member(trial, order=order)
    position = await publish(trial)
    claim = await trial.claim(consumer)
    far = Later(trial.clock.now_ms() + FAR_MS, "busy", left=[1])
    assert await consumer.settle([settle(claim, far)]) == [True]
    trial.silence(consumer)
    await consumer.close()
    await trial.broker.admin.seek(PARTED.name, "billing", "beginning")
    again = await trial.claim(await member(trial, order=order))
    assert (again.position, list(again.left), again.attempt) == (position, [], 1)


@packed
async def test_a_pack_comes_whole_when_its_group_begins_anew(trial: Trial) -> None:
    await begins_anew(trial, order=False)


@ordered
async def test_a_pack_comes_whole_when_its_ordered_group_begins_anew(trial: Trial) -> None:
    await begins_anew(trial, order=True)


@ordered
async def test_what_is_left_of_a_pack_survives_the_release_of_its_key(trial: Trial) -> None:
    consumer = await member(trial, order=True)
    await publish(trial, key="a")
    claim = await trial.claim(consumer)
    assert await consumer.settle([settle(claim, Later(HELD_MS, "broken", left=[2]))]) == [True]
    [key] = await trial.broker.admin.keys(PARTED.name, "billing")
    assert key.first == claim.position
    assert await trial.broker.admin.release_keys([key]) == [True]
    again = await trial.claim(consumer)
    assert (list(again.left), again.attempt) == ([2], 1)


@ordered
async def test_a_pack_that_waits_behind_another_one_keeps_what_is_left_of_it(trial: Trial) -> None:
    consumer = await member(trial, order=True)
    for _ in range(2):
        await publish(trial, key="a")
    first, second = await trial.claims(consumer, 2)
    failed = settle(first, Later(trial.clock.now_ms(), "busy", left=[1, 2]))
    behind = settle(second, Later(0, "", counted=False, left=[3]))
    assert await consumer.settle([failed, behind]) == [True, True]
    for claim, left, attempt in ((first, [1, 2], 2), (second, [3], 1)):
        again = await trial.claim(consumer)
        assert (again.stored, list(again.left), again.attempt) == (claim.stored, left, attempt)
        await trial.nothing(consumer)
        assert await consumer.settle([settle(again)]) == [True]


@ordered
async def test_of_a_pack_that_waits_those_events_are_told_that_are_left(trial: Trial) -> None:
    consumer = await member(trial, order=True)
    for _ in range(2):
        await publish(trial, key="a")
    first, second = await trial.claims(consumer, 2)
    failed = settle(first, Later(HELD_MS, "broken", left=[1, 2]))
    assert await consumer.settle([failed, settle(second, Later(0, "", counted=False))]) == [True, True]
    [key] = await trial.broker.admin.keys(PARTED.name, "billing")
    events = await trial.broker.admin.parked(key)
    left = [part(first.stored.position, k) for k in (1, 2)] + [part(second.stored.position, k) for k in range(EVENTS)]
    assert [stored.position for stored in events] == left
    assert events[1].record == event(first, 2)
    assert await trial.broker.admin.parked(key, 3) == events[:3]


def new_pack(trial: Trial, key: str | None = None) -> Record:
    """A pack of new events, as a publisher makes it."""
    columns = Columns.of([replace(trial.record(key=key), id="") for _ in range(EVENTS)])
    return packs.write(columns, "none", partition=0, id_=trial.clock.new_id(), key=key, source="shop")


async def publish(trial: Trial, key: str | None = None) -> Position:
    """Append a pack to `parted`."""
    [position] = await trial.broker.append(PARTED.name, [new_pack(trial, key)])
    return position


async def member(trial: Trial, *, order: bool) -> Consumer:
    """A member of the group `billing` of `parted`, through a broker of its own."""
    return await trial.consumer(stream=PARTED, order=order, broker=await trial.another())


async def waits(trial: Trial, consumer: Consumer, left: list[int]) -> None:
    """Claim a pack, and settle it so far that this is left of it, due at once."""
    claim = await trial.claim(consumer)
    assert await consumer.settle([settle(claim, Later(trial.clock.now_ms(), "busy", left=left))]) == [True]


async def dead(trial: Trial) -> list[DeadLetter]:
    """The dead letters of the group."""
    return await trial.broker.admin.dead(PARTED.name, "billing")


async def finished(trial: Trial, consumer: Consumer, count: int) -> Counter[Position]:
    """Claim and finish until so many events came, and count which."""
    found: Counter[Position] = Counter()

    async def some() -> int:
        for claim in await consumer.fetch(10, 0.1):
            found.update(events_of(claim))
            assert await consumer.settle([settle(claim)]) == [True]
        return found.total()

    await trial.eventually(some, lambda total: total >= count)
    return found


def events_of(claim: Claim) -> list[Position]:
    """Where the events lie that a claim asks for: those of a pack that are left, or the one that came alone."""
    position, record = claim.position, claim.record
    if not packs.is_pack(record):
        return [position]
    return [part(position, k) for k in claim.left or range(len(packs.read(record, position.offset)))]


def part(position: Position, k: int) -> Position:
    return Position(position.partition, packs.part_offset(position.offset, k))


def event(claim: Claim, k: int) -> Record:
    return packs.read(claim.record, claim.position.offset).record(k)


def letter(claim: Claim, k: int, reason: str = "failed") -> Letter:
    return Letter(k, event(claim, k), reason, f"event {k}")


def settlement(claim: Claim, outcome: Outcome, *letters: Letter) -> Settlement:
    return Settlement(claim.position, outcome, letters=letters)
