"""What is packed before it is appended, and what is posted: the same bytes, never another stream's, and no promise less."""

from __future__ import annotations

import asyncio

import pytest

from millstream.brokers.base import Policy, Position
from millstream.brokers.preparing import Posted, Posting, Preparing
from millstream.brokers.redis import appending
from millstream.brokers.redis.appending import Packed
from millstream.brokers.redis.link import pack
from millstream.errors import BrokerFull, BrokerRefused, Unconfirmed
from millstream.units import MAX_APPEND_RECORDS
from millstream.wire import entry
from millstream.wire.entry import Record
from tests.redis import brokers
from tests.redis.brokers import ALERTS, ORDERS, everything, opened, records, run_in
from tests.servers import RedisServer

started = brokers.started
server = brokers.server


async def test_what_was_packed_before_is_stored_as_if_it_were_not(server: RedisServer) -> None:
    async with opened(server.url, ORDERS) as broker:
        assert isinstance(broker, Preparing)
        some = records(100, partitions=4)
        ready = broker.prepared("orders", some)
        assert isinstance(ready, Packed) and ready == some
        commands = [pack("XADD", f"orders:{record.partition}", "*", *entry.write(record)) for record in some]
        assert ready.packed == b"".join([pack("MULTI"), *commands, pack("EXEC")])
        positions = await broker.append("orders", ready)
        assert [position.partition for position in positions] == [record.partition for record in some]
        assert list((await everything(broker, "orders", 3)).values()) == positions[3::4]


async def test_what_cannot_leave_in_one_write_is_left_as_it_is(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        for some in (records(MAX_APPEND_RECORDS + 1), records(5, size_bytes=1_000_000)):
            assert broker.prepared("alerts", some) is some
            assert len(await broker.append("alerts", broker.prepared("alerts", some))) == len(some)
        later = [*records(2), Record(0, "3", "alert", b"{}", due_ms=1)]
        assert broker.prepared("alerts", later) is later
        assert broker.prepared("unknown", some) is some


async def test_a_partition_that_there_is_not_is_refused_by_append(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        some = broker.prepared("alerts", [*records(2), Record(1, "3", "alert", b"{}")])
        with pytest.raises(BrokerRefused, match="none with number 1"):
            await broker.append("alerts", some)
        assert not await everything(broker, "alerts")


async def test_what_was_packed_for_another_stream_or_server_is_packed_again(server: RedisServer) -> None:
    async with opened(server.url, ALERTS, ORDERS) as broker:
        await broker.append("orders", broker.prepared("alerts", records(3)))
        assert not await everything(broker, "alerts") and len(await everything(broker, "orders", 0)) == 3


async def test_a_stream_that_has_come_to_remember_ids_does_so_for_what_was_packed(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        ready = broker.prepared("alerts", records(3))
        policy = Policy(dedupe_ms=60_000, dedupe_ids=100)
        run_in(server, "HSET", "{alerts}:meta", "policy", appending.write_policy(policy))
        broker._streams["alerts"]._learnt_at -= appending.LEARN_S
        first = await broker.append("alerts", ready)
        assert broker.prepared("alerts", ready) is ready  # and there is nothing to be packed from then on
        assert await broker.append("alerts", ready) == first and all(isinstance(one, Position) for one in first)
        assert list((await everything(broker, "alerts")).values()) == first


async def test_a_policy_that_nobody_can_read_is_told_to_who_has_to_wait_for_it(server: RedisServer) -> None:
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with opened(server.url, ALERTS) as broker:
        await broker.append("alerts", records(1))
        known = broker._streams["alerts"]
        run_in(server, "HSET", "{alerts}:meta", "policy", "{")
        known._learnt_at -= appending.RENEW_S
        await broker.append("alerts", records(1))  # behind the question, on the same link
        assert not known._asking and not told
        known._learnt_at -= appending.LEARN_S
        with pytest.raises(BrokerRefused, match="unreadable"):
            await broker.append("alerts", records(1))


# Posted: on the way before anybody else runs.

ONE = Record(0, "1", "alert", b"{}")


async def answered(posted: Posted | None) -> Position:
    assert posted is not None
    come = asyncio.Event()
    posted.then(come.set)
    await come.wait()
    return posted.result()


async def test_what_is_posted_leaves_at_once_and_is_stored_as_if_it_were_appended(server: RedisServer) -> None:
    async with opened(server.url, ORDERS) as broker:
        assert isinstance(broker, Posting)
        await broker.append("orders", before := records(4, partitions=4))
        some = [Record(n % 4, f"p{n}", "order", b"{}", key="k" if n % 2 else None) for n in range(8)]
        posted = [broker.post("orders", record) for record in some]
        behind = await broker.append("orders", after := records(4, partitions=4))
        positions = [await answered(one) for one in posted]
        for partition in range(4):
            stored = await broker.read("orders", partition, None, 10)
            sent = [record for record in [*before, *some, *after] if record.partition == partition]
            assert [(found.record.id, found.record.key) for found in stored] == [(one.id, one.key) for one in sent]
            assert [found.position for found in stored[1:]] == [*positions[partition::4], behind[partition]]


async def test_what_has_to_wait_or_ask_first_is_not_posted(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        assert broker.post("alerts", ONE) is None  # nobody has connected yet
        await broker.append("alerts", [ONE])
        known, link = broker._streams["alerts"], await broker._publish.get()
        assert broker.post("unknown", ONE) is None
        assert broker.post("alerts", Record(1, "3", "alert", b"{}")) is None  # there is no such partition
        assert broker.post("alerts", Record(0, "3", "alert", b"{}", due_ms=1)) is None
        link.pause_writing()
        assert broker.post("alerts", ONE) is None
        link.resume_writing()
        known.sure = False
        assert broker.post("alerts", ONE) is None
        known.sure, known._learnt_at = True, known._learnt_at - appending.RENEW_S
        assert broker.post("alerts", ONE) is None
        policy = appending.write_policy(Policy(dedupe_ms=60_000, dedupe_ids=100))
        known.learn(policy, None, broker.clock.monotonic())
        assert broker.post("alerts", ONE) is None
        known.learn(appending.write_policy(Policy()), None, broker.clock.monotonic())
        assert await answered(broker.post("alerts", ONE))
        link.close()
        assert broker.post("alerts", ONE) is None
        assert len(await broker.read("alerts", 0, None, 10)) == 2


async def test_a_posted_record_is_refused_or_in_doubt_as_an_appended_one(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        await broker.append("alerts", [ONE])
        run_in(server, "CONFIG", "SET", "maxmemory", "1")
        try:
            with pytest.raises(BrokerFull):
                await answered(broker.post("alerts", ONE))
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", "0")
        lost = broker.post("alerts", ONE)
        (await broker._publish.get()).close()
        with pytest.raises(Unconfirmed) as caught:
            await answered(lost)
        assert caught.value.results == [None]
