"""`replay`: history into one group."""

from __future__ import annotations

from typing import NoReturn

import click

from millstream.brokers.base import Broker, GroupInfo
from millstream.brokers.window import after
from millstream.cli import place, show, target
from millstream.cli.main import Command, Given, Mistake, Refused
from millstream.cli.place import Behind


def _refuse(context: click.Context, option: click.Parameter, value: str | None) -> None:
    if value is not None:
        _not_yet(option.opts[0])


def _not_yet(option: str) -> NoReturn:
    raise Mistake(
        f"{option} is not possible: a replay moves the group back, and from there it sees all events, as fast as it handles "
        f"them. Leave {option} out."
    )


@click.command(cls=Command)
@click.argument("stream", metavar="STREAM")
@click.option(
    "--since",
    metavar="TIME",
    required=True,
    callback=target.moment,
    help="From when on: 5m (ago), 2026-08-01T12:00Z or today.",
)
@click.option("--to-group", "group", metavar="GROUP", required=True, help="The group that is to see the events again.")
@click.option("--live", is_flag=True, help="Also while the group runs: its consumers lose what they hold.")
@click.option("--plan", is_flag=True, help="Show what would be done, and stop.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--until", hidden=True, expose_value=False, callback=_refuse)
@click.option("--rate", hidden=True, expose_value=False, callback=_refuse)
@click.pass_obj
def replay(given: Given, stream: str, since: int, group: str, live: bool, plan: bool, yes: bool) -> None:
    """Let one group see the events of a stream again, from a time on; other groups notice nothing.

    The group is moved back to that time, in one step, and its handlers see the events when they run. It is refused where
    the group has not come that far yet, since it would skip events. Dead letters stay.
    """
    target.run(lambda: _replay(given, stream, since, group, live, plan, yes))


async def _replay(given: Given, stream: str, since: int, group: str, live: bool, plan: bool, yes: bool) -> None:
    meant = target.find(given)
    async with meant.opened() as broker:
        await target.find_stream(broker, stream, meant)
        name = group if "/" in group else f"{stream}/{group}"
        if not name.startswith(f"{stream}/"):
            raise Mistake(f"{group} is a group of another stream than {stream}.")
        await target.find_group(broker, name)
        behind = await place.behind(broker, stream, since)
        info = await target.find_group(broker, name)  # counted last, so that what comes meanwhile cannot mislead
        show.note(f"plan: {name} sees {behind} again")
        place.tell_consumers(info)
        await _check_nothing_is_skipped(broker, info, behind)
        if plan:
            return
        place.check_alone(info, live)
        show.confirm(f"Replay into {name}?", yes=yes)
        await broker.admin.seek(stream, info.group, since, live=live)
    click.echo(f"{name} goes on from {show.moment(since)}")
    show.note(f"its handlers see the events when they run: `millstream group show {name}` shows how far they are")


async def _check_nothing_is_skipped(broker: Broker, info: GroupInfo, behind: Behind) -> None:
    """Raise `Refused` when events from before that place may be missing in the group."""
    # Where a group is in each partition is not told, only what it lacks in all: as long as that is less than what lies
    # behind the place in any partition, the group has come that far in each.
    fewest = min((behind.counts[number] for number, at in behind.places.items() if at is not None), default=None)
    missing = fewest is not None and (info.lag is None or info.lag > fewest)
    if not missing:
        oldest = await broker.admin.pending(info.stream, info.group, 1)
        places = [(pending.position, behind.places[pending.position.partition]) for pending in oldest]
        unsettled = any(at is not None and not after(position.offset, at.offset) for position, at in places)
        missing = unsettled and not await broker.admin.keys(info.stream, info.group, 1)  # what is parked stays
    if missing:
        name = f"{info.stream}/{info.group}"
        raise Refused(
            f"{name} may not have settled all events from before that time, and would skip them: wait until it has, choose "
            f"an earlier time, or skip them with `millstream group seek {name} --to TIME`"
        )
