"""Link: the relay's own connection to the database. Where it is blocking, a thread does each transaction."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from millstream.clock import Clock
from millstream.sql.connections import Dialect, Work, dialect_of, drive, drive_async, is_asynchronous, kind_of
from millstream.worker.threads import Threads

T = TypeVar("T")

LIMIT_S = 30.0  # a database that is silent for so long is taken for gone, and another connection is made
CLOSE_S = 2.0


class Link:
    """One connection, from `open` to `close`. One transaction at a time."""

    def __init__(self, connection: Any, threads: Threads, clock: Clock) -> None:
        self._connection = connection
        self._threads = threads
        self._clock = clock
        self._asynchronous = is_asynchronous(connection)
        self.dialect: Dialect = dialect_of(connection)

    @classmethod
    async def open(cls, connect: Any, threads: Threads, clock: Clock) -> Link:
        """Connect: with an engine, or with a function. Raises what the driver raises, and `TimeoutError`."""
        async with clock.timeout(LIMIT_S):
            made = await _called(threads, connect.connect if hasattr(connect, "connect") else connect)
            return cls(await made if inspect.isawaitable(made) else made, threads, clock)

    async def transact(self, work: Work[T]) -> T:
        """Do it in a transaction of its own, all of it or, when this raises, nothing. Then the link is of no more use."""
        async with self._clock.timeout(LIMIT_S):
            if not self._asynchronous:
                return await _called(self._threads, lambda: _transact(self._connection, work))
            if kind_of(self._connection) == "asyncpg":
                async with self._connection.transaction():
                    return await drive_async(self._connection, work)
            done = await drive_async(self._connection, work)
            await self._connection.commit()
            return done

    async def close(self) -> None:
        """Let go of the connection, and of what it has not committed. Never raises."""
        with suppress(Exception):
            async with self._clock.timeout(CLOSE_S):
                if self._asynchronous:
                    await self._connection.close()
                else:
                    await _called(self._threads, self._connection.close)


def _transact(connection: Any, work: Work[T]) -> T:
    done = drive(connection, work)
    connection.commit()
    return done


async def _called(threads: Threads, function: Callable[[], T]) -> T:
    results: list[T] = []
    await threads.run(lambda: results.append(function()))
    return results[0]
