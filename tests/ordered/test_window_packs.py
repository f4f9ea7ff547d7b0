"""The window with packs: what is left of one, dead letters of its events, and no room for these. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from millstream.brokers.base import (
    Claim,
    Dead,
    Done,
    Later,
    Letter,
    Outcome,
    Output,
    Position,
    Record,
    Settlement,
    Stored,
)
from millstream.brokers.ledger import Bury, Commit, Committed, Delay, Effect, Grant, Head, Park, Pop, State
from millstream.brokers.letters import put_off
from millstream.brokers.window import Window
from millstream.wire import packs

EVENTS = [Record(0, f"7.{k}", "order.placed", b"%d" % k, "a", 5) for k in range(4)]
PACK = Stored(
    Position(0, "7"), packs.write(packs.Columns([b"0", b"1", b"2", b"3"], "order.placed"), "none", partition=0, id_="7")
)
OUTPUT = Output("mails", Record(0, "1", "mail.sent", b"{}"))
STORED, DEAD_FULL = Committed(State.STORED), Committed(State.DEAD_FULL)


def letter(part: int) -> Letter:
    return Letter(part, EVENTS[part], "failed", "broken")


def bury(part: int, attempts: int = 1) -> Bury:
    return Bury(Stored(Position(0, f"7.{part}"), EVENTS[part]), "failed", "broken", attempts)


def fresh(outcome: Outcome, *letters: Letter, outputs: Sequence[Output] = ()) -> Window:
    """A window with a pack that was handed out and has come to this end."""
    window = Window(Grant(0, 1, "6"))
    window.put([Claim.of(PACK, 1)])
    assert [claim.stored for claim in window.hand_out(1)] == [PACK]
    assert window.settle(Settlement(PACK.position, outcome, outputs, (), letters))
    return window


def tried(outcome: Outcome, *letters: Letter, left: Sequence[int] = (0, 1, 3)) -> Window:
    """A window with a parked pack, of which so much was left, that has come to this end."""
    window = Window(Grant(0, 1, "7", parked=frozenset("a"), events_parked=1))
    window.begin([Head("a", Claim.of(PACK, 2, left=left))])
    assert window.settle(Settlement(PACK.position, outcome, [OUTPUT], (), letters))
    return window


def commit(window: Window) -> Commit:
    made = window.commit()
    assert made is not None
    return made


def refused(window: Window) -> list[Effect]:
    """What the next commit has when there was no room for the dead letters of this one."""
    assert any(isinstance(effect, Bury) for effect in commit(window).effects)
    window.answered(DEAD_FULL)
    window.bury_later(900)
    return list(commit(window).effects)


def test_a_pack_waits_with_what_is_left_of_it_and_the_rest_is_stored_in_the_same_step() -> None:
    made = commit(fresh(Later(500, "busy", left=(1, 3)), letter(2), outputs=[OUTPUT]))
    assert made.effects == [OUTPUT, bury(2), Park("\0" + "7", PACK, 500, 1, 0, "busy", (1, 3))]
    assert (made.w, made.done, made.retried) == ("7", 0, 1)


def test_a_pack_that_is_finished_leaves_its_dead_letters() -> None:
    made = commit(fresh(Done(), letter(0), letter(2)))
    assert made.effects == [bury(0), bury(2)]
    assert (made.w, made.done) == ("7", 1)


def test_a_parked_pack_is_delayed_with_what_is_left_of_it() -> None:
    assert commit(tried(Later(500, "busy", left=(3,)), letter(1))).effects == [
        OUTPUT,
        bury(1, 2),
        Delay("a", "7", 500, 2, 0, "busy", (3,)),
    ]
    assert commit(tried(Done(), letter(3))).effects == [OUTPUT, bury(3, 2), Pop("a", "7")]


def test_where_nothing_is_said_all_that_was_left_is_left_again() -> None:
    assert commit(tried(Later(500, "busy"))).effects == [OUTPUT, Delay("a", "7", 500, 2, 0, "busy", (0, 1, 3))]


def test_a_parked_pack_that_is_handed_back_keeps_what_is_left_of_it() -> None:
    window = Window(Grant(0, 1, "7", parked=frozenset("a"), events_parked=1))
    window.begin([Head("a", Claim.of(PACK, 2, left=(3,)))])
    window.give_back()
    assert commit(window).effects == [Delay("a", "7", 0, 1, 0, left=(3,))]


def test_without_room_for_dead_letters_their_events_wait_and_what_is_finished_is() -> None:
    parked = Park("\0" + "7", PACK, 900, 0, 0, left=[1, 2])
    assert refused(fresh(Done(), letter(2), letter(1), outputs=[OUTPUT])) == [OUTPUT, parked]
    assert refused(fresh(Later(500, "busy", left=(1,)), letter(2), outputs=[OUTPUT])) == [OUTPUT, parked]
    delayed = Delay("a", "7", 900, 1, 0, left=[0, 3])
    assert refused(tried(Later(500, "busy", left=(0,)), letter(3))) == [OUTPUT, delayed]
    assert refused(tried(Done(), letter(0), letter(3))) == [OUTPUT, delayed]


def test_without_room_for_a_whole_pack_it_waits_as_it_was() -> None:
    assert refused(fresh(Dead("undecodable"))) == [Park("\0" + "7", PACK, 900)]
    assert refused(tried(Dead("undecodable"))) == [Delay("a", "7", 900, 1, 0, left=(0, 1, 3))]
    assert refused(tried(Later(500, "busy"), letter(1)))[1:] == [Delay("a", "7", 900, 1, 0, left=[0, 1, 3])]
    assert refused(tried(Later(500, "busy"), letter(1), left=())) == [Delay("a", "7", 900, 1, 0)]


def test_what_found_no_room_counts_neither_as_handled_nor_as_tried_again() -> None:
    window = fresh(Later(500, "busy", left=(1,)), letter(2))
    commit(window)
    window.answered(DEAD_FULL)
    window.bury_later(900)
    made = commit(window)
    assert (made.done, made.retried) == (0, 0)
    window.answered(STORED)
    assert window.at_rest() and window.due_ms <= 900


def test_a_key_goes_on_when_what_found_no_room_is_finished() -> None:
    window, key = fresh(Later(500, "busy", left=(1,)), letter(2)), "\0" + "7"
    refused(window)
    window.answered(STORED)
    assert window.parked == {key}
    window.begin([Head(key, Claim.of(PACK, 1, left=[1, 2]))])
    assert window.settle(Settlement(PACK.position, Done()))
    commit(window)
    window.answered(Committed(State.STORED, frozenset([key])))
    assert window.parked == set()


def test_a_settlement_is_put_off_with_all_that_would_have_died() -> None:
    later = Later(900, "no room for more dead letters", counted=False)
    at, outputs = PACK.position, [OUTPUT]
    for outcome, letters, left in (
        (Done(), [letter(2), letter(1)], [1, 2]),
        (Later(5, "busy", left=(3,)), [letter(0)], [0, 3]),
        (Later(5, "busy"), [letter(0)], []),
        (Dead("undecodable"), [], []),
    ):
        expected = Later(later.at_ms, later.error, later.counted, left)
        assert put_off(Settlement(at, outcome, outputs, (), letters), 900) == Settlement(at, expected, outputs)
