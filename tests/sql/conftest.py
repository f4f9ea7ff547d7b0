"""The databases of these tests: one PostgreSQL for all of a process's tests, with a database for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import PostgresServer
from tests.sql.ways import POSTGRES, SQLITE, Way


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer.start() as server:
        yield server


@pytest.fixture
def dsn(postgres: PostgresServer) -> str:
    """A PostgreSQL database of this test alone."""
    return postgres.database()


@pytest.fixture(params=[*SQLITE, *POSTGRES])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Way:
    """A database of this test alone, and a driver for it."""
    if request.param in SQLITE:
        return Way(request.param, f"{tmp_path}/user.db")
    return Way(request.param, request.getfixturevalue("dsn"))
