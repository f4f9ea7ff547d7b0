"""The command tree, the options that all commands share, and the exit codes.

A command's module is imported when the command is typed, so that `millstream --help` loads neither brokers nor rich.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from millstream.errors import (
    BrokerError,
    ConfigError,
    GroupOwned,
    MillstreamError,
    StreamMismatch,
    TooLarge,
    Unconfirmed,
    Unroutable,
)

COMMANDS = {
    "demo": ("run", "The first thing to run: real flight events, live."),
    "run": ("run", "Run the handlers of an app."),
    "publish": ("events", "Publish one event, or JSON lines."),
    "tail": ("events", "Show the events of a stream."),
    "stream": ("streams", "List streams; show, change or drop one."),
    "group": ("groups", "List groups; show, adopt, move or forget one."),
    "dead": ("dead", "Dead letters: list, show, replay, drop."),
    "key": ("keys", "Keys that wait: list, show, release, drop."),
    "replay": ("replay", "Let one group see events again."),
    "schedule": ("schedules", "List schedules, run one now."),
    "bench": ("bench", "Measure how fast it is here."),
}
"""Each command: its module in this folder, and what `--help` says about it."""

DONE, PART, USAGE, BROKER, REFUSED, FAULT, INTERRUPTED = 0, 1, 2, 3, 4, 70, 130

EXIT_CODES = {
    DONE: "done",
    PART: "done in part, or found something",
    USAGE: "wrong usage; unknown app, stream, group, key, schedule or dead letter; unusable event or setting",
    BROKER: "the broker cannot be reached, or refused us",
    REFUSED: "refused to act: not confirmed, a group that runs or would skip events, StreamMismatch, GroupOwned",
    FAULT: "a fault of Millstream",
    INTERRUPTED: "interrupted",
}


class Mistake(click.ClickException):
    """What was asked for does not exist, or cannot be meant: said in one line that needs no look at --help."""

    exit_code = USAGE


class Refused(click.ClickException):
    """Nothing was changed, since it would do harm as things are now."""

    exit_code = REFUSED


class NotConfirmed(Refused):
    """Nothing was changed, since nobody said yes."""


def exit_code(error: BaseException) -> int:
    """What an error means to the shell: the one place that decides."""
    match error:
        case click.ClickException():
            return error.exit_code
        case click.Abort() | KeyboardInterrupt():
            return INTERRUPTED
        case StreamMismatch() | GroupOwned():
            return REFUSED
        case ConfigError() | Unroutable() | TooLarge():
            return USAGE
        case BrokerError() | Unconfirmed():
            return BROKER
    return FAULT


@dataclass
class Given:
    """What the shared options say. They may stand before or after a command's own words; the last one counts."""

    app: str | None = None
    broker: str | None = None
    factory: bool = False
    debug: bool = False


def _remember(context: click.Context, option: click.Parameter, value: Any) -> None:
    if value:  # not given at this place: another place may have said it
        setattr(context.ensure_object(Given), option.name or "", value)


def _shared() -> list[click.Parameter]:
    def option(*names: str, **rest: Any) -> click.Option:
        return click.Option(names, expose_value=False, callback=_remember, **rest)

    return [
        option("--app", metavar="MODULE:NAME", help="The app, as in shop.main:app."),
        option("--broker", metavar="URL", help="The broker, as in redis://host:6379/0 or sqlite:///shop.db."),
        option("--factory", is_flag=True, help="NAME is a function that returns the app."),
        option("--debug", is_flag=True, help="Show tracebacks of errors."),
    ]


class Command(click.Command):
    """A command that takes the shared options among its own."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.params += _shared()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A command's own options first, then those that every command has."""
        _write_options(self, ctx, formatter)


class Group(click.Group):
    """Commands under one word, which takes the shared options too."""

    command_class = Command

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.params += _shared()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands first: who asks looks for them."""
        self.format_commands(ctx, formatter)
        _write_options(self, ctx, formatter)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they were declared."""
        return list(self.commands)


class Root(Group):
    """The whole tree. It alone turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table above."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"millstream.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table: help must not import every command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Whoever reads our output may have seen enough, as in `tail … | head`: that is no error."""
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # The interpreter's last flush must go nowhere, or it would complain about the closed pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        return code

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Carry out a command line, and exit."""
        given = Given()
        extra |= {"standalone_mode": False, "obj": given}
        try:
            code = super().main(args, "millstream", **extra)
        except (Exception, KeyboardInterrupt) as error:
            code = _complain(error, given.debug)
        sys.exit(code or DONE)


@click.command(cls=Root)
@click.version_option(package_name="millstream", message="millstream %(version)s")
def millstream() -> None:
    """Typed events, groups of handlers, at-least-once delivery; on SQLite and on Redis.

    Commands find their broker through --app or --broker, else MILLSTREAM_APP and MILLSTREAM_BROKER, else
    `[tool.millstream] app = "shop.main:app"` in the nearest pyproject.toml. Try `millstream demo` first.
    """


def main() -> NoReturn:
    """The command `millstream`."""
    millstream.main()


def _write_options(command: click.Command, context: click.Context, formatter: click.HelpFormatter) -> None:
    own: list[tuple[str, str]] = []
    shared: list[tuple[str, str]] = []
    for option in command.get_params(context):
        record = option.get_help_record(context)
        if record is not None and isinstance(option, click.Option):
            (shared if option.callback is _remember else own).append(record)
    for title, records in (("Options", own), ("Options of every command", shared)):
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def _complain(error: BaseException, debug: bool) -> int:
    """One line on stderr, and the exit code."""
    if debug:
        traceback.print_exception(error)
    error = innermost(error)
    code = exit_code(error)
    match error:
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), err=True)
            return code
        case click.Abort() | KeyboardInterrupt():
            message = "interrupted"
        case click.UsageError(ctx=click.Context() as context):
            message = f"{error.format_message()} See {context.command_path} --help"
        case click.ClickException():
            message = error.format_message()
        case MillstreamError():
            message = str(error) or type(error).__name__
        case _:
            hint = "" if debug else "; --debug shows where"
            message = f"a fault of Millstream, please report it: {type(error).__name__}: {error}{hint}"
    with suppress(BrokenPipeError):
        click.echo(f"millstream: {' '.join(message.split())}", err=True)
    return code


def innermost(error: BaseException) -> BaseException:
    """The first error of a group: task groups wrap what one of their tasks raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
