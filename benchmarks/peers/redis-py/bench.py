"""Plain redis-py on asyncio, no framework: pipelines of 100, reads of 100 with one XACK for all of them."""

import msgspec
import redis.asyncio as redis
import uvloop
from tally import Tally, arguments, event, report, timed_async

BATCH = 100


def entry(number: int, size: int) -> dict[str, bytes | str]:
    """The seven fields that the engine's limit is measured with."""
    bare = {"id": f"{number:021}", "type": "bench.sale", "source": "bench", "time": "", "subject": "", "headers": ""}
    return bare | {"data": msgspec.json.encode(event(number, size))}


async def main() -> None:
    url, events, size, _ = arguments()
    client = redis.from_url(url, protocol=2)  # with 3, its replies are nested otherwise; as fast
    entries = [entry(number, size) for number in range(events)]
    few = entries[: max(20, events // 20)]

    async def publish_one() -> None:
        for fields in few:
            await client.xadd("few", fields)

    async def publish_many() -> None:
        for begin in range(0, events, BATCH):
            pipeline = client.pipeline(transaction=False)
            for fields in entries[begin : begin + BATCH]:
                pipeline.xadd("sales", fields)
            await pipeline.execute()

    one, many = await timed_async(publish_one), await timed_async(publish_many)
    tally = Tally.new(events)
    await client.xgroup_create("sales", "group", "0")
    left = events
    while left:
        [(_, batch)] = await client.xreadgroup("group", "me", {"sales": ">"}, count=BATCH)
        for _, fields in batch:
            await handle(tally, msgspec.json.decode(fields[b"data"]))
        await client.xack("sales", "group", *(position for position, _ in batch))
        left -= len(batch)
    await client.aclose()
    report("redis", events, publish_one=len(few) / one, publish_many=events / many, handle=tally.rate())


async def handle(tally: Tally, sale: dict[str, object]) -> None:
    tally.handled(sale["number"])


uvloop.run(main())
