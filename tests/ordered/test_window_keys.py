"""The window of one partition: when a key waits, what is given back, and all of it at once by chance."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.brokers.base import Dead, Later
from millstream.brokers.ledger import Committed, Delay, Park, State
from millstream.brokers.window import keyless
from tests.ordered.helpers import (
    PUT_BACK,
    claims,
    event,
    handed_out,
    head,
    numbers,
    opened,
    output,
    parking,
    settle,
    stored,
    written,
)
from tests.ordered.model import World

NEVER = float("inf")


# Keys that wait.


def test_a_key_that_waits_is_joined_by_its_later_events_in_order_and_the_others_go_on() -> None:
    window = opened("abaab")
    assert numbers(window.hand_out(2)) == [1, 2]
    settle(window, 1, Later(5, "busy"))
    assert window.parked == {"a"} and window.due_ms == 5
    assert numbers(window.hand_out(10)) == [5]
    assert written(stored(window).effects) == ["park 1", "park 3", "park 4"]
    window.put(claims("ca", 6))
    assert numbers(window.hand_out(10)) == [6]
    assert written(stored(window).effects) == ["park 7"]


def test_keys_that_were_parked_before_us_are_joined_too() -> None:
    window = parking()
    window.put(claims("ab", 3))
    assert window.due_ms == 0
    assert numbers(window.hand_out(10)) == [4]
    assert stored(window).effects == [Park("a", event(3, "a"))]


def test_what_comes_behind_waits_for_all_of_its_key_that_was_handed_out_before_it() -> None:
    window = opened("aaaa")
    window.hand_out(3)
    settle(window, 1, Later(5, "busy"))
    assert window.hand_out(10) == []
    assert written(stored(window).effects) == ["park 1"]
    settle(window, 2, PUT_BACK)
    assert window.hand_out(10) == []
    assert written(stored(window).effects) == ["park 2"]
    settle(window, 3, PUT_BACK)
    commit = stored(window)
    assert (written(commit.effects), commit.w) == (["park 3", "park 4"], "4")


def test_what_is_put_back_in_another_order_is_set_aside_in_that_of_the_log() -> None:
    window = handed_out("aaa")
    settle(window, 1, Later(5, "busy"))
    settle(window, 3, PUT_BACK)
    assert written(stored(window).effects) == ["park 1"]
    settle(window, 2, PUT_BACK)
    assert written(stored(window).effects) == ["park 2", "park 3"]


def test_nothing_of_a_key_goes_past_an_event_that_a_full_broker_refused() -> None:
    window = handed_out("aab")
    settle(window, 1, None, [output(1)])
    settle(window, 2, Later(5, "busy"))
    settle(window, 3, Later(5, "busy"))
    assert window.commit() is not None
    window.answered(Committed(State.FULL))
    commit = stored(window, room=False)  # a crash after it would run 1 again, behind 2
    assert (commit.open, written(commit.effects)) == (["1", "2"], ["park 3"])
    assert written(stored(window).effects) == ["output 1", "park 2"]


def test_what_waited_behind_goes_on_in_order_when_its_key_does_not_wait_any_more() -> None:
    window = opened("aaab")
    window.hand_out(1)
    window.begin([head(9, "a", 1)])  # a dead letter that a person replayed
    assert numbers(window.hand_out(10)) == [4]
    settle(window, 9)
    stored(window, emptied="a")
    assert window.hand_out(10) == []  # 1 is still out
    settle(window, 1)
    window.put(claims("a", 5))
    assert numbers(window.hand_out(10)) == [2, 3, 5]


def test_what_joins_a_key_that_waits_does_not_make_it_due() -> None:
    window = handed_out("a")
    assert settle(window, 1, Later(5_000, "busy"))
    stored(window)
    window.put(claims("a", first=2))
    assert window.hand_out(10) == [] and stored(window).effects
    assert window.due_ms == 5_000


def test_of_a_key_no_more_is_handed_out_at_once_and_its_order_stays() -> None:
    window = opened("aaabaaa")
    assert numbers(window.hand_out(10, 2)) == [1, 2, 4]
    assert settle(window, 1)
    window.put(claims("ab", first=8))
    assert numbers(window.hand_out(10, 2)) == [9]
    assert settle(window, 2)
    assert numbers(window.hand_out(10, 2)) == [3, 5]
    assert settle(window, 3) and settle(window, 5, Later(0, "busy"))
    assert numbers(window.hand_out(10, 2)) == []
    assert [effect.stored.position.offset for effect in stored(window).effects if isinstance(effect, Park)] == [
        "5",
        "6",
        "7",
        "8",
    ]


def test_what_waited_behind_goes_on_when_nothing_is_out_before_it() -> None:
    window = opened("aab")
    window.hand_out(1)
    window.begin([head(9, "a", 1)])
    assert numbers(window.hand_out(10)) == [3]
    settle(window, 1)
    settle(window, 9)
    assert written(stored(window, emptied="a").effects) == ["park 2", "pop 9"]
    assert window.parked == set()


def test_a_key_goes_on_when_a_commit_says_that_nothing_of_it_is_parked() -> None:
    window = parking()
    window.begin([head(1, "a")])
    settle(window, 1)
    stored(window)  # more is parked of it
    assert window.parked == {"a"} and window.due_ms == 0
    window.begin([head(2, "a", 1)])
    settle(window, 2)
    commit = window.commit()
    assert commit is not None and window.parked == {"a"}
    window.answered(Committed(State.STORED, frozenset("a")))
    assert window.parked == set()
    window.put(claims("a", 3))
    assert numbers(window.hand_out(10)) == [3]


def test_a_key_waits_on_while_an_event_of_it_joins_that_the_commit_did_not_hold() -> None:
    window = parking()
    window.begin([head(1, "a")])
    settle(window, 1)
    commit = window.commit()
    assert commit is not None and written(commit.effects) == ["pop 1"]
    window.put(claims("a", 2))
    assert window.hand_out(10) == []  # it joins, and the commit is under way
    window.answered(Committed(State.STORED, frozenset("a")))
    window.put(claims("a", 3))
    assert window.hand_out(10) == []
    assert written(stored(window).effects) == ["park 2", "park 3"]
    assert window.parked == {"a"}
    window.begin([head(2, "a", 1)])
    settle(window, 2)
    stored(window, emptied="a")
    assert window.parked == set()


def test_a_key_that_is_parked_anew_while_its_last_head_is_stored_waits_on() -> None:
    window = handed_out("ab")
    window.begin([head(9, "a")])
    settle(window, 9)
    assert window.commit() is not None
    settle(window, 1, Later(5, "busy"))
    window.answered(Committed(State.STORED, frozenset("a")))
    assert window.parked == {"a"} and window.due_ms <= 5
    assert written(stored(window).effects) == ["park 1"]


def test_a_head_is_not_begun_while_its_key_is_busy() -> None:
    window = opened("aab")
    window.hand_out(3)
    assert window.busy() == []
    settle(window, 1, Later(0, "busy"))
    assert window.busy() == ["a"]  # 2 is out
    settle(window, 2, PUT_BACK)
    stored(window)
    assert window.busy() == []
    window.begin([head(1, "a")])
    assert window.busy() == ["a"]
    settle(window, 1)
    assert window.busy() == ["a"]
    assert window.commit() is not None and window.busy() == ["a"]
    window.answered(Committed(State.STORED))
    assert window.busy() == []


def test_the_next_due_time_is_the_least_that_was_heard_of() -> None:
    window = handed_out("ab")
    assert window.due_ms == NEVER
    settle(window, 1, Later(70, "busy"))
    settle(window, 2, Later(50, "busy"))
    assert window.due_ms == 50
    window.due_ms = NEVER  # they were asked for before the commit was stored
    stored(window)
    assert window.due_ms == 50
    window.due_ms = NEVER
    window.begin([head(1, "a")])
    settle(window, 1, Later(90, "busy"))
    stored(window)
    assert window.due_ms == 90


def test_a_key_that_a_person_parked_waits_from_the_beginning_of_its_head() -> None:
    window = opened("a")
    window.begin([head(9, "a", 1)])
    assert window.parked == {"a"} and window.hand_out(10) == []
    assert written(stored(window).effects) == ["park 1"]


def test_events_without_a_key_wait_for_nobody() -> None:
    window = handed_out("---")
    settle(window, 1, Later(5, "busy"))
    settle(window, 2)
    settle(window, 3, Later(6, "busy"))
    assert [effect.key for effect in stored(window).effects if isinstance(effect, Park)] == [keyless("1"), keyless("3")]
    window.put(claims("-", 4))
    assert numbers(window.hand_out(10)) == [4]
    window.begin([head(1, keyless("1"))])
    settle(window, 1)
    stored(window)
    assert window.parked == {keyless("1"), keyless("3")}


# Giving back.


def test_what_is_given_back_comes_again_as_if_it_had_never_been() -> None:
    window = handed_out("abc")
    window.put(claims("d", 4))
    settle(window, 2)
    window.give_back()
    assert window.held() == [] and window.at_rest()
    assert not settle(window, 1)
    assert [(claim.attempt, int(claim.position.offset)) for claim in window.hand_out(10)] == [
        (1, 1),
        (1, 3),
        (1, 4),
    ]


def test_a_head_that_is_given_back_is_due_at_once_and_its_attempt_is_not_counted() -> None:
    window = parking()
    window.begin([head(1, "a", 3, 5)])
    window.give_back()
    commit = stored(window)
    assert commit.effects == [Delay("a", "1", 0, 2, 5)]
    assert (commit.done, commit.retried, window.parked, window.due_ms) == (0, 0, {"a"}, 0)


def test_a_head_that_is_given_back_is_not_ours_to_settle() -> None:
    window = parking()
    window.begin([head(1, "a")])
    window.give_back()
    assert not settle(window, 1)


def test_all_that_was_settled_is_stored_when_the_rest_is_given_back() -> None:
    window = handed_out("abc")
    settle(window, 2)
    stored(window)
    settle(window, 3)
    window.give_back()
    commit = stored(window)
    assert (commit.h, commit.open) == ("3", ["1"])


def test_a_head_whose_dead_letter_waits_keeps_its_postponements() -> None:
    window = parking()
    window.begin([head(1, "a", 3, 1_000)])
    settle(window, 1, Dead("never"))
    window.bury_later(500)
    assert stored(window).effects == [Delay("a", "1", 500, 2, 1_000)]


# All of it at once, by chance.


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(50, 200))
def test_the_order_of_keys_survives_whatever_happens_and_nothing_is_lost_or_written_twice(
    seed: int, steps: int
) -> None:
    world = World(random.Random(seed))
    world.run(steps)
    world.calm_down()


def test_the_order_of_keys_survives_a_full_broker_and_what_is_put_back_in_any_order() -> None:
    for seed in range(300):
        world = World(random.Random(seed), unruly=True)
        world.run(150)
        world.calm_down()
