"""Pages: what is read ahead comes once, in order, and only to the owner that it was read for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from millstream.brokers.base import Claim
from millstream.brokers.redis.ledger import RedisLedger
from millstream.brokers.redis.link import Answers
from millstream.brokers.redis.turns import MAX_EVENTS
from millstream.brokers.window import WINDOW
from millstream.errors import BrokerDown
from tests.redis import brokers
from tests.redis.brokers import records, run_in
from tests.redis.consuming import ids
from tests.redis.raw import LOG
from tests.redis.test_redis_ordered import alone, claimed, life_of, settled
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

PAGE = MAX_EVENTS  # of one partition


def due(life: RedisLedger) -> None:
    """From now on the look for gaps is due."""
    life._gaps._look_at = 0.0


def reads(life: RedisLedger, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The reads that are waited for, from now on."""
    read, commands = life._pair.read, list[bytes]()

    async def noted(command: bytes, block_s: float) -> object:
        commands.append(command)
        return await read(command, block_s)

    monkeypatch.setattr(life._pair, "read", noted)
    return commands


class Other:
    """Stands for a consumer of another group."""


def asked(command: bytes) -> int:
    """How many events of each partition."""
    words = command.split(b"\r\n")
    return int(words[words.index(b"COUNT") + 2])


async def gone(command: bytes) -> Answers:
    raise BrokerDown("the connection was lost")


def numbered(claims: Sequence[Claim], first: int) -> bool:
    return ids(claims) == [f"id-{number}" for number in range(first, first + len(claims))]


async def test_what_is_read_ahead_comes_once_and_in_order(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(5 * PAGE))
        claims = await consumer.fetch(PAGE, 1)
        assert life_of(consumer)._pages.under_way
        commands = reads(life_of(consumer), monkeypatch)
        claims += await consumer.fetch(PAGE, 1)
        assert len(claims) == 2 * PAGE and commands == []
        assert all(await settled(consumer, claims))
        for _ in range(3):
            page = await claimed(consumer, PAGE)
            assert all(await settled(consumer, page))
            claims += page
        assert numbered(claims, 0)


async def test_nothing_is_read_ahead_of_a_window_that_is_full(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(2 * WINDOW))
        assert len(await claimed(consumer, WINDOW)) == WINDOW
        assert not life_of(consumer)._pages.under_way


async def test_what_was_read_ahead_of_a_lease_that_was_given_back_is_dropped(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(3 * PAGE))
        assert len(await consumer.fetch(PAGE, 1)) == PAGE and life_of(consumer)._pages.under_way
        await consumer.release(frozenset([0]))
        await consumer.keep()
        assert numbered(await claimed(consumer, PAGE), 0)


async def test_what_is_in_hand_by_reading_ahead_is_not_lost_when_it_is_trimmed_away(server: RedisServer) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(3 * PAGE))
        claims = await consumer.fetch(PAGE, 1)
        run_in(server, "CLIENT", "UNBLOCK", "0")  # answered behind the read: what it brings is on its way
        run_in(server, "XTRIM", LOG, "MAXLEN", "0")
        due(life_of(consumer))
        claims += await consumer.fetch(PAGE, 1)
        assert numbered(claims, 0) and len(claims) == 2 * PAGE
        assert not life_of(consumer)._pages.under_way  # the look that is due comes first
        assert await consumer.fetch(PAGE, 0) == []
        assert all(await settled(consumer, claims))
        (info,) = await broker.admin.groups("orders")
        assert (info.done, info.lost) == (2 * PAGE, PAGE)


async def test_what_was_read_is_handed_out_though_nothing_can_be_read_ahead_of_it(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(2 * PAGE))
        with monkeypatch.context() as patched:
            patched.setattr(life_of(consumer)._pair, "post", gone)
            claims = await consumer.fetch(PAGE, 1)
        assert len(claims) == PAGE
        claims += await claimed(consumer, PAGE)
        due(life_of(consumer))
        assert numbered(claims, 0) and await consumer.fetch(PAGE, 0) == []
        (info,) = await broker.admin.groups("orders")
        assert info.lost == 0


async def test_a_read_that_would_bring_no_more_is_not_repeated(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with alone(server) as (broker, consumer):
        await broker.append("orders", records(3 * PAGE))
        commands = reads(life_of(consumer), monkeypatch)
        assert len(await consumer.fetch(PAGE, 1)) == PAGE
        assert len(commands) == len(set(commands)) == 3


async def test_groups_that_share_a_process_share_what_their_first_reads_bring(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with alone(server) as (broker, consumer):
        others = [Other() for _ in range(7)]
        for other in others:
            broker.budget.join(other)
        await broker.append("orders", records(PAGE))
        commands = reads(life_of(consumer), monkeypatch)
        assert len(await consumer.fetch(PAGE, 1)) == PAGE
        assert [asked(command) for command in commands] == [1, 16, 256, PAGE]
