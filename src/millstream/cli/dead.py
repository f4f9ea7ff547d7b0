"""`dead ls`, `dead show`, `dead replay`, `dead drop`."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from msgspec.structs import replace

from millstream.brokers.base import Broker, DeadLetter, GroupInfo, Stored
from millstream.cli import show, target
from millstream.cli.main import DONE, INTERRUPTED, PART, Command, Given, Group, Mistake
from millstream.cli.show import Column, Output
from millstream.clock import Clock
from millstream.publisher import opened

PAGE = 100  # letters asked for, and acted on, at once: each carries its whole event
MAX_NAMED = 20  # ids of letters that one message names

_COLUMNS = (
    Column("DIED", "died_ms", show.lately),
    Column("GROUP", "name"),
    Column("POSITION", "position"),
    Column("TYPE", "type", spare=True),
    Column("REASON", "reason"),
    Column("TRIES", "attempts", show.count, spare=True),
    Column("ERROR", "error", lambda error: show.text(error.rstrip().rpartition("\n")[2]), elastic=True),
)
_LINES = (
    Column("group", "name"),
    Column("position", "position"),
    Column("id", "id"),
    Column("type", "type"),
    Column("key", "key"),
    Column("source", "source"),
    Column("published", "time", show.local),
    Column("died", "died_ms", show.moment),
    Column("reason", "reason"),
    Column("attempts", "attempts", show.count),
)
_PLAN = (Column("GROUP", "name"), Column("REASON", "reason"), Column("DEAD LETTERS", "letters", show.count))


@dataclass
class Wanted:
    """Which dead letters are meant, and which of the ids were found."""

    groups: Sequence[GroupInfo]
    ids: frozenset[str]
    type: str | None
    reason: str | None
    since_ms: int | None
    found: set[str] = field(default_factory=set)

    def matches(self, letter: DeadLetter) -> bool:
        """Every filter that was given holds."""
        names = {letter.stored.record.id, str(letter.stored.position)} & self.ids
        self.found |= names
        return (
            (bool(names) or not self.ids)
            and self.type in (None, letter.stored.record.type)
            and self.reason in (None, letter.reason)
            and (self.since_ms is None or letter.died_ms >= self.since_ms)
        )


@dataclass(frozen=True)
class Filters:
    """What the options say; the groups are looked up once the broker is open."""

    ids: tuple[str, ...] = ()
    group: str | None = None
    type: str | None = None
    reason: str | None = None
    since: int | None = None

    async def wanted(self, broker: Broker) -> Wanted:
        """Raises `Mistake` for an unknown group."""
        found = await target.find_groups(broker, self.group)
        return Wanted(found, frozenset(self.ids), self.type, self.reason, self.since)


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--since", metavar="TIME", callback=target.moment, help="Died since: 5m (ago), 2026-08-01T12:00Z or today."
        ),
        click.option("--reason", metavar="WORDS", help="As `dead ls` shows it: failed, rejected, …"),
        click.option("--type", metavar="TYPE", help="Type of the event, as in order.placed."),
        click.option("--group", metavar="GROUP", help="As in billing, or orders/billing."),
    ):
        command = option(command)
    return command


def _changes(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--yes", is_flag=True, help="Do not ask."),
        click.option("--plan", is_flag=True, help="Show what would be done, and stop."),
        click.option("--rate", type=click.FloatRange(min=0, min_open=True), metavar="N", help="At most N a second."),
    ):
        command = option(command)
    return _filters(command)


@click.group(cls=Group)
def dead() -> None:
    """Dead letters: list, show, replay, drop.

    A dead letter is an event that was given up for one group. It is kept, with the reason, until somebody replays it or
    drops it.
    """


@dead.command()
@_filters
@click.option(
    "--limit", type=click.IntRange(min=0), metavar="N", default=100, show_default=True, help="At most so many; 0: all."
)
@show.output_option
@click.pass_obj
def ls(given: Given, /, limit: int, output: Output, **filters: Any) -> None:
    """List dead letters, the oldest of each group first."""
    target.run(lambda: _list(given, Filters(**filters), limit, output))


@dead.command("show")
@click.argument("identity", metavar="ID")
@click.option("--group", metavar="GROUP", help="Where several groups gave the event up: as in billing.")
@show.output_option
@click.pass_obj
def show_(given: Given, identity: str, group: str | None, output: Output) -> None:
    """Show a dead letter: the whole event, and the error.

    ID is an event's id, or a position, as in 3@1693-0.
    """
    target.run(lambda: _show(given, Filters((identity,), group), output))


@dead.command(cls=Command)
@click.argument("ids", nargs=-1, metavar="[ID]…")
@_changes
@click.pass_obj
def replay(given: Given, /, ids: tuple[str, ...], rate: float | None, plan: bool, yes: bool, **filters: Any) -> int:
    """Give dead letters back to their groups, which handle them anew.

    Those with these ids or positions, else all that the options choose. Shows how many before it asks.
    """
    return target.run(lambda: _Change(given, Filters(ids, **filters), "replay", rate, plan, yes).run())


@dead.command(cls=Command)
@click.argument("ids", nargs=-1, metavar="[ID]…")
@_changes
@click.pass_obj
def drop(given: Given, /, ids: tuple[str, ...], rate: float | None, plan: bool, yes: bool, **filters: Any) -> int:
    """Discard dead letters for ever.

    Those with these ids or positions, else all that the options choose. Shows how many before it asks.
    """
    return target.run(lambda: _Change(given, Filters(ids, **filters), "drop", rate, plan, yes).run())


async def _list(given: Given, filters: Filters, limit: int, output: Output) -> None:
    found: list[dict[str, Any]] = []
    more = False
    async with target.find(given).opened() as broker:
        async for letter in _letters(broker, await filters.wanted(broker)):
            more = bool(limit) and len(found) == limit
            if more:
                break
            found.append(_summary(letter))
    show.rows(found, _COLUMNS, output)
    if more:
        show.note(f"there are more than these {limit:,}: --limit 0 shows all, the options choose")
    elif not found:
        show.note("no dead letters")


async def _show(given: Given, filters: Filters, output: Output) -> None:
    async with target.find(given).opened() as broker:
        found = [letter async for letter in _letters(broker, await filters.wanted(broker))]
    if not found:
        raise Mistake(f"There is no dead letter with the id or position {filters.ids[0]!r}.")
    if len(found) > 1:
        names = " or ".join(sorted({_name(letter) for letter in found}))
        raise Mistake(f"Several groups gave {filters.ids[0]!r} up: say --group {names}.")
    letter = found[0]
    event = show.event(letter.stored) | _summary(letter)
    show.one(event, _LINES, output)
    if output == "table":
        show.block("headers", event["headers"])
        show.block("data", event.get("data", event.get("fault")))
        show.block("error", letter.error)


class _Change:
    """Replaying or dropping: first shown and counted, then done page by page, to be cut short at any moment."""

    def __init__(self, given: Given, filters: Filters, verb: str, rate: float | None, plan: bool, yes: bool) -> None:
        self._given = given
        self._filters = filters
        self._verb = verb
        self._rate = rate
        self._plan = plan
        self._yes = yes
        self._done = 0
        self._gone: list[str] = []

    async def run(self) -> int:
        """The exit code."""
        meant = target.find(self._given)
        async with meant.opened() as broker:
            wanted = await self._filters.wanted(broker)
            planned = await self._planned(broker, wanted)
            unknown = sorted(wanted.ids - wanted.found)
            if unknown:
                show.note(f"no dead letter has the id or position {_named(unknown)}")
            total = sum(planned.values())
            if self._plan or not total:
                return PART if unknown else DONE
            show.confirm(f"{self._verb.capitalize()} {show.many(total, 'dead letter')}?", yes=self._yes)
            act = broker.admin.replay if self._verb == "replay" else broker.admin.drop
            cut = await self._carry_out(broker, wanted, planned, act, meant.clock)
        click.echo(f"{self._past} {show.many(self._done, 'dead letter')}")
        if self._gone:
            show.note(f"{len(self._gone):,} could not be: the letter or its event is gone: {_named(self._gone)}")
        if cut:
            return INTERRUPTED
        return PART if self._gone or unknown else DONE

    @property
    def _past(self) -> str:
        return "replayed" if self._verb == "replay" else "dropped"

    async def _planned(self, broker: Broker, wanted: Wanted) -> Counter[tuple[str, str]]:
        """How many letters of each group are meant, after telling so."""
        reasons: Counter[tuple[str, str]] = Counter()
        letters: Counter[tuple[str, str]] = Counter()
        async for letter in _letters(broker, wanted):
            reasons[_name(letter), letter.reason] += 1
            letters[letter.stream, letter.group] += 1
        lines = [{"name": name, "reason": reason, "letters": n} for (name, reason), n in sorted(reasons.items())]
        show.note(f"plan: {self._verb} {show.many(letters.total(), 'dead letter')}")
        show.rows(lines, _PLAN, "table", err=True)
        return letters

    async def _carry_out(
        self,
        broker: Broker,
        wanted: Wanted,
        left: Counter[tuple[str, str]],
        act: Callable[[Sequence[DeadLetter]], Awaitable[list[bool]]],
        clock: Clock,
    ) -> bool:
        """Act on what was planned; True when it was cut short."""
        interrupt, total = target.Interrupt(), left.total()
        begun_s = clock.monotonic()
        try:
            with interrupt.caught(), show.Progress(f"{self._verb}ing", "letter", clock, total) as progress:
                async for page in _pages(broker, wanted, left, self._page):
                    if self._rate:
                        due_s = begun_s + (self._done + len(self._gone)) / self._rate
                        await clock.wait(interrupt.asked, max(due_s - clock.monotonic(), 0))
                    if interrupt.asked.is_set():
                        break
                    answers = await act(page)
                    self._done += sum(answers)
                    self._gone += [letter.stored.record.id for letter, ok in zip(page, answers, strict=True) if not ok]
                    progress.show(self._done)
        finally:
            untouched = total - self._done - len(self._gone)
            if untouched:
                show.note(f"{self._past} {self._done:,} of {total:,}; go on with the same command")
        return interrupt.asked.is_set() and untouched > 0

    @property
    def _page(self) -> int:
        return PAGE if not self._rate else max(1, min(PAGE, int(self._rate)))


async def _letters(broker: Broker, wanted: Wanted) -> AsyncIterator[DeadLetter]:
    """The letters that are wanted, group by group."""
    for group in wanted.groups:
        after = ""
        while page := await broker.admin.dead(group.stream, group.group, after, PAGE):
            events = await opened(broker, group.stream, [letter.stored for letter in page])
            for letter in map(_with, page, events):
                if wanted.matches(letter):
                    yield letter
            after = page[-1].ref


def _with(letter: DeadLetter, event: Stored) -> DeadLetter:
    return replace(letter, stored=event)


async def _pages(
    broker: Broker, wanted: Wanted, left: Counter[tuple[str, str]], most: int
) -> AsyncIterator[list[DeadLetter]]:
    """As many letters of each group as were planned: what fails again meanwhile dies again, and must not be taken again."""
    page: list[DeadLetter] = []
    remaining = Counter(left)
    async for letter in _letters(broker, wanted):
        if not remaining[letter.stream, letter.group]:
            continue
        remaining[letter.stream, letter.group] -= 1
        page.append(letter)
        if len(page) == most:
            yield page
            page = []
        if not remaining.total():
            break
    if page:
        yield page


def _summary(letter: DeadLetter) -> dict[str, Any]:
    record = letter.stored.record
    return {
        "name": _name(letter),
        "stream": letter.stream,
        "group": letter.group,
        "position": str(letter.stored.position),
        "id": record.id,
        "type": record.type,
        "key": record.key,
        "time": show.iso(record.time_ms) if record.time_ms else None,
        "reason": letter.reason,
        "error": letter.error,
        "attempts": letter.attempts,
        "died_ms": letter.died_ms,
    }


def _name(letter: DeadLetter) -> str:
    return f"{letter.stream}/{letter.group}"


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - MAX_NAMED:,} more" if len(ids) > MAX_NAMED else ""
    return ", ".join(ids[:MAX_NAMED]) + more
