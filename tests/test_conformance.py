"""Every broker of ours passes the suite."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from millstream.brokers.base import Position, Stored, Traits
from millstream.brokers.memory.broker import MemoryBroker
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
    traits = Traits(order=True, atomic_outputs=True, confirms=frozenset({"memory", "fsync"}))

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(url=f"sqlite:///{tmp_path}/events.db", moment_s=MOMENT_S)


@pytest.fixture(scope="module", params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer.start(request.param) as server:
        yield server


class TestRedisBroker(Conformance):
    """On each version, within one server: every test has a namespace of its own."""

    traits = Traits(order=True)

    @pytest.fixture
    def place(self, server: RedisServer) -> Place:
        return Place(url=server.url, settings=Settings(namespace=f"t{next(NAMESPACES)}"), moment_s=MOMENT_S)


def test_a_power_that_is_absent_has_no_test() -> None:
    class Weak(Conformance):
        traits = Traits(shared=False)

    class Strong(Conformance):
        traits = Traits(atomic_outputs=True, order=True)

    weak, strong = ({name for name in vars(cls) if name.startswith("test_")} for cls in (Weak, Strong))
    assert "test_who_was_taken_over_stores_no_output" in strong - weak
    assert "test_what_one_process_stores_another_sees" in strong - weak
    assert weak - strong == {"test_consuming_in_order_is_refused_by_name"}
    assert len(weak) > 60


def test_a_suite_without_traits_says_what_to_write() -> None:
    with pytest.raises(TypeError, match="write traits = Traits"):

        class Silent(Conformance):
            pass


def test_the_suite_fails_a_broker_that_breaks_its_promise() -> None:
    class Forgetful(MemoryBroker):
        async def read(self, stream: str, partition: int, after: Position | None, limit: int) -> list[Stored]:
            return (await super().read(stream, partition, after, limit))[:1]

    class Suite(Conformance):
        traits = MemoryBroker.traits

    place = Place(url="memory://", factory=Forgetful, clock=VirtualClock())
    with pytest.raises(AssertionError):
        vars(Suite)["test_appends_at_the_same_time_each_keep_their_order"](Suite(), place)
