"""taskiq on Redis Streams: one worker process, 500 tasks at once, reads of 1,000, orjson, no parsing, no results."""

import asyncio
import os
import subprocess
import sys

import uvloop
from tally import Tally, arguments, event, report, timed_async
from taskiq.serializers import ORJSONSerializer
from taskiq_redis import RedisStreamBroker

AT_ONCE = 100
WORKER = ["--workers", "1", "--max-async-tasks", "500", "--max-prefetch", "1000", "--no-parse", "--log-level", "ERROR"]

broker = RedisStreamBroker(
    os.environ.get("BENCH_URL", sys.argv[1]), consumer_id="0", xread_count=1_000
).with_serializer(ORJSONSerializer())
tally = Tally.open(os.environ["BENCH_TALLY"]) if "BENCH_TALLY" in os.environ else None


@broker.task(task_name="handle")
async def handle(sale: dict[str, int]) -> None:
    tally.handled(sale["number"])


async def main() -> None:
    url, events, size, _ = arguments()
    counted = Tally.new(events)
    prepared = [event(number, size) for number in range(events)]
    few = RedisStreamBroker(url, queue_name="few").with_serializer(ORJSONSerializer())
    some = prepared[: max(20, events // 5)]

    async def publish_one() -> None:
        for sale in some:
            await handle.kicker().with_broker(few).kiq(sale)

    async def publish_many() -> None:
        for begin in range(0, events, AT_ONCE):
            await asyncio.gather(*(handle.kiq(sale) for sale in prepared[begin : begin + AT_ONCE]))

    await broker.startup()
    await few.startup()
    one, many = await timed_async(publish_one), await timed_async(publish_many)
    await broker.shutdown()
    await few.shutdown()
    environment = os.environ | {"BENCH_URL": url, "BENCH_TALLY": str(counted.path)}
    command = [
        sys.executable,
        "-m",
        "taskiq",
        "worker",
        "--app-dir",
        os.path.dirname(__file__),
        *WORKER,
        "bench:broker",
    ]
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as worker:
        counted.wait(lambda: worker.poll() is None)
        worker.terminate()
    report("taskiq", events, publish_one=len(some) / one, publish_many=events / many, handle=counted.rate())


if __name__ == "__main__":
    uvloop.run(main())
