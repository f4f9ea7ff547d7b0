"""How fast is it here? Events of 200 bytes through one process, beside what the engine itself can do in the same minutes.

    python benchmarks/run.py [--events 200000] [--rounds 3] [--broker redis|sqlite|both] [-o table|json]

The Redis server is its own, on a free port, and keeps nothing on disk. Each round runs everything once, so that a machine
that gets slower does so for all; the medians are shown. No figure is shown unless every event was handled, each exactly
once, and the broker says that the group has nothing left.

- `XADD`: redis-benchmark, the fields of a whole event in each entry; one connection with 64 commands in flight, and the
  better of two ways with many. Where redis-benchmark is not installed, these are left out.
- `publish_many`: from the first event to the last confirmed position.
- `handler`: a handler that takes the event alone, from the start of the worker to the end of its drain.
- `handler, all`: the same with the delivery, a dependency that is a generator, and a timeout.
- `handler, by key`: as `handler`, in the order of 9,973 keys in 8 partitions.
- `1,000 keys`: the same with 1,000 keys; and `one fails`: one of them fails and waits, and the others are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import uvloop
from redis import Redis

from millstream import App, Delivery, Depends, Event, Retry, Settings, Stream
from tests.servers import RedisServer, find

DATA_BYTES = 200
TARGETS = {("redis", "publish_many"): 150_000, ("redis", "handler"): 150_000}
KEYS, POISON = 1_000, 7
HANDLED_WITHIN_S = 300.0


class Sale(Event, type="bench.sale"):
    number: int
    customer: str
    article: str
    cents: int
    remark: str


sales = Stream("sales", Sale)
visits = Stream("visits", Sale, key="customer")
counters = Stream("counters", Sale, key=lambda sale: sale.number % KEYS)


def sale(number: int) -> Sale:
    return Sale(number=number, customer=f"c-{number % 9973:06}", article="a-000731", cents=1999, remark="-" * 115)


class Count:
    """How often each event was handled."""

    def __init__(self, events: int) -> None:
        self.times = bytearray(events)
        self.left = events
        self.finished = asyncio.Event()

    def handled(self, number: int) -> None:
        self.times[number] += 1
        self.left -= 1
        if not self.left:
            self.finished.set()


def plain(url: str, namespace: str, count: Count) -> App:
    app = App("bench", broker=url, settings=Settings.load(namespace=namespace))

    @app.subscriber(sales, "handler", timeout="never")
    async def handle(event: Sale) -> None:
        count.handled(event.number)

    return app


def by_key(url: str, namespace: str, count: Count) -> App:
    app = App("bench", broker=url, settings=Settings.load(namespace=namespace))

    @app.subscriber(visits, "by-key", timeout="never")
    async def handle(event: Sale) -> None:
        count.handled(event.number)

    return app


def thousand(url: str, namespace: str, count: Count, *, poison: bool = False) -> App:
    """In the order of a thousand keys; the events of one may fail, and are tried again after the run."""
    app = App("bench", broker=url, settings=Settings.load(namespace=namespace))

    @app.subscriber(counters, "poisoned" if poison else "healthy", timeout="never", retry=Retry(first="1h"))
    async def handle(event: Sale) -> None:
        if poison and event.number % KEYS == POISON:
            raise RuntimeError("nothing helps")
        count.handled(event.number)

    return app


def a_session() -> Iterator[object]:
    yield None


def whole(url: str, namespace: str, count: Count) -> App:
    app = App("bench", broker=url, settings=Settings.load(namespace=namespace))

    @app.subscriber(sales, "all", timeout="30s")
    async def handle(event: Sale, delivery: Delivery, session: Annotated[object, Depends(a_session)]) -> None:
        count.handled(event.number)

    return app


async def publish(url: str, namespace: str, events: int, to: Stream[Sale] = sales) -> float:
    app = App("bench", broker=url, streams=[to], settings=Settings.load(namespace=namespace))
    prepared = [sale(number) for number in range(events)]
    async with app:
        began = time.perf_counter()
        positions = await app.publish_many(prepared, to=to)
        seconds = time.perf_counter() - began
        (info,) = (info for info in await app.broker.admin.streams() if info.spec.name == to.name)
    check("published", [len(set(positions)), info.events], events)
    return seconds


async def handle(
    make: Callable[[str, str, Count], App], url: str, namespace: str, events: int, failing: int = 0
) -> float:
    """Seconds until all events were handled, but for those that are to fail."""
    count = Count(events)
    count.left -= failing
    app = make(url, namespace, count)
    began = time.perf_counter()
    async with app.worker(), asyncio.timeout(HANDLED_WITHIN_S):
        await count.finished.wait()
    seconds = time.perf_counter() - began
    async with app:
        (group,) = app.groups()
        (info,) = (info for info in await app.broker.admin.groups(group.stream.name) if info.group == group.name)
    check("handled", [count.times.count(1), info.done], events - failing)
    check("left", [info.lag, info.dead], 0)
    check("waiting", [info.pending], failing)
    return seconds


def check(what: str, found: list[int | None], expected: int) -> None:
    if any(number != expected for number in found):
        raise SystemExit(f"{what}: {found}, expected {expected} each: no figures")


def engine(port: int, events: int, clients: int, pipeline: int) -> float | None:
    """Entries a second, by redis-benchmark."""
    binary = shutil.which("redis-benchmark") or shutil.which("redis-benchmark", path=str(Path(find("7")).parent))
    if binary is None:
        return None
    fields = {"id": "0" * 21, "type": "bench.sale", "source": "bench", "time": "", "subject": "", "headers": ""}
    entry = [word for pair in fields.items() for word in pair] + ["data", "x" * DATA_BYTES]
    options = ["-p", str(port), "-n", str(events), "-c", str(clients), "-P", str(pipeline), "--csv"]
    ran = subprocess.run([binary, *options, "XADD", "engine", "*", *entry], capture_output=True, text=True, check=True)
    return float(list(csv.reader(ran.stdout.splitlines()))[-1][1])


class Bench:
    """The rates of all rounds, by broker and scenario."""

    def __init__(self, events: int) -> None:
        self.events = events
        self.rates: defaultdict[tuple[str, str], list[float]] = defaultdict(list)

    def engine(self, port: int) -> None:
        one = engine(port, self.events, 1, 64)
        many = [engine(port, self.events, 10, 256), engine(port, self.events, 50, 64)]
        if one is not None:
            self.rates["engine", "XADD, 1 connection, 64 in flight"].append(one)
            self.rates["engine", "XADD, best of many connections"].append(max(rate or 0 for rate in many))

    async def round(self, broker: str, url: str, namespace: str) -> None:
        self._add(broker, "publish_many", await publish(url, namespace, self.events))
        self._add(broker, "handler", await handle(plain, url, namespace, self.events))
        self._add(broker, "handler, all", await handle(whole, url, namespace, self.events))
        await publish(url, namespace, self.events, visits)
        self._add(broker, "handler, by key", await handle(by_key, url, namespace, self.events))
        await publish(url, namespace, self.events, counters)
        self._add(broker, "by key, 1,000 keys", await handle(thousand, url, namespace, self.events))
        failing = len(range(POISON, self.events, KEYS))
        seconds = await handle(partial(thousand, poison=True), url, namespace, self.events, failing)
        self._add(broker, "by key, 1,000 keys, one fails", seconds * self.events / (self.events - failing))

    def _add(self, broker: str, scenario: str, seconds: float) -> None:
        self.rates[broker, scenario].append(self.events / seconds)

    def as_json(self) -> dict[str, Any]:
        rows = [
            {
                "broker": broker,
                "scenario": scenario,
                "per_second": round(statistics.median(rates)),
                "runs": [round(rate) for rate in rates],
                "target": TARGETS.get((broker, scenario)),
            }
            for (broker, scenario), rates in self.rates.items()
        ]
        return {"events": self.events, "data_bytes": DATA_BYTES, "rows": rows}

    def as_table(self) -> str:
        lines = [f"{'':8}{'':36}{'events/s':>10}{'least':>10}{'most':>10}{'target':>10}"]
        for row in self.as_json()["rows"]:
            target = f"{row['target']:,}" if row["target"] else ""
            figures = f"{row['per_second']:>10,}{min(row['runs']):>10,}{max(row['runs']):>10,}"
            lines.append(f"{row['broker']:8}{row['scenario']:36}{figures}{target:>10}")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--broker", choices=["redis", "sqlite", "both"], default="both")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    options = parser.parse_args()
    logging.getLogger("millstream").setLevel(logging.ERROR)  # its warning that our server keeps nothing on disk
    bench = Bench(options.events)
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer.start("7")) if options.broker != "sqlite" else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            if server is not None:
                bench.engine(server.port)
                runner.run(bench.round("redis", server.url, f"r{number}"))
                with Redis(port=server.port) as client:
                    client.flushall()
            if options.broker != "redis":
                runner.run(bench.round("sqlite", f"sqlite:///{folder}/{number}.db", ""))
    print(json.dumps(bench.as_json(), indent=2) if options.output == "json" else bench.as_table())


if __name__ == "__main__":
    main()
