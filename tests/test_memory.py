"""The memory broker: what the conformance suite does not ask of every broker."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from millstream.brokers.base import (
    Claim,
    Consumer,
    Dead,
    Done,
    Later,
    Outcome,
    Output,
    Position,
    Record,
    Settlement,
    Stored,
    StreamSpec,
    Subscription,
)
from millstream.brokers.ledger import HELD_MS
from millstream.brokers.memory.broker import MemoryBroker
from millstream.brokers.memory.letters import Letters
from millstream.errors import BrokerRefused, NotSupported
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from millstream.testing.clock import VirtualClock
from millstream.units import MAX_ERROR_CHARS

ORDERS = StreamSpec("orders", partitions=3)
LEASE_S = 10.0


async def opened() -> tuple[MemoryBroker, VirtualClock]:
    clock = VirtualClock()
    broker = MemoryBroker("memory://", Settings(), clock, Telemetry())
    await broker.open()
    await broker.declare(ORDERS)
    return broker, clock


async def joined(broker: MemoryBroker, group: str = "billing") -> Consumer:
    return await broker.subscribe(Subscription(ORDERS, group, "shop", lease_s=LEASE_S))


def record(partition: int = 0) -> Record:
    return Record(partition, "id", "order.placed", b"{}")


def settlement(claim: Claim, outcome: Outcome | None = None) -> Settlement:
    return Settlement(claim.stored.position, outcome or Done())


async def test_it_is_quiet_when_only_time_or_a_publisher_can_make_something_happen() -> None:
    broker, clock = await opened()
    consumer = await joined(broker)
    assert broker.quiet() and broker.next_due_ms() is None
    await broker.append("orders", [record()])
    assert not broker.quiet()  # undelivered
    [claim] = await consumer.fetch(10, 0)
    assert not broker.quiet()  # held
    due_ms = clock.now_ms() + 5_000
    await consumer.settle([settlement(claim, Later(due_ms, "busy"))])
    assert broker.quiet() and broker.next_due_ms() == due_ms
    await clock.advance(5)
    assert not broker.quiet()  # due
    await consumer.settle([settlement(claim) for claim in await consumer.fetch(10, 0)])
    assert broker.quiet() and broker.next_due_ms() is None


async def test_a_group_without_members_is_not_quiet_while_it_has_events() -> None:
    broker, _ = await opened()
    await (await joined(broker)).close()
    await broker.append("orders", [record()])
    assert not broker.quiet()


async def test_no_more_dead_letters_than_the_limit_are_kept_of_a_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millstream.brokers.memory.letters.MAX_DEAD", 2)
    broker, _ = await opened()
    consumer = await joined(broker)
    await broker.append("orders", [*(record(0) for _ in range(4)), record(1)])
    claims = sorted(await consumer.fetch(10, 0), key=lambda claim: str(claim.stored.position))
    outcomes: list[Outcome] = [Dead("failed"), Dead("failed"), Dead("failed"), Done(), Dead("failed")]
    settlements = [settlement(claim, outcome) for claim, outcome in zip(claims, outcomes, strict=True)]
    assert await consumer.settle(settlements) == [True] * 5
    [info] = await broker.admin.groups("orders")
    assert (info.dead, info.done, info.scheduled) == (3, 1, 1)  # the other partition, and what needs no room, went on
    [waiting] = await broker.admin.pending("orders", "billing", 10)
    assert waiting.due_ms is not None
    assert waiting.due_ms - broker.clock.now_ms() == pytest.approx(300_000, abs=1_000)


def test_there_is_room_for_so_many_dead_letters_in_each_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millstream.brokers.memory.letters.MAX_DEAD", 2)
    letters = Letters("orders", "billing")
    for partition in (0, 1, 1):
        letters.bury(Stored(Position(partition, "1"), record(partition)), "failed", "", 1, 0)
    assert [letters.full(partition) for partition in (0, 1, 2)] == [False, True, False]
    assert [letters.full(partition, 2) for partition in (0, 2)] == [True, False]
    assert letters.take("000000000002", replay=False) is not None and not letters.full(1)


async def test_what_it_cannot_do_is_refused_before_anything_is_stored() -> None:
    broker, _ = await opened()
    consumer = await joined(broker)
    with pytest.raises(NotSupported, match="fsync"):
        await broker.append("orders", [record()], "fsync")
    with pytest.raises(NotSupported, match="delay"):
        await broker.append("orders", [record(), Record(0, "id", "t", b"", due_ms=1)])
    with pytest.raises(BrokerRefused, match="partitions"):
        await broker.append("orders", [record(), record(3)])
    with pytest.raises(BrokerRefused, match="nobody"):
        await broker.admin.adopt("orders", "nobody", "shop")
    assert await consumer.fetch(10, 0) == []


async def test_a_refused_output_leaves_all_settlements_of_the_call_unsettled() -> None:
    broker, _ = await opened()
    consumer = await joined(broker)
    await broker.append("orders", [record(), record()])
    first, second = await consumer.fetch(10, 0)
    bad = Settlement(second.stored.position, Done(), [Output("orders", record(7))])
    with pytest.raises(BrokerRefused):
        await consumer.settle([settlement(first), bad])
    assert await consumer.settle([settlement(first), settlement(second)]) == [True, True]


async def test_a_busy_partition_does_not_starve_the_others() -> None:
    broker, _ = await opened()
    consumer = await joined(broker)
    await broker.append("orders", [record(0) for _ in range(100)] + [record(1), record(2)])
    claims = [claim for _ in range(3) for claim in await consumer.fetch(1, 0)]
    assert {claim.stored.position.partition for claim in claims} == {0, 1, 2}


async def test_a_key_that_waits_for_a_person_is_quiet_and_never_due() -> None:
    broker, _ = await opened()
    consumer = await broker.subscribe(Subscription(ORDERS, "billing", "shop", lease_s=LEASE_S, order=True))
    await broker.append("orders", [record()])
    [claim] = await consumer.fetch(1, 0)
    assert await consumer.settle([settlement(claim, Later(HELD_MS, "x" * (MAX_ERROR_CHARS + 1)))]) == [True]
    assert broker.quiet() and broker.next_due_ms() is None
    [pending] = await broker.admin.pending("orders", "billing", 10)
    assert (pending.consumer, pending.due_ms) == ("", None)
    [key] = await broker.admin.keys("orders", "billing")
    assert len(key.error) == MAX_ERROR_CHARS
    await broker.admin.release_keys([key])
    assert not broker.quiet() and broker.next_due_ms() == 0


async def test_a_group_without_order_that_is_moved_forgets_all_that_is_pending() -> None:
    broker, _ = await opened()
    consumer = await joined(broker)
    await broker.append("orders", [record(), record()])
    held, waiting = await consumer.fetch(10, 0)
    await consumer.settle([settlement(waiting, Later(0, "busy"))])
    await broker.admin.seek("orders", "billing", "now", live=True)
    assert broker.quiet()
    assert await consumer.fetch(10, 0) == []  # it has not been told yet
    assert (await consumer.keep()).lost == {held.stored.position}
    assert await consumer.fetch(10, 0) == []


async def test_an_errors_text_is_cut_at_its_limit() -> None:
    broker, _ = await opened()
    consumer = await joined(broker)
    await broker.append("orders", [record()])
    [claim] = await consumer.fetch(1, 0)
    await consumer.settle([settlement(claim, Dead("failed", "x" * (MAX_ERROR_CHARS + 1)))])
    [letter] = await broker.admin.dead("orders", "billing")
    assert len(letter.error) == MAX_ERROR_CHARS


async def test_after_a_pause_of_the_whole_process_nobody_judges_before_having_beaten() -> None:
    broker, clock = await opened()
    first, second = await joined(broker), await joined(broker)
    await broker.append("orders", [record()])
    [claim] = await first.fetch(1, 0)
    await clock.advance(LEASE_S * 2)
    assert await second.fetch(1, 0) == []
    assert await first.keep() == await second.keep()
    assert await second.fetch(1, 0) == []
    assert await first.settle([settlement(claim)]) == [True]


async def test_who_was_found_silent_claims_nothing_before_it_was_told() -> None:
    broker, clock = await opened()
    silent, living = await joined(broker), await joined(broker)
    await broker.append("orders", [record(), record()])
    [held] = await silent.fetch(1, 0)
    await clock.advance(LEASE_S / 2)
    await living.keep()
    await clock.advance(LEASE_S / 2)
    [taken] = await living.fetch(1, 0)
    assert taken.stored == held.stored
    assert await silent.fetch(1, 0) == []
    assert (await silent.keep()).lost == {held.stored.position}
    assert (await silent.keep()).lost == frozenset()
    assert len(await silent.fetch(1, 0)) == 1


@pytest.mark.parametrize("seed", range(40))
async def test_whatever_happens_every_event_is_settled_once_by_whoever_holds_it(seed: int) -> None:
    """Consumers come, crash, stand still and go at random; at the end all numbers add up, and nothing is lost."""
    chaos = _Chaos(random.Random(seed), *await opened())
    for _ in range(300):
        await chaos.step()
    await chaos.finish()
    [info] = await chaos.broker.admin.groups("orders")
    assert info.lag == info.pending == info.scheduled == 0
    assert (info.done, info.dead) == (chaos.settled["Done"], chaos.settled["Dead"])
    assert chaos.ended == Counter(chaos.published)


class _Chaos:
    def __init__(self, dice: random.Random, broker: MemoryBroker, clock: VirtualClock) -> None:
        self.dice, self.broker, self.clock = dice, broker, clock
        self.published: list[Position] = []
        self.held: dict[Consumer, list[Claim]] = {}
        self.silent: set[Consumer] = set()
        self.attempts: Counter[Position] = Counter()
        self.ended: Counter[Position] = Counter()
        self.settled: Counter[str] = Counter()

    async def step(self) -> None:
        consumer = self.dice.choice([*self.held, None, None])
        match self.dice.randrange(8):
            case 0 if len(self.held) < 5:
                self.held[await joined(self.broker)] = []
            case 1:
                self.published += await self.broker.append("orders", [record(self.dice.randrange(3))])
            case 2 if consumer:
                self.silent ^= {consumer}
            case 3 if consumer and self.dice.random() < 0.3:
                del self.held[consumer]
                self.silent.discard(consumer)
                await consumer.close()
            case 4 | 5 if consumer:
                await self.fetch(consumer)
            case 6 if consumer:
                await self.settle(consumer)
            case _:
                await self.pass_time()

    async def fetch(self, consumer: Consumer) -> None:
        for claim in await consumer.fetch(self.dice.randrange(1, 5), 0):
            self.held[consumer].append(claim)
            self.attempts[claim.stored.position] += 1
            assert 1 <= claim.attempt <= self.attempts[claim.stored.position]
            assert not self.ended[claim.stored.position]

    async def settle(self, consumer: Consumer, *, done: bool = False) -> None:
        claims, self.held[consumer] = self.held[consumer], []
        at_ms = self.clock.now_ms() + self.dice.randrange(20_000)
        choices: list[Outcome] = [Done(), Done(), Later(at_ms, "e"), Later(at_ms, "e", counted=False), Dead("failed")]
        outcomes = [Done() if done else self.dice.choice(choices) for _ in claims]
        results = await consumer.settle([settlement(*pair) for pair in zip(claims, outcomes, strict=True)])
        for claim, outcome, ours in zip(claims, outcomes, results, strict=True):
            if ours:
                self.settled[type(outcome).__name__] += 1
                self.ended[claim.stored.position] += isinstance(outcome, Done | Dead)

    async def pass_time(self) -> None:
        await self.clock.advance(self.dice.choice([0.1, 1, LEASE_S / 4]))
        for consumer in self.held.keys() - self.silent:
            lost = (await consumer.keep()).lost
            self.held[consumer] = [claim for claim in self.held[consumer] if claim.stored.position not in lost]

    async def finish(self) -> None:
        self.silent = set(self.held)
        last = await joined(self.broker)
        self.held[last] = []
        for _ in range(60):
            await self.pass_time()
            await self.fetch(last)
            await self.settle(last, done=True)
        assert await last.fetch(1, 0) == []
