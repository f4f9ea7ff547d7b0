"""Sizes: how many events are asked for, when only a number of them can be."""

from __future__ import annotations

from millstream.brokers.redis.sizes import MAX_REPLY_BYTES, Sizes
from millstream.brokers.redis.turns import MAX_EVENTS, Turns
from millstream.units import MAX_EVENT_BYTES

FEW = MAX_REPLY_BYTES // MAX_EVENT_BYTES


def test_before_anything_was_seen_all_may_be_as_large_as_an_event_can_be() -> None:
    assert Sizes().most == FEW


def test_events_that_turn_out_small_are_asked_for_in_full_from_the_third_read_on() -> None:
    sizes = Sizes()
    sizes.seen(200)
    assert sizes.most == 16 * FEW
    sizes.seen(200)
    assert sizes.most >= MAX_EVENTS


def test_large_ones_are_remembered_and_forgotten_step_by_step() -> None:
    sizes = Sizes()
    for _ in range(3):
        sizes.seen(200)
    sizes.seen(MAX_EVENT_BYTES)
    assert sizes.most == FEW
    asked = []
    while sizes.most < MAX_EVENTS:
        sizes.seen(200)
        asked.append(sizes.most)
    assert asked == sorted(asked) and len(asked) > 20


def test_one_event_is_asked_for_however_large_it_was() -> None:
    sizes = Sizes()
    sizes.seen(10 * MAX_REPLY_BYTES)
    assert sizes.most == 1


def test_where_few_large_events_fit_into_an_answer_few_partitions_are_read() -> None:
    turns = Turns()
    for partition in range(256):
        turns.acquired(partition)
    chosen, busy = turns.next(range(256), 1)
    assert len(chosen) == busy == 1
    turns.read(chosen, [])
    chosen, busy = turns.next(range(256), 1)
    assert (len(chosen), busy) == (2, 1)
    assert chosen[busy:] == [0]
