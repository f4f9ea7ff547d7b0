"""What the tests of the command line share: a project to run in, the command inside this process, and as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from millstream.brokers.memory.broker import MemoryBroker
from millstream.cli import target
from millstream.cli.main import millstream
from millstream.clock import Clock
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from tests.servers import wait_until

WITHIN_S = 30.0  # a loaded machine with two cores

SHOP = """
import asyncio
from millstream import App, Delivery, Event, Reject, Retry, Router, Stream

class OrderPlaced(Event, type="order.placed"):
    order_id: str
    customer: str = "anonymous"
    total: int = 0
    tags: list[str] = []

class OrderCancelled(Event, type="order.cancelled"):
    order_id: str
    reason: str = ""

orders = Stream("orders", OrderPlaced | OrderCancelled, key="order_id", partitions=4)
parts = Router(retry=Retry(1))

@parts.subscriber(orders, "billing")
async def charge(event: OrderPlaced) -> None:
    if event.total < 0:
        raise ValueError(f"negative total {event.total}")
    if event.customer == "slow":
        print("handling", flush=True)
        await asyncio.Event().wait()

@parts.subscriber(orders, "warehouse")
async def load(event: OrderPlaced | OrderCancelled) -> None:
    if event.order_id == "bad":
        raise Reject("a bad order")

app = App("shop", include=[parts])
other = App("other", include=[parts], broker="sqlite:///shop.db")
empty = App("empty")

def make() -> App:
    return App("made", include=[parts])
"""


@dataclass
class Project:
    """A folder with an app in it, and the command run there, inside this process."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, *words: str, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(millstream, list(words), input=input, env=self.environment)

    def write(self, name: str, text: str | bytes) -> str:
        """A file of the project; its name."""
        (self.path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return name

    def start(self, *words: str, stdin: Any = subprocess.DEVNULL) -> Program:
        """The command as a process."""
        return Program(self.path, words, os.environ | self.environment, stdin)

    def finish(self, *words: str) -> Program:
        """The command as a process, when it has ended."""
        program = self.start(*words)
        program.wait()
        return program


class Program:
    """A running command, and what it has written so far."""

    def __init__(self, path: Path, words: tuple[str, ...], environment: Mapping[str, str], stdin: Any) -> None:
        self._files = [path / f".{name}{len(list(path.iterdir()))}" for name in ("out", "err")]
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "millstream", *words],
                cwd=path,
                env=environment,
                stdin=stdin,
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        return self._files[0].read_text("utf-8")

    @property
    def err(self) -> str:
        return self._files[1].read_text("utf-8")

    def until(self, met: Callable[[], bool]) -> None:
        """Wait for something that the command must bring about."""
        try:
            wait_until(lambda: met() or self.process.poll() is not None, WITHIN_S, "nothing came")
            assert met(), f"it ended with {self.process.returncode}"
        except BaseException as error:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{error}; stdout {self.out!r}; stderr {self.err!r}") from error

    def interrupt(self, number: int = signal.SIGINT) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit code."""
        try:
            return self.process.wait(WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"it did not end; stdout {self.out!r}; stderr {self.err!r}") from None


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A folder with the app `shop:app`, which the environment names, on an SQLite file."""
    for name in [name for name in os.environ if name.startswith("MILLSTREAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    paths, modules = list(sys.path), set(sys.modules)
    made = Project(tmp_path, {"MILLSTREAM_APP": "shop:app"})
    made.write("shop.py", SHOP)
    yield made
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def memory(project: Project, monkeypatch: pytest.MonkeyPatch) -> MemoryBroker:
    """A broker in memory, which the commands of this process share with the test; there is no app."""
    broker = MemoryBroker("memory://", Settings(), Clock(), Telemetry())
    monkeypatch.setattr(target, "broker_for", lambda *_: broker)
    project.environment = {"MILLSTREAM_BROKER": "memory://"}
    return broker
