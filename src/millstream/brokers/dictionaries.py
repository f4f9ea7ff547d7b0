"""Dictionaries: kept beside a stream, and met by who reads an event that was written with one.

A dictionary is stored before the first event that needs it and never changes, so who asks for it once has it for good.
Whoever reads a stream asks here before it opens packs: the broker answers over a network, and opening is done between
two steps of a handler.
"""

from __future__ import annotations

from collections.abc import Iterable

from millstream.brokers.base import Broker, Stored
from millstream.errors import BadSetting, BrokerRefused, NotSupported
from millstream.units import MAX_DICTIONARIES
from millstream.wire import compression, packs
from millstream.wire.compression import Dictionary


async def readable(broker: Broker, stream: str, page: Iterable[Stored]) -> NotSupported | None:
    """Learn the dictionaries that the packs of a page need. What still keeps us from reading one: a missing library.

    A dictionary that the broker does not have keeps nobody waiting: `packs.read` says that it is not known.
    """
    asked: set[int] = set()
    for stored in page:
        if packs.is_pack(stored.record):
            lacking = packs.lacking(stored.record)
            if isinstance(lacking, NotSupported):
                return lacking
            if lacking is not None and lacking.number not in asked:
                asked.add(lacking.number)
                await learn(broker, stream, lacking.number)
    return None


async def learn(broker: Broker, stream: str, number: int) -> Dictionary | None:
    """A dictionary of a stream; None where there is none that can be used. Raises `NotSupported` without the library."""
    known = compression.known(number)
    if known is not None or not broker.traits.dictionaries:
        return known
    content = await broker.dictionary(stream, number)
    try:
        learnt = None if content is None else compression.learn(content)
    except BadSetting:
        return None
    return learnt if learnt is not None and learnt.id == number else None


def refused(stream: str, number: int, why: str) -> BrokerRefused:
    """Why a dictionary is not stored: `TAKEN`, `FULL` or `UNKNOWN`."""
    reasons = {
        "TAKEN": f"has another dictionary with the number {number}: train it anew",
        "FULL": f"has {MAX_DICTIONARIES} dictionaries, as many as it may, and keeps them, since its events need them",
        "UNKNOWN": f"has no dictionary with the number {number}",
    }
    return BrokerRefused(f"stream {stream!r} {reasons[why]}")
