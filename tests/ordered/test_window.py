"""The window of one partition: what it hands out, what a commit holds, and what it takes over."""

from __future__ import annotations

from typing import Any

import pytest

from millstream.brokers import portion
from millstream.brokers.base import Later, Position
from millstream.brokers.ledger import Bury, Committed, Cursor, Delay, Park, Pop, State
from millstream.brokers.portion import Portion
from millstream.brokers.settled import End, Settled
from millstream.brokers.window import after, place
from tests.ordered.helpers import (
    claims,
    dead,
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

FULL, DEAD_FULL = Committed(State.FULL), Committed(State.DEAD_FULL)
NEVER = float("inf")


# Reading, and handing out.


def test_claims_are_handed_out_in_the_order_of_the_log_and_each_once() -> None:
    window = opened("abacb")
    assert numbers(window.hand_out(2)) == [1, 2]
    assert numbers(window.hand_out(10)) == [3, 4, 5]
    assert window.hand_out(10) == []
    window.put(claims("a", 6))
    assert numbers(window.hand_out(10)) == [6]


def test_no_more_is_read_than_there_is_room_for() -> None:
    window = opened(size=5, epoch=7, w="3")
    assert window.cursor == Cursor("3", 5, 7)
    window.put(claims("abc", 4))
    assert window.cursor == Cursor("6", 2, 7)
    window.hand_out(3)
    settle(window, 5)
    stored(window)
    assert window.cursor.room == 2  # from the first event that is not settled on
    settle(window, 4)
    stored(window)
    assert window.cursor == Cursor("6", 4, 7)


def test_a_draining_window_reads_and_hands_out_nothing() -> None:
    window = opened("ab")
    window.hand_out(1)
    window.draining = True
    assert window.hand_out(10) == [] and window.cursor.room == 0
    assert settle(window, 1) and stored(window).w == "1"


def test_offsets_are_compared_as_numbers() -> None:
    assert place("1693-10") == (1693, 10)
    assert after("1693-10", "1693-9") and after("10", "9") and not after("9", "10")
    assert not after("7", "7") and after("7", "7", or_equal=True)


def test_what_is_handed_out_and_not_settled_is_held() -> None:
    window = handed_out("ab")
    window.put(claims("b", 3))
    window.begin([head(9, "c")])
    assert window.held() == [Position(0, "1"), Position(0, "2"), Position(0, "9")]
    assert [window.holds(offset) for offset in ("1", "3", "9", "77")] == [True, False, True, False]
    settle(window, 1)
    settle(window, 9)
    assert window.held() == [Position(0, "2")] and not window.holds("1") and not window.holds("9")


def test_it_is_at_rest_when_nothing_is_handed_out_or_waits_for_a_commit() -> None:
    window = opened("ab")
    assert window.at_rest()
    window.hand_out(1)
    assert not window.at_rest()
    settle(window, 1, None, [output(1)])
    assert not window.at_rest()
    assert window.commit() is not None and not window.at_rest()
    window.answered(Committed(State.STORED))
    assert window.at_rest()
    window.begin([head(9, "c")])
    assert not window.at_rest()
    settle(window, 9)
    assert not window.at_rest()
    stored(window, emptied="c")
    assert window.at_rest()


# Settling.


def test_an_outcome_is_ours_until_it_is_stored_and_only_for_what_was_handed_out() -> None:
    window = opened("ab")
    assert not settle(window, 1)  # only read
    window.hand_out(1)
    assert settle(window, 1)
    assert settle(window, 1)  # a repeat of what waits for a commit
    assert window.commit() is not None
    assert settle(window, 1)
    window.answered(Committed(State.STORED))
    assert not settle(window, 1)
    assert not settle(window, 77)


def test_the_first_outcome_of_a_repeat_counts() -> None:
    window = handed_out("a")
    settle(window, 1, None, [output(1)])
    settle(window, 1, dead(), [output(2)])
    commit = stored(window)
    assert (written(commit.effects), commit.done) == (["output 1"], 1)


def test_a_repeat_for_a_head_is_ours_until_it_is_stored() -> None:
    window = parking()
    window.begin([head(1, "a")])
    assert settle(window, 1) and settle(window, 1)
    commit = stored(window, emptied="a")
    assert written(commit.effects) == ["pop 1"] and commit.done == 1
    assert not settle(window, 1)


def test_what_is_done_is_finished_together_and_what_is_not_ours_is_told() -> None:
    window = handed_out("abc")
    window.put(claims("d", 4))
    window.begin([head(9, "e")])
    assert window.finish(["1", "77", "3", "9", "4"]) == ["77", "4"]
    assert window.finish(["1", "9", "2"]) == []  # repeats of what waits for a commit, and one more
    commit = stored(window, emptied="e")
    assert (commit.w, commit.done, written(commit.effects)) == ("3", 4, ["pop 9"])
    assert window.finish(["1", "9"]) == ["1", "9"]


def test_what_waited_behind_goes_on_when_all_before_it_is_finished() -> None:
    window = opened("aaab")
    assert numbers(window.hand_out(10, 2)) == [1, 2, 4]
    window.finish(["2"])
    assert window.hand_out(10, 2) == []
    window.finish(["1"])
    assert numbers(window.hand_out(10, 2)) == [3]


def test_an_event_that_is_covered_ahead_is_not_ours_any_more() -> None:
    window = handed_out("ab")
    settle(window, 2)
    assert stored(window).h == "2"
    assert not settle(window, 2)


# The mark, and what is settled ahead of it.


def test_w_moves_to_the_first_event_that_is_not_settled() -> None:
    window = handed_out("abcd", ordinal=10)
    settle(window, 2)
    settle(window, 1)
    settle(window, 4)
    commit = stored(window)
    assert (commit.w, commit.ordinal, commit.done, commit.seq) == ("2", 12, 3, 1)
    assert window.w == "2"
    settle(window, 3)
    commit = stored(window)
    assert (commit.w, commit.ordinal, commit.done, commit.seq) == ("4", 14, 1, 2)
    assert window.commit() is None


def test_an_unknown_ordinal_stays_unknown() -> None:
    window = handed_out("a")
    settle(window, 1)
    assert stored(window).ordinal is None


def test_what_is_ahead_is_told_at_once_also_without_effects() -> None:
    window = handed_out("abcde")
    settle(window, 2)
    commit = stored(window)
    assert (commit.w, commit.h, commit.open, commit.done) == ("", "2", ["1"], 1)
    assert window.commit() is None
    settle(window, 4)
    commit = stored(window)
    assert (commit.h, commit.open, commit.done) == ("4", ["1", "3"], 1)
    assert window.commit() is None


def test_effects_ahead_of_w_are_told_at_once_with_all_that_is_settled() -> None:
    window = handed_out("abcde")
    settle(window, 4, None, [output(4)])
    settle(window, 2)
    commit = stored(window)
    assert (commit.w, commit.h, commit.open, commit.done) == ("", "4", ["1", "3"], 2)
    assert written(commit.effects) == ["output 4"]


def test_w_leaves_behind_what_it_passes_and_h_never_goes_back() -> None:
    window = handed_out("abcdef")
    settle(window, 5, None, [output(5)])
    assert stored(window).open == ["1", "2", "3", "4"]
    settle(window, 6)
    settle(window, 3)
    settle(window, 1)
    commit = stored(window)
    assert (commit.w, commit.h, commit.open, commit.done) == ("1", "6", ["2", "4"], 3)
    settle(window, 2)
    commit = stored(window)
    assert (commit.w, commit.h, commit.open) == ("3", "6", ["4"])
    settle(window, 4)
    commit = stored(window)
    assert (commit.w, commit.h, commit.open) == ("6", "", ())


def test_h_stays_where_it_is_while_what_lies_before_it_is_settled() -> None:
    window = handed_out("abcdefg")
    settle(window, 6)
    assert stored(window).h == "6"
    settle(window, 3)
    commit = stored(window)
    assert (commit.h, commit.open, commit.done) == ("6", ["1", "2", "4", "5"], 1)
    settle(window, 4, None, [output(4)])
    assert window.commit() is not None
    window.answered(FULL)
    settle(window, 2)
    commit = stored(window, room=False)
    assert (commit.h, commit.open, commit.done) == ("6", ["1", "4", "5"], 1)


def test_one_commit_takes_so_many_outputs_and_the_next_ones_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portion, "MAX_LARGE", 3)
    window = handed_out("abcade")
    for number, count in enumerate([2, 2, 0, 1, 9, 1], 1):
        settle(window, number, None, [output(10 * number + n) for n in range(count)])
    first = stored(window)
    assert written(first.effects) == ["output 10", "output 11"] and (first.w, first.h, first.open) == ("1", "3", ["2"])
    second = stored(window)
    assert written(second.effects) == ["output 20", "output 21", "output 40"] and (second.w, second.h) == ("4", "")
    third = stored(window)
    assert len(third.effects) == 9 and third.w == "5", "what one event published is never parted"
    assert written(stored(window).effects) == ["output 60"] and window.commit() is None


def test_one_commit_takes_so_many_bytes_of_dead_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portion, "MAX_LARGE_BYTES", 5)
    window = handed_out("abab")
    for number in range(1, 5):
        settle(window, number, dead())  # of two bytes each
    assert [written(stored(window).effects) for _ in range(2)] == [["bury 1", "bury 2"], ["bury 3", "bury 4"]]


def test_nothing_is_looked_at_behind_the_last_settled_event_and_the_old_h() -> None:
    window = {claim.position.offset: claim for claim in claims("abcdefghi")}
    settled = Settled()
    settled.offsets.add("2")
    rest = iter(window.items())
    assert settled.ahead(rest, 1, "", Portion()) == ("2", ["1"], ["2"])
    assert next(rest)[0] == "3"
    settled.inherit("5")
    rest = iter(window.items())
    assert settled.ahead(rest, 1, "5", Portion()) == ("5", ["1", "3", "4"], ["2"])
    assert next(rest)[0] == "6"
    settled.add("7", End([output(7)]))
    rest = iter(window.items())
    assert settled.ahead(rest, 2, "5", Portion(room=False)) == ("5", ["1", "3", "4"], ["2"])
    assert next(rest)[0] == "8"


def test_h_of_the_last_owner_holds_until_w_passes_it() -> None:
    window = opened("abcd", h="3", open=frozenset("12"))
    assert numbers(window.hand_out(10)) == [1, 2, 4]
    settle(window, 1)
    commit = stored(window)
    assert (commit.w, commit.h, commit.open) == ("1", "3", ["2"])
    settle(window, 2)
    commit = stored(window)
    assert (commit.w, commit.h, commit.open, commit.done) == ("3", "", (), 1)


# Effects.


def test_effects_go_out_once_in_the_order_of_the_log() -> None:
    window = handed_out("abcd")
    settle(window, 3, None, [output(3), output(33)])
    settle(window, 1, dead(), [output(1)])
    settle(window, 4, Later(5, "busy"))
    commit = stored(window)
    assert written(commit.effects) == ["output 1", "bury 1", "output 3", "output 33", "park 4"]
    assert (commit.done, commit.retried) == (1, 1)
    settle(window, 2)
    commit = stored(window)
    assert (commit.w, commit.effects, commit.done, commit.retried) == ("4", [], 1, 0)


def test_what_became_of_an_event_is_in_its_effect() -> None:
    window = handed_out("abc")
    settle(window, 1, dead("rejected"))
    settle(window, 2, Later(50, "busy"))
    settle(window, 3, Later(60, "soon", counted=False))
    assert stored(window).effects == [
        Bury(event(1, "a"), "rejected", "broken", 1),
        Park("b", event(2, "b"), 50, 1, 0, "busy"),
        Park("c", event(3, "c"), 60, 0, 1, "soon"),
    ]


def test_what_became_of_a_head_is_in_its_effect() -> None:
    window = parking()
    window.begin([head(1, "a", 3), head(2, "b", 3, 5), head(3, "c", 3, 5), head(4, "d", 3)])
    settle(window, 1, None, [output(1)])
    settle(window, 2, Later(50, "busy"))
    settle(window, 3, Later(60, "soon", counted=False))
    settle(window, 4, dead("failed"))
    commit = stored(window)
    assert commit.effects == [
        output(1),
        Pop("a", "1"),
        Delay("b", "2", 50, 3, 5, "busy"),
        Delay("c", "3", 60, 2, 6, "soon"),
        Bury(event(4, "d"), "failed", "broken", 3),
        Pop("d", "4"),
    ]
    assert (commit.done, commit.retried) == (1, 1)


def test_what_joins_a_parked_key_comes_before_what_leaves_it() -> None:
    window = parking()
    window.begin([head(1, "a")])
    window.put(claims("aa", 2))
    window.hand_out(10)
    settle(window, 1)
    assert written(stored(window).effects) == ["park 2", "park 3", "pop 1"]


def test_the_same_commit_is_sent_until_it_is_answered() -> None:
    window = handed_out("abc")
    settle(window, 2, None, [output(2)])
    commit = window.commit()
    settle(window, 1, dead())
    settle(window, 3, None, [output(3)])
    assert window.commit() is commit and window.commit(room=False) is commit
    assert commit is not None and written(commit.effects) == ["output 2"]
    window.answered(Committed(State.STORED))
    commit = stored(window)
    assert (commit.w, commit.seq, written(commit.effects)) == ("3", 2, ["bury 1", "output 3"])


def test_a_commit_of_one_event_alone_takes_all_that_it_published_and_nothing_of_the_next() -> None:
    window = handed_out("abcd")
    settle(window, 1, None, [output(1), output(11)])
    settle(window, 2)
    settle(window, 3, None, [output(3)])
    settle(window, 4)
    together = window.commit()
    assert together is not None and together.several and together.w == "4"
    window.answered(FULL)
    commit = stored(window, alone=True)
    assert (written(commit.effects), commit.several) == (["output 1", "output 11"], False)
    assert (commit.w, commit.h, commit.open) == ("2", "4", ["3"])
    rest = stored(window, alone=True)
    assert (written(rest.effects), rest.several, rest.w) == (["output 3"], False, "4")


def test_a_full_broker_gets_what_needs_no_room_and_w_stays_before_the_rest() -> None:
    window = handed_out("abcde")
    settle(window, 1)
    settle(window, 2, None, [output(2)])
    settle(window, 3, dead())
    settle(window, 4)
    settle(window, 5, Later(5, "busy"))
    refused = window.commit()
    assert refused is not None and refused.w == "5"
    window.answered(FULL)
    commit = stored(window, room=False)
    assert (commit.seq, commit.w, commit.h, commit.open) == (1, "1", "5", ["2", "3"])
    assert (written(commit.effects), commit.done) == (["park 5"], 2)
    assert window.commit(room=False) is None
    assert settle(window, 2)  # the worker sends it again
    commit = stored(window)
    assert (commit.w, written(commit.effects), commit.done) == ("5", ["output 2", "bury 3"], 1)


def test_a_head_that_needs_room_waits_for_it_and_its_key_stays_busy() -> None:
    window = parking()
    window.begin([head(1, "a"), head(2, "b")])
    settle(window, 1, None, [output(1)])
    settle(window, 2)
    assert window.commit() is not None
    window.answered(FULL)
    assert written(stored(window, room=False, emptied="b").effects) == ["pop 2"]
    assert window.busy() == ["a"] and window.commit(room=False) is None
    assert written(stored(window, emptied="a").effects) == ["output 1", "pop 1"]


def test_without_room_for_dead_letters_their_events_wait_and_their_keys_with_them() -> None:
    window = handed_out("ab")
    window.begin([head(9, "c", 3)])
    settle(window, 1, dead(), [output(1)])
    settle(window, 2, None, [output(2)])
    settle(window, 9, dead(), [output(9)])
    assert window.commit() is not None
    window.answered(DEAD_FULL)
    window.bury_later(500)
    window.put(claims("a", 3))
    assert window.hand_out(10) == []
    commit = stored(window)
    assert commit.effects == [
        Park("a", event(1, "a"), 500, 0, 0),
        output(2),
        Park("a", event(3, "a")),
        Delay("c", "9", 500, 2, 0),
    ]
    assert (commit.w, commit.done, commit.retried) == ("3", 1, 0)
    assert window.parked == {"a", "c"} and window.due_ms <= 500 and window.at_rest()


def test_a_key_whose_dead_letter_found_no_room_is_due_when_it_is_stored_as_waiting() -> None:
    window = handed_out("a")
    settle(window, 1, dead())
    assert window.commit() is not None
    window.answered(DEAD_FULL)
    window.bury_later(500)
    window.due_ms = NEVER  # heads were asked for before the commit was stored
    stored(window)
    assert window.due_ms == 500


def test_notes_of_suspects_go_with_the_commit_that_covers_them() -> None:
    window = handed_out("abc", clean=False, last="2", notes={"1": 1})
    settle(window, 1)
    settle(window, 3)
    assert stored(window).cleared == ["1"]
    settle(window, 2)
    assert stored(window).cleared == ["2"]


# Taking over.


def test_nothing_is_committed_before_all_is_read_that_was_settled_ahead() -> None:
    window = opened("abc", h="4", open=frozenset("2"))
    assert window.catching_up
    assert numbers(window.hand_out(10)) == [2]
    settle(window, 2)
    assert window.commit() is None
    window.put(claims("de", 4))
    assert not window.catching_up
    assert numbers(window.hand_out(10)) == [5]
    commit = stored(window)
    assert (commit.w, commit.h, commit.done) == ("4", "", 1)


def test_what_is_gone_is_not_waited_for() -> None:
    window = opened("a", h="4", open=frozenset("1"))
    assert window.catching_up
    window.caught_up()
    assert not window.catching_up
    window.put(claims("b", 7))
    assert numbers(window.hand_out(10)) == [1, 7]
    settle(window, 1)
    assert stored(window).w == "1"


def test_what_the_last_owner_has_not_seen_is_not_compared_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    heir = opened("abcd", h="2", open=frozenset("1"), clean=False, last="3")
    compared: list[str] = []
    monkeypatch.setattr("millstream.brokers.window.place", compared.append)
    heir.put(claims("ef", 5))
    assert [(*numbers([claim]), claim.suspect) for claim in heir.hand_out(10)] == [
        (1, 1),
        (3, 1),
        (4, 0),
        (5, 0),
        (6, 0),
    ]
    assert compared == []


def test_without_h_there_is_nothing_to_catch_up() -> None:
    assert not opened().catching_up
    assert not opened(w="4").catching_up


def test_after_a_crash_what_its_owner_may_have_seen_is_suspect() -> None:
    window = opened("abcde", clean=False, last="4", h="2", open=frozenset("1"), notes={"3": 2, "4": 0})
    found = [(claim.position.offset, claim.attempt, claim.suspect) for claim in window.hand_out(10)]
    assert found == [("1", 1, 1), ("3", 3, 3), ("4", 1, 1), ("5", 1, 0)]


def test_after_a_crash_no_more_than_the_first_window_is_suspect() -> None:
    window = opened("abc", size=3, clean=False, last="9")
    assert [claim.suspect for claim in window.hand_out(3)] == [1, 1, 1]
    for number in (1, 2, 3):
        settle(window, number)
    stored(window)
    window.put(claims("d", 4))
    assert [claim.suspect for claim in window.hand_out(3)] == [0]


@pytest.mark.parametrize("grant", [{"clean": True, "last": "9"}, {"clean": False, "last": ""}])
def test_nobody_is_suspect_without_a_crash_or_without_an_event_before_it(grant: dict[str, Any]) -> None:
    window = opened("ab", notes={"1": 1}, **grant)
    assert [(claim.attempt, claim.suspect) for claim in window.hand_out(3)] == [(1, 0)] * 2
