"""How many bytecodes does an event cost? Counted, not timed: no other work on the machine changes the answer.

    python -m benchmarks.bytecodes [SCENARIO …] [--broker redis|sqlite|memory|both] [--events 6000] [--record | --gate]

Runs scenarios of `ours.py` in this process while Python tells of each bytecode, and shows those of an event, by function.
What C does with it is not seen: `run.py` measures that. `--record` writes bytecodes.json anew, `--gate` compares with it:
it fails beyond 5 % more, since the same code differs by up to 3 % from run to run, as pages have other sizes. Another Python
has other bytecodes, so the record is one of a version.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import uvloop

from benchmarks import record
from benchmarks.ours import MEASURES
from millstream.bench.meter import Meter
from tests.servers import RedisServer

RECORD = Path(__file__).parent / "bytecodes.json"
MOST = 1.05
VERSION = ".".join(platform.python_version_tuple()[:2])
SCENARIOS = ("publish-many", "publish-concurrent", "handle", "handle-ordered", "handle-batch", "handle-all")
BROKERS = {"both": ("redis", "sqlite")}
FUNCTIONS = 15  # that are shown
IN_FLIGHT = "1000"  # else it depends on the pace, which counting slows down


class Bytecodes(Meter):
    """Counts those that are run under `running`, by any thread that is started while this one is being used."""

    def __init__(self) -> None:
        super().__init__()
        self.by_function: Counter[CodeType] = Counter()
        self._counting = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with super().running():
            self._counting = True
            sys.settrace(self.trace)
            yield
            sys.settrace(None)
            self._counting = False

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not self._counting:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.by_function[frame.f_code] += 1
        return self.trace


def counted(scenario: str, url: str, events: int) -> dict[str, float]:
    """What an event costs in each function, the dearest first."""
    meter = Bytecodes()
    threading.settrace(meter.trace)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(MEASURES[scenario].run(url, scenario, events, 200, meter=meter))
    finally:
        threading.settrace(None)
    return {_name(code): count / result.events for code, count in meter.by_function.most_common()}


def complaints(recorded: dict[str, Any], found: dict[str, float]) -> list[str]:
    """What takes more than the record allows, one sentence each."""
    if recorded["python"] != VERSION:
        return []
    return [
        f"{name}: {count:.0f} bytecodes an event, {count / recorded['counts'][name] - 1:.1%} more than recorded"
        for name, count in found.items()
        if count > MOST * recorded["counts"].get(name, count)
    ]


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    recorded = record.load(options.file) if options.gate else {}
    logging.getLogger("millstream").setLevel(logging.ERROR)
    os.environ["MILLSTREAM_MAX_IN_FLIGHT"] = IN_FLIGHT
    found = {}
    with tempfile.TemporaryDirectory() as folder, _urls(options.broker, folder) as urls:
        for broker, url in urls.items():
            for scenario in options.scenarios:
                functions = counted(scenario, url, options.events)
                found[f"{broker} {scenario}"] = total = round(sum(functions.values()), 1)
                print(f"{total:8.1f}  {broker} {scenario}")
                if not options.gate and not options.record:
                    print("".join(f"{functions[name]:12.1f}  {name}\n" for name in list(functions)[:FUNCTIONS]))
    if options.record:
        options.file.write_text(json.dumps({"python": VERSION, "counts": found}, indent=1) + "\n")
    more = complaints(recorded, found) if options.gate else []
    for complaint in more:
        print(f"more: {complaint}", file=sys.stderr)
    return 1 if more else 0


def _name(code: CodeType) -> str:
    return f"{code.co_qualname}  {code.co_filename.rpartition('/src/')[2]}:{code.co_firstlineno}"


@contextmanager
def _urls(brokers: str, folder: str) -> Iterator[dict[str, str]]:
    wanted = BROKERS.get(brokers, (brokers,))
    urls = {"sqlite": f"sqlite:///{folder}/bytecodes.db", "memory": "memory://"}
    if "redis" not in wanted:
        yield {name: urls[name] for name in wanted}
        return
    with RedisServer.start("7") as server:
        urls["redis"] = server.url
        yield {name: urls[name] for name in wanted}


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(MEASURES))
    parser.add_argument("--broker", choices=["redis", "sqlite", "memory", *BROKERS], default="both")
    parser.add_argument("--events", type=int, default=6_000)
    parser.add_argument("--file", type=Path, default=RECORD, help="another record")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--record", action="store_true", help="write the record anew")
    what.add_argument("--gate", action="store_true", help=f"fail where it is more than {MOST} times the record")
    options = parser.parse_args(words)
    options.scenarios = options.scenarios or SCENARIOS
    if unknown := [name for name in options.scenarios if name not in MEASURES]:
        parser.error(f"unknown: {', '.join(unknown)}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
