"""Dictionaries: kept beside a stream, unchanged and as long as it, and named by what holds for it."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from millstream.brokers.base import Policy, StreamSpec
from millstream.errors import BadSetting, BrokerRefused
from millstream.testing.suite.trial import ORDERS, PARTED, Trial, where
from millstream.units import MAX_DICTIONARIES, MAX_DICTIONARY_BYTES

kept = where(lambda traits: traits.dictionaries)

CONTENT = bytes(range(256)) * 3
LARGE = bytes(MAX_DICTIONARY_BYTES)


@kept
async def test_a_dictionary_comes_back_as_it_was_stored_and_what_holds_for_the_stream_names_it(trial: Trial) -> None:
    other = await trial.another()
    for number, content in ((7, CONTENT), (4_294_967_295, LARGE)):
        await trial.broker.admin.train(PARTED.name, number, content)
        assert await other.dictionary(PARTED.name, number) == content
        assert await other.declare(PARTED) == Policy(dictionary=number) == (await trial.about(PARTED)).policy
    assert await other.dictionary(PARTED.name, 7) == CONTENT


@kept
async def test_a_dictionary_belongs_to_its_stream(trial: Trial) -> None:
    await trial.broker.admin.train("orders", 7, CONTENT)
    assert await trial.broker.dictionary(PARTED.name, 7) is None
    assert await trial.broker.declare(PARTED) == Policy()


@kept
async def test_a_dictionary_that_is_used_no_more_stays_and_may_be_used_again(trial: Trial) -> None:
    admin = trial.broker.admin
    await admin.train("orders", 7, CONTENT)
    await admin.train("orders", 0)
    assert await trial.broker.declare(ORDERS) == Policy()
    assert await trial.broker.dictionary("orders", 7) == CONTENT
    await admin.train("orders", 7)
    assert await trial.broker.declare(ORDERS) == Policy(dictionary=7)


@kept
async def test_a_dictionary_never_changes(trial: Trial) -> None:
    admin = trial.broker.admin
    await admin.train("orders", 7, CONTENT)
    await admin.train("orders", 8, LARGE)
    with pytest.raises(BrokerRefused, match="another dictionary with the number 7"):
        await admin.train("orders", 7, CONTENT + b"more")
    await admin.train("orders", 7, CONTENT)
    assert await trial.broker.dictionary("orders", 7) == CONTENT
    assert await trial.broker.declare(ORDERS) == Policy(dictionary=7)


@kept
async def test_none_is_used_that_is_not_there(trial: Trial) -> None:
    with pytest.raises(BrokerRefused, match="no dictionary with the number 7"):
        await trial.broker.admin.train("orders", 7)
    with pytest.raises(BrokerRefused, match="nowhere"):
        await trial.broker.admin.train("nowhere", 7, CONTENT)
    assert await trial.broker.declare(ORDERS) == Policy()
    assert await trial.broker.dictionary("orders", 7) is None


@kept
async def test_a_stream_has_so_many_dictionaries_and_no_more(trial: Trial) -> None:
    admin = trial.broker.admin
    for number in range(1, MAX_DICTIONARIES + 1):
        await admin.train("orders", number, CONTENT)
    with pytest.raises(BrokerRefused, match=f"has {MAX_DICTIONARIES} dictionaries"):
        await admin.train("orders", 99, CONTENT)
    await admin.train("orders", 1, CONTENT)
    assert await trial.broker.declare(ORDERS) == Policy(dictionary=1)


@kept
async def test_a_dictionary_over_the_limit_is_refused(trial: Trial) -> None:
    with pytest.raises(BadSetting, match="112,641 bytes, over the limit of 112,640"):
        await trial.broker.admin.train("orders", 7, LARGE + b"x")
    assert await trial.broker.dictionary("orders", 7) is None
    assert await trial.broker.declare(ORDERS) == Policy()


@kept
async def test_dictionaries_that_are_stored_at_once_are_all_there_and_one_is_used(trial: Trial) -> None:
    other = await trial.another()
    async with asyncio.TaskGroup() as tasks:
        for number in range(1, 9):
            broker = (trial.broker, other)[number % 2]
            tasks.create_task(broker.admin.train("orders", number, CONTENT[number:]))
    for number in range(1, 9):
        assert await trial.broker.dictionary("orders", number) == CONTENT[number:]
    assert (await trial.broker.declare(ORDERS)).dictionary in range(1, 9)


@where(lambda traits: traits.dictionaries and traits.retention)
async def test_a_dictionary_changes_nothing_else_that_holds(trial: Trial) -> None:
    policy = Policy(events=1_000, keep=False, ceiling_events=2_000_000_000_000)
    stream = await trial.declared(policy)
    await trial.broker.admin.train(stream.name, 7, CONTENT)
    assert await trial.broker.declare(stream) == replace(policy, dictionary=7)
    await trial.broker.admin.train(stream.name, 0)
    assert await trial.broker.declare(stream) == policy


@kept
async def test_dictionaries_go_with_their_stream(trial: Trial) -> None:
    brief = StreamSpec("brief", 2)
    await trial.broker.declare(brief)
    await trial.broker.admin.train("brief", 7, CONTENT)
    await trial.broker.admin.discard("brief")
    assert await trial.broker.declare(brief) == Policy()
    assert await trial.broker.dictionary("brief", 7) is None
