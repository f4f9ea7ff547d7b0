"""The contracts of the Lua scripts that take over, look after things, and work where there is no room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hiredis import ReplyError

from tests.redis import brokers
from tests.redis.raw import DEAD, DUE, GROUP, LIVE, LOG, META, NOTE, STATS, Raw, fence
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

SOON_MS = 60_000


@pytest.fixture
def redis(server: RedisServer) -> Iterator[Raw]:
    with Raw(server.port) as redis:
        redis.join()
        redis.enter("c")
        yield redis


@pytest.fixture
def full(redis: Raw) -> Iterator[Raw]:
    """A server that takes no more: the events were published before."""
    redis.add(5)
    yield redis
    redis.do("CONFIG", "SET", "maxmemory", 0)


def fill(redis: Raw) -> None:
    redis.do("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(ReplyError, match="OOM"):
        redis.add()


# Taking over


def test_an_evicted_consumer_loses_its_fence_and_all_that_it_held(redis: Raw) -> None:
    redis.enter("d")
    ids = redis.add(5)
    redis.read("c")
    score = redis.score("c")
    assert redis.evict("c", score, 2) == [b"more", 2]
    assert redis.evict("c", score, 2) == [b"more", 2]
    assert not redis.do("EXISTS", fence("c")) and redis.beat("c") == [b"FENCED"]
    assert redis.evict("c", score, 2) == [b"done", 1]
    assert redis.evict("c", score, 2) == [b"done", 0]
    assert redis.bury("c", score) == b"OK" and redis.do("ZRANGE", LIVE, 0, -1) == [b"d"]
    assert [(id_, owner) for id_, owner, _ in redis.pending()] == [(id_, b"~due") for id_ in ids]
    assert [row[:3] for row in redis.take("d")[3:]] == [[id_, 2, b"0"] for id_ in ids]


def test_who_has_beaten_since_is_not_evicted(redis: Raw) -> None:
    redis.add()
    redis.read("c")
    seen = redis.score("c")
    redis.beat("c")
    assert redis.evict("c", seen) == [b"ALIVE"] and redis.bury("c", seen) == b"ALIVE"
    assert redis.beat("c")[0] == b"OK" and redis.pending()[0][1] == b"c"


def test_a_transaction_of_an_evicted_consumer_is_refused(redis: Raw, server: RedisServer) -> None:
    (id_,) = redis.add()
    redis.read("c")
    with Raw(server.port) as zombie:
        assert zombie.calls(("WATCH", fence("c")), ("GET", fence("c")))[1] == b"n-c"
        redis.evict("c", redis.score("c"))
        replies = zombie.calls(
            ("MULTI",), ("XACK", LOG, GROUP, id_), ("EXEC",), ("WATCH", fence("c")), ("GET", fence("c"))
        )
    assert replies[2] is None and replies[4] is None
    assert redis.pending() == [(id_, b"~due", 1)]


def test_blame_is_narrowed_down_to_what_was_running(redis: Raw) -> None:
    fetched, started, again = redis.add(3)
    redis.read("c")
    redis.do("HSET", NOTE, started, "0", again, "1")
    redis.mark("c", started, again)
    assert redis.do("HMGET", NOTE, started, again) == [b"0s", b"1s"]
    redis.mark("c", started)
    assert redis.do("HGET", NOTE, started) == b"0s", "marking twice is marking once"
    redis.evict("c", redis.score("c"))
    assert redis.do("HMGET", NOTE, fetched, started, again) == [b"0", b"1", b"2"]


def test_the_only_event_of_a_crashed_consumer_is_blamed_at_once(redis: Raw) -> None:
    (id_,) = redis.add()
    redis.read("c")
    redis.evict("c", redis.score("c"), lone=1)
    assert redis.do("HGET", NOTE, id_) == b"1"


def test_nobody_is_blamed_without_a_crash(redis: Raw) -> None:
    fetched, started = redis.add(2)
    redis.read("c")
    redis.do("HSET", NOTE, started, "1")
    redis.mark("c", started)
    redis.evict("c", redis.score("c"), crashed=0, lone=1)
    assert redis.do("HMGET", NOTE, fetched, started) == [None, b"1"]


def test_evicting_where_the_group_is_gone_is_done_at_once(redis: Raw) -> None:
    redis.do("DEL", LOG)
    assert redis.evict("c", redis.score("c")) == [b"done", 0]


def test_a_foreign_consumer_is_adopted_only_when_it_was_idle_long_enough(redis: Raw) -> None:
    ids = redis.add(3)
    redis.read("foreign")
    assert redis.adopt("foreign", SOON_MS) == 0 and redis.adopt("foreign", 0, 2) == 2 and redis.adopt("foreign", 0) == 1
    assert [row[:2] for row in redis.take("c")[3:]] == [[id_, 2] for id_ in ids]


# Sweeping


def test_a_sweep_remembers_where_all_before_is_settled(redis: Raw) -> None:
    def low() -> bytes:
        assert redis.sweep()[0] == b"OK"
        found: bytes = redis.do("HGET", META, "low:g")
        return found

    for number in range(1, 5):
        redis.do("XADD", LOG, f"7-{number}", "type", "t")
    redis.do("XADD", LOG, "9-0", "type", "t")
    assert low() == b"0-0 0"
    redis.read("c")
    assert low() == b"7-0 5"
    redis.ack("c", b"7-1", b"7-3")
    assert low() == b"7-1 5"
    redis.ack("c", b"7-2", b"7-4")
    assert low() == b"8-18446744073709551615 5"
    redis.ack("c", b"9-0")
    assert low() == b"9-0 5"


def test_a_sweep_finds_waiting_entries_that_are_not_in_due(redis: Raw) -> None:
    ids = redis.add(5)
    redis.read("c")
    redis.settle("c", *(("retry", id_, 1, 9) for id_ in ids))
    redis.do("ZREM", DUE, *ids[1:4])
    state, missing, cursor, _, *names = redis.sweep(limit=3)
    assert (state, missing, names) == (b"OK", 2, [b"c"])
    state, missing, cursor, *names = redis.sweep(cursor, limit=3)
    assert (state, missing, cursor) == (b"OK", 1, b"")
    assert sorted(redis.do("ZRANGE", DUE, 0, -1)) == ids and redis.do("ZSCORE", DUE, ids[0]) == b"9"


def test_one_process_sweeps_at_a_time(redis: Raw) -> None:
    assert redis.sweep(often_ms=SOON_MS)[0] == b"OK"
    assert redis.sweep(often_ms=SOON_MS) == [b"RECENT"] and redis.sweep("(0-0", SOON_MS)[0] == b"OK"
    redis.do("XGROUP", "DESTROY", LOG, GROUP)
    assert redis.sweep() == [b"NOGROUP"]
    redis.do("DEL", LOG)
    assert redis.sweep() == [b"NOGROUP"]


# Dead letters


def killed(redis: Raw) -> tuple[bytes, bytes]:
    """An event that is dead: its letter and its id."""
    (id_,) = redis.add()
    redis.read("c")
    redis.settle("c", ("dead", id_, 1, "failed", "why"))
    ((letter, _),) = redis.do("XRANGE", DEAD, "-", "+")
    return letter, id_


def test_a_replayed_letter_is_delivered_again_with_attempts_counted_anew(redis: Raw) -> None:
    letter, id_ = killed(redis)
    assert redis.replay(letter, id_) == 1 and redis.do("XLEN", DEAD) == 0
    assert redis.pending() == [(id_, b"~due", 0)]
    assert redis.take("c")[3][:4] == [id_, 1, b"", b"0"]
    assert redis.replay(letter, id_) == 0 and redis.do("HGET", STATS, "replayed") == b"1"


def test_a_letter_stays_when_its_event_or_its_group_is_gone(redis: Raw) -> None:
    letter, id_ = killed(redis)
    redis.do("XTRIM", LOG, "MAXLEN", 0)
    assert redis.replay(letter, id_) == 0 and redis.do("XLEN", DEAD) == 1 and not redis.pending()
    redis.do("XADD", LOG, "*", "type", "t")
    redis.do("XGROUP", "DESTROY", LOG, GROUP)
    (other,) = redis.add()
    assert redis.replay(letter, other) == 0 and redis.do("XLEN", DEAD) == 1


def test_a_replay_takes_nothing_out_of_anybodys_hands(redis: Raw) -> None:
    letter, id_ = killed(redis)
    redis.do("XGROUP", "SETID", LOG, GROUP, "0-0")
    assert redis.replay(letter, id_) == 1 and not redis.pending(), "it is undelivered, so it comes anyway"
    redis.do("XADD", DEAD, letter.replace(b"-0", b"-1"), "reason", "x")
    redis.read("c")
    assert redis.replay(letter.replace(b"-0", b"-1"), id_) == 1 and redis.pending() == [(id_, b"c", 1)]
    assert not redis.do("EXISTS", DUE)


def test_a_dropped_letter_is_gone_and_counted(redis: Raw) -> None:
    letter, _ = killed(redis)
    assert redis.drop(letter) == 1 and redis.drop(letter) == 0
    assert redis.do("XLEN", DEAD) == 0 and redis.do("HGET", STATS, "dropped") == b"1"


# At maxmemory


def test_at_maxmemory_a_consumer_can_still_live_and_take_over(full: Raw) -> None:
    full.read("c")
    fill(full)
    assert full.enter("d")[0] == b"OK" and full.beat("d")[0] == b"OK" and full.join() == [b"OK", 0]
    assert full.evict("c", full.score("c")) == [b"done", 5] and full.bury("c", full.score("c")) == b"OK"
    rows = full.take("d")[3:]
    assert len(rows) == 5 and full.mark("d", *(row[0] for row in rows)) == b"OK"
    assert full.sweep()[0] == b"OK" and len(full.recall("d", rows[0][0])) == 4
    full.read("foreign")
    assert full.adopt("foreign", 0) == 0


def test_at_maxmemory_a_group_that_vanished_is_made_again(full: Raw) -> None:
    full.do("XGROUP", "DESTROY", LOG, GROUP)
    fill(full)
    assert full.join() == [b"OK", 2]


def test_at_maxmemory_all_is_settled_but_dead_letters(full: Raw) -> None:
    acked, done, retry, release, dead = full.read("c")
    fill(full)
    assert full.ack("c", acked) == [b"OK", 1]
    items = ("dead", dead, 1, "failed", ""), ("done", done, 1), ("retry", retry, 1, 0), ("release", release, 1, 0)
    answer = full.settle("c", *items)
    assert answer[1].startswith(b"OOM") and answer[2:] == [1, 1, 1]
    assert full.pending("c") == [(dead, b"c", 1)] and not full.do("EXISTS", DEAD)
    full.do("CONFIG", "SET", "maxmemory", 0)
    assert full.settle("c", *items) == [b"OK", 1, 0, 0, 0]


def test_at_maxmemory_a_dead_letter_can_be_replayed(full: Raw) -> None:
    letter, id_ = killed(full)
    fill(full)
    assert full.replay(letter, id_) == 1 and full.take("c")[3][0] == id_
