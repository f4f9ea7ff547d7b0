"""The contracts of the Lua scripts, on each version of Redis: what they answer, what they change, what they refuse.

Here: living, joining, settling and taking. `test_script_care.py` has the others.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from importlib.resources import files

import pytest

from tests.redis import brokers
from tests.redis.raw import DEAD, DUE, GROUP, LOG, META, NOTE, STATS, TICK, Raw, fence
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


def now_ms() -> int:
    return time.time_ns() // 1_000_000


# Living


def test_a_consumer_enters_once_under_its_name(redis: Raw) -> None:
    ok, tick, server_ms = redis.enter("d")
    assert (ok, tick) == (b"OK", 2) and abs(server_ms - now_ms()) < 60_000
    assert redis.enter("d", "another") == [b"NAME"] == redis.enter("d")
    assert redis.do("GET", fence("d")) == b"n-d" and redis.do("TTL", fence("d")) == -1
    assert redis.score("d") == b"2"


def test_a_beat_raises_the_tick_and_says_what_is_due(redis: Raw) -> None:
    ok, tick, server_ms, first, waiting = redis.beat("c")
    assert (ok, tick, first, waiting) == (b"OK", 2, b"", 0) and abs(server_ms - now_ms()) < 60_000
    redis.do("ZADD", DUE, 500, "1-0", 700, "2-0")
    assert redis.beat("c")[3:] == [b"500", 2]
    assert redis.score("c") == redis.do("GET", TICK) == b"3"


def test_a_beat_does_not_disturb_who_watches_the_fence(redis: Raw, server: RedisServer) -> None:
    (id_,) = redis.add()
    redis.read("c")
    with Raw(server.port) as watcher:
        watcher.calls(("WATCH", fence("c")), ("GET", fence("c")))
        redis.beat("c")
        redis.mark("c", id_)
        assert watcher.calls(("MULTI",), ("XACK", LOG, GROUP, id_), ("EXEC",))[-1] == [1]


def test_who_has_no_fence_can_do_nothing(redis: Raw) -> None:
    (id_,) = redis.add()
    redis.read("c")
    redis.do("DEL", fence("c"))
    before = redis.pending()
    assert redis.beat("c") == redis.ack("c", id_) == redis.take("c") == redis.recall("c", id_) == [b"FENCED"]
    assert redis.settle("c", ("done", id_, 1)) == [b"FENCED"] and redis.mark("c", id_) == b"FENCED"
    assert redis.pending() == before == [(id_, b"c", 1)] and not redis.do("EXISTS", NOTE, DUE)


# Joining


def test_a_group_is_born_where_it_was_asked_to(redis: Raw) -> None:
    assert redis.join() == [b"OK", 0]  # it exists
    redis.do("FLUSHALL")
    assert redis.join() == [b"OK", 1] and redis.group()[b"last-delivered-id"] == b"0-0"
    assert redis.do("HGET", META, "start:g") == b"0-0 0"
    redis.do("FLUSHALL")
    *_, last = redis.add(3)
    assert redis.join("$") == [b"OK", 1]
    info = redis.group()
    assert info[b"last-delivered-id"] == last and (info[b"lag"], info[b"entries-read"]) == (0, 3)
    assert redis.do("HGET", META, "start:g") == last + b" 3"


def test_a_group_is_refused_to_another_owner_and_in_another_mode(redis: Raw) -> None:
    assert redis.join(owner="other") == [b"OWNER", b"app"]
    redis.do("HSET", META, "mode:g", "log")
    assert redis.join() == [b"MODE", b"log"]


def test_a_group_that_vanished_begins_where_all_before_was_settled(redis: Raw) -> None:
    ids = redis.add(6)
    redis.read("c", 4)
    redis.ack("c", *ids[:2])
    redis.sweep()
    redis.do("ZADD", DUE, 5, ids[2])
    redis.do("HSET", NOTE, ids[2], "0")
    redis.do("XGROUP", "DESTROY", LOG, GROUP)
    assert redis.join("$") == [b"OK", 2]
    assert redis.read("c") == ids[2:], "the pending ones come again, the settled ones do not"
    assert not redis.do("EXISTS", DUE, NOTE)


def test_a_group_that_vanished_before_any_sweep_begins_where_it_was_born(redis: Raw) -> None:
    redis.do("XGROUP", "DESTROY", LOG, GROUP)
    redis.do("DEL", META)
    redis.add(2)
    redis.join("$")
    later = redis.add(2)
    redis.do("XGROUP", "DESTROY", LOG, GROUP)
    assert redis.join("$") == [b"OK", 2] and redis.read("c") == later


def test_a_group_on_a_log_that_was_made_anew_begins_at_its_beginning(redis: Raw) -> None:
    redis.add(5)
    redis.read("c")
    redis.sweep()
    redis.do("DEL", LOG)
    anew = redis.do("XADD", LOG, "5-5", "type", "t")
    assert redis.join() == [b"OK", 2] and redis.read("c") == [anew]


# Settling


def test_an_ack_counts_what_was_pending(redis: Raw) -> None:
    ids = redis.add(3)
    redis.read("c")
    assert redis.ack("c", *ids[:2]) == [b"OK", 2] and redis.ack("c", *ids) == [b"OK", 1]


def test_each_verdict_moves_its_entry(redis: Raw) -> None:
    done, retry, postpone, release = redis.add(4)
    redis.read("c")
    redis.do("HSET", NOTE, done, "0s", f"+{done.decode()}", 3, retry, "0s", postpone, "1s", release, "2s")
    items = ("done", done, 1), ("retry", retry, 1, 7), ("postpone", postpone, 1, 8), ("release", release, 1, 0)
    assert redis.settle("c", *items) == [b"OK", 1, 1, 1, 1]
    assert redis.pending() == [(retry, b"~due", 1), (postpone, b"~due", 0), (release, b"~due", 0)]
    assert redis.do("ZRANGE", DUE, 0, -1, "WITHSCORES") == [release, b"0", retry, b"7", postpone, b"8"]
    notes = redis.do("HGETALL", NOTE)
    assert dict(zip(notes[::2], notes[1::2], strict=True)) == {b"+" + postpone: b"1", release: b"2"}
    assert redis.do("HGETALL", STATS) == [b"retried", b"1"]


def test_a_settlement_sent_again_changes_nothing(redis: Raw) -> None:
    done, retry, dead = redis.add(3)
    redis.read("c")
    items = ("done", done, 1), ("retry", retry, 1, 0), ("dead", dead, 1, "failed", "why")
    assert redis.settle("c", *items) == [b"OK", 1, 1, 1]
    assert redis.settle("c", *items) == [b"OK", 0, 0, 0]
    redis.take("c")  # it is ours again, under another count
    assert redis.settle("c", *items) == [b"OK", 0, 0, 0]
    assert redis.pending() == [(retry, b"c", 2)] and redis.do("XLEN", DEAD) == 1


def test_what_somebody_else_holds_cannot_be_settled(redis: Raw) -> None:
    (id_,) = redis.add()
    redis.read("c")
    redis.do("XCLAIM", LOG, GROUP, "foreign", 0, id_, "RETRYCOUNT", 1)
    for verdict in "done", "retry", "postpone", "release", "dead":
        assert redis.settle("c", (verdict, id_, 1, 0)) == [b"OK", 0]
    assert redis.pending() == [(id_, b"foreign", 1)] and not redis.do("XLEN", DEAD)


def test_a_dead_letter_is_the_whole_entry_behind_our_own_fields(redis: Raw) -> None:
    id_ = redis.do("XADD", LOG, "*", "a", "1", "a", "2", "b\x00", "\xff")
    redis.read("c")
    assert redis.settle("c", ("dead", id_, 1, "failed", "ValueError: no")) == [b"OK", 1]
    ((_, fields),) = redis.do("XRANGE", DEAD, "-", "+")
    names = [b"reason", b"error", b"attempts", b"position", b"group", b"died"]
    assert fields[0:12:2] == names
    assert fields[1:11:2] == [b"failed", b"ValueError: no", b"1", b"0@" + id_, b"g"]
    assert abs(int(fields[11]) - now_ms()) < 60_000
    assert fields[12:] == [b"a", b"1", b"a", b"2", b"b\x00", "\xff".encode()]
    assert not redis.pending() and redis.do("HGETALL", STATS) == [b"dead", b"1"]


def test_an_event_whose_body_is_gone_still_becomes_a_dead_letter(redis: Raw) -> None:
    (id_,) = redis.add()
    redis.read("c")
    redis.do("XTRIM", LOG, "MAXLEN", 0)
    assert redis.settle("c", ("dead", id_, 1, "failed", "why")) == [b"OK", 1]
    ((_, fields),) = redis.do("XRANGE", DEAD, "-", "+")
    assert len(fields) == 12 and not redis.pending()


def test_no_more_dead_letters_are_kept_than_allowed(redis: Raw) -> None:
    ids = redis.add(3)
    redis.read("c")
    items = [("dead", id_, 1, "failed", "") for id_ in ids]
    assert redis.settle("c", *items, max_dead=2) == [b"OK", 1, 1, b"FULL"]
    assert redis.pending() == [(ids[2], b"c", 1)]


def test_one_call_copies_about_a_megabyte_of_dead_letters(redis: Raw) -> None:
    ids = [redis.do("XADD", LOG, "*", "data", "x" * 400_000) for _ in range(5)]
    redis.read("c")
    items = [("dead", id_, 1, "failed", "") for id_ in ids]
    assert redis.settle("c", *items) == [b"OK", 1, 1, 1, b"MORE", b"MORE"]
    assert redis.settle("c", *items[3:]) == [b"OK", 1, 1] and redis.do("XLEN", DEAD) == 5


def test_an_entry_of_ten_thousand_fields_becomes_a_dead_letter(redis: Raw) -> None:
    id_ = redis.do("XADD", LOG, "*", *(str(n) for n in range(20_000)))
    redis.read("c")
    assert redis.settle("c", ("dead", id_, 1, "failed", "")) == [b"OK", 1]
    ((_, fields),) = redis.do("XRANGE", DEAD, "-", "+")
    assert fields[12:16] == [b"0", b"1", b"2", b"3"] and len(fields) == 12 + 7_000


@pytest.mark.parametrize("key", [DUE, NOTE, DEAD, STATS])
def test_a_key_of_another_kind_refuses_the_call_with_nothing_written(redis: Raw, key: bytes) -> None:
    ids = redis.add(2)
    redis.read("c")
    redis.do("SET", key, "somebody else's")
    assert redis.settle("c", ("done", ids[0], 1), ("dead", ids[1], 1)) == [b"TYPE", key]
    assert len(redis.pending()) == 2


# Taking


def test_only_what_is_due_is_taken_and_counted(redis: Raw) -> None:
    early, late = redis.add(2)
    redis.read("c")
    at = now_ms() + SOON_MS
    redis.settle("c", ("retry", early, 1, 0), ("retry", late, 1, at))
    assert redis.take("c") == [b"OK", str(at).encode(), 0, [early, 2, b"", b"0", [b"type", b"t", b"data", b"{}"]]]
    assert redis.take("c") == [b"OK", str(at).encode(), 0]
    assert redis.pending() == [(early, b"c", 2), (late, b"~due", 1)]


def test_two_takers_get_different_entries(redis: Raw) -> None:
    redis.enter("d")
    ids = redis.add(4)
    redis.read("c")
    redis.settle("c", *(("release", id_, 1, 0) for id_ in ids))
    first, second = redis.take("c", 2)[3:], redis.take("d", 10)[3:]
    assert [row[0] for row in first + second] == ids and {row[1] for row in first + second} == {1}


def test_a_released_delivery_and_a_postponed_one_count_for_nothing(redis: Raw) -> None:
    (id_,) = redis.add()
    redis.read("c")
    for postponed in 1, 2:
        redis.settle("c", ("postpone", id_, 1, 0))
        assert redis.take("c")[3][1:4] == [1, b"", str(postponed).encode()]
    redis.settle("c", ("retry", id_, 1, 0))
    assert redis.take("c")[3][1:4] == [2, b"", b"2"]
    redis.settle("c", ("done", id_, 2))
    assert not redis.do("EXISTS", NOTE)


def test_what_a_foreign_client_took_or_acked_is_not_taken(redis: Raw) -> None:
    taken, acked, ours = redis.add(3)
    redis.read("c")
    redis.settle("c", *(("release", id_, 1, 0) for id_ in (taken, acked, ours)))
    redis.do("XCLAIM", LOG, GROUP, "foreign", 0, taken)
    redis.do("XACK", LOG, GROUP, acked)
    answer = redis.take("c")
    assert answer[1:3] == [b"", 0] and [row[0] for row in answer[3:]] == [ours]
    assert redis.pending() == [(taken, b"foreign", 1), (ours, b"c", 1)]


@pytest.mark.parametrize("way", ["take", "recall", "evict"])
def test_a_trimmed_body_is_counted_as_lost(redis: Raw, way: str) -> None:
    (id_,) = redis.add()
    redis.read("c")
    if way == "take":
        redis.settle("c", ("release", id_, 1, 0))
    redis.do("XTRIM", LOG, "MAXLEN", 0)
    match way:
        case "take":
            assert redis.take("c") == [b"OK", b"", 1]
        case "recall":
            assert redis.recall("c", id_) == [b"OK", b"", 1]
        case "evict":
            assert redis.evict("c", redis.score("c")) == [b"done", 0]
    assert not redis.pending() and redis.do("HGET", STATS, "lost") == b"1" and not redis.do("EXISTS", DUE, NOTE)


def test_one_call_takes_about_a_megabyte(redis: Raw) -> None:
    ids = [redis.do("XADD", LOG, "*", "data", "x" * 400_000) for _ in range(5)]
    redis.read("c")
    redis.settle("c", *(("release", id_, 1, 0) for id_ in ids))
    assert len(redis.take("c")[3:]) == 3 and len(redis.take("c")[3:]) == 2


def test_recalling_counts_nothing_and_gives_only_what_is_ours(redis: Raw) -> None:
    redis.enter("d")
    mine, retried, theirs = redis.add(3)
    redis.read("c", 2)
    redis.read("d")
    redis.settle("c", ("retry", retried, 1, 0))
    redis.take("c")
    redis.do("HSET", NOTE, mine, "1")
    body = [b"type", b"t", b"data", b"{}"]
    rows = [mine, 1, b"1", b"0", body], [retried, 2, b"", b"0", body]
    for _ in range(2):
        assert redis.recall("c", mine, retried, theirs, b"99-0")[3:] == list(rows)


def test_every_script_has_a_contract() -> None:
    for name, text in texts(""):
        assert text.startswith(f"-- {name}: "), name
        for word in "KEYS", "ARGV", "RETURNS", "Why", "Cost":
            assert f"\n-- {word}" in text, f"{name}: {word}"


def test_all_that_scripts_share_has_a_contract_and_is_used() -> None:
    used = {
        word for _, text in texts("") for line in re.findall("^-- USES +(.*)$", text, re.M) for word in line.split()
    }
    shared = dict(texts("lib"))
    assert {f"{name}.lua" for name in used} == shared.keys()
    for name, text in shared.items():
        assert text.startswith(f"-- {name}: ") and "\n-- CALL " in text and "\n-- Cost " in text, name


def texts(folder: str) -> Iterator[tuple[str, str]]:
    """The files of scripts, by name."""
    for path in files("millstream.brokers.redis").joinpath("lua", folder).iterdir():
        if path.name.endswith(".lua"):
            yield path.name, path.read_text()
