"""Where the shop lives in these tests, and what takes the power from its server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


@pytest.fixture(scope="session")
def power(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes a server forget when it is killed what it has not synced."""
    if sys.platform != "linux":
        pytest.skip("only Linux loads a library before that of C")
    compiler = shutil.which("cc")
    if compiler is None:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("no C compiler on this machine: install gcc")
    library = tmp_path_factory.mktemp("power") / "power.so"
    source = Path(__file__).with_name("power.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


@pytest.fixture
def powered(power: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that are started now lose their power when they are killed."""
    monkeypatch.setenv("LD_PRELOAD", str(power))
