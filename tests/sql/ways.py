"""The ways in which people reach their database, each with what is the same in all of them: connect, do, commit."""

from __future__ import annotations

import inspect
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiosqlite
import asyncpg
import psycopg
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

SQLITE = ("sqlite3", "aiosqlite", "sqlalchemy sqlite", "sqlalchemy aiosqlite")
POSTGRES = ("psycopg", "psycopg async", "asyncpg", "sqlalchemy psycopg", "sqlalchemy asyncpg")


class Way:
    """A driver and a database."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    def engine(self) -> Any:
        """SQLAlchemy's, for the ways that are its own."""
        if self.name == "sqlalchemy sqlite":
            return sqlalchemy.create_engine(f"sqlite:///{self.address}")
        if self.name == "sqlalchemy psycopg":
            return sqlalchemy.create_engine(self.address.replace("postgresql:", "postgresql+psycopg:"))
        if self.name == "sqlalchemy aiosqlite":
            return create_async_engine(f"sqlite+aiosqlite:///{self.address}")
        return create_async_engine(self.address.replace("postgresql:", "postgresql+asyncpg:"))

    def connect(self) -> Any:
        """What a relay is given."""
        if "sqlalchemy" in self.name:
            return self.engine()
        opens: dict[str, Callable[[], Any]] = {
            "sqlite3": lambda: sqlite3.connect(self.address),
            "aiosqlite": lambda: aiosqlite.connect(self.address),
            "psycopg": lambda: psycopg.connect(self.address),
            "psycopg async": lambda: psycopg.AsyncConnection.connect(self.address),
            "asyncpg": lambda: asyncpg.connect(self.address),
        }
        return opens[self.name]

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        """A connection or session in a transaction, which is committed unless the block raises."""
        if "sqlalchemy" in self.name:
            async with self._session() as session:
                yield session
            return
        made = self.connect()()
        connection = await made if inspect.isawaitable(made) else made
        try:
            if self.name == "asyncpg":
                async with connection.transaction():
                    yield connection
            else:
                yield connection
                await maybe(connection.commit())
        finally:
            await maybe(connection.close())

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[Any]:
        engine = self.engine()
        try:
            if "aio" in self.name or "asyncpg" in self.name:
                async with AsyncSession(engine) as session, session.begin():
                    yield session
            else:
                with Session(engine) as blocking, blocking.begin():
                    yield blocking
        finally:
            await maybe(engine.dispose())


async def maybe(given: Any) -> Any:
    """What came of it, awaited where it has to be."""
    return await given if inspect.isawaitable(given) else given
