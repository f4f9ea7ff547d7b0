"""`replay`: history into one group, which is moved back; or given chosen events while it stays where it is."""

from __future__ import annotations

import math

import click

from millstream.brokers.base import Broker, GroupInfo, Position
from millstream.brokers.window import after
from millstream.brokers.window import place as offset
from millstream.cli import place, show, target
from millstream.cli.giving import Giving, Wish
from millstream.cli.main import DONE, Command, Given, Refused
from millstream.cli.place import Behind


def _rate(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"{value:g} is not a rate: write a positive number.", context, option)
    return value


def _position(context: click.Context, option: click.Parameter, value: str | None) -> Position | None:
    if value is None:
        return None
    try:
        position = Position.parse(value)
        offset(position.offset)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a position: write partition@offset, as in 3@1693-0.", context, option
        ) from None
    return position


@click.command(cls=Command)
@click.argument("stream", metavar="STREAM")
@click.option(
    "--since",
    metavar="TIME",
    required=True,
    callback=target.moment,
    help="From when on: 5m (ago), 2026-08-01T12:00Z or today.",
)
@click.option(
    "--until",
    metavar="TIME",
    callback=target.moment,
    help="Give the group what was stored from --since up to this TIME; now, where --rate or --from is given alone.",
)
@click.option("--rate", type=float, metavar="N", callback=_rate, help="Give the group at most N events a second.")
@click.option(
    "--from", "begin", metavar="POSITION", callback=_position, help="Go on giving behind a position, as in 3@1693-0."
)
@click.option("--to-group", "group", metavar="GROUP", required=True, help="The group that is to see the events again.")
@click.option("--live", is_flag=True, help="Also while the group runs: its consumers lose what they hold.")
@click.option("--plan", is_flag=True, help="Show what would be done, and stop.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def replay(
    given: Given,
    stream: str,
    since: int,
    until: int | None,
    rate: float | None,
    begin: Position | None,
    group: str,
    live: bool,
    plan: bool,
    yes: bool,
) -> int:
    """Let one group see the events of a stream again, from a time on; other groups notice nothing.

    The group is moved back to that time, in one step, and its handlers see the events when they run. It is refused where
    the group has not come that far yet, since it would skip events. Dead letters stay.

    With --until, --rate or --from it stays where it is, and may run: it is given the chosen events once more, partition by
    partition, of each key in order. What it has not settled yet is left out, since that comes anyway. While more than
    10,000 events are pending in the group, no more are given. Cut short, it says with which command to go on.
    """
    if until is None and rate is None and begin is None:
        return target.run(lambda: _replay(given, stream, since, group, live, plan, yes))
    if live:
        raise click.UsageError(
            "--live is for a group that is moved: with --until, --rate or --from it stays, and may run."
        )
    wish = Wish(stream, group, since, until, rate, begin)
    return target.run(lambda: Giving(given, wish, plan, yes).run())


async def _replay(given: Given, stream: str, since: int, group: str, live: bool, plan: bool, yes: bool) -> int:
    meant = target.find(given)
    async with meant.opened() as broker:
        await target.find_stream(broker, stream, meant)
        await place.group_of(broker, stream, group)
        behind = await place.behind(broker, stream, since)
        info = await place.group_of(broker, stream, group)  # counted last, so that what comes meanwhile cannot mislead
        name = f"{info.stream}/{info.group}"
        show.note(f"plan: {name} sees {behind} again")
        place.tell_consumers(info)
        await _check_nothing_is_skipped(broker, info, behind)
        if plan:
            return DONE
        place.check_alone(info, live)
        show.confirm(f"Replay into {name}?", yes=yes)
        await broker.admin.seek(stream, info.group, since, live=live)
    click.echo(f"{name} goes on from {show.moment(since)}")
    show.note(f"its handlers see the events when they run: `millstream group show {name}` shows how far they are")
    return DONE


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
