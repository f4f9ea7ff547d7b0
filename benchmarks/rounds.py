"""Everything once in each round: ours, the limit, and peers, each a process of its own against an empty broker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from redis import Redis

from benchmarks import limits, others
from benchmarks.figures import Found, Line, line
from benchmarks.limits import Limit, Missing
from benchmarks.scenarios import CONSUME, SCENARIOS, Scenario

ROOT = Path(__file__).parent.parent
WITHIN_S = 1_800
MAX_REASON_CHARS = 500

Key = tuple[str, str, Limit]
"""Who ran which scenario, and what limits it."""


class Rounds:
    """What was printed, by who ran what; and what the limit of the same round was."""

    def __init__(self, events: int, size_bytes: int, port: int | None, folder: Path) -> None:
        self.events, self.size_bytes = events, size_bytes
        self._port, self._folder = port, folder
        self._runs: defaultdict[Key, list[Found]] = defaultdict(list)
        self._limits: defaultdict[Key, list[Found]] = defaultdict(list)
        self._missing: dict[Key, str] = {}

    def round(self, brokers: Sequence[str], scenarios: Sequence[str], others: Sequence[str]) -> None:
        """Run everything once."""
        for broker in brokers:
            for name in scenarios:
                self._ours(broker, SCENARIOS[name])
        for name in others:
            self._peer(name)

    def lines(self) -> Iterator[Line]:
        """What came out, in the order in which it was run; with what failed in any round."""
        for key in dict.fromkeys([*self._runs, *self._missing]):
            who, name, limit = key
            if key in self._missing:
                yield Line(who, name, missing=self._missing[key])
            else:
                target = SCENARIOS[name].target if who == "redis" else None
                yield line(who, name, limit.mode, self._runs[key], self._limits[key], target)

    def _ours(self, broker: str, scenario: Scenario) -> None:
        key = (broker, scenario.name, scenario.limit)
        events, size_bytes = scenario.amount(self.events, self.size_bytes)
        limit = self._limit(broker, scenario.limit, min(events, self.events), size_bytes)
        options = ["--events", str(events), "--size", str(size_bytes)]
        command = [sys.executable, "-m", "benchmarks.ours", scenario.measure, self._empty(broker), *options]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WITHIN_S)
        if ran.returncode:
            self._failed(key, ran.stderr.strip().rpartition("\n")[2])  # above it, where that was raised
            return
        found: Found = json.loads(ran.stdout)
        if broker == "redis" and scenario.measure in ("publish-many", "pack-publish"):
            found["stored_bytes"] = self._stored_bytes() / events
        self._add(key, found, limit)

    def _peer(self, name: str) -> None:
        try:
            found = others.run(name, self._empty("redis"), self.events, self.size_bytes)
        except Missing as reason:
            self._failed((name, "", CONSUME), str(reason))
            return
        for scenario, rate in found["rates"].items():
            key = (f"{name} {found['version']}", scenario, SCENARIOS[scenario].limit)
            self._add(key, {"events": found["events"], "size": self.size_bytes, "rate": rate})

    def _limit(self, broker: str, limit: Limit, events: int, size_bytes: int) -> Found | None:
        """Measured anew beside each scenario, though several have the same one: a machine's mood lasts seconds."""
        try:
            return limits.of(self._empty(broker), limit, events, size_bytes)
        except Missing as reason:
            print(f"no limit for {broker}: {reason}", file=sys.stderr)
            return None

    def _empty(self, broker: str) -> str:
        """The URL of a broker that has nothing."""
        if broker == "redis":
            with self._server() as client:
                client.flushall()
            return f"redis://127.0.0.1:{self._port}/0"
        if broker == "sqlite":
            for left in self._folder.glob("bench.db*"):
                left.unlink()
            return f"sqlite:///{self._folder}/bench.db"
        return "memory://"

    def _stored_bytes(self) -> int:
        with self._server() as client:
            stored: int = client.info("memory")["used_memory_dataset"]
            return stored

    def _server(self) -> Redis:
        assert self._port is not None
        return Redis(port=self._port)

    def _add(self, key: Key, run: Found, limit: Found | None = None) -> None:
        self._runs[key].append(run)
        self._limits[key] += [] if limit is None else [limit]
        print(f"  {key[0]} {key[1]}: {run['rate']:,} a second", file=sys.stderr)

    def _failed(self, key: Key, why: str) -> None:
        self._missing[key] = why.strip()[-MAX_REASON_CHARS:]
        print(f"  {key[0]} {key[1]}: failed", file=sys.stderr)
