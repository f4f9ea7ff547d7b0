"""Two threads at one file: a writer that commits for everybody, a reader that looks.

    ask ─► waiting ─► one transaction for all that wait ─► COMMIT ─► answers, bell
                      └─ one failed ─► rolled back, each again in a transaction of its own

While a commit runs, new requests gather; the next transaction takes them all, so a thousand publishers share one fsync.
A request is a function of the connection that can be run again: it keeps nothing outside of the database. That is what
isolates requests from each other without a savepoint each, which every healthy request would pay for.

Every transaction is BEGIN IMMEDIATE inside the turnstile. The reader's are short, and no cursor outlives its request: an
open one would keep the write-ahead log from ever being reused. The writer's commits copy the log into the file after every
thousand pages, which is SQLite's own way: after four thousand nothing was saved, and the slowest commits took twice as long.

A request costs 45 µs for its way to the thread and back, with an empty transaction: what can be asked at once should be.

The bell rings when there may be something new: after a commit of ours that says so, and when PRAGMA data_version shows
that another process has committed. The writer asks that on its own connection, where our own commits do not show, and
only while somebody listens: when another process has touched the turnstile, as each does after such a commit; and, in
case that one does not, now and then. Where nobody tells of touches it asks every 2 ms after a change, then ever more
seldom, down to 50 ms; so a wake-up comes late by 2 % of the silence before it.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from millstream.brokers.sqlite import touches
from millstream.brokers.sqlite.file import File, InDoubt, Turnstile
from millstream.brokers.sqlite.forks import Holder
from millstream.clock import Clock
from millstream.errors import BrokerDown, BrokerError, BrokerFull, BrokerRefused
from millstream.telemetry import logger

T = TypeVar("T")

Job: TypeAlias = Callable[[sqlite3.Connection], T]
"""Runs in the thread, inside a transaction. May be run again."""

MAX_REQUESTS = 64  # in one transaction: a heartbeat must not wait behind an endless one
ANSWER_WITHIN_S = 20.0  # twice what SQLite waits for a lock
POLL_S = (0.002, 0.05)  # how often we look for commits of other processes, where nobody tells of touches
POLL_SHARE = 0.02
DEAF_S = 0.25  # where somebody does: strangers, and processes of an earlier version, do not touch
CLOSE_WITHIN_S = 30.0


class Request:
    """Something asked of a thread, and its answer."""

    __slots__ = ("answer", "durable", "job", "rings")

    def __init__(self, job: Job[Any], answer: asyncio.Future[Any], durable: bool, rings: bool) -> None:
        self.job = job
        self.answer = answer
        self.durable = durable
        self.rings = rings


class Reader(Holder):
    """A thread with a connection, which runs one request after the other, each in a transaction that sees one state.

    Started by `start`, ended and joined by `close`. A daemon: a process that is stopped inside the turnstile must not
    keep ours from ending, and ending between two instructions is what the file survives anyway.
    """

    role = "reader"

    def __init__(self, file: File, clock: Clock) -> None:
        super().__init__()
        self._file = file
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Condition()
        self._waiting: list[Request] = []
        self._closing = False
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"millstream-sqlite-{self.role}", daemon=True)
        self._connection: sqlite3.Connection | None = None

    async def start(self) -> None:
        """Open the connection, then serve. Raises `BrokerError`."""
        self._thread.start()
        try:
            await self.ask(lambda connection: None)
        except BaseException:
            await self.close()
            raise

    async def ask(self, job: Job[T], *, durable: bool = False, rings: bool = False) -> T:
        """Run the job in the thread and return its result, once its transaction is committed.

        `durable`: synchronised to disk as the URL says. `rings`: others may find something new afterwards. Cancelling
        withdraws a job that has not begun, and does not stop one under way.
        Raises `InDoubt` when the job may or may not have been committed, another `BrokerError` when it was not.
        """
        request = Request(job, self._loop.create_future(), durable, rings)
        with self._lock:
            if self._closing:
                raise BrokerDown(f"{self._file.path} is closed")
            self._waiting.append(request)
            self._lock.notify()
        try:
            async with self._clock.timeout(ANSWER_WITHIN_S):
                result: T = await request.answer
        except TimeoutError:
            result = self._overdue(request)
        except asyncio.CancelledError:
            self._withdraw(request)
            raise
        return result

    async def close(self) -> None:
        """Serve what waits, close the connection, end the thread."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        if await self._clock.wait(self._ended, CLOSE_WITHIN_S):
            self._thread.join()
        else:
            logger.warning("%s: another process holds the file and does not go on; left it behind", self._file.path)

    def _overdue(self, request: Request) -> Any:
        if _succeeded(request.answer):
            return request.answer.result()
        busy = f"{self._file.path}: no answer within {ANSWER_WITHIN_S:g} s, another process holds the file"
        if self._withdraw(request):
            raise BrokerDown(busy)
        raise InDoubt(f"{busy}; what was asked for may or may not happen")

    def _withdraw(self, request: Request) -> bool:
        with self._lock:
            if request not in self._waiting:
                return False
            self._waiting.remove(request)
            return True

    def _run(self) -> None:
        """The thread: ends when closing is asked for and nothing waits any more."""
        while True:
            with self._lock:
                if not self._waiting and not self._closing:
                    self._lock.wait(self._pause_s())
                batch, self._waiting = self._waiting[:MAX_REQUESTS], self._waiting[MAX_REQUESTS:]
                if self._closing and not batch:
                    break
            with self.using:
                self._turn(batch)
        with self.using:
            self.let_go()
        self._post(self._ended.set)

    def _turn(self, batch: list[Request]) -> None:
        for request in batch:
            self._transact([request], "BEGIN")

    def _pause_s(self) -> float | None:
        return None

    def let_go(self) -> None:
        """Close the connection; the next request opens it again."""
        self._disconnect()

    def _transact(self, batch: Sequence[Request], begin: str) -> bool:
        """One transaction. False when it was rolled back as a whole and nobody was answered: try them one by one."""
        committing = False
        try:
            connection = self._connect()
            connection.execute(begin)
            results = [request.job(connection) for request in batch]
            committing = True
            connection.execute("COMMIT")
        except Exception as error:
            explained = self._roll_back(error, committing)
            if len(batch) > 1 and not isinstance(explained, InDoubt):
                return False
            self._post(_fail, batch, explained)
            return True
        self._post(self._answer, batch, results)
        return True

    def _connect(self) -> sqlite3.Connection:
        self._file.check_place()
        if self._connection is None:
            self._connection = self._file.connect(reader=True)
        return self._connection

    def _roll_back(self, error: Exception, committing: bool) -> Exception:
        explained = error
        if isinstance(error, OSError):
            explained = BrokerRefused(f"{self._file.path}: {error.strerror}")
        elif isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) is not None:
            explained = self._file.explain(error, in_doubt=committing)
        try:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._disconnect()
        # A new connection is a new chance. Not so when the disk is full: closing the last one would cut the log to nothing.
        if explained is not error and not isinstance(explained, BrokerFull):
            self._disconnect()
        return explained

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error as error:
                logger.warning("%s: %s on closing", self._file.path, error)

    def _answer(self, batch: Sequence[Request], results: Sequence[Any]) -> None:
        for request, result in zip(batch, results, strict=True):
            if not request.answer.cancelled():
                request.answer.set_result(result)

    def _post(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop was closed without closing us: nobody is left to answer
            with self._lock:
                self._closing = True


class Writer(Reader):
    """The one thread that writes, and the bell."""

    role = "writer"

    def __init__(self, file: File, clock: Clock) -> None:
        super().__init__(file, clock)
        self._turnstile: Turnstile | None = None
        self._bell = asyncio.Event()
        self._touches: int | None = None
        self._listening = 0
        self._wanted = False  # to look for commits of other processes, since it was last done
        self._version = -1
        self._changed_s = clock.monotonic()
        self._synchronous = ""

    async def start(self) -> None:
        """Open the connection, then serve, and hear what other processes touch. Raises `BrokerError`."""
        await super().start()
        self._touches = touches.watch(self._file.turnstile_path)
        if self._touches is not None:
            self._loop.add_reader(self._touches, self._touched, self._touches)

    async def close(self) -> None:
        """Hear no more, serve what waits, close the connection, end the thread."""
        descriptor, self._touches = self._touches, None
        if descriptor is not None:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        await super().close()

    @property
    def bell(self) -> asyncio.Event:
        """Rings once. To be taken *before* looking whether there is something, else its ring may be missed."""
        return self._bell

    def ring(self) -> None:
        """Let all who listen look again."""
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()

    async def listen(self, bell: asyncio.Event, wait_s: float) -> bool:
        """Wait for the bell; False when the time ran out first."""
        self._listening += 1
        self._look()
        try:
            return await self._clock.wait(bell, wait_s)
        finally:
            self._listening -= 1

    def _turn(self, batch: list[Request]) -> None:
        if batch and not self._commit(batch):
            for request in batch:
                self._commit([request])
        try:
            self._watch()
        except (BrokerError, sqlite3.Error, OSError):  # whoever asks next is told
            self._disconnect()

    def _commit(self, batch: list[Request]) -> bool:
        try:
            if self._turnstile is None:
                self._turnstile = self._file.turnstile()
            with self._turnstile:
                self._synchronise(any(request.durable for request in batch))
                answered = self._transact(batch, "BEGIN IMMEDIATE")
            if any(request.rings for request in batch):
                self._turnstile.touch()
            return answered
        except (BrokerError, OSError, sqlite3.Error) as error:
            self._post(_fail, batch, self._roll_back(error, False))
            return True

    def _synchronise(self, durable: bool) -> None:
        # A claim or a beat that a power cut takes back is merely repeated, so it need not wait for the disk.
        wanted = self._file.synchronous if durable else "normal"
        connection = self._connect()
        if wanted != self._synchronous:
            connection.execute(f"PRAGMA synchronous = {wanted}")
            self._synchronous = wanted

    def _connect(self) -> sqlite3.Connection:
        self._file.check_place()
        if self._connection is None:
            self._connection = self._file.connect()
            self._synchronous = self._file.synchronous
            self._version = -1
        return self._connection

    def _answer(self, batch: Sequence[Request], results: Sequence[Any]) -> None:
        super()._answer(batch, results)
        if any(request.rings for request in batch):
            self.ring()

    def _touched(self, descriptor: int) -> None:
        touches.drain(descriptor)
        if self._listening:
            self._look()

    def _look(self) -> None:
        with self._lock:
            self._wanted = True
            self._lock.notify()

    def _pause_s(self) -> float | None:
        if self._wanted:
            return 0.0
        if self._listening and self._touches is not None:
            return DEAF_S
        if self._listening:
            least_s, most_s = POLL_S
            return min(max((self._clock.monotonic() - self._changed_s) * POLL_SHARE, least_s), most_s)
        return None

    def _watch(self) -> None:
        self._wanted = False
        if not self._listening:
            return
        (version,) = self._connect().execute("PRAGMA data_version").fetchone()
        if version != self._version:
            self._version = version
            self._changed_s = self._clock.monotonic()
            self._post(self.ring)

    def let_go(self) -> None:
        """Close connection and turnstile; the next request opens them again."""
        self._disconnect()
        turnstile, self._turnstile = self._turnstile, None
        if turnstile is not None:
            turnstile.close()


def _fail(batch: Sequence[Request], error: Exception) -> None:
    for request in batch:
        if not request.answer.cancelled():
            request.answer.set_exception(error)


def _succeeded(answer: asyncio.Future[Any]) -> bool:
    return answer.done() and not answer.cancelled() and answer.exception() is None
