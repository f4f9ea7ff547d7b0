"""Which app or broker a command is about, and which stream or group: from options, environment and pyproject.toml."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import sysconfig
import tomllib
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from millstream.app import App
from millstream.brokers.base import Broker, GroupInfo, StreamInfo
from millstream.brokers.urls import broker_for, mask
from millstream.cli.main import Given, Mistake
from millstream.clock import Clock
from millstream.errors import BadHandler, BadSetting, ConfigError
from millstream.publisher import policy_of, spec_of
from millstream.settings import Settings
from millstream.stream import Position, Stream
from millstream.telemetry import Telemetry
from millstream.units import seconds

T = TypeVar("T")

_LIBRARY = Path(sysconfig.get_path("purelib"))
_MAX_NAMED = 20  # names in one message: with more, a list command serves better


def moment(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """An option's TIME (how long ago, a date and time, `today`) as milliseconds since the epoch.

    Times without a zone are local, as the tables show them.
    """
    if value is None:
        return None
    now_ms = Clock().now_ms()
    if value == "today":
        now = datetime.fromtimestamp(now_ms / 1000).astimezone()
        return int(now.replace(hour=0, minute=0, second=0, microsecond=0).timestamp() * 1000)
    with suppress(BadSetting):
        return now_ms - int(seconds(value) * 1000)
    with suppress(ValueError):
        return round(datetime.fromisoformat(value).timestamp() * 1000)  # cut off, 0.283 s would become 0.282 s
    raise click.BadParameter(f"{value!r} is not a time: write 5m (ago), 2026-08-01T12:00Z or today.", context, option)


@dataclass(frozen=True)
class Target:
    """The broker that a command is about, and the app, where one is known."""

    url: str
    app: App | None = None
    settings: Settings = field(default_factory=Settings.load)
    clock: Clock = field(default_factory=Clock)
    telemetry: Telemetry = field(default_factory=Telemetry)

    def announce(self) -> None:
        """The first line on stderr: which broker is meant."""
        scheme, separator, path = self.url.partition(":///")
        if scheme == "sqlite" and separator:  # two working directories are two databases: say which
            path = os.path.abspath(path)
        name = f", app {self.app.name}" if self.app else ""
        click.echo(f"broker {mask(f'{scheme}{separator}{path}')}{name}", err=True)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Broker]:
        """The broker, open. Not the app: whoever only looks must not make its streams or compare them."""
        broker = broker_for(self.url, self.settings, self.clock, self.telemetry)
        try:
            await broker.open()
            yield broker
        finally:
            await broker.close()

    def stream(self, name: str) -> Stream[Any] | None:
        """The stream as the app declares it; None where it does not, or there is no app."""
        return self.app.all_streams().get(name) if self.app else None


def find(given: Given, app: str | None = None, *, announce: bool = True) -> Target:
    """What the command line, the environment and pyproject.toml name; `app` is an argument that names the app."""
    root = os.getcwd()
    name = app or given.app or os.environ.get("MILLSTREAM_APP")
    if not name:
        name, root = _configured()
    url = given.broker or os.environ.get("MILLSTREAM_BROKER")
    if name:
        found = load(name, root, factory=given.factory)
        found.configure(broker=given.broker)
        target = Target(found.url, found, found.settings, found.clock, found.telemetry)
    elif url:
        target = Target(url)
    else:
        raise Mistake(
            "Which broker? Give --app shop.main:app or --broker sqlite:///shop.db, or set MILLSTREAM_APP or "
            "MILLSTREAM_BROKER."
        )
    if announce:
        target.announce()
    return target


def load(name: str, root: str, *, factory: bool) -> App:
    """Import an app named `MODULE:NAME`; `MODULE` alone means the name `app`."""
    module_name, _, attribute = name.partition(":")
    for path in (root, os.getcwd()):
        if path not in sys.path:
            sys.path.insert(0, path)
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, attribute or "app", None)
        if factory and callable(found):
            found = found()
    except (Exception, SystemExit) as error:
        raise Mistake(f"Cannot load the app {name!r}: {blame(error)}") from error
    if isinstance(found, App):
        return found
    apps = ", ".join(f"{module_name}:{known}" for known, value in vars(module).items() if isinstance(value, App))
    hint = "use --factory if it is a function" if callable(found) else f"the module has {apps or 'no app'}"
    raise Mistake(f"{module_name}:{attribute or 'app'} is not an app; {hint}.")


async def find_stream(broker: Broker, name: str, meant: Target, *, make: bool = False) -> StreamInfo:
    """The stream of this name, else a `Mistake` that names those there are.

    `make`: one that only the app knows so far is made, as its first event would make it.
    """
    declared = meant.stream(name)
    known = {info.spec.name: info for info in await broker.admin.streams()}
    if name not in known and declared is not None and make:
        await broker.declare(spec_of(declared), policy_of(declared))
        known = {info.spec.name: info for info in await broker.admin.streams()}
    if name in known:
        return known[name]
    if declared is not None:
        raise Mistake(f"Stream {name!r} is declared, but holds nothing yet: its first event makes it.")
    names = known.keys() | (meant.app.all_streams().keys() if meant.app else set())
    raise Mistake(f"There is no stream {name!r}; there are: {_listed(names)}.")


async def all_groups(broker: Broker) -> list[GroupInfo]:
    """All groups of all streams."""
    return [group for info in await broker.admin.streams() for group in await broker.admin.groups(info.spec.name)]


async def find_groups(broker: Broker, name: str | None) -> list[GroupInfo]:
    """The groups meant by `billing` or `orders/billing`; without a name all. Never none: that is a `Mistake`."""
    groups = await all_groups(broker)
    if name is None:
        return groups
    found = [group for group in groups if name in (group.group, f"{group.stream}/{group.group}")]
    if not found:
        known = _listed(f"{group.stream}/{group.group}" for group in groups)
        raise Mistake(f"There is no group {name!r}; there are: {known}.")
    return found


async def find_group(broker: Broker, name: str) -> GroupInfo:
    """The one group meant by `billing` or `orders/billing`."""
    found = await find_groups(broker, name)
    if len(found) > 1:
        raise Mistake(f"Which {name!r}? Say {' or '.join(f'{g.stream}/{g.group}' for g in found)}.")
    return found[0]


def is_position(text: str) -> bool:
    """True for `3@1693-0`."""
    with suppress(ValueError):
        return bool(Position.parse(text))
    return False


class Interrupt:
    """Ctrl-C during long work: the first asks it to stop at a good place, the second cuts it off."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Inside the block, from a coroutine."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        with suppress(NotImplementedError, RuntimeError):  # Windows; a thread: it is cut off at once
            loop.add_signal_handler(signal.SIGINT, self._signalled, task)
        try:
            yield
        finally:
            with suppress(NotImplementedError, RuntimeError):
                loop.remove_signal_handler(signal.SIGINT)

    def _signalled(self, task: asyncio.Task[Any] | None) -> None:
        if not self.asked.is_set():
            click.echo("stopping; Ctrl-C again cuts it off", err=True)
        elif task is not None:
            task.cancel()
        self.asked.set()


def run(
    work: Callable[[], Coroutine[Any, Any, T]], loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
) -> T:
    """Run a command's coroutine to its end. Work that was cut off counts as interrupted."""
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(work())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _configured() -> tuple[str | None, str]:
    """The app that the nearest pyproject.toml names, and the folder of that file."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            try:
                tool = tomllib.loads(path.read_text("utf-8")).get("tool", {})
            except (ValueError, OSError) as error:
                raise Mistake(f"Cannot read {path}: {error}") from None
            return tool.get("millstream", {}).get("app"), str(folder)
    return None, str(here)


def blame(error: BaseException) -> str:
    """An error of the user's code on one line: file, line, what."""
    return _where(error) + _what(error)


def _where(error: BaseException) -> str:
    """File and line in the user's code; empty when the error names them itself, or there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_relative(error.filename)}, line {error.lineno}: "
    if isinstance(error, BadHandler):  # it says where the handler is
        return ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    # The innermost line of the user's own: what it calls, a library or us, is not where the mistake is.
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path.cwd())]
    outside = [frame for frame in own or frames if not Path(frame.filename).is_relative_to(_LIBRARY)]
    outside = [frame for frame in outside if frame.filename not in (__file__, importlib.__file__)]
    return f"{_relative(outside[-1].filename)}, line {outside[-1].lineno}: " if outside else ""


def _what(error: BaseException) -> str:
    match error:
        case SyntaxError():
            return error.msg
        case ConfigError():
            return str(error)
        case ModuleNotFoundError():
            return f"{error} (imports start in {os.getcwd()})"
    return f"{type(error).__name__}: {error}"


def _relative(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


def _listed(names: Iterable[str]) -> str:
    known = sorted(names)
    more = f" and {len(known) - _MAX_NAMED} more" if len(known) > _MAX_NAMED else ""
    return ", ".join(known[:_MAX_NAMED]) + more or "none"
