"""FastStream on Redis Streams, one by one or in batches (`batch`): no log, no type conversion, orjson, reads of 1,000.

It acknowledges by itself, each event or each batch, as it does by default.
"""

import asyncio

import uvloop
from faststream.redis import RedisBroker, StreamSub
from tally import Tally, arguments, event, report, timed_async

PIPELINE, READ = 100, 1_000


async def main() -> None:
    url, events, size, way = arguments()
    broker, tally = RedisBroker(url, logger=None, apply_types=False, protocol=2), Tally.new(events)
    prepared = [event(number, size) for number in range(events)]
    few = prepared[: max(20, events // 5)]
    stream = StreamSub("sales", group="group", consumer="me", max_records=READ, batch=way == "batch")

    @broker.subscriber(stream=stream)
    async def handle(message: list[dict[str, int]] | dict[str, int]) -> None:
        for sale in message if isinstance(message, list) else [message]:
            tally.handled(sale["number"])

    async def publish_one() -> None:
        for sale in few:
            await broker.publish(sale, stream="few")

    async def publish_many() -> None:
        for begin in range(0, events, PIPELINE):
            pipeline = client.pipeline(transaction=False)
            for sale in prepared[begin : begin + PIPELINE]:
                await broker.publish(sale, stream="sales", pipeline=pipeline)
            await pipeline.execute()

    client = await broker.connect()
    one, many = await timed_async(publish_one), await timed_async(publish_many)
    await client.xgroup_create("sales", "group", "0")
    await broker.start()
    await asyncio.to_thread(tally.wait)
    await broker.stop()
    handled = {"handle_batch" if way == "batch" else "handle": tally.rate()}
    report("faststream", events, publish_one=len(few) / one, publish_many=events / many, **handled)


uvloop.run(main())
