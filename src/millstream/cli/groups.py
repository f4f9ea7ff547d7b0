"""`group ls`, `group show`, `group adopt`, `group seek`, `group forget`."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from millstream.brokers.base import Broker, GroupInfo, PendingInfo, Start
from millstream.brokers.ledger import HELD_MS
from millstream.cli import place, show, target
from millstream.cli.main import Given, Group, Mistake, Refused
from millstream.cli.show import Column, Output
from millstream.units import check_name

_MAX_PENDING = 10  # the oldest of each partition: they show what everything else waits for

COLUMNS = (
    Column("GROUP", "name", elastic=True),
    Column("APP", "owner"),
    Column("LIVE", "consumers", show.count),
    Column("LAG", "lag", show.count),
    Column("PENDING", "pending", show.count),
    Column("WAITING", "scheduled", show.count),
    Column("DEAD", "dead", show.count),
    Column("DONE", "done", show.count),
    Column("LOST", "lost", show.some, rare=True),
)
_LINES = (
    Column("group", "name"),
    Column("app", "owner"),
    Column("live consumers", "consumers", show.count),
    Column("lag", "lag", show.count),
    Column("pending", "pending", show.count),
    Column("of these waiting", "scheduled", show.count),
    Column("done", "done", show.count),
    Column("retried", "retried", show.count),
    Column("dead letters", "dead", show.count),
    Column("replayed", "replayed", show.count),
    Column("dropped", "dropped", show.count),
    Column("lost", "lost", show.count),
    Column("last seen", "seen_ms", show.moment),
)
_PENDING = (
    Column("PENDING", "position"),
    Column("ATTEMPT", "attempt", show.count),
    Column("NEXT TRY", "due_ms", show.lately),
    Column("CONSUMER", "consumer", elastic=True),
)


@click.group(cls=Group)
def group() -> None:
    """List groups; show, adopt, move or forget one."""


@group.command()
@show.output_option
@click.pass_obj
def ls(given: Given, output: Output) -> None:
    """List the groups of all streams, and how far they are."""
    target.run(lambda: _list(given, output))


@group.command("show")
@click.argument("name", metavar="GROUP")
@show.output_option
@click.pass_obj
def show_(given: Given, name: str, output: Output) -> None:
    """Show a group, and its oldest events that are not settled.

    GROUP is `billing`, or `orders/billing` where two streams have it.
    """
    target.run(lambda: _show(given, name, output))


@group.command()
@click.argument("name", metavar="GROUP")
@click.option("--owner", metavar="APP", help="The app to own it; without this, the one of --app.")
@click.option("--plan", is_flag=True, help="Show what would be done, and stop.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def adopt(given: Given, name: str, owner: str | None, plan: bool, yes: bool) -> None:
    """Make another app the owner of a group; the group keeps its place.

    A group belongs to one app, so that two apps cannot take events from each other by using one name. Adopt a group after
    its app was renamed, or its handlers moved.
    """
    target.run(lambda: _adopt(given, name, owner, plan, yes))


@group.command()
@click.argument("name", metavar="GROUP")
@click.option(
    "--to",
    "start",
    metavar="PLACE",
    required=True,
    callback=place.place,
    help="beginning, now, or a TIME: 5m (ago), 2026-08-01T12:00Z or today.",
)
@click.option("--live", is_flag=True, help="Also while the group runs: its consumers lose what they hold.")
@click.option("--plan", is_flag=True, help="Show what would be done, and stop.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def seek(given: Given, name: str, start: Start, live: bool, plan: bool, yes: bool) -> None:
    """Move a group to another place of its stream.

    Back, and it sees events again; forward, and it skips events. Other groups notice nothing, and dead letters stay.
    """
    target.run(lambda: _seek(given, name, start, live, plan, yes))


@group.command()
@click.argument("name", metavar="GROUP")
@click.option("--plan", is_flag=True, help="Show what would be done, and stop.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def forget(given: Given, name: str, plan: bool, yes: bool) -> None:
    """Delete a group: its place, what waits in it, its dead letters.

    The events stay in the stream. A group of this name that is used later begins anew.
    """
    target.run(lambda: _forget(given, name, plan, yes))


async def _list(given: Given, output: Output) -> None:
    async with target.find(given).opened() as broker:
        infos = await target.all_groups(broker)
    show.rows([fields(info) for info in infos], COLUMNS, output)
    if not infos:
        show.note("There are no groups yet: `millstream run` makes those that handlers name.")


async def _show(given: Given, name: str, output: Output) -> None:
    async with target.find(given).opened() as broker:
        info = await target.find_group(broker, name)
        pending = await broker.admin.pending(info.stream, info.group, _MAX_PENDING)
    found = fields(info)
    waiting = [_pending_fields(event) for event in pending]
    if output != "table":
        found["oldest_pending"] = waiting
    show.one(found, _LINES, output)
    if output == "table" and waiting:
        click.echo()
        show.rows(waiting, _PENDING, output)


async def _adopt(given: Given, name: str, owner: str | None, plan: bool, yes: bool) -> None:
    meant = target.find(given)
    new = owner or (meant.app.name if meant.app else "")
    if not new:
        raise Mistake("Adopted by which app? Give --owner NAME or --app.")
    check_name("app", new)
    async with meant.opened() as broker:
        info = await target.find_group(broker, name)
        await _change_owner(broker, info, new, plan, yes)


async def _change_owner(broker: Broker, info: GroupInfo, new: str, plan: bool, yes: bool) -> None:
    named = f"{info.stream}/{info.group}"
    if info.owner == new:
        show.note(f"{named} belongs to {new} already")
        return
    left = "an unknown number of events" if info.lag is None else show.many(info.lag + info.pending, "event")
    show.note(f"plan: {named} changes from app {info.owner or '-'} to {new}, with {left} that are not settled")
    if info.consumers:
        show.note(f"{place.running(info)}, and will until stopped")
    if plan:
        return
    show.confirm(f"Give {named} to {new}?", yes=yes)
    await broker.admin.adopt(info.stream, info.group, new)
    click.echo(f"{named} belongs to {new} now")


async def _seek(given: Given, name: str, start: Start, live: bool, plan: bool, yes: bool) -> None:
    async with target.find(given).opened() as broker:
        info = await target.find_group(broker, name)
        named = f"{info.stream}/{info.group}"
        behind = await place.behind(broker, info.stream, start)
        show.note(f"plan: {named} goes to {place.words(start)}; behind it lie {behind}")
        await _tell_unsettled(broker, info)
        place.tell_consumers(info)
        if plan:
            return
        place.check_alone(info, live)
        show.confirm(f"Move {named} to {place.words(start)}?", yes=yes)
        await broker.admin.seek(info.stream, info.group, start, live=live)
    click.echo(f"{named} goes on from {place.words(start)}")


async def _tell_unsettled(broker: Broker, info: GroupInfo) -> None:
    """Say what may be skipped."""
    if info.lag != 0:
        lag = "an unknown number of events" if info.lag is None else show.many(info.lag, "event")
        show.note(f"{lag} it has not been given yet; those before that place it never will be")
    if info.pending and await broker.admin.keys(info.stream, info.group, 1):
        show.note(f"{show.many(info.pending, 'waiting event')} of keys; those before that place stay")
    elif info.pending:
        show.note(f"{show.many(info.pending, 'pending event')} will be forgotten; those behind that place come again")


async def _forget(given: Given, name: str, plan: bool, yes: bool) -> None:
    async with target.find(given).opened() as broker:
        info = await target.find_group(broker, name)
        named = f"{info.stream}/{info.group}"
        lag = "an unknown number of events" if info.lag is None else show.many(info.lag, "event")
        show.note(
            f"plan: forget {named} of app {info.owner or '-'}, with {show.many(info.dead, 'dead letter')}, "
            f"{show.many(info.pending, 'pending event')}, and its place, {lag} before the end"
        )
        place.tell_consumers(info)
        if plan:
            return
        if info.consumers:
            raise Refused(f"{named} runs: stop its consumers first, or they would make it again")
        show.confirm(f"Forget {named} for ever?", yes=yes)
        await broker.admin.forget(info.stream, info.group)
    click.echo(f"{named} is forgotten")


def fields(info: GroupInfo) -> dict[str, Any]:
    """A group's fields, and the name by which commands know it."""
    return {"name": f"{info.stream}/{info.group}", **msgspec.structs.asdict(info)}


def _pending_fields(event: PendingInfo) -> dict[str, Any]:
    due_ms = None if event.due_ms is None or event.due_ms >= HELD_MS else event.due_ms
    return {**msgspec.structs.asdict(event), "position": str(event.position), "due_ms": due_ms}
