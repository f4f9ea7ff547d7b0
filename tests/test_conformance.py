"""Every broker of ours passes the suite."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from millstream.brokers.base import Traits
from millstream.brokers.memory import MemoryBroker
from millstream.settings import Settings
from millstream.testing.clock import VirtualClock
from millstream.testing.conformance import Conformance, Place
from tests.servers import VERSIONS, RedisServer

NAMESPACES = count()

MOMENT_S = 3.0  # a takeover is promised within a second of the lease; two busy cores may need more


class TestMemoryBrokerUnderVirtualTime(Conformance):
    traits = MemoryBroker.traits

    @pytest.fixture
    def place(self) -> Place:
        return Place(url="memory://", clock=VirtualClock(), lease_s=10.0)


class TestMemoryBrokerInRealTime(Conformance):
    traits = MemoryBroker.traits

    @pytest.fixture
    def place(self) -> Place:
        return Place(url="memory://", moment_s=MOMENT_S)


class TestSQLiteBroker(Conformance):
    traits = Traits(atomic_outputs=True, confirms=frozenset({"memory", "fsync"}))

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(url=f"sqlite:///{tmp_path}/events.db", moment_s=MOMENT_S)


@pytest.fixture(scope="module", params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer.start(request.param) as server:
        yield server


class TestRedisBroker(Conformance):
    """On each version, within one server: every test has a namespace of its own."""

    traits = Traits()

    @pytest.fixture
    def place(self, server: RedisServer) -> Place:
        return Place(url=server.url, settings=Settings(namespace=f"t{next(NAMESPACES)}"), moment_s=MOMENT_S)
