"""Places in a stream that a group can go to, and how many events lie behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import click

from millstream.brokers.base import Broker, GroupInfo, Position, Start, Stored
from millstream.brokers.window import after as is_after
from millstream.cli import show, target
from millstream.cli.main import Mistake, Refused
from millstream.wire.packs import events_in

MAX_COUNTED = 100_000  # events that a plan reads to count them: it is to be there soon
PAGE = 1_000
NEVER = Position(0, "")
"""No end: all that there is."""


class Behind(NamedTuple):
    """What lies behind a place."""

    places: Mapping[int, Position | None]
    counts: Mapping[int, int]
    """Entries of each partition, as far as they were counted: as lag and pending are."""
    events: int
    """All of them: of a pack each."""
    complete: bool
    """False: there are more."""
    first_ms: int | None
    last_ms: int | None

    def __str__(self) -> str:
        """How many, from when to when."""
        words = ("" if self.complete else "more than ") + show.many(self.events, "event")
        if self.first_ms is None:
            return words
        until = f" to {show.moment(self.last_ms)}" if self.complete else " on"
        return f"{words}, from {show.moment(self.first_ms)}{until}"


def place(context: click.Context, option: click.Parameter, value: str) -> Start:
    """An option's `beginning`, `now` or TIME."""
    if value == "now":
        return "now"
    at_ms = None if value == "beginning" else target.moment(context, option, value)
    return "beginning" if at_ms is None else at_ms


def words(start: Start) -> str:
    """A place, for people."""
    return show.moment(start) if isinstance(start, int) else start


async def behind(broker: Broker, stream: str, start: Start) -> Behind:
    """Count the events behind a place; of each partition its share of the most that are counted."""
    return await between(broker, stream, await broker.locate(stream, start), None)


async def between(
    broker: Broker, stream: str, places: Mapping[int, Position | None], ends: Mapping[int, Position | None] | None
) -> Behind:
    """Count the events behind these places, up to these ends, or to those of the partitions."""
    most = max(PAGE, MAX_COUNTED // len(places))
    counts = dict.fromkeys(places, 0)
    complete, times, events = True, list[int](), 0
    for partition, after in places.items():
        end = ends[partition] if ends is not None else NEVER
        while found := await page(broker, stream, partition, after, end, PAGE):
            counts[partition] += len(found)
            events += sum(events_in(stored.record) for stored in found)
            times += found[0].record.time_ms, found[-1].record.time_ms
            after = found[-1].position
            if counts[partition] >= most:
                complete = False
                break
    return Behind(places, counts, events, complete, min(times, default=None), max(times, default=None))


async def page(
    broker: Broker, stream: str, partition: int, begin: Position | None, end: Position | None, limit: int
) -> list[Stored]:
    """Up to `limit` events of a partition behind a place, up to an end, which may be the very beginning (None)."""
    if end is None:
        return []
    found = await broker.read(stream, partition, begin, limit)
    return [stored for stored in found if end is NEVER or not is_after(stored.position.offset, end.offset)]


async def group_of(broker: Broker, stream: str, group: str) -> GroupInfo:
    """The group meant by `billing` or `orders/billing`, of this stream."""
    name = group if "/" in group else f"{stream}/{group}"
    if not name.startswith(f"{stream}/"):
        raise Mistake(f"{group} is a group of another stream than {stream}.")
    return await target.find_group(broker, name)


def running(info: GroupInfo) -> str:
    """How many work for the group."""
    return f"{show.many(info.consumers, 'consumer')} of it {'runs' if info.consumers == 1 else 'run'} now"


def tell_consumers(info: GroupInfo) -> None:
    """Say who works for the group."""
    if info.consumers:
        show.note(running(info))


def check_alone(info: GroupInfo, live: bool) -> None:
    """Raise `Refused` for a group with consumers, unless they may lose what they hold."""
    if info.consumers and not live:
        raise Refused(
            f"{info.stream}/{info.group} runs: stop its consumers, or say --live, and they lose what they hold"
        )
