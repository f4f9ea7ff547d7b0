"""Turns: which partitions a read looks at. Nobody waits for long, and no read brings too much."""

from __future__ import annotations

from millstream.brokers.redis.turns import MAX_BUSY, MAX_QUIET, Turns

ALL = range(256)


def taken(turns: Turns, busy: set[int], partitions: range = ALL) -> list[int]:
    """One read, in which these have more than it takes."""
    chosen, _ = turns.next(partitions)
    turns.read(chosen, busy.intersection(chosen))
    return chosen


def fresh(partitions: range = ALL) -> Turns:
    """Those of somebody who has just acquired all."""
    turns = Turns()
    for partition in partitions:
        turns.acquired(partition)
    return turns


def quiet(partitions: range = ALL) -> Turns:
    """Those of somebody who has read all that there is."""
    turns = fresh(partitions)
    while turns.next(partitions)[1]:
        taken(turns, set(), partitions)
    return turns


def test_where_nothing_is_left_all_are_waited_for() -> None:
    chosen, busy = quiet().next(ALL)
    assert sorted(chosen) == list(ALL) and busy == 0


def test_what_was_acquired_is_busy_until_a_read_has_come_to_its_end() -> None:
    turns = quiet(range(3))
    turns.acquired(1)
    chosen, busy = turns.next(range(3))
    assert (chosen[0], busy) == (1, 1)
    turns.read(chosen, [])
    assert turns.next(range(3))[1] == 0


def test_few_partitions_are_all_read_each_time() -> None:
    few = range(MAX_BUSY)
    turns = fresh(few)
    assert [sorted(taken(turns, {0}, few)) for _ in range(3)] == [list(few)] * 3


def test_busy_ones_have_a_turn_each_and_some_quiet_ones_beside() -> None:
    turns = quiet()
    busy = set(range(100, 100 + 5 * MAX_BUSY))
    turns.read(ALL, busy)
    reads = [taken(turns, busy) for _ in range(5)]
    assert {partition for chosen in reads for partition in chosen[:MAX_BUSY]} == busy
    assert all(len(chosen) == MAX_BUSY + MAX_QUIET for chosen in reads)


def test_behind_a_backlog_a_quiet_one_is_looked_at_within_sixteen_reads() -> None:
    turns, busy = quiet(), {3, 7}
    turns.read(ALL, busy)
    seen = {partition for _ in range(16) for partition in taken(turns, busy)}
    assert seen == set(ALL)


def test_with_backlogs_everywhere_each_has_a_page_in_every_round() -> None:
    turns = fresh()
    seen = [partition for _ in range(len(ALL) // MAX_BUSY) for partition in taken(turns, set(ALL))]
    assert sorted(seen) == list(ALL)


def test_one_that_cannot_be_read_now_is_no_reason_not_to_wait() -> None:
    turns = quiet()
    turns.acquired(5)
    chosen, busy = turns.next([partition for partition in ALL if partition != 5])
    assert (len(chosen), busy) == (255, 0)
