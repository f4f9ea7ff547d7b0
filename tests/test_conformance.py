"""Every broker of ours passes the suite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest
from msgspec.structs import replace

from millstream.brokers.base import (
    Claim,
    Confirm,
    Consumer,
    Position,
    Record,
    Settlement,
    Slot,
    Stored,
    Subscription,
    Tended,
    Traits,
)
from millstream.brokers.memory.broker import MemoryBroker
from millstream.settings import Settings
from millstream.testing.clock import VirtualClock
from millstream.testing.conformance import Conformance, Place
from tests.servers import VERSIONS, RedisServer

NAMESPACES = count()

NODE = 100  # entries of a Redis stream that lie together, and are removed together
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
    traits = Traits(
        order=True,
        delayed=True,
        atomic_outputs=True,
        confirms=frozenset({"memory", "fsync"}),
        dedupe=True,
        retention=True,
        slots=True,
        packs=True,
        dictionaries=True,
    )

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(url=f"sqlite:///{tmp_path}/events.db", moment_s=MOMENT_S)


@pytest.fixture(scope="module", params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer.start(request.param) as server:
        yield server


class TestRedisBroker(Conformance):
    """On each version, within one server: every test has a namespace of its own."""

    traits = Traits(
        order=True,
        delayed=True,
        atomic_outputs=True,
        dedupe=True,
        retention=True,
        slots=True,
        packs=True,
        dictionaries=True,
    )

    @pytest.fixture
    def place(self, server: RedisServer) -> Place:
        settings = Settings(namespace=f"t{next(NAMESPACES)}")
        return Place(url=server.url, settings=settings, moment_s=MOMENT_S, spare=NODE)


def test_a_power_that_is_absent_has_no_test() -> None:
    class Weak(Conformance):
        traits = Traits(shared=False)

    class Strong(Conformance):
        traits = Traits(
            order=True, delayed=True, atomic_outputs=True, dedupe=True, retention=True, slots=True, packs=True
        )

    weak, strong = ({name for name in vars(cls) if name.startswith("test_")} for cls in (Weak, Strong))
    assert "test_who_was_taken_over_stores_no_output" in strong - weak
    assert "test_what_one_process_stores_another_sees" in strong - weak
    assert "test_events_of_a_pack_die_alone_and_the_others_go_on" in strong - weak
    assert weak - strong == {
        "test_consuming_in_order_is_refused_by_name",
        "test_a_window_is_refused_by_a_broker_that_remembers_no_ids",
        "test_an_event_for_later_is_refused_by_a_broker_that_cannot_delay",
        "test_a_slot_is_refused_by_a_broker_that_cannot_tell_whether_it_was_published",
        "test_retention_is_refused_by_a_broker_that_removes_nothing",
    }
    assert len(weak) > 60


def test_a_suite_without_traits_says_what_to_write() -> None:
    with pytest.raises(TypeError, match="write traits = Traits"):

        class Silent(Conformance):
            pass


class Forgetful(MemoryBroker):
    """Reads no further than the first event."""

    async def read(self, stream: str, partition: int, after: Position | None, limit: int) -> list[Stored]:
        return [] if after else (await super().read(stream, partition, after, limit))[:1]


class Doubling(MemoryBroker):
    """Remembers no ids."""

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        self.log(stream).policy = replace(self.log(stream).policy, dedupe_ms=0)
        return await super().append(stream, records, confirm)


class Hasty(MemoryBroker):
    """Publishes at once what is for later."""

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        return await super().append(stream, [replace(record, due_ms=None) for record in records], confirm)


class Repeating(MemoryBroker):
    """Publishes every slot that it is asked to."""

    async def append_slot(self, stream: str, slot: Slot, record: Record | None) -> bool:
        self.log(stream).slots.pop(slot.schedule, None)
        return await super().append_slot(stream, slot, record)


class Greedy(MemoryBroker):
    """Removes what groups still need."""

    async def tend(self, stream: str) -> Tended:
        log = self.log(stream)
        log.policy, recorded = replace(log.policy, keep=False), log.policy
        tended = await super().tend(stream)
        log.policy = recorded
        return tended


class Secretive(MemoryBroker):
    """Tells nobody what is lost."""

    async def tend(self, stream: str) -> Tended:
        return replace(await super().tend(stream), lost={})


class Wasteful(MemoryBroker):
    """Forgets what is left of a pack."""

    async def subscribe(self, subscription: Subscription) -> Consumer:
        consumer = await super().subscribe(subscription)
        fetch = consumer.fetch

        async def whole(limit: int, wait_s: float) -> list[Claim]:
            return [replace(claim, left=()) for claim in await fetch(limit, wait_s)]

        consumer.fetch = whole  # type: ignore[method-assign]
        return consumer


class Careless(MemoryBroker):
    """Keeps no dead letters of events of a pack."""

    async def subscribe(self, subscription: Subscription) -> Consumer:
        consumer = await super().subscribe(subscription)
        settle = consumer.settle

        async def bare(settlements: Sequence[Settlement]) -> list[bool]:
            return await settle([replace(settlement, letters=()) for settlement in settlements])

        consumer.settle = bare  # type: ignore[method-assign]
        return consumer


@pytest.mark.parametrize(
    ("broker", "test"),
    [
        (Forgetful, "test_appends_at_the_same_time_each_keep_their_order"),
        (Doubling, "test_an_event_that_is_published_again_is_not_stored_again"),
        (Hasty, "test_an_event_for_later_is_kept_aside"),
        (Hasty, "test_events_for_later_come_when_they_are_due_and_in_that_order"),
        (Repeating, "test_a_slot_is_published_once_and_none_before_it_any_more"),
        (Greedy, "test_events_that_a_group_has_not_seen_stay"),
        (Greedy, "test_events_that_an_ordered_group_has_not_settled_stay"),
        (Secretive, "test_losses_are_told_once_by_whoever_tends"),
        (Wasteful, "test_of_a_pack_only_what_is_left_is_tried_again"),
        (Wasteful, "test_of_a_pack_only_what_is_left_is_tried_again_in_order"),
        (Wasteful, "test_what_is_left_of_a_pack_survives_a_release"),
        (Wasteful, "test_what_is_left_of_a_pack_survives_the_release_of_its_key"),
        (Careless, "test_events_of_a_pack_die_alone_and_the_others_go_on"),
        (Careless, "test_events_of_a_pack_die_alone_and_the_others_go_on_in_order"),
    ],
)
def test_the_suite_fails_a_broker_that_breaks_its_promise(broker: type[MemoryBroker], test: str) -> None:
    class Suite(Conformance):
        traits = MemoryBroker.traits

    place = Place(url="memory://", factory=broker, clock=VirtualClock())
    with pytest.raises(AssertionError):
        vars(Suite)[test](Suite(), place)
