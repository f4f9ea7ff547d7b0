"""Where the time of a scenario goes, by function and by line, sampled from outside by py-spy.

    pip install py-spy                                  # not pinned here: only this program uses it, anywhere on the path
    python -m benchmarks.profiling handle [--broker URL] [--events 300000] [--native]

Only the timed part is sampled, not the filling before it; a profiler within the process, as cProfile, would make each
call look dearer than it is. A sample counts for the innermost frame of Python; the event loop's own work, mostly the
reads and writes of sockets, appears as `run`. `--native` looks into C too, and tells which functions the process was in.
Attaching needs root, or `kernel.yama.ptrace_scope=0`. Without a URL, a Redis server of its own is started.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import uvloop

from benchmarks.ours import MEASURES
from millstream.bench.meter import Meter
from tests.servers import RedisServer

PER_SECOND = 500
LINES = 25
PYTHON = re.compile(r"(?P<name>.+) \((?P<file>.+\.py):(?P<line>\d+)\)")


class Sampled(Meter):
    """A meter whose blocks are sampled into one file each."""

    def __init__(self, folder: Path, native: bool) -> None:
        super().__init__()
        self._folder = folder
        self._native = ["--native"] if native else []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        file = self._folder / f"{len(list(self._folder.iterdir()))}.raw"
        words = ["py-spy", "record", "--pid", str(os.getpid()), "--rate", str(PER_SECOND), "--format", "raw"]
        spy = subprocess.Popen([*words, *self._native, "--output", file], stdout=subprocess.PIPE, text=True)
        assert spy.stdout is not None
        if "Sampling" not in spy.stdout.readline():
            raise SystemExit("py-spy cannot look at this process: root can")
        try:
            async with super().running():
                yield
        finally:
            spy.send_signal(signal.SIGINT)
            spy.communicate()

    def samples(self) -> Iterable[tuple[list[str], int]]:
        """Each stack, outermost frame first, and how often it was seen."""
        for file in self._folder.iterdir():
            for line in file.read_text().splitlines():
                stack, _, count = line.rpartition(" ")
                yield stack.split(";"), int(count)


def shares(samples: Iterable[tuple[list[str], int]]) -> dict[str, Counter[str]]:
    """How often the process was where: by function, by line, and in C where that was looked at."""
    found = {"function": Counter[str](), "line": Counter[str](), "C": Counter[str]()}
    for stack, count in samples:
        frames = [match for frame in stack if (match := PYTHON.fullmatch(frame))]
        if not frames:  # a thread that has nothing of Python
            continue
        name, file, line = frames[-1].group("name", "file", "line")
        found["function"][f"{name}  {file}"] += count
        found["line"][f"{file}:{line}  {name}"] += count
        if not PYTHON.fullmatch(stack[-1]):
            found["C"][stack[-1].partition(" (")[0]] += count
    return found


def table(counts: Counter[str], total: int) -> str:
    return "\n".join(f"{count / total:6.1%}  {what}" for what, count in counts.most_common(LINES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=MEASURES)
    parser.add_argument("--broker", metavar="URL")
    parser.add_argument("--events", type=int, default=300_000)
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--native", action="store_true")
    options = parser.parse_args()
    if shutil.which("py-spy") is None:
        raise SystemExit("py-spy is not on the path: pip install py-spy")
    logging.getLogger("millstream").setLevel(logging.ERROR)
    with ExitStack() as stack:
        url = options.broker or stack.enter_context(RedisServer.start("7")).url
        meter = Sampled(Path(stack.enter_context(tempfile.TemporaryDirectory())), options.native)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(MEASURES[options.scenario].run(url, "", options.events, options.size, meter=meter))
        found = shares(meter.samples())
    total = found["function"].total()
    print(f"{result.scenario}: {result.rate:,.0f} a second, {total:,} samples in {result.cost.seconds:.1f} s")
    for by, counts in found.items():
        if counts:
            print(f"\nby {by}\n{table(counts, total)}")


if __name__ == "__main__":
    main()
