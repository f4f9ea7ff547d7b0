"""Where the shop lives in these tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import RedisServer

LONG = os.environ.get("MILLSTREAM_FAULTS") == "long"
"""True for people who have half an hour: ten times as many faults."""

SHORT_S, LONG_S = 120, 3_600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(LONG_S if LONG else SHORT_S))


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A broker of this test alone."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/shop.db"
        return
    with RedisServer.start("7", appendonly="yes") as server:
        yield server.url


@pytest.fixture
def journals(tmp_path: Path) -> Path:
    """Where processes write what happens."""
    (tmp_path / "journals").mkdir()
    return tmp_path / "journals"
