"""Journals: what each process of a fault test did, in a file of its own, outside of the system under test.

One `write` per line to a file opened with O_APPEND: a line is there whole or not at all, and a SIGKILL after it loses
nothing. A line: nanoseconds on the machine's clock, process, verb, words.

    try id          a publisher is about to publish       ok id             it was confirmed
    run id attempt  a handler begins                      fin id attempt    it has ended well
    yes id attempt  the broker accepted its outcome       no id attempt     the broker refused it
    told name n     telemetry                             died place        a process kills itself, here
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    ns: int
    pid: int
    verb: str
    words: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.words[0]

    @property
    def attempt(self) -> int:
        return int(self.words[1])

    def __str__(self) -> str:
        return f"{self.ns / 1e9:.3f} s  process {self.pid}  {self.verb} {' '.join(self.words)}"


class Journal:
    """This process's own."""

    def __init__(self, directory: Path) -> None:
        self._pid = os.getpid()
        flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC
        self._file = os.open(directory / f"{self._pid}.journal", flags)

    def say(self, verb: str, *words: object) -> None:
        line = " ".join(map(str, (time.monotonic_ns(), self._pid, verb, *words))) + "\n"
        assert len(line) < 4_096, "longer writes may be torn"
        os.write(self._file, line.encode())


class Reader:
    """Reads the journals of all processes; each call goes on where the last one ended."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = {}

    def new(self) -> Iterator[Line]:
        for path in sorted(self._directory.glob("*.journal")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.decode().splitlines():
                ns, pid, verb, *words = line.split(" ")
                yield Line(int(ns), int(pid), verb, tuple(words))
