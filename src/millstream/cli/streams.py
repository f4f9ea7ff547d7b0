"""`stream ls`, `stream show`, `stream apply`, `stream train`, `stream drop`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import click
import msgspec

from millstream.app import App
from millstream.brokers.base import Broker, GroupInfo, Policy, StreamInfo
from millstream.cli import groups, place, show, target, training
from millstream.cli.main import Given, Group, Mistake, Refused
from millstream.cli.show import Column, Output
from millstream.cli.training import Wish
from millstream.errors import BadSetting
from millstream.publisher import differences, in_words, settings, wanted
from millstream.stream import Stream
from millstream.units import size_bytes


def _policy(fields: dict[str, Any]) -> str:
    """What was declared, and is not as without a declaration."""
    usual = settings(Policy())
    said = [f"{name} {value}" for name, value in settings(Policy(**fields)).items() if value != usual[name]]
    return ", ".join(said) or show.NOTHING


_COLUMNS = (
    Column("STREAM", "name", elastic=True),
    Column("PARTITIONS", "partitions", show.count),
    Column("KEY", "key"),
    Column("EVENTS", "events", show.count),
    Column("DELAYED", "delayed", show.some, rare=True),
    Column("SIZE", "bytes", show.size),
    Column("LAST", "last_ms", show.lately),
    Column("POLICY", "policy", _policy, spare=True, rare=True),
)
_LINES = (
    Column("stream", "name"),
    Column("partitions", "partitions", show.count),
    Column("key", "key"),
    Column("codec", "codec"),
    Column("types", "types", lambda types: show.text(", ".join(types or ()))),
    Column("policy", "policy", lambda fields: in_words(Policy(**fields))),
    Column("dictionary", "policy", lambda fields: show.text(fields["dictionary"] or None)),
    Column("events", "events", show.count),
    Column("ever added", "added", show.count),
    Column("delayed", "delayed", show.count),
    Column("repeats dropped", "repeats", show.count),
    Column("trimmed", "trimmed", show.count),
    Column("size", "bytes", show.size),
    Column("first", "first_ms", show.moment),
    Column("last", "last_ms", show.moment),
)
_PLAN = (
    Column("STREAM", "name", elastic=True),
    Column("SETTING", "setting"),
    Column("RECORDED", "recorded"),
    Column("DECLARED", "declared"),
)


def _bytes(context: click.Context, option: click.Parameter, value: str) -> int:
    try:
        return size_bytes(value)
    except BadSetting:
        raise click.BadParameter(f"{value!r} is not a size: write 16KB.", context, option) from None


@click.group(cls=Group)
def stream() -> None:
    """List streams; show, change or drop one."""


@stream.command()
@show.output_option
@click.pass_obj
def ls(given: Given, output: Output) -> None:
    """List the streams of the broker."""
    target.run(lambda: _list(given, output))


@stream.command("show")
@click.argument("name", metavar="STREAM")
@show.output_option
@click.pass_obj
def show_(given: Given, name: str, output: Output) -> None:
    """Show a stream, and the groups that consume it."""
    target.run(lambda: _show(given, name, output))


@stream.command()
@click.argument("names", nargs=-1, metavar="[STREAM]…")
@click.option("--exact", is_flag=True, help="Also undo what is recorded and the app does not ask for.")
@click.option("--plan", is_flag=True, help="Show what would be done, and stop.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def apply(given: Given, names: tuple[str, ...], exact: bool, plan: bool, yes: bool) -> None:
    """Put the retention and dedupe that the app declares into force.

    Of all its streams, or of these. They are recorded when a stream is first used, and hold for all who use it; a changed
    declaration changes nothing until it is applied. What the app says nothing about stays as it is. Who uses the stream
    learns of it within seconds.
    """
    target.run(lambda: _apply(given, names, exact, plan, yes))


@stream.command()
@click.argument("name", metavar="STREAM")
@click.option(
    "--size", metavar="SIZE", default="16KB", show_default=True, callback=_bytes, help="At most so large, up to 110KB."
)
@click.option(
    "--events",
    type=click.IntRange(100, training.MAX_SAMPLES),
    metavar="N",
    default=10_000,
    show_default=True,
    help="Learn from the newest N.",
)
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE",
    help="Write it to a file too.",
)
@click.option("--use", is_flag=True, help="Use it for what is published from now on.")
@click.option("--none", is_flag=True, help="Use none from now on; those there are stay, to read with.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def train(
    given: Given, /, name: str, size: int, events: int, path: str | None, use: bool, none: bool, yes: bool
) -> None:
    """Train a zstd dictionary from the newest events of a stream, and show what it would save.

    With it, a small event that travels alone becomes shorter; handlers and commands see it as it was. --use keeps the
    dictionary beside the stream, where readers find it, and who publishes learns of it within seconds. Compare with what a
    pack saves, which needs no dictionary: Stream(…, pack=Pack()).
    """
    target.run(lambda: training.run(given, Wish(name, size, events, path, use, none, yes)))


@stream.command()
@click.argument("name", metavar="STREAM")
@click.option("--plan", is_flag=True, help="Show what would be done, and stop.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def drop(given: Given, name: str, plan: bool, yes: bool) -> None:
    """Delete a stream with all that it has.

    That is: its events, the delayed ones too, its groups, their dead letters, its place in every schedule. Stop whatever
    uses it before; an app that declares it makes it anew when it starts.
    """
    target.run(lambda: _drop(given, name, plan, yes))


async def _list(given: Given, output: Output) -> None:
    async with target.find(given).opened() as broker:
        infos = await broker.admin.streams()
    show.rows([fields(info) for info in infos], _COLUMNS, output)
    if not infos:
        show.note("There are no streams yet: the first event published makes one.")


async def _show(given: Given, name: str, output: Output) -> None:
    meant = target.find(given)
    async with meant.opened() as broker:
        info = await target.find_stream(broker, name, meant)
        consumers = await broker.admin.groups(name)
    found = fields(info)
    declared = meant.stream(name)
    if declared is not None:
        found["types"] = list(declared.types)
    if output != "table":
        found["groups"] = [groups.fields(group) for group in consumers]
    show.one(found, [line for line in _LINES if line.field in found], output)
    if output == "table" and consumers:
        click.echo()
        show.rows([groups.fields(group) for group in consumers], groups.COLUMNS, output)
    if declared is not None and wanted(declared, info.policy) != info.policy:
        show.note(f"the app declares another policy: `millstream stream apply {name}` shows and applies it")


class _Change(NamedTuple):
    """What is recorded of a stream, and what shall be."""

    info: StreamInfo
    policy: Policy


async def _apply(given: Given, names: Sequence[str], exact: bool, plan: bool, yes: bool) -> None:
    meant = target.find(given)
    if meant.app is None:
        raise Mistake("Apply the declarations of which app? Give --app shop.main:app.")
    chosen = _chosen(meant.app, names)
    async with meant.opened() as broker:
        known = {info.spec.name: info for info in await broker.admin.streams()}
        changes: list[_Change] = []
        for declared in chosen:
            if declared.name not in known:
                show.note(f"{declared.name} is not there yet: its first event makes it as it is declared")
                continue
            info = known[declared.name]
            policy = wanted(declared, info.policy, exact=exact)
            if policy != info.policy:
                changes.append(_Change(info, policy))
        await _tell_plan(broker, changes, meant.clock.now_ms())
        if plan or not changes:
            return
        show.confirm(f"Apply this to {show.many(len(changes), 'stream')}?", yes=yes)
        for change in changes:
            await broker.admin.apply(change.info.spec.name, change.policy)
            click.echo(f"{change.info.spec.name} has {in_words(change.policy)} now")


async def _tell_plan(broker: Broker, changes: Sequence[_Change], now_ms: int) -> None:
    if not changes:
        show.note("nothing to do: what is declared holds")
        return
    show.note(f"plan: change {show.many(len(changes), 'stream')}")
    lines = [
        {"name": info.spec.name, "setting": setting, "recorded": before, "declared": after}
        for info, policy in changes
        for setting, (before, after) in differences(info.policy, policy).items()
    ]
    show.rows(lines, _PLAN, "table", err=True)
    for change in changes:
        await _tell_effect(broker, change, now_ms)


async def _tell_effect(broker: Broker, change: _Change, now_ms: int) -> None:
    info, policy = change
    name = info.spec.name
    excess = await _excess(broker, change, now_ms)
    if excess:
        then = "once their groups have settled them" if policy.keep else "and what groups have not settled is lost"
        show.note(f"{name}: about {excess:,} of its {show.many(info.events, 'event')} may go, {then}")
    full = 0 < policy.ceiling_events <= info.events or 0 < policy.ceiling_bytes <= (info.bytes or 0)
    if full:
        show.note(f"{name} is over that ceiling now: publishing is refused until it is below")


async def _excess(broker: Broker, change: _Change, now_ms: int) -> int:
    """About how many events are too old, or too many; of very many old ones, as many as a plan counts."""
    info, policy = change
    excess = [0]
    if policy.age_ms:
        ends = await broker.locate(info.spec.name, now_ms - policy.age_ms)
        old = await place.between(broker, info.spec.name, dict.fromkeys(ends), ends)
        excess.append(sum(old.counts.values()))
    if policy.events:
        excess.append(info.events - policy.events)
    if policy.bytes and info.bytes:
        excess.append(int(info.events * (1 - policy.bytes / info.bytes)))
    return max(excess)


async def _drop(given: Given, name: str, plan: bool, yes: bool) -> None:
    meant = target.find(given)
    async with meant.opened() as broker:
        info = await target.find_stream(broker, name, meant)
        consumers = await broker.admin.groups(name)
        delayed = f", {show.many(info.delayed, 'delayed event')}" if info.delayed else ""
        show.note(
            f"plan: drop {name} with {show.many(info.events, 'event')}{delayed} and {show.many(len(consumers), 'group')}"
        )
        for group in consumers:
            show.note(f"      group {group.group} of app {group.owner or show.NOTHING}: {_unfinished(group)}")
        if plan:
            return
        running = [group.group for group in consumers if group.consumers]
        if running:
            raise Refused(f"{name} is consumed by {', '.join(running)}: stop these first")
        show.confirm(f"Drop {name} for ever?", yes=yes)
        await broker.admin.discard(name)
    click.echo(f"{name} is dropped")


def _unfinished(group: GroupInfo) -> str:
    lag = "an unknown number of events" if group.lag is None else show.many(group.lag, "event")
    left = f"{lag} before the end, {show.many(group.pending, 'pending event')}, {show.many(group.dead, 'dead letter')}"
    return f"{left}; {place.running(group)}" if group.consumers else left


def _chosen(app: App, names: Sequence[str]) -> list[Stream[Any]]:
    declared = app.all_streams()
    unknown = [name for name in names if name not in declared]
    if unknown:
        raise Mistake(f"{app.name} has no stream {unknown[0]!r}; it has: {', '.join(sorted(declared)) or 'none'}.")
    return [found for name, found in sorted(declared.items()) if not names or name in names]


def fields(info: StreamInfo) -> dict[str, Any]:
    """A stream's fields, those of its declaration among them."""
    spec = info.spec
    return {
        "name": spec.name,
        "partitions": spec.partitions,
        "key": spec.key,
        "codec": spec.codec,
        "events": info.events,
        "added": info.added,
        "bytes": info.bytes,
        "first_ms": info.first_ms,
        "last_ms": info.last_ms,
        "policy": msgspec.structs.asdict(info.policy),
        "delayed": info.delayed,
        "repeats": info.repeats,
        "trimmed": info.trimmed,
    }
