"""Outputs as the scripts store them: with an outcome in `settle.lua`, with progress in `commit.lua`, on each version."""

from __future__ import annotations

from typing import Any

import pytest

from tests.redis import brokers, raw
from tests.redis.raw import DEAD, GROUP, LOG, MAILS, NOTE, PARKINFO, Raw, fence, mail
from tests.redis.test_ordered_scripts import buried, everything, fill, granted, parked

started = brokers.started
server = brokers.server
redis = raw.queue
ordered = raw.log


# With outcomes


def test_outputs_are_stored_with_their_outcome_and_with_a_repeat_never_again(redis: Raw) -> None:
    done, dead, retry = redis.add(3)
    redis.read("c")
    items = ("done", done, 1), ("dead", dead, 1, "failed", "why"), ("retry", retry, 1, 0)
    outputs = {1: [mail("a"), mail("b", 1), mail("c")], 2: [mail("d")], 3: [mail("e")]}
    assert redis.settle("c", *items, outputs=outputs) == [b"OK", 1, 1, 1]
    assert redis.settle("c", *items, outputs=outputs) == [b"OK", 0, 0, 0]
    redis.take("c")  # it is ours again, under another count
    assert redis.settle("c", *items, outputs=outputs) == [b"OK", 0, 0, 0]
    assert (redis.mails(), redis.mails(1)) == (["a", "c", "d", "e"], ["b"])
    assert redis.pending() == [(retry, b"c", 2)] and redis.do("XLEN", DEAD) == 1


def test_outputs_of_one_event_twice_in_a_call_are_stored_once(redis: Raw) -> None:
    (id_,) = redis.add()
    redis.read("c")
    outputs = {1: [mail("a")], 2: [mail("b")]}
    assert redis.settle("c", ("done", id_, 1), ("done", id_, 1), outputs=outputs) == [b"OK", 1, 0]
    assert redis.mails() == ["a"]


def test_who_holds_the_event_no_more_stores_no_output(redis: Raw) -> None:
    taken, fenced = redis.add(2)
    redis.read("c")
    redis.do("XCLAIM", LOG, GROUP, "foreign", 0, taken, "RETRYCOUNT", 1)
    assert redis.settle("c", ("done", taken, 1), outputs={1: [mail("a")]}) == [b"OK", 0]
    redis.do("DEL", fence("c"))
    assert redis.settle("c", ("done", fenced, 1), outputs={1: [mail("b")]}) == [b"FENCED"]
    assert redis.mails() == [] and len(redis.pending()) == 2


def test_refused_outputs_keep_their_outcome_back_and_no_other(redis: Raw) -> None:
    ids = redis.add(6)
    redis.read("c")
    items = [("done", id_, 1) for id_ in ids]
    ceiling: dict[str, Any] = {"limits": (0, 0, 2, 0)}
    redis.do("SET", MAILS.later(1), "somebody else's")
    outputs = {1: [mail("a", **ceiling)], 2: [mail("b", **ceiling), mail("c", 1)], 3: [mail("d", **ceiling)]}
    wrong = b"WRONGTYPE " + MAILS.later(1) + b" holds a string"
    assert redis.settle("c", *items[:4], outputs=outputs) == [b"OK", 1, [wrong, 2], 1, 1]
    outputs = {1: [mail("e", **ceiling), mail("f", **ceiling)]}
    assert redis.settle("c", *items[4:], outputs=outputs) == [b"OK", [b"FULL events", 1], 1]
    assert redis.mails() == ["a", "d"] and [row[0] for row in redis.pending()] == [ids[1], ids[4]]


def test_outputs_are_told_apart_by_their_ids_where_these_are_remembered(redis: Raw) -> None:
    ids = redis.add(5)
    redis.read("c")
    items = [("done", id_, 1) for id_ in ids]
    ours: dict[str, Any] = {"limits": (9_000, 2, 0, 0)}
    outputs = {
        1: [mail("a", **ours), mail("a", **ours)],
        2: [mail("b", **ours)],
        3: [mail("a", **ours), mail("b", derived=True, **ours)],
        4: [mail("c", **ours)],
        5: [mail("c", derived=True, **ours), mail("b", **ours)],
    }
    assert redis.settle("c", *items, outputs=outputs) == [b"OK", 1, 1, 1, [b"FULL ids", 1], 1]
    assert redis.mails() == ["a", "b", "b", "c"] and redis.do("HGET", MAILS.meta(0), "repeats") == b"3"


def test_at_maxmemory_outputs_and_their_outcomes_wait_and_others_go_on(redis: Raw) -> None:
    ids = redis.add(3)
    redis.read("c")
    redis.do("CONFIG", "SET", "maxmemory", 1)
    items = [("done", id_, 1) for id_ in ids[:2]] + [("retry", ids[2], 1, 7)]
    refused, *settled = redis.settle("c", *items, outputs={1: [mail("a"), mail("b")]})[1:]
    redis.do("CONFIG", "SET", "maxmemory", 0)
    assert refused[0].startswith(b"OOM") and refused[1] == 1 and settled == [1, 1] and redis.mails() == []
    assert redis.settle("c", *items, outputs={1: [mail("a"), mail("b")]}) == [b"OK", 1, 0, 0]
    assert redis.mails() == ["a", "b"]


def test_at_maxmemory_an_output_for_later_waits_too_and_a_repeat_needs_no_room(redis: Raw) -> None:
    ours: dict[str, Any] = {"limits": (60_000, 9, 0, 0)}
    ids = redis.add(3)
    redis.read("c")
    redis.settle("c", ("done", ids[0], 1), outputs={1: [mail("a", **ours)]})
    redis.do("CONFIG", "SET", "maxmemory", 1)
    (refused,) = redis.settle("c", ("done", ids[1], 1), outputs={1: [mail("b", due="9000000000000", **ours)]})[1:]
    repeat = redis.settle("c", ("done", ids[2], 1), outputs={1: [mail("a", **ours)]})
    redis.do("CONFIG", "SET", "maxmemory", 0)
    assert refused[0].startswith(b"OOM") and not redis.do("EXISTS", MAILS.later(0))
    assert repeat == [b"OK", 1] and redis.mails() == ["a"] and redis.pending() == [(ids[1], b"c", 1)]
    assert redis.settle("c", ("done", ids[1], 1), outputs={1: [mail("b", due="9000000000000", **ours)]}) == [b"OK", 1]
    assert redis.do("ZCARD", MAILS.later(0)) == 1 and redis.mails() == ["a"]


def test_a_dead_letter_that_has_no_room_stores_no_output(redis: Raw) -> None:
    ids = redis.add(2)
    redis.read("c")
    items = [("dead", id_, 1, "failed", "") for id_ in ids]
    assert redis.settle("c", *items, max_dead=1, outputs={1: [mail("a")], 2: [mail("b")]}) == [b"OK", 1, b"FULL"]
    assert redis.mails() == ["a"]


# In the order of keys


def test_outputs_are_stored_with_their_commit_and_by_its_owner_alone(ordered: Raw) -> None:
    ids = ordered.add(3)
    first = granted(ordered, "a")
    outputs = mail("a"), mail("b", 1), mail("c")
    effects = parked("k", ids[0]), buried(ids[1])
    for _ in range(2):
        assert ordered.commit("a", first.epoch, 1, ids[1], 2, *effects, outputs=outputs) == [b"OK", 1]
    assert (ordered.mails(), ordered.mails(1), ordered.do("XLEN", DEAD)) == (["a", "c"], ["b"], 1)
    granted(ordered, "b", ordered.score("a"))
    before = everything(ordered)
    assert ordered.commit("a", first.epoch, 2, ids[2], 3, outputs=outputs) == [b"LOST"]
    assert everything(ordered) == before


@pytest.mark.parametrize("wrong", [MAILS.log(1), NOTE, PARKINFO])
def test_a_commit_whose_outputs_cannot_be_stored_writes_nothing(ordered: Raw, wrong: bytes) -> None:
    ids = ordered.add(2)
    first = granted(ordered, "a")
    ordered.commit("a", first.epoch, 1, ids[0], 1, outputs=[mail("a")])
    ordered.do("SET", wrong, "somebody else's")
    before = everything(ordered)
    full = ordered.commit("a", first.epoch, 2, ids[1], 2, outputs=[mail("b", limits=(0, 0, 1, 0))])
    effects = parked("k", ids[1]), buried(ids[1])
    refused = ordered.commit("a", first.epoch, 2, ids[1], 2, *effects, outputs=[mail("b"), mail("c", 1)])
    if wrong == MAILS.log(1):
        assert full == [b"REFUSED", b"FULL events", 1]
        assert refused == [b"REFUSED", b"WRONGTYPE mails:1 holds a string", 2]
    else:
        assert full == refused == [b"TYPE", wrong]
    assert ordered.do("GET", wrong) and {key: ordered.do("DUMP", key) for key in before} == before


def test_at_maxmemory_a_commit_with_outputs_writes_nothing(ordered: Raw) -> None:
    ids = ordered.add(2)
    first = granted(ordered, "a")
    fill(ordered)
    before = everything(ordered)
    state, why, which = ordered.commit("a", first.epoch, 1, ids[0], 1, outputs=[mail("a"), mail("b")])
    assert (state, why[:3], which) == (b"REFUSED", b"OOM", 1) and everything(ordered) == before
    assert ordered.commit("a", first.epoch, 1, ids[0], 1)[0] == b"OK"
