"""Dramatiq: two worker processes of eight threads, which is its way to use two cores; a plain function as the actor."""

import os
import subprocess
import sys

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from tally import Tally, arguments, event, report, timed

WORKER = ["--processes", "2", "--threads", "8"]

dramatiq.set_broker(RedisBroker(url=os.environ.get("BENCH_URL", sys.argv[1])))
tally = Tally.open(os.environ["BENCH_TALLY"]) if "BENCH_TALLY" in os.environ else None


@dramatiq.actor
def handle(sale: dict[str, int]) -> None:
    tally.handled(sale["number"])


def main() -> None:
    url, events, size, _ = arguments()
    counted = Tally.new(events)
    prepared = [event(number, size) for number in range(events)]
    seconds = timed(lambda: [handle.send(sale) for sale in prepared])
    environment = os.environ | {"BENCH_URL": url, "BENCH_TALLY": str(counted.path)}
    command = [sys.executable, "-m", "dramatiq", "--path", os.path.dirname(__file__), *WORKER, "bench"]
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as worker:
        counted.wait(lambda: worker.poll() is None)
        worker.terminate()
    report("dramatiq", events, publish_one=events / seconds, handle=counted.rate())


if __name__ == "__main__":
    main()
