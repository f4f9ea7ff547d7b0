"""Events for later: they lie beside the log until they are due, and are published by whoever tends the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hiredis import ReplyError

from millstream.brokers.redis.appending import MAX_SCRIPT_BYTES, MAX_SCRIPT_RECORDS, Known, refusal
from millstream.brokers.redis.scripts import scripts
from millstream.errors import BrokerFull

if TYPE_CHECKING:
    from millstream.brokers.redis.broker import RedisBroker

MAX_CALLS = 50  # per partition and round: 10,000 small events; the next round goes on


async def ripen(broker: RedisBroker, known: Known) -> tuple[int, int | None]:
    """Publish what has fallen due, in order of due time: how many, and when the next one is due (past: more waits).

    What finds no room, by maxmemory or the ceiling, stays where it is.
    """
    link = await broker.control()
    await known.fresh(link, broker.clock.monotonic())
    published, due = 0, dict[int, int]()
    waiting = list(range(known.spec.partitions))
    for _ in range(MAX_CALLS):
        args = MAX_SCRIPT_RECORDS, MAX_SCRIPT_BYTES, *known.limits(7)
        replies = await link.run_each(
            scripts["ripen"], [((*known.keys.store(p), *known.counted), args) for p in waiting]
        )
        more: list[int] = []
        for partition, reply in zip(waiting, replies, strict=True):
            if isinstance(reply, ReplyError):
                raise link.failure(reply, f"publish what is due of {known.spec.name}")
            count, next_ms, refused = reply
            published += count
            due.pop(partition, None)
            if next_ms:
                due[partition] = int(float(next_ms))
            if refused:
                _raise_unless_full(known, partition, refused.decode(), link.target.where)
            elif count:
                more.append(partition)
        waiting = more
        if not waiting:
            break
    return published, min(due.values(), default=None)


def _raise_unless_full(known: Known, partition: int, refused: str, where: str) -> None:
    error = refusal(known, partition, ReplyError(refused), where)
    if not isinstance(error, BrokerFull):
        raise error
