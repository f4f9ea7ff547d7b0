"""How fast is it here? Events of 200 bytes through one process, beside what the engine can do in the same minutes.

    python benchmarks/run.py [SCENARIO …] [--broker redis|sqlite|memory|both|all] [--events 200000] [--size 200]
        [--rounds 3] [--long] [--peers [NAME …]] [-o table|markdown|json] [--svg FILE] [--record | --gate]

Each run is a process of its own against an empty broker. Each round runs everything once, so that a machine that gets
slower does so for all; the medians are shown, and a ratio is one of medians. The Redis server is its own, on a free
port, and keeps nothing on disk; the commits of SQLite are durable. `--record` writes the figures to recorded.json, and
`--gate` compares what is there with what is now; what is slower than it may be has a few rounds more before that counts.
README.md, beside this file, says how to read the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import figures, record
from benchmarks.chart import chart
from benchmarks.figures import Line
from benchmarks.others import PEERS
from benchmarks.rounds import Rounds
from benchmarks.scenarios import CORE, SCENARIOS
from tests.servers import RedisServer, find

BROKERS = {"both": ("redis", "sqlite"), "all": figures.OURS}
MIN_BYTES, MAX_BYTES = 64, 1_000_000
RERUNS = 3  # of all rounds of what is slower, before the gate says so

OUTPUTS: dict[str, Callable[[Sequence[Line]], str]] = {
    "table": figures.table,
    "markdown": figures.markdown,
    "json": lambda lines: json.dumps(figures.as_json(lines), indent=1),
}


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    recorded = record.load(options.file) if options.gate else {}
    brokers = BROKERS.get(options.broker, (options.broker,))
    lines = measured(options, brokers, recorded)
    print(OUTPUTS[options.output](lines))
    if options.svg is not None:
        options.svg.write_text(chart([line for line in lines if _belongs_on_chart(line)]))
    if options.record:
        record.save(options.file, lines, options.rounds, find("7") if "redis" in brokers else None)
    complaints = record.complaints(recorded, lines) if options.gate else []
    for complaint in complaints:
        print(f"slower: {complaint}", file=sys.stderr)
    ours_failed = any(line.missing and line.who in figures.OURS for line in lines)
    return 1 if complaints or ours_failed else 0


def measured(options: argparse.Namespace, brokers: Sequence[str], recorded: dict[str, Any]) -> list[Line]:
    """The lines of all rounds, with some more of what a record says was faster."""
    with ExitStack() as stack:
        needed = "redis" in brokers or options.peers
        port = stack.enter_context(RedisServer.start("7")).port if needed else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rounds = Rounds(options.events, options.size, port, folder)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            rounds.round(brokers, options.scenarios, options.peers)
        for _ in range(RERUNS if recorded else 0):
            slower = [line for line in record.slower(recorded, rounds.lines()) if not line.missing]
            for line in slower * options.rounds:
                rounds.round([line.who], [line.scenario], [])
        return list(rounds.lines())


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--broker", choices=[*figures.OURS, *BROKERS], default="both")
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=200, help="of an event's JSON, in bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--long", action="store_true", help="the backlogs of 1M and 10M too: minutes, and 3 GB of memory"
    )
    parser.add_argument("--peers", nargs="*", metavar="NAME", help=f"all, or some of: {'; '.join(PEERS)}")
    parser.add_argument("-o", "--output", choices=OUTPUTS, default="table")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the chart of the documentation")
    parser.add_argument("--file", type=Path, default=record.RECORD, help="another record")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--record", action="store_true", help="write the record anew")
    what.add_argument("--gate", action="store_true", help=f"fail below {record.LEAST} of a recorded ratio")
    options = parser.parse_args(words)
    options.peers = [] if options.peers is None else options.peers or list(PEERS)
    options.scenarios = options.scenarios or (CORE if options.gate else _all(options.long))
    unknown = [name for name in options.scenarios if name not in SCENARIOS]
    unknown += [name for name in options.peers if name not in PEERS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    if not MIN_BYTES <= options.size <= MAX_BYTES or options.events < 1 or options.rounds < 1:
        parser.error(f"--size is from {MIN_BYTES} to {MAX_BYTES:,}, --events and --rounds at least 1")
    return options


def _all(long: bool) -> list[str]:
    return [name for name, scenario in SCENARIOS.items() if long or not scenario.long]


def _belongs_on_chart(line: Line) -> bool:
    return line.scenario in CORE if line.who in figures.OURS else True


if __name__ == "__main__":
    raise SystemExit(main())
