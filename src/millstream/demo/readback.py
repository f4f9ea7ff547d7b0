"""The second reader: what became of every event, by the broker's own word and by the handlers'.

The broker alone cannot prove that nothing was lost: where it works out `done` from what it does not find any more, the sum
comes out right by construction. So `lost` is what is missing on the larger of two ways of counting:

- by figures: events stored − done − dead letters − those that wait for another attempt;
- by positions: of all that the publisher was promised (`publish` returned their positions), those that are not stored, and
  those of which neither a handler of the group ever reached its end, nor a dead letter is kept, nor an attempt is due.

The second way takes its evidence from outside the broker: a middleware notes each position whose handler came to its end.
It shows that no event was passed over. It cannot show that a handler's effect was kept by whatever the handler wrote to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from millstream import BrokerError, Call, Handle, Position
from millstream.brokers.base import Broker, GroupInfo
from millstream.demo.flights import alerts, flights
from millstream.handlers.subscriber import Group

PAGE = 1_000


@dataclass(frozen=True)
class Figures:
    """What became of a run's events in one group."""

    handled: int
    """Settled as done."""
    retried: int
    dead: int
    """Dead letters that are left."""
    died: int
    """Dead letters that there ever were."""
    replayed: int
    lost: int
    """0, or something is wrong. Negative: the broker counts more as settled than were ever published."""


@dataclass
class Witness:
    """Notes, outside the broker, what was promised and what was done. A middleware."""

    confirmed: set[Position] = field(default_factory=set)
    finished: dict[str, set[Position]] = field(default_factory=lambda: defaultdict(set))

    def __call__(self, handle: Handle) -> Handle:
        """Note what `handle` has brought to its end; what it raises travels on."""

        async def noted(call: Call) -> None:
            await handle(call)
            self.finished[call.subscriber.group].update(delivery.position for delivery in call.deliveries)

        return noted


async def read_back(broker: Broker, groups: Iterable[Group], witness: Witness) -> tuple[int, dict[str, Figures], int]:
    """How many flight events are stored, what became of them in each group, and how many alerts are stored."""
    stored = await _types_by_position(broker)
    vanished = witness.confirmed - stored.keys()
    found = {info.group: info for info in await broker.admin.groups(flights.name)}
    figures = {}
    for group in groups:
        expected = {position for position, type_ in stored.items() if type_ in group.routes}
        evidence = witness.finished[group.name] | await _kept(broker, group.name)
        figures[group.name] = _figures(found[group.name], len(stored), len(vanished | (expected - evidence)))
    return len(stored), figures, await _count(broker, alerts.name)


def _figures(info: GroupInfo, published: int, missing: int) -> Figures:
    if info.done is None:
        raise BrokerError(f"the broker cannot tell how many events group {info.group!r} has done")
    by_figures = published - info.done - info.dead - info.scheduled
    return Figures(
        handled=info.done,
        retried=info.retried,
        dead=info.dead,
        died=info.dead + info.replayed + info.dropped,
        replayed=info.replayed,
        lost=max(by_figures, missing, key=abs),
    )


async def _types_by_position(broker: Broker) -> dict[Position, str]:
    found: dict[Position, str] = {}
    for partition in range(flights.partitions):
        after: Position | None = None
        while page := await broker.read(flights.name, partition, after, PAGE):
            found.update((stored.position, stored.record.type) for stored in page)
            after = page[-1].position
    return found


async def _kept(broker: Broker, group: str) -> set[Position]:
    """The positions of a group's dead letters and of events that wait for another attempt."""
    found: set[Position] = set()
    after = ""
    while letters := await broker.admin.dead(flights.name, group, after, PAGE):
        found.update(letter.stored.position for letter in letters)
        after = letters[-1].ref
    pending = await broker.admin.pending(flights.name, group, PAGE)
    return found | {entry.position for entry in pending if entry.due_ms is not None}


async def _count(broker: Broker, stream: str) -> int:
    return next((info.events for info in await broker.admin.streams() if info.spec.name == stream), 0)
