"""`key ls`, `key show`, `key release`, `key drop`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any, Literal

import click
import msgspec

from millstream.brokers.base import Admin, Broker, GroupInfo, ParkedKey
from millstream.brokers.urls import mask
from millstream.cli import show, target
from millstream.cli.main import DONE, INTERRUPTED, PART, Command, Given, Group, Mistake
from millstream.cli.show import Column, Output
from millstream.clock import Clock
from millstream.publisher import opened
from millstream.units import MAX_PARKED

PAGE = 100  # keys acted on at once
MAX_SHOWN = 20  # keys that a plan names
_MAX_EVENTS = 100  # of a key, that are shown


def _due(due_ms: int | None) -> str:
    return "held" if due_ms is None else show.lately(due_ms) if due_ms else "at once"


_COLUMNS = (
    Column("SINCE", "since_ms", show.lately),
    Column("KEY", "key"),
    Column("EVENTS", "events", show.count),
    Column("TRIES", "attempts", show.count, spare=True),
    Column("NEXT TRY", "due_ms", _due),
    Column("ERROR", "error", lambda error: show.text(error.rstrip().rpartition("\n")[2]), elastic=True),
)
_LINES = (
    Column("group", "name"),
    Column("key", "key"),
    Column("partition", "partition"),
    Column("events", "events", show.count),
    Column("first", "first"),
    Column("waits since", "since_ms", show.moment),
    Column("attempts", "attempts", show.count),
    Column("next try", "due_ms", _due),
)
_EVENTS = (
    Column("POSITION", "position"),
    Column("TYPE", "type"),
    Column("PUBLISHED", "time", show.local),
    Column("ID", "id", elastic=True),
)


def _changes(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--yes", is_flag=True, help="Do not ask."),
        click.option("--plan", is_flag=True, help="Show what would be done, and stop."),
    ):
        command = option(command)
    return command


@click.group(cls=Group)
def key() -> None:
    """Keys that wait: list, show, release, drop.

    In a group that keeps the order of keys, an event that failed makes the later ones of its key wait, until it is tried
    again, or until somebody releases the key. An event without a key goes by its position, as in 3@1693-0.
    """


@key.command()
@click.argument("group", metavar="GROUP")
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", default=100, show_default=True, help="At most so many."
)
@show.output_option
@click.pass_obj
def ls(given: Given, group: str, limit: int, output: Output) -> None:
    """List the keys of a group that wait, the longest waiting first."""
    target.run(lambda: _list(given, group, limit, output))


@key.command("show")
@click.argument("group", metavar="GROUP")
@click.argument("name", metavar="KEY")
@show.output_option
@click.pass_obj
def show_(given: Given, group: str, name: str, output: Output) -> None:
    """Show a key that waits: its first events, and the error."""
    target.run(lambda: _show(given, group, name, output))


@key.command(cls=Command)
@click.argument("group", metavar="GROUP")
@click.argument("names", nargs=-1, metavar="[KEY]…")
@click.option("--all", "every", is_flag=True, help="All keys of the group that wait.")
@_changes
@click.pass_obj
def release(given: Given, group: str, names: tuple[str, ...], every: bool, plan: bool, yes: bool) -> int:
    """Let keys go on at once.

    The first event of each is tried again, with its attempts counted anew, then those behind it.
    """
    if every == bool(names):
        raise Mistake("Which keys? Name them, or say --all.")
    return target.run(lambda: _Changing(given, "release", names, plan, yes).run(group))


@key.command(cls=Command)
@click.argument("group", metavar="GROUP")
@click.argument("names", nargs=-1, required=True, metavar="KEY…")
@_changes
@click.pass_obj
def drop(given: Given, group: str, names: tuple[str, ...], plan: bool, yes: bool) -> int:
    """Discard all that waits of these keys, for ever.

    The events stay in the stream, but the group has done with them. Later events of these keys are handled again.
    """
    return target.run(lambda: _Changing(given, "drop", names, plan, yes).run(group))


async def _list(given: Given, group: str, limit: int, output: Output) -> None:
    async with target.find(given).opened() as broker:
        info = await target.find_group(broker, group)
        found = await broker.admin.keys(info.stream, info.group, limit + 1)
    show.rows([_fields(key) for key in found[:limit]], _COLUMNS, output)
    if len(found) > limit:
        show.note(f"there are more than these {limit:,}: --limit shows more")
    elif not found:
        show.note(f"no key of {_named(info)} waits")


async def _show(given: Given, group: str, name: str, output: Output) -> None:
    async with target.find(given).opened() as broker:
        info = await target.find_group(broker, group)
        found = await _find(broker, info, (name,))
        if len(found) > 1:
            raise Mistake(f"Which {name!r}? Say {' or '.join(str(key.first) for key in found)}.")
        events = await opened(broker, info.stream, await broker.admin.parked(found[0], _MAX_EVENTS))
    fields = _fields(found[0])
    waiting = [show.event(stored) for stored in events]
    if output != "table":
        fields["waiting"] = waiting
    show.one(fields, _LINES, output)
    if output == "table":
        click.echo()
        show.rows(waiting, _EVENTS, output)
        show.block("error", found[0].error)
    if found[0].events > len(events):
        show.note(f"these are the first {len(events):,} of {found[0].events:,} events")


class _Changing:
    """Keys are released, or dropped: first shown, then done. Whatever ends it, it says with which command to go on."""

    def __init__(
        self, given: Given, verb: Literal["release", "drop"], names: Sequence[str], plan: bool, yes: bool
    ) -> None:
        self._given = given
        self._verb = verb
        self._names = names
        self._plan = plan
        self._yes = yes
        self._group = ""
        self._doubt = ""
        self._left: Sequence[ParkedKey] = ()
        self._keys = self._events = self._gone = 0

    async def run(self, group: str) -> int:
        """The exit code."""
        meant = target.find(self._given)
        async with meant.opened() as broker:
            info = await target.find_group(broker, group)
            self._group = _named(info)
            try:
                return await self._run(broker, info, meant.clock)
            except click.ClickException:
                raise
            except BaseException:
                show.note(f"{self._done()}; {self._how_to_go_on()}")
                raise

    async def _run(self, broker: Broker, info: GroupInfo, clock: Clock) -> int:
        keys = self._left = await _find(broker, info, self._names)
        self._tell_plan()
        if self._plan or not keys:
            return DONE
        count = show.many(len(keys), "key")
        drop = self._verb == "drop"
        show.confirm(f"Drop all that waits of {count}, for ever?" if drop else f"Release {count}?", yes=self._yes)
        interrupt = target.Interrupt()
        progress = show.Progress("dropping" if drop else "releasing", "key", clock, len(keys))
        with interrupt.caught(), progress:
            while self._left and not interrupt.asked.is_set():
                await self._change(broker.admin, self._left[:PAGE])
                self._left = self._left[PAGE:]
                progress.show(len(keys) - len(self._left))
        click.echo(self._done())
        if self._gone:
            show.note(f"{show.many(self._gone, 'key')} did not wait any more")
        if self._left:
            show.note(self._how_to_go_on())
            return INTERRUPTED
        return PART if self._gone else DONE

    def _tell_plan(self) -> None:
        keys = self._left
        events = show.many(sum(key.events for key in keys), "event")
        show.note(f"plan: {self._verb} {show.many(len(keys), 'key')} of {self._group}, with {events}")
        show.rows([_fields(key) for key in keys[:MAX_SHOWN]], _COLUMNS, "table", err=True)
        if len(keys) > MAX_SHOWN:
            show.note(f"and {len(keys) - MAX_SHOWN:,} more")

    async def _change(self, admin: Admin, page: Sequence[ParkedKey]) -> None:
        self._doubt = f"; some of the next {show.many(len(page), 'key')} may have been {self._past} already"
        counts: Sequence[int] = await (admin.drop_keys(page) if self._verb == "drop" else admin.release_keys(page))
        self._doubt = ""
        self._events += sum(counts)
        self._gone += counts.count(0)
        self._keys += len(counts) - counts.count(0)

    @property
    def _past(self) -> str:
        return "dropped" if self._verb == "drop" else "released"

    def _done(self) -> str:
        what = f"{show.many(self._events, 'event')} of " if self._verb == "drop" else ""
        return f"{self._past} {what}{show.many(self._keys, 'key')}"

    def _how_to_go_on(self) -> str:
        return f"stopped{self._doubt}; go on with: {shlex.join(self._command())}"

    def _command(self) -> list[str]:
        given = self._given
        words = ["millstream", "key", self._verb, self._group]
        words += ["--app", given.app] if given.app else []
        words += ["--broker", mask(given.broker)] if given.broker else []
        words += ["--factory"] if given.factory else []
        words += ["--yes"] if self._yes else []
        if not self._names:
            return [*words, "--all"]
        return [*words, "--", *([_word(key) for key in self._left] or self._names)]


async def _find(broker: Broker, info: GroupInfo, names: Sequence[str]) -> list[ParkedKey]:
    """The keys of these names; all without names. One whose name nothing waits under is a `Mistake`."""
    known = await broker.admin.keys(info.stream, info.group, MAX_PARKED)
    if not names:
        return known
    found: dict[ParkedKey, None] = {}
    for name in names:
        same = [key for key in known if key.key == name] or [key for key in known if str(key.first) == name]
        if not same:
            raise Mistake(
                f"Nothing waits under key {name!r} in {_named(info)}; `millstream key ls {_named(info)}` shows what does."
            )
        found |= dict.fromkeys(same)
    return list(found)


def _fields(key: ParkedKey) -> dict[str, Any]:
    """A key's fields, for people and machines."""
    fields = msgspec.structs.asdict(key)
    return {"name": f"{key.stream}/{key.group}", **fields, "key": _word(key), "first": str(key.first)}


def _word(key: ParkedKey) -> str:
    """What people call a key; one that only stands for an event without a key goes by its position."""
    return str(key.first) if key.key.startswith("\0") else key.key


def _named(info: GroupInfo) -> str:
    return f"{info.stream}/{info.group}"
