"""What happened, written by the processes themselves, never through what is tested.

Each process appends to a file of its own, one short line per `write`: the kernel keeps what was written by a process that
is killed in the next instruction. A line is `time word id attempt pid`, the time by the machine's monotonic clock.

    try, ok          a publisher is about to publish an event; it is confirmed
    again            it may be stored or not, and is published again
    up               a worker is a member of its group
    got              the broker gave it an event
    run, fin, cut    a handler began; it came to its end; it was cancelled
    set, put         an outcome was accepted: the event is over; it is to come again
    ref, lost        an outcome was refused; the broker said that somebody else has the event
    kill, stop, cont what was done to a process
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    """One thing that happened."""

    time_ns: int
    word: str
    id: str
    attempt: int
    pid: int


class Pen:
    """Writes the journal of this process."""

    def __init__(self, directory: Path | str) -> None:
        self._pid = os.getpid()
        path = Path(directory) / f"{self._pid}-{time.monotonic_ns()}.journal"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, word: str, id: str = "-", attempt: int = 0, pid: int = 0) -> None:
        line = f"{time.monotonic_ns()} {word} {id} {attempt} {pid or self._pid}\n"
        os.write(self._file, line.encode())


class Journal:
    """Reads the journals of all processes, each line once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = {}
        self._lines: list[Line] = []
        self.by_word: dict[str, list[Line]] = defaultdict(list)

    def lines(self, *words: str) -> list[Line]:
        """All lines so far with one of these words, each file's in their order; without words, all by time."""
        self._catch_up()
        if not words:
            return sorted(self._lines)
        return [line for word in words for line in self.by_word[word]]

    def ids(self, *words: str) -> set[str]:
        """The events of these lines."""
        return {line.id for line in self.lines(*words)}

    def history(self, ids: Iterable[str]) -> str:
        """All lines of these events, for people."""
        wanted = set(ids)
        found = [line for line in self.lines() if line.id in wanted or line.word in ("kill", "stop", "cont")]
        start_ns = self.lines()[0].time_ns if found else 0
        return "\n".join(
            f"{(line.time_ns - start_ns) / 1e9:9.4f} {line.word:5} {line.id} attempt {line.attempt} process {line.pid}"
            for line in found
        )

    def _catch_up(self) -> None:
        for path in self._directory.glob("*.journal"):
            start = self._read.get(path, 0)
            if path.stat().st_size == start:
                continue
            with path.open("rb") as file:
                file.seek(start)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path] = start + len(whole)
            for row in whole.decode().splitlines():
                time_ns, word, id_, attempt, pid = row.split()
                line = Line(int(time_ns), word, id_, int(attempt), int(pid))
                self._lines.append(line)
                self.by_word[word].append(line)
