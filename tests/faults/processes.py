"""The processes of one fault test: started with a journal, signalled by pid, all ended at the end."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from millstream.brokers.base import DeadLetter, GroupInfo
from tests.conftest import run
from tests.faults.oracle import History, SecondReader, history

ROOT = Path(__file__).parents[2]

LEASE_S = 1.0
GRACE_S = 3.0
CONCURRENCY = 16
IN_FLIGHT = 2 * CONCURRENCY
POLL_S = 0.01

LONG = bool(os.environ.get("MILLSTREAM_FAULTS_LONG"))
"""The long form, for people: ten times as many faults."""


class Child:
    """One process of ours."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self.pid = process.pid

    def signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    @property
    def code(self) -> int | None:
        """How it ended; None while it lives."""
        return self._process.poll()

    def ended(self, within_s: float) -> int:
        """Wait for its end."""
        try:
            return self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"process {self.pid} did not end within {within_s:g} s; it said:\n{self.said()}"
            ) from None

    def said(self) -> str:
        return self._log.read_text(errors="replace")[-4_000:]


class Trial:
    """A shop at a broker under faults. On a failure it prints the seed, the faults, and the last words of each process."""

    def __init__(self, url: str, directory: Path, seed: int | None = None) -> None:
        given = os.environ.get("MILLSTREAM_FAULTS_SEED")
        self.seed = seed if seed is not None else int(given) if given else random.SystemRandom().randrange(10**6)
        self.random = random.Random(self.seed)
        self.url = url
        self.reader = SecondReader(url)
        self.log: list[str] = []
        self._began_s = time.monotonic()
        self._journals = directory / "journals"
        self._directory = directory
        self._journals.mkdir()
        self._children: list[Child] = []
        self._history = history(self._journals)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            child.signal(signal.SIGKILL)
        for child in self._children:
            child.ended(10)
        if error is not None:
            print(f"\nseed {self.seed} (MILLSTREAM_FAULTS_SEED={self.seed} repeats the plan)\n" + "\n".join(self.log))
            for child in self._children[-4:]:
                print(f"--- process {child.pid}, ended with {child.code}:\n{child.said()}")

    def note(self, what: str) -> None:
        """Write a fault down."""
        self.log.append(f"{time.monotonic():.3f} s  {what}")

    @property
    def history(self) -> History:
        """What the journals say by now."""
        return self._history.look()

    def child(self, *words: object, concurrency: int = CONCURRENCY, grace_s: float = GRACE_S, **more: str) -> Child:
        """Start a process of the shop: a verb and its words; the rest goes into its environment as SHOP_…"""
        environment = os.environ | {
            "MILLSTREAM_BROKER": self.url,
            "MILLSTREAM_LEASE": f"{LEASE_S}s",
            "MILLSTREAM_GRACE": f"{grace_s}s",
            "MILLSTREAM_CONCURRENCY": str(concurrency),
            "SHOP_JOURNAL": str(self._journals),
        }
        environment |= {f"SHOP_{name.upper()}": value for name, value in more.items()}
        log = self._directory / f"{len(self._children)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.shop", *map(str, words)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        child = Child(process, log)
        self._children.append(child)
        self.note(f"process {child.pid}: {' '.join(map(str, words))} {more or ''}")
        return child

    def stop(self, child: Child) -> None:
        """SIGSTOP, at a moment when it holds no lock of the file.

        A process that is stopped inside of a transaction holds up every writer of an SQLite file until it goes on: that is
        so, and not what is tried here.
        """
        child.signal(signal.SIGSTOP)
        while self.url.startswith("sqlite") and not self._file_is_free():
            child.signal(signal.SIGCONT)
            time.sleep(POLL_S)
            child.signal(signal.SIGSTOP)

    def _file_is_free(self) -> bool:
        """Nobody keeps a lock: those of living processes are short."""
        until_s = time.monotonic() + 0.3
        with Path(f"{self.url.removeprefix('sqlite:///')}-turn").open("rb") as file:
            while time.monotonic() < until_s:
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
        return False

    def publish(self, count: int, *, rate: float = 1e6, within_s: float = 60, **more: str) -> None:
        """Publish so many events, and wait until all are confirmed."""
        assert self.child("publish", count, rate, **more).ended(within_s) == 0

    def until(self, met: Callable[[], object], why: str, within_s: float = 30) -> None:
        """Return as soon as the condition is met."""
        until_s = time.monotonic() + within_s
        while not met():
            assert time.monotonic() < until_s, f"not within {within_s:g} s: {why}"
            time.sleep(POLL_S)

    def until_settled(self, within_s: float = 60) -> GroupInfo:
        """Wait until the broker says that nothing is undelivered and nothing pending."""
        until_s = time.monotonic() + within_s
        while True:
            info = self.group()
            if info is not None and info.lag == 0 and info.pending == 0:
                return info
            assert time.monotonic() < until_s, f"not settled within {within_s:g} s: {info}"
            time.sleep(5 * POLL_S)

    def group(self) -> GroupInfo | None:
        found: list[GroupInfo | None] = []

        async def ask() -> None:
            found.append(await self.reader.group())

        run(ask())
        return found[0]

    def dead(self) -> list[DeadLetter]:
        found: list[DeadLetter] = []

        async def ask() -> None:
            found.extend(await self.reader.dead())

        run(ask())
        return found

    def judge(self, dead: set[str] | None = None) -> None:
        """Nothing is lost, nothing came from nowhere, nobody settled what was not his any more."""
        history = self.history
        lost, phantom, stale = history.lost(dead or ()), history.phantom(), history.stale()
        wrong = lost | phantom | stale
        assert not wrong, (
            f"seed {self.seed}: lost {len(lost)}, phantom {len(phantom)}, stale {len(stale)}:\n{history.tell(wrong)}"
        )


@contextmanager
def ending(*children: Child) -> Iterator[None]:
    """Children that are not needed after the block: drained, or the test fails."""
    yield
    for child in children:
        child.signal(signal.SIGTERM)
    for child in children:
        assert child.ended(GRACE_S + 3) == 0, child.said()
