"""The memory broker: what the conformance suite does not ask of every broker."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from millstream.brokers.base import (
    LATER,
    Claim,
    Consumer,
    Dead,
    Done,
    Later,
    Letter,
    Outcome,
    Output,
    Policy,
    Position,
    Record,
    Settlement,
    Stored,
    StreamSpec,
    Subscription,
)
from millstream.brokers.ledger import HELD_MS, Bury
from millstream.brokers.memory.broker import MemoryBroker
from millstream.brokers.memory.letters import Letters
from millstream.errors import BrokerFull, BrokerRefused, NotSupported
from millstream.settings import Settings
from millstream.telemetry import Telemetry
from millstream.testing.clock import VirtualClock
from millstream.units import MAX_ERROR_CHARS
from millstream.wire.packs import Columns, write

ORDERS = StreamSpec("orders", partitions=3)
LEASE_S = 10.0


async def opened() -> tuple[MemoryBroker, VirtualClock]:
    clock = VirtualClock()
    broker = MemoryBroker("memory://", Settings(), clock, Telemetry())
    await broker.open()
    await broker.declare(ORDERS)
    return broker, clock


async def joined(broker: MemoryBroker, group: str = "billing", *, order: bool = False) -> Consumer:
    return await broker.subscribe(Subscription(ORDERS, group, "shop", lease_s=LEASE_S, order=order))


def record(partition: int = 0, id_: str = "id", due_ms: int | None = None) -> Record:
    return Record(partition, id_, "order.placed", b"{}", due_ms=due_ms)


def settlement(claim: Claim, outcome: Outcome | None = None) -> Settlement:
    return Settlement(claim.position, outcome or Done())


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
    claims = sorted(await consumer.fetch(10, 0), key=lambda claim: str(claim.position))
    outcomes: list[Outcome] = [Dead("failed"), Dead("failed"), Dead("failed"), Done(), Dead("failed")]
    settlements = [settlement(claim, outcome) for claim, outcome in zip(claims, outcomes, strict=True)]
    assert await consumer.settle(settlements) == [True] * 5
    [info] = await broker.admin.groups("orders")
    assert (info.dead, info.done, info.scheduled) == (3, 1, 1)  # the other partition, and what needs no room, went on
    [waiting] = await broker.admin.pending("orders", "billing", 10)
    assert waiting.due_ms is not None
    assert waiting.due_ms - broker.clock.now_ms() == pytest.approx(300_000, abs=1_000)


@pytest.mark.parametrize("order", [False, True])
async def test_without_room_for_letters_of_a_pack_these_events_wait_and_the_others_are_finished(
    monkeypatch: pytest.MonkeyPatch, order: bool
) -> None:
    monkeypatch.setattr("millstream.brokers.memory.letters.MAX_DEAD", 2)
    broker, clock = await opened()
    consumer = await joined(broker, order=order)
    columns = Columns([b"{}"] * 5, "order.placed")
    await broker.append("orders", [write(columns, "none", partition=0, id_=f"pack{n}") for n in range(2)])
    first, second = await consumer.fetch(2, 0)
    letters = [Letter(k, record(), "failed") for k in (1, 3)]
    assert await consumer.settle([Settlement(first.stored.position, Done(), letters=letters)]) == [True]
    busy = Later(broker.clock.now_ms(), "busy", left=(2,))
    assert await consumer.settle([Settlement(second.stored.position, busy, letters=letters)]) == [True]
    [info] = await broker.admin.groups("orders")
    assert (info.dead, info.pending) == (2, 1)
    assert await consumer.fetch(2, 0) == []
    await consumer.close()
    await clock.advance(300.0)
    [again] = await (await joined(broker, order=order)).fetch(2, 0)
    assert (again.stored, list(again.left), again.attempt) == (second.stored, [1, 2, 3], 1)


def test_there_is_room_for_so_many_dead_letters_in_each_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millstream.brokers.memory.letters.MAX_DEAD", 2)
    letters = Letters("orders", "billing")
    for partition in (0, 1, 1):
        letters.bury(Bury(Stored(Position(partition, "1"), record(partition)), "failed", "", 1), 0)
    assert [letters.full(partition) for partition in (0, 1, 2)] == [False, True, False]
    assert [letters.full(partition, 2) for partition in (0, 2)] == [True, False]
    assert letters.take("000000000002", replay=False) is not None and not letters.full(1)


async def test_what_it_cannot_do_is_refused_before_anything_is_stored() -> None:
    broker, _ = await opened()
    consumer = await joined(broker)
    with pytest.raises(NotSupported, match="fsync"):
        await broker.append("orders", [record()], "fsync")
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
    assert {claim.position.partition for claim in claims} == {0, 1, 2}


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


@pytest.mark.parametrize("fetched", [False, True])
async def test_a_dead_letter_whose_event_comes_again_by_itself_is_not_given_besides(fetched: bool) -> None:
    broker, _ = await opened()
    consumer = await joined(broker)
    await broker.append("orders", [record()])
    await consumer.settle([settlement(claim, Dead("failed")) for claim in await consumer.fetch(10, 0)])
    letters = await broker.admin.dead("orders", "billing")
    await broker.admin.seek("orders", "billing", "beginning", live=True)
    await consumer.keep()
    claims = await consumer.fetch(10, 0) if fetched else []
    assert await broker.admin.replay(letters) == [True]
    claims += await consumer.fetch(10, 0)
    assert len(claims) == 1 and await consumer.settle([settlement(claims[0])]) == [True]
    assert await consumer.fetch(10, 0) == [] and broker.quiet()


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


async def test_it_is_not_quiet_while_an_event_for_later_is_due_and_nobody_has_published_it() -> None:
    broker, clock = await opened()
    due_ms = clock.now_ms() + 60_000
    await broker.append("orders", [record(due_ms=due_ms + 1), record(due_ms=due_ms)])
    assert broker.quiet() and broker.next_due_ms() == due_ms
    await clock.advance(60)
    assert not broker.quiet()
    assert (await broker.tend("orders")).published == 1
    assert broker.quiet() and broker.next_due_ms() == due_ms + 1


async def test_a_repeat_of_an_event_for_later_answers_where_it_lies_once_it_was_due() -> None:
    broker, clock = await opened()
    await broker.admin.apply("orders", Policy(dedupe_ms=60_000))
    later = record(due_ms=clock.now_ms() + 1_000)
    assert await broker.append("orders", [later, record(1)]) == [Position(0, LATER), Position(1, "1")]
    await clock.advance(1)
    await broker.tend("orders")
    assert await broker.append("orders", [record(), later, record(1)]) == [*[Position(0, "1")] * 2, Position(1, "1")]


async def test_an_event_that_falls_due_after_its_id_was_given_anew_is_not_taken_for_that_one() -> None:
    broker, clock = await opened()
    await broker.admin.apply("orders", Policy(dedupe_ms=1_000))
    await broker.append("orders", [record(due_ms=clock.now_ms() + 2_000)])
    await clock.advance(1.5)
    answers = await broker.append("orders", [record()])
    await clock.advance(0.5)
    assert (await broker.tend("orders")).published == 1
    assert await broker.append("orders", [record()]) == answers == [Position(0, "1")]


async def test_an_append_for_which_there_is_no_room_stores_none_of_its_records() -> None:
    broker, clock = await opened()
    await broker.admin.apply("orders", Policy(dedupe_ms=1_000, dedupe_ids=2, ceiling_events=3, ceiling_bytes=8))
    for many in ("abc", "abcd"):
        with pytest.raises(BrokerFull, match=r"ids in partition 0, its limit is 2: wait until the oldest are 1,000 ms"):
            await broker.append("orders", [record(id_=id_) for id_ in many])
    await broker.append("orders", [record(id_=id_) for id_ in "abab"])
    with pytest.raises(BrokerFull, match="ceiling of 3 events, and none of them may go yet"):
        await broker.append("orders", [record(1, "c"), record(1, "d")])
    later = record(1, "d", due_ms=clock.now_ms() + 5_000)
    await broker.append("orders", [record(1, "c"), later])  # which needs no room before it is due
    await broker.admin.apply("orders", Policy(ceiling_bytes=7))
    with pytest.raises(BrokerFull, match="ceiling of 7 bytes"):
        await broker.append("orders", [record()])
    [info] = await broker.admin.streams()
    assert (info.events, info.delayed, info.bytes) == (3, 1, 6)


async def test_derived_outputs_need_no_ids_and_share_the_room_with_others() -> None:
    broker, _ = await opened()
    consumer = await joined(broker)
    await broker.append("orders", [record()])
    [claim] = await consumer.fetch(1, 0)
    await broker.admin.apply("orders", Policy(dedupe_ms=1_000, dedupe_ids=1, ceiling_events=3))
    derived, own = Output("orders", record(), derived=True), Output("orders", record(id_="own"))
    with pytest.raises(BrokerFull, match="3 events"):
        await consumer.settle([Settlement(claim.position, Done(), [derived, own, derived])])
    assert await consumer.settle([Settlement(claim.position, Done(), [own, derived, own])]) == [True]
    assert [stored.record.id for stored in await broker.read("orders", 0, None, 10)] == ["id", "own", "id"]


async def test_each_partition_keeps_its_share_of_events_and_bytes() -> None:
    broker, _ = await opened()
    await broker.append("orders", [*(record(0) for _ in range(60)), *(record(1) for _ in range(30)), record(2)])
    await broker.admin.apply("orders", Policy(events=31))
    assert (await broker.tend("orders")).trimmed == 60
    assert [len(await broker.read("orders", n, None, 99)) for n in range(3)] == [15, 15, 1]
    await broker.admin.apply("orders", Policy(bytes=30))
    assert (await broker.tend("orders")).trimmed == 16
    assert [len(await broker.read("orders", n, None, 99)) for n in range(3)] == [7, 7, 1]
    await broker.admin.apply("orders", Policy(age_ms=1))
    assert (await broker.tend("orders")).trimmed == 0  # as old as that, and no older


async def test_what_is_worked_on_while_it_goes_is_lost_when_it_would_have_to_come_again() -> None:
    broker, clock = await opened()
    consumer = await joined(broker)
    await broker.append("orders", [record() for _ in range(4)])
    first, second, third, _ = await consumer.fetch(4, 0)
    await broker.admin.apply("orders", Policy(events=1, keep=False))
    assert (await broker.tend("orders")).lost == {}
    at_ms = clock.now_ms() + 1_000
    await consumer.settle(
        [settlement(first), settlement(second, Later(at_ms, "busy")), settlement(third, Dead("failed"))]
    )
    assert (await broker.tend("orders")).lost == {"billing": 1}
    [letter] = await broker.admin.dead("orders", "billing")
    assert await broker.admin.replay([letter]) == [True]
    [again] = await consumer.fetch(4, 0)
    assert await consumer.settle([settlement(again, Later(clock.now_ms(), "busy"))]) == [True]  # a copy is not lost
    assert [claim.attempt for claim in await consumer.fetch(4, 0)] == [2]
    events = [first.stored, second.stored]
    assert await broker.admin.give("orders", "billing", events) == 0  # which are gone
    [info] = await broker.admin.groups("orders")
    assert (info.done, info.lost, info.pending) == (1, 1, 2)


async def test_an_event_of_which_a_group_has_a_copy_keeps_nothing() -> None:
    broker, _ = await opened()
    consumer = await joined(broker)
    await broker.append("orders", [record() for _ in range(4)])
    first, second, *others = await consumer.fetch(4, 0)
    await consumer.settle([settlement(first, Dead("failed")), *(settlement(claim) for claim in others)])
    await broker.admin.replay(await broker.admin.dead("orders", "billing"))
    await broker.admin.apply("orders", Policy(events=2))
    tended = await broker.tend("orders")
    assert (tended.trimmed, tended.pinned_by) == (1, "billing")  # by the second event
    await broker.admin.apply("orders", Policy(events=2, keep=False))
    assert (await broker.tend("orders")).trimmed == 1
    await broker.admin.apply("orders", Policy(events=1))
    tended = await broker.tend("orders")
    assert (tended.trimmed, tended.pinned_by, tended.lost) == (1, "", {})
    assert await consumer.settle([settlement(second)]) == [True]
    assert [claim.stored for claim in await consumer.fetch(4, 0)] == [first.stored]


async def test_what_the_owner_of_a_partition_had_read_is_lost_with_the_owner_and_counted_once() -> None:
    broker, clock = await opened()
    silent = await joined(broker, order=True)
    await broker.append("orders", [record() for _ in range(6)])
    claims = await silent.fetch(6, 0)
    assert await silent.settle([settlement(claims[0]), settlement(claims[3])]) == [True, True]
    await silent.keep()
    await broker.append("orders", [record() for _ in range(6)])
    await broker.admin.apply("orders", Policy(events=1, keep=False))
    for expected in ({"billing": 5}, {}):
        assert (await broker.tend("orders")).lost == expected
    [info] = await broker.admin.groups("orders")
    assert (info.lag, info.lost) == (6, 5)  # behind the mark: five that it has, and the last one
    await clock.advance(LEASE_S)
    living = await joined(broker, order=True)
    [claim] = await living.fetch(6, 60)
    assert (claim.position, await living.settle([settlement(claim)])) == (Position(0, "12"), [True])
    assert (await broker.tend("orders")).lost == {"billing": 4}
    [info] = await broker.admin.groups("orders")
    assert (info.lag, info.lost, info.done) == (0, 9, 3)


async def test_a_group_fades_when_half_of_its_time_is_over() -> None:
    broker, clock = await opened()
    consumer = await joined(broker)
    await broker.append("orders", [record(), record()])
    await broker.admin.apply("orders", Policy(events=1, forget_ms=100_000))
    await clock.advance(30)
    await consumer.keep()
    await consumer.close()
    ends_ms = clock.now_ms() + 100_000
    await clock.advance(49.999)
    assert (await broker.tend("orders")).fading == {}
    await clock.advance(0.001)
    assert (await broker.tend("orders")).fading == {"billing": ends_ms}
    await clock.advance(49.999)
    tended = await broker.tend("orders")
    assert (tended.trimmed, tended.pinned_by, tended.fading) == (0, "billing", {"billing": ends_ms})
    await clock.advance(0.001)
    tended = await broker.tend("orders")
    assert (tended.trimmed, tended.lost, set(tended.forgotten)) == (1, {"billing": 1}, {"billing"})
    assert (tended.pinned_by, tended.fading) == ("", {})
    [info] = await broker.admin.groups("orders")
    assert (info.lag, info.lost, info.seen_ms) == (1, 1, ends_ms - 100_000)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("seed", range(15))
async def test_whatever_goes_meanwhile_every_event_is_settled_or_lost_and_none_is_both(
    seed: int, keep: bool, order: bool
) -> None:
    chaos = _Chaos(random.Random(seed), *await opened(), order=order)
    await chaos.broker.admin.apply("orders", Policy(events=12, keep=keep, forget_ms=0))
    told = 0
    for _ in range(400):
        await chaos.step()
        if chaos.dice.random() < 0.1:
            told += (await chaos.broker.tend("orders")).lost.get("billing", 0)
    await chaos.finish()
    tended = await chaos.broker.tend("orders")
    [info] = await chaos.broker.admin.groups("orders")
    assert info.lag == info.pending == info.scheduled == 0
    assert (info.done, info.dead) == (chaos.settled["Done"], chaos.settled["Dead"])
    assert set(chaos.ended.values()) <= {0, 1}
    assert info.lost == told + tended.lost.get("billing", 0) == len(chaos.published) - chaos.ended.total()
    assert (info.lost == 0) == keep


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
    def __init__(self, dice: random.Random, broker: MemoryBroker, clock: VirtualClock, *, order: bool = False) -> None:
        self.dice, self.broker, self.clock, self.order = dice, broker, clock, order
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
                self.held[await joined(self.broker, order=self.order)] = []
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
            self.attempts[claim.position] += 1
            assert 1 <= claim.attempt <= self.attempts[claim.position]
            assert not self.ended[claim.position]

    async def settle(self, consumer: Consumer, *, done: bool = False) -> None:
        claims, self.held[consumer] = self.held[consumer], []
        at_ms = self.clock.now_ms() + self.dice.randrange(20_000)
        choices: list[Outcome] = [Done(), Done(), Later(at_ms, "e"), Later(at_ms, "e", counted=False), Dead("failed")]
        outcomes = [Done() if done else self.dice.choice(choices) for _ in claims]
        results = await consumer.settle([settlement(*pair) for pair in zip(claims, outcomes, strict=True)])
        for claim, outcome, ours in zip(claims, outcomes, results, strict=True):
            if ours:
                self.settled[type(outcome).__name__] += 1
                self.ended[claim.position] += isinstance(outcome, Done | Dead)

    async def pass_time(self) -> None:
        await self.clock.advance(self.dice.choice([0.1, 1, LEASE_S / 4]))
        for consumer in self.held.keys() - self.silent:
            lost = (await consumer.keep()).lost
            self.held[consumer] = [claim for claim in self.held[consumer] if claim.position not in lost]

    async def finish(self) -> None:
        if self.order:
            for consumer in self.held:
                await consumer.close()
            self.held.clear()
        self.silent = set(self.held)
        last = await joined(self.broker, order=self.order)
        self.held[last] = []
        for _ in range(60):
            await self.pass_time()
            await self.fetch(last)
            await self.settle(last, done=True)
        assert await last.fetch(1, 0) == []
