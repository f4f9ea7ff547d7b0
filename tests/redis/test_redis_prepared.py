"""What is packed before it is appended: the same bytes, never another stream's, and refused when it is its turn."""

from __future__ import annotations

import pytest

from millstream.brokers.base import Policy, Position
from millstream.brokers.preparing import Preparing
from millstream.brokers.redis import appending
from millstream.brokers.redis.appending import Packed
from millstream.brokers.redis.link import pack
from millstream.errors import BrokerRefused
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
