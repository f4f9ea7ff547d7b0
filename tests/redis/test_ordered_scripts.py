"""The contracts of the Lua scripts of the order of keys: leases, commits, parked keys, and the change of a group's way."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hiredis import ReplyError

from tests.redis import brokers, raw
from tests.redis.raw import DEAD, DUE, GROUP, LEASE, LIVE, LOG, META, NOTE, PARKED, PARKINFO, STATS, Raw, fence, park

started = brokers.started
server = brokers.server
redis = raw.log

FAR_MS = 9_000_000_000_000


class Granted(NamedTuple):
    """The answer of `acquire.lua`."""

    state: bytes
    epoch: bytes
    w: bytes
    wn: bytes
    h: bytes
    open: bytes
    clean: int
    last: bytes
    lost: int
    regressed: int
    events_parked: int
    keys: list[bytes]
    notes: list[bytes]
    gaps: bytes


def granted(redis: Raw, member: str, silent: Any = "", *formers: str) -> Granted:
    answer = redis.acquire(member, silent, *formers)
    assert answer[0] == b"OK", answer
    return Granted(*answer)


def event(id_: bytes) -> bytes:
    return id_ + b" \x80"


def parked(key: str, id_: bytes, due_ms: int = 0) -> tuple[Any, ...]:
    return "park", key, event(id_), str(due_ms), 1, 0, "why"


def buried(id_: bytes) -> tuple[Any, ...]:
    return "dead", id_.decode(), "failed", "why", 3, (b"type", b"ours")


def everything(redis: Raw) -> dict[bytes, Any]:
    return {key: redis.do("DUMP", key) for key in redis.do("KEYS", "*")}


def fill(redis: Raw) -> None:
    redis.do("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(ReplyError, match="OOM"):
        redis.add()


# Leases


def test_a_lease_is_taken_when_it_is_free_and_as_it_was_seen(redis: Raw) -> None:
    first = granted(redis, "a")
    assert (first.w, first.wn, first.clean, first.regressed, first.lost) == (b"0-0", b"0", 1, 0, 0)
    assert redis.acquire("b") == [b"HELD"]
    assert redis.acquire("b", seen=(b"", b"0")) == [b"HELD"]
    assert redis.give("b", first.epoch) == b"LOST" and redis.give("a", first.epoch, "b") == b"OK"
    assert redis.lease("next") == b"b"
    second = granted(redis, "b")
    assert int(second.epoch) > int(first.epoch) and second.clean == 1


def test_a_silent_owner_is_not_clean_and_one_that_has_beaten_since_is_alive(redis: Raw) -> None:
    granted(redis, "a")
    seen = redis.score("a")
    redis.beat("a")
    assert redis.acquire("b", seen) == [b"HELD"]
    assert granted(redis, "b", redis.score("a")).clean == 0


def test_who_has_no_fence_takes_nothing(redis: Raw) -> None:
    redis.do("DEL", fence("a"))
    assert redis.acquire("a") == [b"FENCED"] and redis.do("EXISTS", LEASE) == 0


def test_a_former_life_and_an_answer_that_was_lost_are_no_crash(redis: Raw) -> None:
    (id_,) = redis.add()
    first = granted(redis, "a")
    assert redis.begin("a", first.epoch, id_) == b"OK"
    again = granted(redis, "a")
    assert again.clean == 1 and again.notes == [id_, b"0"] and redis.do("HGET", NOTE, id_) == b"0s"
    assert granted(redis, "b", "", "a").clean == 1
    assert redis.do("HGET", NOTE, id_) == b"0"


def test_what_was_running_in_a_crash_is_counted(redis: Raw) -> None:
    running, waiting = redis.add(2)
    first = granted(redis, "a")
    redis.begin("a", first.epoch, running)
    redis.do("HSET", NOTE, waiting, "0")
    notes = granted(redis, "b", redis.score("a")).notes
    assert dict(zip(notes[::2], notes[1::2], strict=True)) == {running: b"1", waiting: b"0"}
    assert redis.begin("a", first.epoch, running) == b"LOST"


# The mark, and the log under it


def test_the_mark_is_the_truth_and_a_foreign_reader_moves_nothing(redis: Raw) -> None:
    ids = redis.add(4)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[0], 1)
    redis.read("foreign")
    assert redis.group()[b"last-delivered-id"] == ids[3]
    redis.give("a", first.epoch)
    second = granted(redis, "b")
    assert (second.w, second.wn, second.last) == (ids[0], b"1", ids[3])
    assert redis.group()[b"last-delivered-id"] == ids[0] and redis.group()[b"lag"] == 3


def test_a_group_that_was_moved_back_by_hand_is_followed(redis: Raw) -> None:
    ids = redis.add(4)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[2], 3, h=ids[3])
    redis.give("a", first.epoch)
    redis.do("XGROUP", "SETID", LOG, GROUP, ids[0])
    second = granted(redis, "b")
    assert (second.w, second.h, second.open, second.regressed) == (ids[0], b"", b"", 0)
    redis.commit("b", second.epoch, 1, ids[3], second.wn)
    assert redis.group()[b"lag"] == 0


def test_a_log_that_ends_before_the_mark_is_another_one(redis: Raw) -> None:
    ids = redis.add(4)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[3], 4)
    redis.give("a", first.epoch)
    redis.do("DEL", LOG)
    redis.add(2)
    assert redis.found() == [b"OK", 2]
    second = granted(redis, "b")
    assert (second.w, second.wn, second.regressed) == (b"0-0", b"0", 1)
    assert redis.group()[b"lag"] == 2


def test_a_group_that_is_destroyed_is_made_again_at_the_mark(redis: Raw) -> None:
    ids = redis.add(4)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[1], 2)
    redis.do("XGROUP", "DESTROY", LOG, GROUP)
    assert redis.commit("a", first.epoch, 2, ids[2], 3) == [b"GONE"]
    assert granted(redis, "a").w == ids[1] and redis.group()[b"lag"] == 2


def test_what_was_trimmed_before_it_was_settled_is_counted_as_lost(redis: Raw) -> None:
    ids = redis.add(10)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[2], 3)
    redis.do("XTRIM", LOG, "MAXLEN", 4)
    redis.give("a", first.epoch)
    second = granted(redis, "b")
    assert (second.lost, second.wn, second.w) == (3, b"6", ids[2])
    redis.commit("b", second.epoch, 1, ids[6], 7)
    assert redis.group()[b"lag"] == 3
    redis.give("b", second.epoch)
    assert granted(redis, "a").lost == 0


def test_a_group_that_begins_at_a_time_without_events_has_lost_nothing(redis: Raw) -> None:
    ids = redis.add(2)
    redis.do("XGROUP", "DESTROY", LOG, GROUP)
    redis.do("DEL", META)
    redis.found(f"{ids[1].decode().partition('-')[0]}-18446744073709551615")
    first = granted(redis, "a")
    assert (first.w, first.wn) == (ids[1], b"2")
    redis.give("a", first.epoch)
    assert granted(redis, "b").regressed == 0


def test_a_group_that_begins_at_a_time_to_come_waits_for_it(redis: Raw) -> None:
    redis.add(2)
    redis.do("XGROUP", "DESTROY", LOG, GROUP)
    redis.do("DEL", META)
    redis.found(f"{FAR_MS}-0")
    first = granted(redis, "a")
    assert (first.w, first.wn) == (f"{FAR_MS}-0".encode(), b"")
    redis.give("a", first.epoch)
    assert granted(redis, "b")[2:4] == (f"{FAR_MS}-0".encode(), b"")


def test_the_lag_is_exact_after_each_commit(redis: Raw) -> None:
    ids = redis.add(300)
    first = granted(redis, "a")
    for seq, number in enumerate([1, 7, 100, 299, 300], 1):
        assert redis.commit("a", first.epoch, seq, ids[number - 1], number)[0] == b"OK"
        assert redis.group()[b"lag"] == 300 - number and redis.group()[b"entries-read"] == number
    redis.add(5)
    assert redis.group()[b"lag"] == 5


# Commits


def test_a_repeated_commit_changes_nothing_and_answers_the_same(redis: Raw) -> None:
    ids = redis.add(3)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[0], 1, parked("k", ids[0]), done=1)
    pop = "pop", "k", ids[0].decode()
    effects = buried(ids[1]), parked("k", ids[1]), pop
    assert redis.commit("a", first.epoch, 2, ids[1], 2, *effects, done=1) == [b"OK", 1]
    before = everything(redis)
    assert redis.commit("a", first.epoch, 2, ids[1], 2, *effects, done=1) == [b"OK", 1]
    assert redis.commit("a", first.epoch, 1, ids[0], 1) == [b"SEQ"]
    assert redis.commit("a", first.epoch, 4, ids[2], 3) == [b"SEQ"]
    assert everything(redis) == before
    assert redis.lease("done") == b"2" and redis.do("XLEN", DEAD) == 1


def test_whoever_was_taken_over_stores_nothing(redis: Raw) -> None:
    ids = redis.add(3)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[0], 1, parked("k", ids[0]))
    second = granted(redis, "b", redis.score("a"))
    before = everything(redis)
    assert redis.commit("a", first.epoch, 2, ids[1], 2, parked("k", ids[1]), buried(ids[1])) == [b"LOST"]
    assert redis.commit("b", first.epoch, 1, ids[1], 2) == [b"LOST"]
    assert redis.heads("a", first.epoch, "k") == [b"LOST"] and redis.give("a", first.epoch) == b"LOST"
    assert everything(redis) == before
    assert redis.commit("b", second.epoch, 1, ids[1], 2)[0] == b"OK"


def test_a_dead_letter_is_the_entry_as_it_was_written_or_ours_when_that_is_gone(redis: Raw) -> None:
    id_ = redis.do("XADD", LOG, "*", "type", "t", "more", "of it", "data", "{}")
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, id_, 1, buried(id_))
    redis.do("XTRIM", LOG, "MAXLEN", 0)
    redis.commit("a", first.epoch, 2, id_, 1, buried(id_))
    (_, whole), (_, ours) = redis.do("XRANGE", DEAD, "-", "+")
    assert whole[12:] == [b"type", b"t", b"more", b"of it", b"data", b"{}"] and ours[12:] == [b"type", b"ours"]
    assert whole[:10:2] == [b"reason", b"error", b"attempts", b"position", b"group"]
    assert whole[1:10:2] == [b"failed", b"why", b"3", b"0@" + id_, GROUP.encode()]


def test_past_the_bound_of_dead_letters_nothing_of_the_commit_is_stored(redis: Raw) -> None:
    ids = redis.add(3)
    first = granted(redis, "a")
    assert redis.commit("a", first.epoch, 1, ids[1], 2, buried(ids[0]), buried(ids[1]), max_dead=2)[0] == b"OK"
    before = everything(redis)
    assert redis.commit("a", first.epoch, 2, ids[2], 3, buried(ids[2]), max_dead=2) == [b"DEAD_FULL"]
    assert everything(redis) == before


def test_a_key_of_another_kind_is_named_and_nothing_is_written(redis: Raw) -> None:
    (id_,) = redis.add()
    first = granted(redis, "a")
    redis.do("SET", park("k"), "somebody's")
    before = everything(redis)
    assert redis.commit("a", first.epoch, 1, id_, 1, buried(id_), parked("k", id_)) == [b"TYPE", park("k")]
    assert everything(redis) == before


# Parked keys


def test_only_the_first_event_of_a_key_is_popped_and_the_next_is_due_at_once(redis: Raw) -> None:
    one, two = redis.add(2)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, two, 2, parked("k", one, FAR_MS), parked("k", two))
    assert redis.do("ZSCORE", PARKED, "k") == b"%d" % FAR_MS and redis.do("HGET", PARKINFO, "#n") == b"2"
    assert redis.do("HGET", PARKINFO, "=k").startswith(b"1 0 ")
    assert redis.commit("a", first.epoch, 2, two, 2, ("pop", "k", two.decode())) == [b"OK", 2]
    assert redis.commit("a", first.epoch, 3, two, 2, ("pop", "k", one.decode())) == [b"OK", 1]
    assert redis.do("ZSCORE", PARKED, "k") == b"0" and redis.do("HGET", PARKINFO, "=k").startswith(b"0 0 ")
    assert redis.commit("a", first.epoch, 4, two, 2, ("pop", "k", two.decode())) == [b"OK", 0, b"k"]
    assert not redis.do("EXISTS", PARKED, park("k"), NOTE) and redis.do("HGETALL", PARKINFO) == [b"#n", b"0"]
    assert redis.commit("a", first.epoch, 4, two, 2, ("pop", "k", two.decode())) == [b"OK", 0, b"k"]


def test_a_head_is_counted_when_it_begins_and_blamed_when_its_process_dies(redis: Raw) -> None:
    (id_,) = redis.add()
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, id_, 1, parked("k", id_))
    for _ in range(2):  # the answer to the first may have been lost
        assert redis.heads("a", first.epoch, "k", "other") == [b"OK", [b"k", event(id_), 2, b"0", b"0"]]
    second = granted(redis, "b", redis.score("a"))
    assert (second.keys, second.events_parked) == ([b"k"], 1)
    assert redis.heads("b", second.epoch, "k") == [b"OK", [b"k", event(id_), 3, b"0", b"1"]]
    delay = "delay", "k", id_.decode(), str(FAR_MS), 3, 1, "later"
    assert redis.commit("b", second.epoch, 1, id_, 1, delay)[0] == b"OK"
    assert redis.heads("b", second.epoch, "k") == [b"OK"] and not redis.do("EXISTS", NOTE)
    assert redis.do("HGET", PARKINFO, "=k").split(b" ")[::3] == [b"3", b"later"]


def test_a_list_that_somebody_deleted_frees_its_key(redis: Raw) -> None:
    (id_,) = redis.add()
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, id_, 1, parked("k", id_))
    redis.do("DEL", park("k"))
    assert redis.heads("a", first.epoch, "k") == [b"OK"] and not redis.do("EXISTS", PARKED)


def test_a_long_event_key_appears_as_its_digest() -> None:
    assert park("k" * 256).endswith(b":" + b"k" * 256)
    assert len(park("k" * 257)) == len(park("")) + 64 and park("k" * 257) != park("k" * 258)


# Giving events again


def given(redis: Raw, *ids: bytes, key: str = "k") -> Any:
    words = [word for id_ in ids for word in (key, event(id_))]
    return redis.run("repark", [LOG, LEASE, PARKED, PARKINFO, *[park(key)] * len(ids)], [GROUP, *words])


def test_only_what_is_settled_and_not_parked_joins_the_end_of_its_key(redis: Raw) -> None:
    ids = redis.add(6)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[1], 2, parked("k", ids[1], FAR_MS), h=ids[4], opened=ids[2] + b" " + ids[3])
    assert given(redis, *ids, ids[0]) == 2
    assert redis.do("LRANGE", park("k"), 0, -1) == [event(ids[1]), event(ids[0]), event(ids[4])]
    assert redis.do("ZSCORE", PARKED, "k") == b"%d" % FAR_MS and redis.do("HGET", PARKINFO, "=k").startswith(b"1 0 ")
    assert given(redis, ids[0], key="other") == 1
    assert redis.do("ZSCORE", PARKED, "other") == b"0" and redis.do("HGET", PARKINFO, "=other").startswith(b"0 0 ")
    assert redis.do("HGET", PARKINFO, "#n") == b"4"
    before = everything(redis)
    assert given(redis, *ids) == 0 and everything(redis) == before


def test_a_long_list_is_looked_through_to_its_end(redis: Raw) -> None:
    ids = redis.add(250)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[-1], 250)
    assert given(redis, *ids[:200]) == 200 and given(redis, *ids[50:]) == 50
    assert redis.do("LLEN", park("k")) == 250 and given(redis, ids[0], ids[120], ids[249]) == 0


def test_where_the_group_was_moved_back_by_hand_what_comes_again_is_not_given(redis: Raw) -> None:
    ids = redis.add(3)
    assert given(redis, ids[0]) == 0, "nobody has begun"
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[2], 3)
    redis.do("XGROUP", "SETID", LOG, GROUP, ids[0])
    assert given(redis, *ids) == 1
    redis.do("XGROUP", "DESTROY", LOG, GROUP)
    assert given(redis, *ids) == 0


def test_without_order_only_what_is_settled_and_still_there_waits_again(redis: Raw) -> None:
    def given(*ids: bytes) -> Any:
        return redis.run("give", [LOG, DUE, STATS, NOTE], [GROUP, *ids])

    redis.do("DEL", META, LOG)
    redis.join()
    ids = redis.add(4)
    redis.read("c", 3)
    redis.do("XACK", LOG, GROUP, *ids[:2])
    redis.do("XDEL", LOG, ids[1])
    redis.do("HSET", NOTE, ids[0], "2", b"+" + ids[0], "3")
    assert given(*ids, ids[0]) == 1 and given(*ids) == 0
    assert redis.pending() == [(ids[0], b"~due", 0), (ids[2], b"c", 1)]
    assert redis.do("ZRANGE", DUE, 0, -1, "WITHSCORES") == [ids[0], b"0"] and not redis.do("EXISTS", NOTE)
    assert redis.do("HGET", STATS, "given") == b"1"
    redis.do("XACK", LOG, GROUP, ids[0])
    fill(redis)
    before = everything(redis)
    with pytest.raises(ReplyError, match="OOM"):
        given(ids[0])
    assert everything(redis) == before
    redis.do("DEL", LOG)
    assert given(ids[0]) == 0


# At maxmemory


def test_at_maxmemory_nothing_is_given(redis: Raw) -> None:
    (id_,) = redis.add()
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, id_, 1)
    fill(redis)
    before = everything(redis)
    with pytest.raises(ReplyError, match="OOM"):
        given(redis, id_)
    assert everything(redis) == before


def test_at_maxmemory_all_is_stored_but_dead_letters(redis: Raw) -> None:
    ids = redis.add(4)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[0], 1, parked("k", ids[0]))
    fill(redis)
    before = everything(redis)
    assert redis.commit("a", first.epoch, 2, ids[1], 2, parked("k", ids[1]), buried(ids[1])) == [b"FULL"]
    assert everything(redis) == before
    assert redis.commit("a", first.epoch, 2, ids[1], 2, parked("k", ids[1]), done=1) == [b"OK", 2]
    assert redis.heads("a", first.epoch, "k")[0] == b"OK" and redis.begin("a", first.epoch, ids[2]) == b"OK"
    second = granted(redis, "b", redis.score("a"))
    assert redis.run("ask", [LEASE], ["a", "b", second.epoch, ""]) == 1 and redis.lease("want") == b"a"
    assert redis.run("ask", [LEASE], ["c", "b", second.epoch, ""]) == 0
    assert redis.give("b", second.epoch) == b"OK"
    redis.do("XGROUP", "DESTROY", LOG, GROUP)
    assert granted(redis, "a").w == ids[1]


# The two ways


def test_a_group_at_rest_may_change_its_way_and_goes_on_where_it_was(redis: Raw) -> None:
    def switched(mode: str, go: int = 1) -> Any:
        return redis.run("switch", [LOG, META, DUE, LEASE, PARKED, LIVE], [GROUP, mode, 60_000, go])

    ids = redis.add(4)
    first = granted(redis, "a")
    redis.commit("a", first.epoch, 1, ids[1], 2, parked("k", ids[1]))
    assert redis.found(mode="queue") == [b"MODE", b"log"] and switched("queue") == 0, "it has an owner"
    redis.give("a", first.epoch)
    assert switched("queue") == 0, "a key is parked"
    second = granted(redis, "a")
    redis.commit("a", second.epoch, 1, ids[1], 2, ("pop", "k", ids[1].decode()))
    redis.give("a", second.epoch)
    assert switched("queue", 0) == 1 and redis.do("HGET", META, "mode:g") == b"log"
    assert switched("queue") == 1 and redis.found(mode="queue") == [b"OK", 0]
    assert redis.read("c", 1) == [ids[2]]
    assert redis.acquire("a") == [b"MODE", b"queue"]
    assert switched("log") == 0, "an event is pending"
    redis.do("XACK", LOG, GROUP, ids[2])
    assert switched("log") == 0, "members live in it"
    ago_ms = int(redis.do("TIME")[0]) * 1000 - 61_000
    redis.do("HSET", META, "entered:g", ago_ms, "seen:g", ago_ms + 2_000)
    assert switched("log") == 0, "somebody looked for silent ones within a minute"
    redis.do("HSET", META, "seen:g", ago_ms)
    assert switched("log") == 1 and redis.found() == [b"OK", 0]
    assert granted(redis, "a").w == ids[2]
