"""Outputs are stored before their outcomes: one that is stored twice is an accident, one that is missing a loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from millstream.brokers.base import Output, Record
from millstream.errors import BrokerDown, BrokerError, PublishError

if TYPE_CHECKING:
    from millstream.brokers.redis.broker import RedisBroker


async def append(broker: RedisBroker, outputs: Iterable[Output]) -> dict[str, BrokerError]:
    """Store outputs; why not, for each stream of which they are not all stored."""
    streams: dict[str, list[Record]] = defaultdict(list)
    for output in outputs:
        streams[output.stream].append(output.record)
    failed: dict[str, BrokerError] = {}
    for stream, records in streams.items():
        try:
            await broker.append(stream, records)
        except BrokerError as error:
            failed[stream] = error
        except PublishError as error:
            failed[stream] = BrokerDown(f"outputs for {stream!r}: {error}")
    return failed
