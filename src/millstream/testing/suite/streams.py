"""Streams: declare, append, read, locate, wait."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from millstream.brokers.base import Position, Record, StreamSpec
from millstream.errors import BrokerRefused, StreamMismatch
from millstream.testing.suite.trial import ORDERS, PARTED, Trial, where
from millstream.units import MAX_EVENT_BYTES, MAX_ID_CHARS, MAX_KEY_BYTES, MAX_TYPE_CHARS


async def test_an_open_broker_has_the_powers_that_its_suite_was_chosen_by(trial: Trial) -> None:
    assert trial.broker.traits == trial.traits


async def test_an_append_answers_with_a_position_per_record_in_the_order_of_the_call(trial: Trial) -> None:
    records = [trial.record(partition=n % 3, key=f"k{n}") for n in range(30)]
    answers = await trial.broker.append("parted", records)
    assert [position.partition for position in answers] == [record.partition for record in records]
    assert len(set(answers)) == 30
    for partition in range(3):
        stored = await trial.stored(stream=PARTED, partition=partition)
        assert [event.position for event in stored] == answers[partition::3]
        assert [event.record.id for event in stored] == [record.id for record in records[partition::3]]


async def test_an_append_of_nothing_stores_nothing(trial: Trial) -> None:
    assert await trial.broker.append("orders", []) == []
    assert await trial.stored() == []


async def test_appends_at_the_same_time_each_keep_their_order(trial: Trial) -> None:
    async def caller(name: str) -> None:
        for n in range(10):
            await trial.broker.append("orders", [trial.record(f"{name} {n} {part}".encode()) for part in range(3)])

    async with asyncio.TaskGroup() as callers:
        for name in "abcd":
            callers.create_task(caller(name))
    stored = [event.record.data.decode() for event in await trial.stored()]
    assert len(stored) == 120
    for name in "abcd":
        mine = [data for data in stored if data.startswith(name)]
        assert mine == [f"{name} {n} {part}" for n in range(10) for part in range(3)]


async def test_a_record_comes_back_as_it_was_appended(trial: Trial) -> None:
    plain = Record(0, "id-1", "order.placed", b"{}", None, 1_700_000_000_123, b"", None, "shop")
    records = [
        plain,
        replace(plain, data=b""),
        replace(plain, data=bytes(range(256)) * 8),
        replace(plain, data=b"x" * MAX_EVENT_BYTES),
        replace(plain, key="Zoë €\n\x00 🚚", headers='{"straße":"ü"}'.encode(), source=""),
        replace(plain, id="!" * MAX_ID_CHARS, type="t" * MAX_TYPE_CHARS, key="k" * MAX_KEY_BYTES, time_ms=1),
    ]
    answers = await trial.broker.append("orders", records)
    stored = await trial.stored()
    assert [event.record for event in stored] == records
    assert [event.position for event in stored] == answers


async def test_a_record_without_a_time_gets_the_time_at_which_it_is_stored(trial: Trial) -> None:
    before_ms = trial.clock.now_ms()
    await trial.publish()
    [stored] = await trial.stored()
    assert before_ms - 1_000 <= stored.record.time_ms <= trial.clock.now_ms() + 1_000  # the server's clock may differ


async def test_reading_by_pages_leaves_out_nothing_and_repeats_nothing(trial: Trial) -> None:
    answers = await trial.publish(25)
    found: list[Position] = []
    while page := await trial.broker.read("orders", 0, found[-1] if found else None, 10):
        assert len(page) <= 10
        found += [event.position for event in page]
    assert found == answers


async def test_reading_behind_the_last_event_finds_nothing(trial: Trial) -> None:
    assert await trial.broker.read("orders", 0, None, 10) == []
    last = (await trial.publish(3))[-1]
    assert await trial.broker.read("orders", 0, last, 10) == []


async def test_the_beginning_is_located_before_the_first_event_of_each_partition(trial: Trial) -> None:
    await trial.publish(2, stream=PARTED, partition=1)
    found = await trial.broker.locate("parted", "beginning")
    assert sorted(found) == [0, 1, 2]
    assert len(await trial.broker.read("parted", 1, found[1], 10)) == 2


async def test_now_is_located_behind_the_last_event_of_each_partition(trial: Trial) -> None:
    await trial.publish(2, stream=PARTED, partition=1)
    found = await trial.broker.locate("parted", "now")
    [late] = await trial.publish(stream=PARTED, partition=1)
    [first] = await trial.publish(stream=PARTED, partition=2)
    assert [event.position for event in await trial.broker.read("parted", 1, found[1], 10)] == [late]
    assert [event.position for event in await trial.broker.read("parted", 2, found[2], 10)] == [first]


async def test_a_time_is_located_between_what_was_stored_before_and_after(trial: Trial) -> None:
    await trial.publish(2)
    between_ms = await later_ms(trial)
    late = await trial.publish(2)
    found = await trial.broker.locate("orders", between_ms)
    assert [event.position for event in await trial.broker.read("orders", 0, found[0], 10)] == late


async def test_a_wait_returns_at_once_when_there_is_an_event_behind(trial: Trial) -> None:
    await trial.publish(2)
    started_s = trial.clock.monotonic()
    await trial.broker.wait("orders", {0: None}, 30)
    assert trial.clock.monotonic() - started_s < 10


async def test_a_wait_ends_when_an_event_is_appended_to_any_of_the_partitions(trial: Trial) -> None:
    await trial.publish(1, stream=PARTED, partition=2)
    now = await trial.broker.locate("parted", "now")
    started_s = trial.clock.monotonic()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(trial.broker.wait("parted", now, 30))
        await trial.turns()
        await trial.publish(stream=PARTED, partition=2)
    assert trial.clock.monotonic() - started_s < 10


async def test_a_wait_ends_when_the_time_is_up(trial: Trial) -> None:
    [last] = await trial.publish()
    started_s = trial.clock.monotonic()
    await trial.broker.wait("orders", {0: last}, 0.2)
    assert 0.1 < trial.clock.monotonic() - started_s < 10


async def test_a_stream_may_be_declared_again_as_it_is(trial: Trial) -> None:
    await trial.broker.declare(ORDERS)
    await (await trial.another()).declare(PARTED)


async def test_a_declared_stream_cannot_be_declared_differently(trial: Trial) -> None:
    for other in (
        StreamSpec("parted", partitions=4, key="order_id"),
        StreamSpec("parted", partitions=3, key="customer"),
        StreamSpec("parted", partitions=3, key="order_id", codec="other"),
    ):
        with pytest.raises(StreamMismatch, match="parted"):
            await trial.broker.declare(other)
    await trial.publish(stream=PARTED, partition=2)


async def test_an_append_to_a_stream_that_was_never_declared_is_refused(trial: Trial) -> None:
    with pytest.raises(BrokerRefused, match="nowhere"):
        await trial.broker.append("nowhere", [trial.record()])
    assert [info.spec.name for info in await trial.broker.admin.streams()] == ["orders", "parted"]


async def test_the_admin_tells_of_all_streams_by_name(trial: Trial) -> None:
    before_ms = trial.clock.now_ms()
    for partition in range(3):
        await trial.publish(2, stream=PARTED, partition=partition)
    orders, parted = await trial.broker.admin.streams()
    assert (orders.spec, orders.events, orders.first_ms, orders.last_ms) == (ORDERS, 0, None, None)
    assert (parted.spec, parted.events) == (PARTED, 6)
    assert orders.added in (0, None) and parted.added in (6, None)
    assert parted.first_ms is not None and parted.last_ms is not None
    assert before_ms - 1_000 <= parted.first_ms <= parted.last_ms <= trial.clock.now_ms() + 1_000


@where(lambda traits: traits.shared)
async def test_what_one_process_stores_another_sees(trial: Trial) -> None:
    other = await trial.another()
    answers = await trial.publish(3)
    assert [event.position for event in await other.read("orders", 0, None, 10)] == answers
    assert await other.admin.streams() == await trial.broker.admin.streams()


@where(lambda traits: traits.shared)
async def test_a_broker_opened_later_finds_all_as_it_was(trial: Trial) -> None:
    consumer = await trial.consumer()
    await trial.publish(3)
    await trial.claims(consumer, 2)
    trial.silence(consumer)
    await consumer.close()
    await trial.broker.close()
    later = trial.brokers[0] = await trial.another()
    assert len(await trial.stored()) == 3
    assert len(await trial.claims(await trial.consumer(broker=later), 3)) == 3


async def later_ms(trial: Trial) -> int:
    """A time that is later than anything stored so far, and not later than what comes next."""
    now_ms = trial.clock.now_ms()

    async def ask() -> int:
        return trial.clock.now_ms()

    return await trial.eventually(ask, lambda ms: ms > now_ms + 2)
