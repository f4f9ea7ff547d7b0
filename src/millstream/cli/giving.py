"""Giving a group chosen events of its stream once more: page by page, at a chosen rate, to be cut short at any moment.

They lie between two places of each partition, and go partition by partition, so one position says how far it came. Both
places are found by when events were stored, which never goes back within a partition: the same command finds them again.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import click

from millstream.brokers.base import Broker, GroupInfo, Position, Stored, StreamInfo
from millstream.brokers.urls import mask
from millstream.brokers.window import after
from millstream.cli import place, show, target
from millstream.cli.main import DONE, INTERRUPTED, Given, Mistake
from millstream.clock import Clock
from millstream.wire.packs import events_in, is_one, is_pack

PAGE = 100  # events that are read, and given, at once
MAX_PENDING = 10_000  # of the group: past it, what is given would only lie there, in the way of what fails
LOOK_EVERY = 1_000  # events given between two looks at what is pending
LOOK_S = 1.0  # between two looks while nothing is given


class Wish(NamedTuple):
    """Which events are meant, for whom, and how fast."""

    stream: str
    group: str
    since_ms: int
    until_ms: int | None
    """The last moment that is meant; None: now."""
    rate: float | None
    behind: Position | None
    """How far an earlier command came: only what lies behind it in its partition, and the partitions after that."""


class Giving:
    """First shown and counted, then done. Whatever ends it, it says with which command to go on."""

    def __init__(self, given: Given, wish: Wish, plan: bool, yes: bool) -> None:
        self._given = given
        self._wish = wish
        self._plan = plan
        self._yes = yes
        self._at = wish.behind
        self._seen = 0
        self._count = 0
        self._doubt = ""
        self._next_s = 0.0
        self._until_look = 0
        self._told = False

    async def run(self) -> int:
        """The exit code."""
        meant = target.find(self._given)
        async with meant.opened() as broker:
            stream = await target.find_stream(broker, self._wish.stream, meant)
            group = await place.group_of(broker, self._wish.stream, self._wish.group)
            self._settle_wish(stream, group, meant.clock)
            try:
                return await self._run(broker, group, meant.clock)
            except click.ClickException:
                raise
            except BaseException:
                show.note(f"gave {show.many(self._count, 'event')}; {self._how_to_go_on()}")
                raise

    def _settle_wish(self, stream: StreamInfo, group: GroupInfo, clock: Clock) -> None:
        """From now on the wish means the same at any time. Raises `Mistake` for what cannot be meant."""
        wish = self._wish
        since_ms, until_ms = max(wish.since_ms, 0), wish.until_ms
        if until_ms is None:
            until_ms = max(clock.now_ms(), stream.last_ms or 0)  # the broker's clock may be ahead of ours
        if until_ms < since_ms:
            raise Mistake(f"The end, {show.moment(until_ms)}, lies before --since, {show.moment(since_ms)}.")
        if wish.behind is not None and wish.behind.partition >= stream.spec.partitions:
            count = show.many(stream.spec.partitions, "partition")
            raise Mistake(f"--from {wish.behind}: stream {wish.stream!r} has {count}, counted from 0.")
        self._wish = wish._replace(group=f"{group.stream}/{group.group}", since_ms=since_ms, until_ms=until_ms)

    async def _run(self, broker: Broker, group: GroupInfo, clock: Clock) -> int:
        begins, ends = await self._places(broker)
        events = await place.between(broker, self._wish.stream, begins, ends)
        total, name = events.events, self._wish.group
        pace = f", at most {self._wish.rate:.15g} a second" if self._wish.rate else ""
        show.note(f"plan: {name} is given {events} once more{pace}; not those that it has not settled yet")
        place.tell_consumers(group)
        if self._plan or not total:
            return DONE
        show.confirm(f"Give them to {name}?", yes=self._yes)
        interrupt = target.Interrupt()
        progress = show.Progress("giving", "event", clock, total if events.complete else None)
        with interrupt.caught(), progress:
            cut = await self._give(broker, begins, ends, _Pace(clock, interrupt.asked, progress))
        click.echo(f"gave {show.many(self._count, 'event')} to {name}")
        if self._seen > self._count:
            show.note(f"{self._seen - self._count:,} were left out: not settled yet, so they come anyway; or gone")
        if cut:
            show.note(self._how_to_go_on())
        return INTERRUPTED if cut else DONE

    async def _places(self, broker: Broker) -> tuple[Mapping[int, Position | None], Mapping[int, Position | None]]:
        """Of each partition that is meant, behind which place its events begin, and with which they end."""
        wish = self._wish
        assert wish.until_ms is not None
        begins = dict(await broker.locate(wish.stream, wish.since_ms))
        ends = await broker.locate(wish.stream, wish.until_ms + 1)
        if wish.behind is not None:
            partition, offset = wish.behind.partition, wish.behind.offset
            begin = begins[partition]
            if begin is None or after(offset, begin.offset):
                begins[partition] = wish.behind
            begins = {number: begin for number, begin in begins.items() if number >= partition}
        return begins, ends

    async def _give(
        self, broker: Broker, begins: Mapping[int, Position | None], ends: Mapping[int, Position | None], pace: _Pace
    ) -> bool:
        """True when it was cut short."""
        wish = self._wish
        most = PAGE if not wish.rate else max(1, min(PAGE, int(wish.rate)))
        for partition, begin in begins.items():
            at = begin
            while page := await place.page(broker, wish.stream, partition, at, ends[partition], most):
                for piece in _pieces(page):
                    await self._wait(broker, pace)
                    if pace.asked.is_set():
                        return True
                    await self._give_piece(broker, piece, pace)
                at = page[-1].position
        return False

    async def _give_piece(self, broker: Broker, piece: Sequence[Stored], pace: _Pace) -> None:
        wish, events = self._wish, sum(events_in(stored.record) for stored in piece)
        self._doubt = "; some events behind that place may have been given already"
        given = await broker.admin.give(wish.stream, _bare(wish.group), piece)
        self._doubt = ""
        self._count += events if given == len(piece) else given
        self._seen += events
        self._until_look -= events
        if wish.rate:
            self._next_s = max(self._next_s, pace.clock.monotonic()) + events / wish.rate
        self._at = piece[-1].position
        pace.progress.show(self._seen)

    async def _wait(self, broker: Broker, pace: _Pace) -> None:
        """Until the rate and the group allow the next page, or somebody wants it to stop."""
        await pace.wait(self._next_s - pace.clock.monotonic())
        if self._until_look > 0:
            return
        self._until_look = LOOK_EVERY
        while (pending := await self._pending(broker)) > MAX_PENDING and not pace.asked.is_set():
            if not self._told:
                self._told = True
                show.note(f"{self._wish.group} has {show.many(pending, 'pending event')}: waiting until it has fewer")
            await pace.wait(LOOK_S)

    async def _pending(self, broker: Broker) -> int:
        infos = await broker.admin.groups(self._wish.stream)
        return sum(info.pending for info in infos if info.group == _bare(self._wish.group))

    def _how_to_go_on(self) -> str:
        return f"stopped{self._doubt}; go on with: {shlex.join(self._command())}"

    def _command(self) -> list[str]:
        wish, given = self._wish, self._given
        assert wish.until_ms is not None
        words = ["millstream", "replay", wish.stream, "--to-group", wish.group]
        words += ["--since", show.iso(wish.since_ms), "--until", show.iso(wish.until_ms)]
        words += ["--rate", f"{wish.rate:.15g}"] if wish.rate else []
        words += ["--from", str(self._at)] if self._at else []
        words += ["--app", given.app] if given.app else []
        words += ["--broker", mask(given.broker)] if given.broker else []
        words += ["--factory"] if given.factory else []
        return words + (["--yes"] if self._yes else [])


class _Pace(NamedTuple):
    """What giving waits for, and where it shows how far it is."""

    clock: Clock
    asked: asyncio.Event
    progress: show.Progress

    async def wait(self, seconds: float) -> None:
        if seconds > 0:
            await self.clock.wait(self.asked, seconds)


def _pieces(page: Sequence[Stored]) -> Iterator[Sequence[Stored]]:
    """What is given in one step: each pack by itself, so that its events are counted or left out together."""
    for pack, stored in groupby(page, lambda stored: is_pack(stored.record) and not is_one(stored.record)):
        piece = list(stored)
        yield from ([one] for one in piece) if pack else [piece]


def _bare(name: str) -> str:
    return name.partition("/")[2]
