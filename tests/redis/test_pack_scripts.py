"""What is left of a pack, and dead letters of its events, as the scripts keep them, on each version."""

from __future__ import annotations

import pytest
from hiredis import ReplyError

from tests.redis import brokers, raw
from tests.redis.raw import DEAD, GROUP, LOG, NOTE, STATS, Raw, fence, mail, park
from tests.redis.test_ordered_scripts import buried, event, everything, fill, granted, parked
from tests.redis.test_redis_retention import trim

started = brokers.started
server = brokers.server
redis = raw.queue
ordered = raw.log


def pack(redis: Raw, left: str = "") -> bytes:
    """An entry that `c` holds: as it was read, or so much of it as is left."""
    (id_,) = redis.add()
    redis.read("c")
    if left:
        assert redis.settle("c", ("retry", id_, 1, 0, left)) == [b"OK", 1]
        assert rows(redis, "c") == [[id_, 2, left.encode()]]
    return id_


def rows(redis: Raw, consumer: str) -> list[list[object]]:
    """What `take` hands out: id, count and what is left."""
    return [[row[0], row[1], *row[5:]] for row in redis.take(consumer)[3:]]


def letters(redis: Raw) -> list[tuple[bytes, bytes]]:
    """Position and data of each dead letter."""
    found = [fields for _, fields in redis.do("XRANGE", DEAD, "-", "+")]
    return [(fields[7], fields[-1]) for fields in found]


def last_letter(redis: Raw) -> bytes:
    found: bytes = redis.do("XREVRANGE", DEAD, "+", "-", "COUNT", 1)[0][0]
    return found


# What is left


def test_what_is_left_survives_a_crash_while_it_was_at_work(redis: Raw) -> None:
    id_ = pack(redis, left="1,3")
    assert redis.evict("c", redis.score("c")) == [b"done", 1]
    assert redis.do("HGET", NOTE, b"*" + id_) == b"1,3"
    assert rows(redis, "d") == [[id_, 3, b"1,3"]]
    assert redis.settle("d", ("done", id_, 3)) == [b"OK", 1]
    assert redis.pending() == [] and redis.do("EXISTS", NOTE) == 0


def test_what_is_left_survives_a_lost_answer_and_being_handed_back(redis: Raw) -> None:
    id_ = pack(redis, left="0,2")
    assert redis.recall("c", id_)[3][5] == b"0,2"
    redis.settle("c", ("release", id_, 2, 0))
    assert rows(redis, "c") == [[id_, 2, b"0,2"]]
    redis.settle("c", ("postpone", id_, 2, 0))
    assert rows(redis, "c") == [[id_, 2, b"0,2"]]
    redis.settle("c", ("postpone", id_, 2, 0, "2"))
    assert rows(redis, "c") == [[id_, 2, b"2"]]


def test_at_maxmemory_what_is_left_is_stored(redis: Raw) -> None:
    id_ = pack(redis)
    redis.add()
    fill(redis)
    assert redis.settle("c", ("retry", id_, 1, 0, "4")) == [b"OK", 1]
    assert rows(redis, "c") == [[id_, 2, b"4"]]


@pytest.mark.parametrize("way", ["done", "dead", "trimmed", "taken", "recalled", "evicted", "swept", "foreign"])
def test_nothing_is_noted_of_a_pack_that_has_come_to_its_end(redis: Raw, way: str) -> None:
    id_ = pack(redis, left="1")
    match way:
        case "done":
            redis.settle("c", ("done", id_, 2))
        case "dead":
            redis.settle("c", ("dead", id_, 2, "undecodable", ""))
        case "trimmed":
            redis.do("XTRIM", LOG, "MAXLEN", 0)
            redis.settle("c", ("retry", id_, 2, 0, "1"))
        case "recalled":
            redis.do("XTRIM", LOG, "MAXLEN", 0)
            assert redis.recall("c", id_)[2:] == [1]
        case "evicted":
            redis.do("XTRIM", LOG, "MAXLEN", 0)
            assert redis.evict("c", redis.score("c"), crashed=0) == [b"done", 0]
        case "taken" | "swept":
            redis.settle("c", ("retry", id_, 2, 0, "1"))
            redis.do("XTRIM", LOG, "MAXLEN", 0)
            assert redis.take("d")[2] if way == "taken" else redis.sweep()[3] == 1
        case "foreign":
            redis.settle("c", ("retry", id_, 2, 0, "1"))
            redis.do("XACK", LOG, GROUP, id_)
            assert rows(redis, "c") == []
    assert redis.pending() == [] and redis.do("EXISTS", NOTE) == 0


# Its dead letters


def test_letters_are_stored_with_their_outcome_and_with_a_repeat_never_again(redis: Raw) -> None:
    id_ = pack(redis)
    again = ("retry", id_, 1, 0, "0")
    for answer in (1, 0):
        assert redis.settle("c", again, outputs={1: [mail("a")]}, letters={1: [2, 4]}) == [b"OK", answer]
    assert letters(redis) == [(b"0@" + id_ + b".2", b"2"), (b"0@" + id_ + b".4", b"4")]
    assert redis.mails() == ["a"] and rows(redis, "c") == [[id_, 2, b"0"]]
    assert redis.do("HMGET", STATS, "dead", "given", "retried") == [b"2", b"2", b"1"]


def test_who_holds_the_pack_no_more_stores_no_letter(redis: Raw) -> None:
    taken, fenced = pack(redis), pack(redis)
    redis.do("XCLAIM", LOG, GROUP, "foreign", 0, taken, "RETRYCOUNT", 1)
    assert redis.settle("c", ("done", taken, 1), letters={1: [0]}) == [b"OK", 0]
    redis.do("DEL", fence("c"))
    assert redis.settle("c", ("done", fenced, 1), letters={1: [0]}) == [b"FENCED"]
    assert letters(redis) == []


def test_without_room_for_all_letters_of_a_pack_there_is_none_of_them(redis: Raw) -> None:
    first, second = pack(redis), pack(redis)
    items = ("done", first, 1), ("done", second, 1)
    outputs = {1: [mail("a")], 2: [mail("b")]}
    answer = redis.settle("c", *items, max_dead=3, outputs=outputs, letters={1: [0, 1], 2: [0, 1]})
    assert answer == [b"OK", 1, b"FULL"] and len(letters(redis)) == 2 and redis.mails() == ["a"]
    assert redis.settle("c", ("postpone", second, 1, 0, "0,1"), outputs={1: [mail("b")]}) == [b"OK", 1]
    assert rows(redis, "c") == [[second, 1, b"0,1"]] and redis.mails() == ["a", "b"]


def test_at_maxmemory_letters_and_their_outcomes_wait_and_others_go_on(redis: Raw) -> None:
    dying, done, retried = pack(redis), pack(redis), pack(redis)
    fill(redis)
    items = ("retry", dying, 1, 0, "3"), ("done", done, 1), ("retry", retried, 1, 0, "0")
    refused, *others = redis.settle("c", *items, letters={1: [1, 2]})[1:]
    assert b"OOM" in refused and others == [1, 1]
    assert letters(redis) == [] and redis.do("HGET", NOTE, b"*" + dying) is None
    redis.do("CONFIG", "SET", "maxmemory", 0)
    assert redis.settle("c", items[0], letters={1: [1, 2]}) == [b"OK", 1]
    assert len(letters(redis)) == 2 and redis.do("HGET", NOTE, b"*" + dying) == b"3"


def test_the_letter_of_an_event_that_came_since_letters_were_looked_at_keeps_its_pack(redis: Raw) -> None:
    id_ = pack(redis)
    redis.settle("c", ("done", id_, 1), letters={1: [4]})
    found = redis.add(300)
    redis.read("c", 300)
    redis.settle("c", *(("done", later, 1) for later in found))
    assert trim(redis, GROUP)[1:5:3] == [0, b"dead letters of g"]
    redis.drop(last_letter(redis))
    assert trim(redis, GROUP)[1] >= 100


# Given back


def test_a_replayed_event_waits_alone_where_its_pack_is_done(redis: Raw) -> None:
    id_ = pack(redis)
    redis.settle("c", ("done", id_, 1), letters={1: [4]})
    assert redis.replay(last_letter(redis), id_ + b".4") == 1
    assert rows(redis, "c") == [[id_, 1, b"4"]]
    assert redis.settle("c", ("done", id_, 1)) == [b"OK", 1] and redis.pending() == []


def test_a_replayed_event_joins_what_waits_of_its_pack(redis: Raw) -> None:
    id_ = pack(redis)
    redis.settle("c", ("retry", id_, 1, far_ms(redis), "0"), letters={1: [2]})
    assert rows(redis, "c") == []
    assert redis.replay(last_letter(redis), id_ + b".2") == 1
    assert rows(redis, "c") == [[id_, 1, b"0,2"]]
    assert redis.do("HMGET", STATS, "replayed", "given") == [b"1", b"0"]


@pytest.mark.parametrize("way", ["done", "retry", "release", "crash", "recall"])
def test_an_event_that_is_given_back_while_others_are_at_work_is_not_finished_with_them(redis: Raw, way: str) -> None:
    id_ = pack(redis, left="0,1")
    assert redis.give_again(id_ + b".3", id_ + b".1") == 1
    assert redis.give_again(id_ + b".3") == 0 and rows(redis, "d") == []
    match way:
        case "done":
            redis.settle("c", ("done", id_, 2))
            left: list[object] = [1, b"3"]
        case "retry":
            redis.settle("c", ("retry", id_, 2, 0, "1"))
            left = [3, b"1,3"]
        case "release":
            redis.settle("c", ("release", id_, 2, 0))
            left = [2, b"0,1,3"]
        case "crash":
            redis.evict("c", redis.score("c"))
            left = [3, b"0,1,3"]
        case "recall":
            assert redis.recall("c", id_)[3][5] == b"0,1,3"
            assert redis.settle("c", ("done", id_, 2)) == [b"OK", 1] and redis.pending() == []
            return
    assert rows(redis, "d") == [[id_, *left]]
    assert redis.settle("d", ("done", id_, left[0])) == [b"OK", 1] and redis.pending() == []
    assert redis.do("EXISTS", NOTE) == 0


def test_of_a_pack_that_comes_whole_nothing_is_given_twice(redis: Raw) -> None:
    held, done = pack(redis), pack(redis)
    redis.settle("c", ("done", done, 1))
    (unread,) = redis.add()
    assert redis.give_again(held + b".1", unread + b".0", done + b".1", done + b".2", done + b".1") == 2
    assert rows(redis, "d") == [[done, 1, b"1,2"]] and redis.do("HGET", STATS, "given") == b"1"
    assert redis.do("HGET", NOTE, b"*" + held) is None


def test_at_maxmemory_nothing_is_given_back(redis: Raw) -> None:
    waits, done = pack(redis, left="0"), pack(redis)
    redis.settle("c", ("retry", waits, 2, 0), ("done", done, 1))
    fill(redis)
    before = everything(redis)
    for id_ in (waits, done):
        with pytest.raises(ReplyError, match="OOM"):
            redis.give_again(id_ + b".1")
    assert everything(redis) == before


# In the order of keys


def test_the_head_of_a_key_keeps_what_is_left_of_it_and_those_behind_theirs(ordered: Raw) -> None:
    ids = ordered.add(2)
    epoch = granted(ordered, "a").epoch
    second = "park", "k", ids[1] + b" 1,2 \x80\x00 4", "0", 0, 0, ""
    ordered.commit("a", epoch, 1, ids[1], 2, parked("k", ids[0]), second)
    for seq, left in ((2, "0,3"), (3, "3"), (4, "3")):
        assert ordered.heads("a", epoch, "k")[1][:2] != []
        ordered.commit("a", epoch, seq, ids[1], 2, ("delay", "k", ids[0].decode(), "0", 1, 0, "", left))
        assert ordered.do("LINDEX", park("k"), 0) == ids[0] + b" " + left.encode() + b" \x80"
    ordered.commit("a", epoch, 5, ids[1], 2, ("delay", "k", ids[0].decode(), "0", 1, 0, ""))
    assert ordered.heads("a", epoch, "k")[1][1] == ids[0] + b" 3 \x80"
    ordered.commit("a", epoch, 6, ids[1], 2, ("pop", "k", ids[0].decode()))
    ordered.commit("a", epoch, 7, ids[1], 2, ("delay", "k", ids[1].decode(), "0", 1, 0, "", "2"))
    assert ordered.heads("a", epoch, "k")[1][1] == ids[1] + b" 2 \x80\x00 4"


def test_an_event_of_a_pack_dies_with_its_own_fields_and_the_pack_with_the_entrys(ordered: Raw) -> None:
    (id_,) = ordered.add()
    epoch = granted(ordered, "a").epoch
    assert ordered.commit("a", epoch, 1, id_, 1, buried(id_ + b".17"), buried(id_)) == [b"OK", 0]
    assert letters(ordered) == [(b"0@" + id_ + b".17", b"ours"), (b"0@" + id_, b"{}")]


def test_at_maxmemory_a_commit_with_letters_writes_nothing(ordered: Raw) -> None:
    (id_,) = ordered.add()
    epoch = granted(ordered, "a").epoch
    effects = buried(id_ + b".1"), ("park", "k", event(id_), "0", 1, 0, "")
    fill(ordered)
    before = everything(ordered)
    assert ordered.commit("a", epoch, 1, id_, 1, *effects) == [b"FULL"]
    assert everything(ordered) == before
    ordered.do("CONFIG", "SET", "maxmemory", 0)
    assert ordered.commit("a", epoch, 1, id_, 1, *effects) == [b"OK", 1]


def far_ms(redis: Raw) -> int:
    """A due time that does not come during a test."""
    seconds, _ = redis.do("TIME")
    return (int(seconds) + 3_600) * 1000
