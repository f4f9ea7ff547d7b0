"""Workers that keep the order of keys are killed, stopped and joined by others, under load: no key ever turns around."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from millstream import App
from millstream.brokers.base import Broker, GroupInfo, ParkedKey
from tests.faults import tower
from tests.faults.conftest import LONG, LONG_S
from tests.faults.journal import Journal
from tests.faults.nemesis import PATIENCE_S, Child, Crew
from tests.faults.oracle import asked, stale_settles
from tests.faults.tower import GROUP, PARTITIONS, flights

SEED = 17
LEASE_S = 1.0
WORKERS, MOST_WORKERS = 4, 6
KILL_S, JOIN_S = (2.0, 5.0) if LONG else (1.5, 3.0)
ZOMBIE_ROUNDS = 100 if LONG else 20
PATIENT_S = LONG_S if LONG else 3 * PATIENCE_S
IN_FLIGHT = 2 * 16

Told = Callable[[str, object], None]


def sizes(url: str) -> tuple[int, int, float]:
    """How many events, of how many keys, and how long one takes, in seconds."""
    if LONG:
        return (1_000_000, 10_000, 0.0) if url.startswith("redis") else (100_000, 10_000, 0.02)
    return 20_000, 2_000, 0.04


def worker(crew: Crew) -> Child:
    return crew.run("-m", "tests.faults.tower", "work", MILLSTREAM_CONCURRENCY="16")


def group_of(url: str) -> GroupInfo:
    async def look(broker: Broker) -> GroupInfo:
        (info,) = (info for info in await broker.admin.groups(flights.name) if info.group == GROUP)
        return info

    return asked(url, look)


def until_settled(crew: Crew) -> None:
    """Return when nothing is left."""
    seen: list[GroupInfo] = []

    def settled() -> bool:
        seen[:] = [group_of(crew.url)]
        return (seen[0].lag, seen[0].pending) == (0, 0)

    try:
        crew.until(settled, "not settled", PATIENT_S)
    except RuntimeError as late:
        raise AssertionError(f"{late}: {seen}\n{crew.said()}") from None


def violations(journal: Journal) -> list[tuple[str, int, int]]:
    """Events that were finished for the first time after a later one of their key: key, number, the later one's."""
    first: dict[str, int] = {}
    for line in sorted(journal.lines("fin")):
        first.setdefault(line.id, line.time_ns)
    newest: dict[str, int] = defaultdict(lambda: -1)
    turned: list[tuple[str, int, int]] = []
    for id_ in sorted(first, key=lambda id_: first[id_]):
        key, _, number = id_.partition(".")
        if int(number) < newest[key]:
            turned.append((key, int(number), newest[key]))
        newest[key] = max(newest[key], int(number))
    return turned


def takeovers_s(journal: Journal) -> list[float]:
    """How long each partition of a killed process was nobody's."""
    owners: dict[str, tuple[int, int]] = {}
    found: list[float] = []
    for line in sorted(journal.lines("own", "gave", "kill"), key=lambda line: line.time_ns):
        if line.word == "own":
            _, dead_ns = owners.get(line.id, (0, 0))
            if dead_ns:
                found.append((line.time_ns - dead_ns) / 1e9)
            owners[line.id] = (line.pid, 0)
        elif line.word == "gave":
            owners.pop(line.id, None)
        else:
            for partition, (pid, dead_ns) in owners.items():
                if pid == line.pid and not dead_ns:
                    owners[partition] = (pid, line.time_ns)
    return found


def check(crew: Crew, told: Told, **more: object) -> dict[str, object]:
    """Nothing lost, nothing turned around."""
    journal = crew.journal
    finished, confirmed = journal.ids("fin"), journal.ids("ok")
    runs = journal.lines("run")
    figures: dict[str, object] = {
        "events": len(confirmed),
        "lost": len(confirmed - finished),
        "order violations": len(violations(journal)),
        "begun again": len(runs) - len({line.id for line in runs}),
        **more,
    }
    print(f"\nseed {SEED}: {figures}")
    for name, value in figures.items():
        told(name, value)
    assert not confirmed - finished, figures
    assert not violations(journal), f"{figures}\n{violations(journal)[:20]}"
    info = group_of(crew.url)
    assert (info.lag, info.pending, info.dead) == (0, 0, 0), info
    return figures


class Fate:
    """Kills one worker now and then, and lets another one join now and then; the plan is repeated by its seed."""

    def __init__(self, crew: Crew) -> None:
        self.kills = 0
        self._crew = crew
        self._chance = random.Random(SEED)
        self._workers = [worker(crew) for _ in range(WORKERS)]
        crew.until(lambda: crew.journal.lines("fin"), "nothing begins")
        self._kill_at = time.monotonic() + KILL_S
        self._join_at = time.monotonic() + JOIN_S

    def strike(self) -> None:
        """What is due now."""
        now = time.monotonic()
        if now >= self._kill_at:
            self._kill_at += KILL_S
            self._crew.kill(self._workers.pop(self._chance.randrange(len(self._workers))))
            self.kills += 1
        if now >= self._join_at or len(self._workers) < 2:
            self._join_at += JOIN_S
            if len(self._workers) < MOST_WORKERS:
                self._workers.append(worker(self._crew))

    def end(self) -> Sequence[Child]:
        """Enough of it."""
        while len(self._workers) < WORKERS:
            self._workers.append(worker(self._crew))
        pids = {child.pid for child in self._workers}
        self._crew.until(lambda: pids <= set(self._crew.up()), "somebody does not join")
        return self._workers


def test_kills_and_joins_never_turn_a_key_around(url: str, journals: Path, record_property: Told) -> None:
    events, keys, seconds = sizes(url)
    with Crew(url, journals) as crew:
        publisher = crew.run("-m", "tests.faults.tower", "publish", events, keys, seconds)
        fate = Fate(crew)
        while publisher.code is None or (len(crew.journal.lines("fin")) < 0.9 * events and fate.kills < 1_000):
            fate.strike()
            time.sleep(0.02)  # the pace of the plan
        assert publisher.wait() == 0, publisher.log
        workers = fate.end()
        until_settled(crew)
        for child in workers:
            child.send(signal.SIGTERM)
        assert [child.wait() for child in workers] == [0] * len(workers), [child.log for child in workers]
        taken = sorted(takeovers_s(crew.journal))
        p99_s = taken[int(len(taken) * 0.99)] if taken else 0.0
        figures = check(crew, record_property, kills=fate.kills, takeovers=len(taken), takeover_p99_s=round(p99_s, 2))
        assert fate.kills >= 3 and taken
        window = 2_048 * PARTITIONS
        assert figures["begun again"] <= fate.kills * window  # type: ignore[operator]
        print(
            f"takeovers of {len(taken)} partitions: p99 {p99_s:.2f} s, longest {taken[-1]:.2f} s; lease {LEASE_S:g} s"
        )


def test_processes_stopped_past_their_lease_settle_nothing_and_turn_nothing_around(
    url: str, journals: Path, record_property: Told
) -> None:
    chance = random.Random(SEED)
    with Crew(url, journals, MILLSTREAM_GRACE="10s", FAULTS_OUTPUTS="1") as crew:
        workers = [worker(crew) for _ in range(3)]
        rounds = number = 0
        while rounds < ZOMBIE_ROUNDS:
            before = len(crew.journal.lines("fin"))
            published(crew, number, 400)
            number += 400
            crew.until(lambda: len(crew.journal.lines("fin")) > before, "nothing goes on")  # noqa: B023
            victims = chance.sample(workers, 2)
            for victim in victims:
                time.sleep(chance.uniform(0.0, 0.05))  # the moment is to be any
                crew.stop(victim)
                rounds += 1
            until_settled(crew)
            for victim in victims:
                crew.resume(victim)
        until_settled(crew)
        refused = len(crew.journal.lines("ref")) + len(crew.journal.lines("lost"))
        stale = stale_settles(crew.journal)
        check(crew, record_property, rounds=rounds, refused=refused, stale=len(stale))
        assert not stale, crew.journal.history(sorted(stale)[:20])
        assert refused > 0, "nobody was ever too late"


def published(crew: Crew, first: int, count: int) -> None:
    """Publish from this process: events that take a while."""

    async def send() -> None:
        from millstream import Envelope

        async with App("tower", broker=crew.url, streams=[flights]) as client:
            names = [tower.named(index, 50) for index in range(first, first + count)]
            events = [
                Envelope(tower.Moved(tail=tail, number=number, seconds=0.02), id=f"{tail}.{number}")
                for tail, number in names
            ]
            await client.publish_many(events, to=flights)
            for tail, number in names:
                crew.pen.write("ok", f"{tail}.{number}")

    asyncio.run(send())


def test_a_poisoned_key_is_held_alone_and_goes_on_in_order_when_a_person_releases_it_at_another_owner(
    url: str, journals: Path, record_property: Told
) -> None:
    events, keys = (20_000, 1_000) if LONG else (4_000, 200)
    with Crew(url, journals, FAULTS_POISON="N7") as crew:
        first = worker(crew)
        assert crew.run("-m", "tests.faults.tower", "publish", events, keys, 0).wait(PATIENT_S) == 0
        others = events - events // keys
        crew.until(lambda: len(crew.journal.ids("fin")) == others, "the others wait too", PATIENT_S)
        crew.until(lambda: [key.events for key in held(url)] == [events // keys], "it is not held")
        [key] = held(url)
        assert (key.key, key.attempts) == ("N7", 2)
        second = worker(crew)
        crew.kill(first)
        crew.until(lambda: len(owned(crew, second)) == PARTITIONS, "not all is taken over")
        (journals / "healed").touch()
        assert held(url) == [key]
        assert not any(id_.startswith("N7.") for id_ in crew.journal.ids("fin"))
        assert asked(url, lambda broker: broker.admin.release_keys([key])) == [True]
        until_settled(crew)
        check(crew, record_property)
        ran = [line for line in sorted(crew.journal.lines("run")) if line.id.startswith("N7.")]
        assert [line.pid for line in ran] == [first.pid] * 2 + [second.pid] * (events // keys)
        assert [line.id for line in ran[2:]] == [f"N7.{number}" for number in range(events // keys)]
        assert second.code is None


def held(url: str) -> list[ParkedKey]:
    """The keys that wait for a person."""
    keys = asked(url, lambda broker: broker.admin.keys(flights.name, GROUP))
    return [key for key in keys if key.due_ms is None]


def owned(crew: Crew, child: Child) -> set[str]:
    """The partitions that a process ever had."""
    return {line.id for line in crew.journal.lines("own") if line.pid == child.pid}


def test_members_that_come_and_go_share_evenly_and_each_partition_moves_once(
    url: str, journals: Path, record_property: Told
) -> None:
    with Crew(url, journals, FAULTS_PARTITIONS="16") as crew:
        rebalance = Rebalance(crew)
        rebalance.join()
        publisher = crew.run("-m", "tests.faults.tower", "publish", 6_000, 500, 0.02)
        for _ in range(3):
            rebalance.join()
        for _ in range(2):
            rebalance.leave()
        assert publisher.wait(PATIENT_S) == 0, publisher.log
        until_settled(crew)
        figures = check(crew, record_property, longest_until_fair_s=round(max(rebalance.times_s), 2))
        assert figures["begun again"] == 0, "a clean hand-over repeats nothing"
        assert set(rebalance.moves.values()) == {1}


class Rebalance:
    """Members come and go, one after the other; each time all partitions are shared evenly in the end."""

    def __init__(self, crew: Crew) -> None:
        self.moves: dict[tuple[int, str], int] = defaultdict(int)
        """By change and partition: how often it got a new owner."""
        self.times_s: list[float] = []
        self._crew = crew
        self._workers: list[Child] = []
        self._seen = 0

    def join(self) -> None:
        self._workers.append(worker(self._crew))
        self._until_fair()

    def leave(self) -> None:
        leaver = self._workers.pop(0)
        leaver.send(signal.SIGTERM)
        self._until_fair()
        assert leaver.wait() == 0, leaver.log

    def _until_fair(self) -> None:
        began, crew = time.monotonic(), self._crew
        least, most = 16 // len(self._workers), -(-16 // len(self._workers))
        living = {child.pid for child in self._workers}
        crew.until(
            lambda: self._shares().keys() == living and all(least <= n <= most for n in self._shares().values()),
            f"not shared evenly: {self._shares()}",
        )
        self.times_s.append(time.monotonic() - began)
        lines = sorted(crew.journal.lines("own"))
        for line in lines[self._seen :]:
            self.moves[len(self.times_s), line.id] += 1
        self._seen = len(lines)

    def _shares(self) -> dict[int, int]:
        owners: dict[str, int] = {}
        for line in sorted(self._crew.journal.lines("own", "gave"), key=lambda line: line.time_ns):
            if line.word == "own":
                owners[line.id] = line.pid
            elif owners.get(line.id) == line.pid:
                del owners[line.id]
        return {pid: list(owners.values()).count(pid) for pid in owners.values()}
