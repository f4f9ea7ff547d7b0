"""The judge: what the journals tell, compared with what the broker says to a second reader.

lost        confirmed, and neither finished nor a dead letter
phantom     finished, and never published
stale       an outcome that was accepted although somebody else had the event by then, or it was over
repeats     an event that began once more: each crash may repeat what its process had in hand, no more
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from millstream import App, Envelope
from millstream.brokers.base import Broker, DeadLetter, GroupInfo
from tests.faults.journal import Journal, Pen
from tests.faults.nemesis import PATIENCE_S, Crew
from tests.faults.shop import GROUP, Block, Task, tasks
from tests.servers import wait_until

T = TypeVar("T")

MAX_SHOWN = 20


@dataclass(frozen=True)
class Verdict:
    """What came out."""

    events: int
    lost: set[str]
    phantom: set[str]
    stale: set[str]
    repeats: int
    duplicates: int
    taken: int
    """Events that a living but slow process lost to another one: it may repeat them like a crash does."""
    in_hand: int
    """The most events that one process held at once."""
    dead: list[DeadLetter]
    group: GroupInfo
    history: str

    def figures(self) -> dict[str, int]:
        """For people."""
        return {
            "events": self.events,
            "lost": len(self.lost),
            "phantom": len(self.phantom),
            "stale settles": len(self.stale),
            "begun again": self.repeats,
            "duplicates": self.duplicates,
            "taken from the slow": self.taken,
            "most in hand": self.in_hand,
            "dead": len(self.dead),
            "pending": self.group.pending,
            "lag": -1 if self.group.lag is None else self.group.lag,
        }

    def check(self) -> None:
        """Nothing lost, nothing invented, nothing settled by the wrong one, nothing left. Raises with the history."""
        bad = self.lost or self.phantom or self.stale
        assert not bad, f"{self.figures()}\n{self.history}"
        assert (self.group.lag, self.group.pending) == (0, 0), self.figures()


def judge(crew: Crew, since_ns: int = 0) -> Verdict:
    """The verdict on all that has happened so far; what was published before a time may be lost."""
    journal = crew.journal
    group, letters = group_of(crew.url), dead_of(crew.url)
    confirmed, tried, finished = journal.ids("ok"), journal.ids("try"), journal.ids("fin")
    confirmed -= {line.id for line in journal.lines("try") if line.time_ns < since_ns}
    over = finished | {letter.stored.record.id for letter in letters}
    lost, phantom, stale = confirmed - over, over - tried, stale_settles(journal)
    runs = Counter(line.id for line in journal.lines("run"))
    fins = Counter(line.id for line in journal.lines("fin"))
    return Verdict(
        events=len(confirmed),
        lost=lost,
        phantom=phantom,
        stale=stale,
        repeats=runs.total() - len(runs),
        duplicates=fins.total() - len(fins),
        taken=len(journal.lines("lost")),
        in_hand=most_in_hand(journal),
        dead=letters,
        group=group,
        history=journal.history(sorted(lost | phantom | stale)[:MAX_SHOWN]),
    )


def stale_settles(journal: Journal) -> set[str]:
    """Events that were settled twice, or at an attempt after which somebody was given another one."""
    newest: dict[str, int] = defaultdict(int)
    for line in journal.lines("got"):
        newest[line.id] = max(newest[line.id], line.attempt)
    settled = Counter(line.id for line in journal.lines("set"))
    twice = {id_ for id_, times in settled.items() if times > 1}
    return twice | {line.id for line in journal.lines("set") if line.attempt < newest[line.id]}


def late_starts(journal: Journal) -> int:
    """How often a handler began after somebody else had been given its event."""
    given: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for line in journal.lines("got"):
        given[line.id].append((line.attempt, line.time_ns))
    return sum(
        any(attempt > line.attempt and time_ns < line.time_ns for attempt, time_ns in given[line.id])
        for line in journal.lines("run")
    )


def in_hand(journal: Journal, pid: int) -> set[str]:
    """What a process was given, and has not been answered for."""
    held: set[str] = set()
    for line in sorted(line for line in journal.lines("got", "set", "put", "ref", "lost") if line.pid == pid):
        if line.word == "got":
            held.add(line.id)
        else:
            held.discard(line.id)
    return held


def most_in_hand(journal: Journal) -> int:
    """The most events that one process held at once."""
    held: dict[int, set[str]] = defaultdict(set)
    most = 0
    for line in sorted(journal.lines("got", "set", "put", "ref", "lost")):
        if line.word == "got":
            held[line.pid].add(line.id)
            most = max(most, len(held[line.pid]))
        else:
            held[line.pid].discard(line.id)
    return most


def until_settled(crew: Crew, within_s: float = PATIENCE_S) -> None:
    """Return when the group has nothing undelivered and nothing pending."""
    seen: list[GroupInfo] = []

    def settled() -> bool:
        seen[:] = [group_of(crew.url)]
        return (seen[0].lag, seen[0].pending) == (0, 0)

    try:
        wait_until(settled, within_s, "not settled")
    except RuntimeError as late:
        raise AssertionError(f"{late}: {seen}\n{left(crew)}\n{crew.said()}") from None


def left(crew: Crew) -> str:
    """The history of what is still in somebody's hands, for people."""
    journal = crew.journal
    open_ = journal.ids("ok", "got") - journal.ids("set")
    return journal.history(sorted(open_)[:MAX_SHOWN])


def group_of(url: str) -> GroupInfo:
    """The group, as a second reader sees it."""

    async def look(broker: Broker) -> GroupInfo:
        (info,) = (info for info in await broker.admin.groups(tasks.name) if info.group == GROUP)
        return info

    return asked(url, look)


def dead_of(url: str) -> list[DeadLetter]:
    """The group's dead letters, as a second reader sees them."""
    return asked(url, lambda broker: broker.admin.dead(tasks.name, GROUP, limit=10_000))


def publish(crew: Crew, events: Sequence[tuple[str, Task | Block]]) -> None:
    """Publish events with these ids, from this process."""
    pen = Pen(crew.directory)

    async def send() -> None:
        async with App("shop", broker=crew.url, streams=[tasks]) as client:
            for id_, _ in events:
                pen.write("try", id_)
            await client.publish_many([Envelope(event, id=id_) for id_, event in events], to=tasks)
            for id_, _ in events:
                pen.write("ok", id_)

    asyncio.run(send())


def asked(url: str, question: Callable[[Broker], Awaitable[T]]) -> T:
    """The answer of a broker that is opened for one question."""

    async def ask() -> T:
        async with App("reader", broker=url) as reader:
            return await question(reader.broker)

    return asyncio.run(ask())
