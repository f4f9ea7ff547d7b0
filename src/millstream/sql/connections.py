"""One way to speak to whatever connection the user has, blocking or asynchronous, without importing any driver.

What is to be done is written once, as a generator that yields statements and is sent their rows. A statement has named
parameters (`:name`); here it is put into the words of SQLAlchemy, sqlite3, psycopg, asyncpg, aiosqlite or any other DB-API
driver. The kind is told by the module that the connection's class comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from millstream.errors import BadSetting, MillstreamError, NotSupported

T = TypeVar("T")

Dialect = Literal["sqlite", "postgresql"]
Row: TypeAlias = tuple[Any, ...]

_NAMED = re.compile(r":(\w+)")
_IDLE = 0  # psycopg's transaction status


class Statement(NamedTuple):
    """What to say: SQL with parameters written as `:name`."""

    text: str
    parameters: Mapping[str, Any] = {}


Work: TypeAlias = Generator[Statement, list[Row], T]
"""Yields statements, is sent the rows of each, and returns what came of it."""


class Asynchronous(Protocol):
    """A connection or session whose `execute` is awaited."""

    @property
    def execute(self) -> Callable[..., Coroutine[Any, Any, Any]]:
        """Says one statement."""
        ...


class Answer(Coroutine[Any, Any, T]):
    """What is to be awaited. Asking whether it is true is refused, since a forgotten `await` would always be."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work

    def __await__(self) -> Generator[Any, Any, T]:
        return self._work.__await__()

    def __bool__(self) -> bool:
        self._work.close()
        raise MillstreamError("this connection is asynchronous: await the call. Nothing was done")

    def send(self, value: Any) -> Any:
        """As any coroutine's."""
        return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        """As any coroutine's."""
        return self._work.throw(*error)

    def close(self) -> None:
        """As any coroutine's."""
        self._work.close()


def perform(connection: Any, work: Work[T]) -> T | Coroutine[Any, Any, T]:
    """Do it on this connection, in the transaction that it is in: at once or, where it is asynchronous, when awaited."""
    return Answer(drive_async(connection, work)) if is_asynchronous(connection) else drive(connection, work)


def drive(connection: Any, work: Work[T]) -> T:
    """Do it on a blocking connection."""
    rows: list[Row] | None = None
    while True:
        try:
            statement = next(work) if rows is None else work.send(rows)
        except StopIteration as end:
            result: T = end.value
            return result
        rows = _say(connection, statement)


async def drive_async(connection: Any, work: Work[T]) -> T:
    """Do it on an asynchronous connection."""
    rows: list[Row] | None = None
    while True:
        try:
            statement = next(work) if rows is None else work.send(rows)
        except StopIteration as end:
            result: T = end.value
            return result
        rows = await _say_async(connection, statement)


def is_asynchronous(connection: Any) -> bool:
    """True when what this connection does is awaited. Raises `BadSetting` for what is no connection."""
    match kind_of(connection):
        case "sqlalchemy":
            return any(cls.__module__.startswith("sqlalchemy.ext.asyncio") for cls in type(connection).__mro__)
        case "asyncpg" | "aiosqlite":
            return True
        case "psycopg":
            return type(connection).__name__.startswith("Async")
    return False


def kind_of(connection: Any) -> str:
    """The package that the connection comes from; `dbapi` for one that only has cursors."""
    packages = {cls.__module__.partition(".")[0] for cls in type(connection).__mro__}
    if hasattr(connection, "execute"):
        for package in ("sqlalchemy", "asyncpg", "aiosqlite", "psycopg", "sqlite3"):
            if package in packages:
                return package
    if not hasattr(connection, "cursor"):
        raise BadSetting(
            f"{connection!r} is no connection: give a session or connection of SQLAlchemy 2, sqlite3, psycopg, asyncpg, "
            "aiosqlite or another DB-API driver, in whose transaction you write"
        )
    return "dbapi"


def dialect_of(connection: Any) -> Dialect:
    """The SQL that the database speaks. Raises `NotSupported` for any but SQLite's and PostgreSQL's."""
    kind = kind_of(connection)
    if kind == "sqlalchemy":
        name = str(_bind_of(connection).dialect.name)
    elif kind == "dbapi":  # Django tells it
        name = str(getattr(connection, "vendor", "postgresql"))
    else:
        name = "sqlite" if "sqlite" in kind else "postgresql"
    return checked_dialect(name)


def checked_dialect(name: str) -> Dialect:
    """The name, when Millstream writes that SQL. Raises `NotSupported`."""
    if name == "sqlite":
        return "sqlite"
    if name == "postgresql":
        return "postgresql"
    raise NotSupported(f"inbox and outbox need PostgreSQL or SQLite; this is {name}")


def check_in_transaction(connection: Any) -> None:
    """Raise `MillstreamError` where each statement would be committed by itself, and not with what the user writes.

    SQLAlchemy begins a transaction by itself, unless its isolation level is AUTOCOMMIT.
    """
    if _is_outside(connection):
        raise MillstreamError(
            f"{type(connection).__name__} is not in a transaction: begin one, and write what belongs together in it. "
            "Nothing was stored"
        )


def _is_outside(connection: Any) -> bool:
    match kind_of(connection):
        case "sqlalchemy":
            bind = _bind_of(connection)
            asked = bind.get_execution_options().get("isolation_level")
            # For all of an engine's connections it is noted in its dialect; there is no public word for that.
            return (asked or getattr(bind.dialect, "_on_connect_isolation_level", None)) == "AUTOCOMMIT"
        case "asyncpg":
            return not connection.is_in_transaction()
        case "psycopg":
            return bool(connection.autocommit) and connection.info.transaction_status == _IDLE
        case "sqlite3" | "aiosqlite":
            legacy = connection.isolation_level is None
            return (legacy or getattr(connection, "autocommit", None) is True) and not connection.in_transaction
        case "dbapi":
            ask = getattr(connection, "get_autocommit", None)  # Django's, whose attribute lies before it has connected
            return bool(ask() if ask else getattr(connection, "autocommit", False))
    return False


def _bind_of(connection: Any) -> Any:
    """The engine or connection of SQLAlchemy that a session, or a connection, speaks through."""
    bind = connection if hasattr(connection, "dialect") else connection.get_bind()
    return getattr(bind, "sync_connection", None) or bind


def _say(connection: Any, statement: Statement) -> list[Row]:
    kind, (text, parameters) = kind_of(connection), statement
    if kind == "sqlalchemy":
        return _rows_of(connection.execute(_clause(text), parameters))
    cursor = connection.cursor()
    try:
        cursor.execute(text if kind == "sqlite3" else _pyformat(text), parameters)
        return [] if cursor.description is None else _rows(cursor.fetchall())
    finally:
        cursor.close()


async def _say_async(connection: Any, statement: Statement) -> list[Row]:
    kind, (text, parameters) = kind_of(connection), statement
    if kind == "sqlalchemy":
        return _rows_of(await connection.execute(_clause(text), parameters))
    if kind == "asyncpg":
        names = list(dict.fromkeys(_NAMED.findall(text)))
        numbered = _NAMED.sub(lambda match: f"${names.index(match[1]) + 1}", text)
        return _rows(await connection.fetch(numbered, *[parameters[name] for name in names]))
    cursor = await connection.execute(text if kind == "aiosqlite" else _pyformat(text), parameters)
    try:
        return [] if cursor.description is None else _rows(await cursor.fetchall())
    finally:
        await cursor.close()


def _clause(text: str) -> Any:
    import sqlalchemy  # whoever comes with its session has it

    return sqlalchemy.text(text)


def _pyformat(text: str) -> str:
    return _NAMED.sub(r"%(\1)s", text)


def _rows_of(result: Any) -> list[Row]:
    return _rows(result) if result.returns_rows else []


def _rows(found: Iterable[Any]) -> list[Row]:
    return [tuple(row.values()) if isinstance(row, Mapping) else tuple(row) for row in found]
