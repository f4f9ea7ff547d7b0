"""The oracle: what must hold after a fault test, whatever happened in it.

    lost      confirmed to its publisher, and neither finished by a handler nor a dead letter
    phantom   finished, and never sent
    stale     an outcome was accepted from a process after another one had been given the event
    repeats   handlers begun beyond the first of each event

The end state is read by a second reader, from the broker's `Admin`. `try` without `ok` is unknown: it may appear or not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from millstream.brokers.base import Broker, DeadLetter, GroupInfo
from millstream.brokers.urls import broker_for
from millstream.clock import Clock
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from tests.faults.journal import Line, Reader


@dataclass
class History:
    """All journals so far."""

    reader: Reader
    lines: dict[str, list[Line]] = field(default_factory=lambda: defaultdict(list))
    """Of each event."""
    told: list[Line] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)
    confirmed: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    runs: Counter[str] = field(default_factory=Counter)
    settled: Counter[str] = field(default_factory=Counter)

    def look(self) -> History:
        """Read on."""
        for line in self.reader.new():
            if line.verb in ("told", "died"):
                self.told.append(line)
                continue
            self.lines[line.id].append(line)
            match line.verb:
                case "try":
                    self.tried.add(line.id)
                case "ok":
                    self.confirmed.add(line.id)
                case "fin":
                    self.finished.add(line.id)
                case "run":
                    self.runs[line.id] += 1
                case "yes":
                    self.settled[line.id] += 1
        return self

    def lost(self, dead: Collection[str] = ()) -> set[str]:
        return self.confirmed - self.finished - set(dead)

    def phantom(self) -> set[str]:
        return self.finished - self.tried

    def repeats(self) -> int:
        return sum(self.runs.values()) - len(self.runs)

    def stale(self) -> set[str]:
        """Events with an accepted outcome of an attempt though a later attempt was begun."""
        found: set[str] = set()
        for id_, lines in self.lines.items():
            last = max((line.attempt for line in lines if line.verb == "run"), default=0)
            accepted = [line.attempt for line in lines if line.verb == "yes"]
            if len(accepted) > 1 or any(attempt < last for attempt in accepted):
                found.add(id_)
        return found

    def tell(self, ids: Collection[str]) -> str:
        """The whole history of the first few of these events."""
        return "\n".join(
            f"{id_}:\n" + "\n".join(f"    {line}" for line in sorted(self.lines[id_])) for id_ in sorted(ids)[:5]
        )


class SecondReader:
    """Looks at a broker as a stranger would: it takes no part in what is tested."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def group(self, stream: str = "orders", group: str = "billing") -> GroupInfo | None:
        broker = self._broker()
        await broker.open()
        try:
            return next((info for info in await broker.admin.groups(stream) if info.group == group), None)
        finally:
            await broker.close()

    async def dead(self, stream: str = "orders", group: str = "billing") -> list[DeadLetter]:
        broker = self._broker()
        await broker.open()
        try:
            return await broker.admin.dead(stream, group, limit=1_000)
        finally:
            await broker.close()

    async def stored(self, stream: str = "orders", partitions: int = 2) -> set[str]:
        """The ids of all events that lie in the stream now."""
        broker = self._broker()
        await broker.open()
        try:
            found: set[str] = set()
            for partition in range(partitions):
                after = None
                while page := await broker.read(stream, partition, after, 1_000):
                    found |= {stored.record.id for stored in page}
                    after = page[-1].position
            return found
        finally:
            await broker.close()

    def _broker(self) -> Broker:
        return broker_for(self._url, Settings(), Clock(), Telemetry())


def history(directory: Path) -> History:
    return History(Reader(directory))
