"""The brokers that fault tests run on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.processes import Trial
from tests.servers import RedisServer


@pytest.fixture(params=["sqlite", "redis"])
def trial(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trial]:
    """A shop on an empty broker of each kind."""
    if request.param == "sqlite":
        with Trial(f"sqlite:///{tmp_path}/shop.db", tmp_path) as trial:
            yield trial
    else:
        with RedisServer.start("7") as server, Trial(server.url, tmp_path) as trial:
            yield trial
