"""Celery on Redis: one process that runs its tasks itself (`solo`), 200 fetched ahead, acked late, no results."""

import os
import subprocess
import sys

from celery import Celery
from tally import Tally, arguments, event, report, timed

app = Celery("bench", broker=os.environ.get("BENCH_URL", sys.argv[1]))
app.conf.update(
    task_acks_late=True,  # at least once, as all others
    task_ignore_result=True,
    worker_prefetch_multiplier=200,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)
tally = Tally.open(os.environ["BENCH_TALLY"]) if "BENCH_TALLY" in os.environ else None
WORKER = ["--pool", "solo", "--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "ERROR"]


@app.task(name="handle")
def handle(sale: dict[str, int]) -> None:
    tally.handled(sale["number"])


def main() -> None:
    url, events, size, _ = arguments()
    counted = Tally.new(events)
    prepared = [event(number, size) for number in range(events)]
    seconds = timed(lambda: [handle.delay(sale) for sale in prepared])
    environment = os.environ | {"BENCH_URL": url, "BENCH_TALLY": str(counted.path)}
    command = [sys.executable, "-m", "celery", "--workdir", os.path.dirname(__file__), "-A", "bench", "worker", *WORKER]
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as worker:
        counted.wait(lambda: worker.poll() is None)
        worker.terminate()
    report("celery", events, publish_one=events / seconds, handle=counted.rate())


if __name__ == "__main__":
    main()
