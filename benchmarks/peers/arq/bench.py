"""arq: 200 jobs at once, polled every 10 ms, no results kept, no log."""

import asyncio

import uvloop
from arq import create_pool, func
from arq.connections import RedisSettings
from arq.worker import Worker
from tally import Tally, arguments, event, report, timed_async

AT_ONCE = 100


async def main() -> None:
    url, events, size, _ = arguments()
    tally = Tally.new(events)
    prepared = [event(number, size) for number in range(events)]
    few = prepared[: max(20, events // 5)]
    pool = await create_pool(RedisSettings.from_dsn(url))

    async def handle(_: object, sale: dict[str, int]) -> None:
        tally.handled(sale["number"])

    async def publish_one() -> None:
        for sale in few:
            await pool.enqueue_job("handle", sale, _queue_name="few")

    async def publish_many() -> None:
        for begin in range(0, events, AT_ONCE):
            await asyncio.gather(*(pool.enqueue_job("handle", sale) for sale in prepared[begin : begin + AT_ONCE]))

    one, many = await timed_async(publish_one), await timed_async(publish_many)
    worker = Worker(
        [func(handle, name="handle")],
        redis_pool=pool,
        max_jobs=200,
        poll_delay=0.01,
        keep_result=0,
        queue_read_limit=1_000,
        handle_signals=False,
        log_results=False,
    )
    running = asyncio.create_task(worker.async_run())
    await asyncio.to_thread(tally.wait, lambda: not running.done())
    running.cancel()
    await asyncio.wait([running])
    report("arq", events, publish_one=len(few) / one, publish_many=events / many, handle=tally.rate())


uvloop.run(main())
