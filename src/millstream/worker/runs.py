"""Runs: the packs that lanes work on. Lanes see events, the broker sees packs, and this lies between them.

    claim of a pack ──► open ──┬──► taken one by one from `Run.rest`, no claim made ───┐
                               └──► spread: each event a claim of its own ──► ended ───┴──► all ended: one settlement

Nothing but the settler's gathering brings a claim of an event back to its run, in the order in which the lanes ended them;
so lanes treat it like any other: order, retries, suspects, batches. Where a handler takes the bare event and no order is
kept, that is not needed: a lane goes through the pack and makes a claim of an event that fails only. With JSON of 200
bytes that is 1.0 µs an event in place of 4.7 on its own, all of a worker on the memory broker included; a handler that takes
a `Delivery` pays 6.4.

A pack of one is no run: `Runs.readable` puts its event into its place before lanes see it, and all else is as for any event.

A run that cannot go on, at a stop or when its partition goes to somebody else, is *closed*: what has not ended is left,
uncounted. One that was lost is forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from msgspec.structs import replace

from millstream.brokers.base import (
    Broker,
    Claim,
    Dead,
    Done,
    Later,
    Letter,
    Outcome,
    Output,
    Position,
    Settlement,
    Stored,
    finished,
)
from millstream.brokers.dictionaries import readable
from millstream.clock import Clock
from millstream.errors import BrokerError, MillstreamError, WireError
from millstream.handlers.subscriber import Group
from millstream.telemetry import BROKER_ERROR, DEAD, Telemetry
from millstream.wire import packs
from millstream.wire.packs import One, Packed
from millstream.worker.ahead import ReadAhead
from millstream.worker.order import KeyOrder

_CLOSED = Later(0, "", counted=False)
_PAUSE_S = 1.0


class Run:
    """A pack in work: which of its events have not ended, and what became of the others."""

    def __init__(self, claim: Claim, packed: Packed, *, in_order: bool) -> None:
        self.claim = claim
        self.packed = packed
        whole, datas = range(len(packed)), packed.columns.datas
        left = [part for part in claim.left if part in whole] or whole
        self.rest = zip(left, datas if left is whole else [datas[part] for part in left], strict=True)
        """Those that nobody has begun, and their data."""
        self.lanes = 0
        """Lanes that go through it, each with one event at a time."""
        self.apart: set[int] = set()
        """Those that are claims of their own, and have not ended."""
        self.exhausted = False
        """Whether all have begun."""
        self.waits = False
        """Whether its claim waits at the head of the queue, for lanes to take more of it."""
        self.in_order = in_order
        """Whether its events are handled one after the other."""
        self.lost = False
        self.closing = False
        self._count = len(left)
        self._again: list[int] = []
        self._later: Later | None = None
        self._outputs: list[Output] = []
        self._letters: list[Letter] = []

    @property
    def type(self) -> str:
        """The type of all its events; empty when they have several."""
        types = self.packed.columns.types
        return types if isinstance(types, str) else ""

    def part(self, part: int) -> Claim:
        """An event as a claim of its own."""
        pack = self.claim
        position = Position(pack.position.partition, self.packed.offset_of(part))
        return Claim(position, self.packed.record(part), pack.attempt, pack.suspect, pack.postponed, token=pack.token)

    def end(self, part: int, outcome: Outcome, outputs: Sequence[Output] = ()) -> None:
        """An event that was a claim of its own has ended."""
        self.apart.discard(part)
        self._outputs += outputs
        match outcome:
            case Later():
                self._again.append(part)
                self._wait(outcome)
            case Dead(reason=reason, error=error):
                self._letters.append(Letter(part, self.packed.record(part), reason, error))

    def close(self) -> None:
        """Leave what has not ended. No lane goes through it any more, or it is lost."""
        left = [*self.apart, *(part for part, _ in self.rest)]
        if left:
            self._again += left
            self._wait(_CLOSED)
            self.apart.clear()

    def _wait(self, later: Later) -> None:
        if self._later is None:
            self._later = later
        elif not self.in_order:  # else those behind the first one wait for it, as long as it waits
            self._later = _sooner(self._later, later)

    @property
    def is_over(self) -> bool:
        """True when all have ended, and nobody has settled it yet."""
        return self.exhausted and not (self.lanes or self.apart or self.closing)

    @property
    def is_untouched(self) -> bool:
        """True when nothing has become of any event: then its claim goes back as if nobody had opened it."""
        return len(self._again) == self._count and self._later == _CLOSED

    def settlement(self) -> Settlement:
        """What became of the pack."""
        outcome: Outcome = Done()
        if self._later is not None:
            later = self._later
            outcome = Later(later.at_ms, later.error, later.counted, sorted(self._again))
        return Settlement(self.claim.position, outcome, self._outputs, letters=self._letters)


class Runs:
    """The open runs of one group."""

    def __init__(
        self,
        group: Group,
        ahead: ReadAhead,
        clock: Clock,
        telemetry: Telemetry,
        dropped: Callable[[int], None],
    ) -> None:
        self._group = group.name
        self._stream = group.stream.name
        self._in_order = group.order == "key"
        self._ahead = ahead
        self._telemetry = telemetry
        self._clock = clock
        self._dropped = dropped
        self._open: dict[Position, Run] = {}

    def begin(self, settle: Callable[[Settlement], None], broker: Broker) -> None:
        """Say how to settle, and where the dictionaries are; once, before all else."""
        self._settle = settle
        self._broker = broker
        self._able = broker.traits.packs  # it can keep what becomes of the events of a pack

    async def readable(self, claims: list[Claim]) -> None:
        """Wait, and say so, until the packs among these can be read. Packs of one become their events, where they stand."""
        if packs.TYPE in {claim.record.type for claim in claims}:
            claims[:] = map(_event, claims)
            left = [claim.stored for claim in claims if packs.is_pack(claim.record)]
            await until_readable(self._broker, self._stream, left, self._group, self._clock, self._telemetry)
            claims[:] = map(_event, claims)

    def open(self, claim: Claim) -> Run | Dead:
        """The run of a claim whose record is a pack; or why the pack as a whole is given up."""
        position = claim.position
        run = self._open.get(position)
        if run is not None and not run.closing:
            return run
        if not self._able:
            return self._dead(claim, "it is a pack, and this broker cannot keep what becomes of each of its events")
        try:
            packed = packs.read(claim.record, position.offset)
        except WireError as error:
            return self._dead(claim, str(error))
        if isinstance(packed, One):
            return self._dead(claim, "its dictionary was not known when it was fetched: replay it")
        run = self._open[position] = Run(claim, packed, in_order=self._in_order and claim.record.key is not None)
        return run

    def enter(self, run: Run, queue: deque[Claim]) -> None:
        """A lane goes through it. Its claim is back at the head of the queue: whoever comes takes of what is left."""
        queue.appendleft(run.claim)
        run.waits = True
        run.lanes += 1

    def spread(self, run: Run, queue: deque[Claim], order: KeyOrder | None) -> None:
        """Put the events of a run, whose claim was taken out of the queue, into its place: each as a claim of its own."""
        claims = [self.part(run, part) for part, _ in run.rest]
        run.exhausted = True
        if order is not None and run.in_order:
            order.precede(run.claim.record.key, claims[1:])
            claims = claims[:1]
        queue.extendleft(reversed(claims))

    def part(self, run: Run, part: int) -> Claim:
        """An event as a claim of its own, which we hold beside the pack's from now on."""
        self._ahead.held += 1
        run.apart.add(part)
        return run.part(part)

    def exhaust(self, run: Run, queue: deque[Claim]) -> None:
        """All its events have begun: its claim is there for nobody any more."""
        run.exhausted = True
        if run.waits:
            run.waits = False
            if run.claim in queue:
                queue.remove(run.claim)
            else:
                self._ahead.held += 1  # whoever took it out has counted it as gone

    def leave(self, run: Run) -> None:
        """A lane that went through it does so no more: if it was the last one, and all have ended, it is settled."""
        run.lanes -= 1
        if run.is_over:
            self._settle(self._over(run))

    def gathered(self, done: list[Position], settlements: list[Settlement]) -> tuple[list[Position], list[Settlement]]:
        """What the broker is to be told in place of these: of the events of open runs only how the whole run ended."""
        if not self._open:
            return done, settlements
        gathered = map(self._gather, finished(done) + settlements)
        return [], [settlement for settlement in gathered if settlement is not None]

    def close(self, partitions: Collection[int] | None = None) -> None:
        """Settle runs of these partitions, or all, of which nothing runs and nothing will: what has not ended is left."""
        for run in self._of(partitions):
            self._finish(run)

    def lose(self, lost: frozenset[Position]) -> frozenset[Position]:
        """Forget runs that are not ours any more; with the positions of their events, which lanes may have."""
        runs = [run for position, run in self._open.items() if position in lost and not run.closing]
        for run in runs:
            run.lost = True
            self._finish(run)
        self._dropped(len(runs))
        return lost.union(run.part(part).position for run in runs for part in run.apart)

    def claimed(self, claims: Iterable[Claim]) -> list[Position]:
        """Where they lie for the broker: events of runs where their packs do."""
        return list(dict.fromkeys(self._pack_of(claim.position)[0] for claim in claims))

    def is_event(self, claim: Claim) -> bool:
        """True for an event of a run."""
        return self._pack_of(claim.position)[1] is not None

    def _of(self, partitions: Collection[int] | None) -> list[Run]:
        runs = [run for run in self._open.values() if not run.closing]
        return [run for run in runs if partitions is None or run.claim.position.partition in partitions]

    def _finish(self, run: Run) -> None:
        """Close a run when what its lanes have ended so far has been gathered: behind that, in the settler's queue."""
        run.closing = True
        if run.waits:  # not any more: whoever took its claim out of the queue has counted it as gone
            run.waits = False
            self._ahead.held += 1
        self._settle(Settlement(run.claim.position, _CLOSED))

    def _gather(self, settlement: Settlement) -> Settlement | None:
        if settlement.outcome is _CLOSED:
            return self._closed(settlement.position)
        position, part = self._pack_of(settlement.position)
        if part is None:
            return settlement
        self._ahead.held -= 1
        run = self._open[position]
        run.end(part, settlement.outcome, settlement.outputs)
        return self._over(run) if run.is_over else None

    def _closed(self, position: Position) -> Settlement | None:
        run = self._open.get(position)
        if run is None or not run.closing:
            return None  # of a run that was lost, and its pack came again
        run.close()
        settlement = self._over(run)
        if run.lost:
            return None
        if run.is_untouched:
            self._dropped(1)
            return None
        return settlement

    def _over(self, run: Run) -> Settlement:
        del self._open[run.claim.position]
        run.closing = True
        return run.settlement()

    def _pack_of(self, position: Position) -> tuple[Position, int | None]:
        """Where the pack of an event lies that has not ended, and which of its events it is; else the same, and None."""
        if self._open:
            offset, part = packs.part_of(position.offset)
            pack = Position(position.partition, offset)
            if part is not None and (run := self._open.get(pack)) is not None and part in run.apart:
                return pack, part
        return position, None

    def _dead(self, claim: Claim, error: str) -> Dead:
        position, attempt = claim.position, claim.attempt
        reason = "undecodable"
        self._telemetry.emit(
            DEAD, group=self._group, position=position, attempt=attempt, reason=reason, error=error, exception=None
        )
        return Dead(reason, error)


async def until_readable(
    broker: Broker, stream: str, page: Sequence[Stored], who: str, clock: Clock, telemetry: Telemetry
) -> None:
    """Wait, and say so, until the libraries are installed and the dictionaries are known that the packs of a page need."""
    while True:
        try:
            lacking: MillstreamError | None = await readable(broker, stream, page)
        except BrokerError as error:
            if not error.retryable:
                raise
            lacking = error
        if lacking is None:
            return
        telemetry.emit(BROKER_ERROR, group=who, doing="read packs", error=lacking)
        telemetry.complain(who, clock.monotonic(), "group %s waits: %s", who, lacking)
        await clock.sleep(_PAUSE_S)


def _event(claim: Claim) -> Claim:
    """A claim of a pack of one as that of its event; any other, and one that cannot be read, as it is."""
    if not packs.is_one(claim.record):
        return claim
    try:
        return replace(claim, record=packs.read(claim.record, claim.position.offset).record(0))
    except WireError:
        return claim


def _sooner(one: Later, other: Later) -> Later:
    """Both: at the earlier time, and counted if one is."""
    return Later(min(one.at_ms, other.at_ms), one.error or other.error, one.counted or other.counted)
