"""`key ls`, `key show`, `key release`, `key drop`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click
import msgspec

from millstream.brokers.base import Broker, GroupInfo, ParkedKey
from millstream.cli import show, target
from millstream.cli.main import DONE, PART, Command, Given, Group, Mistake
from millstream.cli.show import Column, Output
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
    return target.run(lambda: _release(given, group, names, plan, yes))


@key.command(cls=Command)
@click.argument("group", metavar="GROUP")
@click.argument("names", nargs=-1, required=True, metavar="KEY…")
@_changes
@click.pass_obj
def drop(given: Given, group: str, names: tuple[str, ...], plan: bool, yes: bool) -> int:
    """Discard all that waits of these keys, for ever.

    The events stay in the stream, but the group has done with them. Later events of these keys are handled again.
    """
    return target.run(lambda: _drop(given, group, names, plan, yes))


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
        events = await broker.admin.parked(found[0], _MAX_EVENTS)
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


async def _release(given: Given, group: str, names: Sequence[str], plan: bool, yes: bool) -> int:
    async with target.find(given).opened() as broker:
        keys = await _planned(broker, group, names, "release")
        if plan or not keys:
            return DONE
        show.confirm(f"Release {show.many(len(keys), 'key')}?", yes=yes)
        done = 0
        try:
            for page in _pages(keys):
                done += sum(await broker.admin.release_keys(page))
        finally:
            click.echo(f"released {show.many(done, 'key')}")
    return _judged(len(keys) - done)


async def _drop(given: Given, group: str, names: Sequence[str], plan: bool, yes: bool) -> int:
    async with target.find(given).opened() as broker:
        keys = await _planned(broker, group, names, "drop")
        if plan:
            return DONE
        show.confirm(f"Drop all that waits of {show.many(len(keys), 'key')}, for ever?", yes=yes)
        dropped: list[int] = []
        try:
            for page in _pages(keys):
                dropped += await broker.admin.drop_keys(page)
        finally:
            gone = dropped.count(0)
            click.echo(f"dropped {show.many(sum(dropped), 'event')} of {show.many(len(dropped) - gone, 'key')}")
    return _judged(gone)


async def _planned(broker: Broker, group: str, names: Sequence[str], verb: str) -> list[ParkedKey]:
    """The keys that are meant, all without names, after telling so."""
    info = await target.find_group(broker, group)
    keys = await _find(broker, info, names)
    events = sum(key.events for key in keys)
    show.note(f"plan: {verb} {show.many(len(keys), 'key')} of {_named(info)}, with {show.many(events, 'event')}")
    show.rows([_fields(key) for key in keys[:MAX_SHOWN]], _COLUMNS, "table", err=True)
    if len(keys) > MAX_SHOWN:
        show.note(f"and {len(keys) - MAX_SHOWN:,} more")
    return keys


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


def _pages(keys: Sequence[ParkedKey]) -> list[Sequence[ParkedKey]]:
    return [keys[start : start + PAGE] for start in range(0, len(keys), PAGE)]


def _judged(gone: int) -> int:
    """The exit code, after telling what could not be done."""
    if gone:
        show.note(f"{show.many(gone, 'key')} did not wait any more")
    return PART if gone else DONE


def _fields(key: ParkedKey) -> dict[str, Any]:
    """A key's fields; one that only stands for an event without a key goes by its position."""
    first = str(key.first)
    word = first if key.key.startswith("\0") else key.key
    return {"name": f"{key.stream}/{key.group}", **msgspec.structs.asdict(key), "key": word, "first": first}


def _named(info: GroupInfo) -> str:
    return f"{info.stream}/{info.group}"
