"""`schedule ls`, `schedule run`."""

from __future__ import annotations

from typing import Any

import click

from millstream.app import App
from millstream.brokers.base import Broker
from millstream.cli import show, target
from millstream.cli.main import Given, Group, Mistake
from millstream.cli.show import Column, Output
from millstream.delivery import Envelope
from millstream.errors import MillstreamError
from millstream.publisher.publisher import SCHEDULE
from millstream.worker.schedule import Schedule, schedules

_COLUMNS = (
    Column("SCHEDULE", "name", elastic=True),
    Column("EXPRESSION", "expression"),
    Column("ZONE", "tz"),
    Column("LAST SLOT", "last_ms", show.moment),
    Column("NEXT SLOT", "next_ms", show.moment),
)


@click.group(cls=Group)
def schedule() -> None:
    """List schedules, run one now.

    A schedule publishes an event at each of its slots, while a worker of its app runs. Which slot was the last one is kept
    with the stream; when the slots are, only the app knows.
    """


@schedule.command()
@show.output_option
@click.pass_obj
def ls(given: Given, output: Output) -> None:
    """List the schedules of the app, and of others.

    Of others, the broker knows the last slot only. Times are local, those of the expression in its own zone. The last slot
    is the last one that was come to: its event was published, or it was passed over.
    """
    target.run(lambda: _list(given, output))


@schedule.command()
@click.argument("name", metavar="NAME")
@click.pass_obj
def run(given: Given, name: str) -> None:
    """Publish the event of a schedule now, beside its slots.

    NAME is as in `schedule ls`, without the stream too where that is clear. Needs --app, since the app makes the event.
    """
    target.run(lambda: _run(given, name))


async def _list(given: Given, output: Output) -> None:
    meant = target.find(given)
    declared = {(each.stream.name, each.name): each for each in _declared(meant.app)}
    async with meant.opened() as broker:
        last = await _last_slots(broker) if broker.traits.slots else {}
    now_ms = meant.clock.now_ms()
    rows = [_fields(*known, declared.get(known), last.get(known), now_ms) for known in sorted(declared.keys() | last)]
    show.rows(rows, _COLUMNS, output)
    if rows:
        return
    if meant.app is None:
        show.note("No schedule has published here yet; --app shows also those that have not.")
    else:
        show.note("There are no schedules: give App(…, include=[schedule('*/5 * * * *', Tick, to=ticks)]) one.")


async def _run(given: Given, name: str) -> None:
    meant = target.find(given)
    if meant.app is None:
        raise Mistake("Run a schedule of which app? Give --app shop.main:app.")
    found = _find(meant.app, name)
    try:
        event = found.event(meant.clock.now_ms())
    except MillstreamError:
        raise
    except Exception as error:
        raise Mistake(f"{found.name} has no event for now: {target.blame(error)}") from error
    envelope = Envelope(event, id=meant.clock.new_id(), headers={SCHEDULE: found.name})
    async with meant.app:
        position = await meant.app.publish(envelope, to=found.stream)
    click.echo(f"{position}  {envelope.id}")


async def _last_slots(broker: Broker) -> dict[tuple[str, str], int]:
    return {
        (info.spec.name, name): at_ms
        for info in await broker.admin.streams()
        for name, at_ms in (await broker.admin.slots(info.spec.name)).items()
    }


def _find(app: App, name: str) -> Schedule:
    """The one meant by `tick` or `ticks/tick`."""
    known = _declared(app)
    found = [each for each in known if name in (each.name, f"{each.stream.name}/{each.name}")]
    if not found:
        names = ", ".join(sorted(f"{each.stream.name}/{each.name}" for each in known)) or "none"
        raise Mistake(f"{app.name} has no schedule {name!r}; it has: {names}.")
    if len(found) > 1:
        raise Mistake(f"Which {name!r}? Say {' or '.join(f'{each.stream.name}/{each.name}' for each in found)}.")
    return found[0]


def _declared(app: App | None) -> list[Schedule]:
    return schedules(app.parts()) if app is not None else []


def _fields(stream: str, name: str, declared: Schedule | None, last_ms: int | None, now_ms: int) -> dict[str, Any]:
    """A schedule's fields; of one that the app does not have, what the broker knows."""
    timetable = declared.timetable if declared is not None else None
    return {
        "name": f"{stream}/{name}",
        "stream": stream,
        "schedule": name,
        "expression": timetable.line if timetable is not None else None,
        "tz": str(timetable.zone) if timetable is not None else None,
        "missed": declared.missed if declared is not None else None,
        "last_ms": last_ms,
        "next_ms": next(timetable.slots(max(now_ms, last_ms or 0))) if timetable is not None else None,
    }
