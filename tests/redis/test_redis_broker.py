"""The broker on Redis: its URL, how it opens, declares and reads."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from urllib.parse import quote

import pytest
from msgspec.structs import replace

from millstream.brokers.base import Policy, StreamSpec, Subscription
from millstream.brokers.redis import appending, control
from millstream.brokers.redis import broker as module
from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.link import Link
from millstream.clock import Clock
from millstream.errors import (
    BadSetting,
    BadStream,
    BrokerDown,
    BrokerError,
    BrokerFull,
    BrokerRefused,
    GroupOwned,
    NotSupported,
    StreamMismatch,
)
from millstream.settings import Settings
from millstream.stream import Position
from millstream.wire.entry import Record
from tests.redis import brokers
from tests.redis.brokers import ALERTS, ORDERS, everything, made, opened, records, run_in, until
from tests.servers import RedisServer, free_port

started = brokers.started
server = brokers.server


# The URL


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost", "redis://localhost:6379/0"),
        ("redis://10.0.0.1:7000/3", "redis://10.0.0.1:7000/3"),
        ("redis://[::1]:7000", "redis://[::1]:7000/0"),
        ("redis://:pass@host/1", "redis://:***@host:6379/1"),
        ("redis://shop:p%40ss%2F@host/1?namespace=prod", "redis://shop:***@host:6379/1?namespace=prod"),
        ("redis+unix:///run/redis.sock?db=2&password=pass", "redis+unix://:***@/run/redis.sock?db=2"),
        ("unix:///run/redis.sock", "redis+unix:///run/redis.sock?db=0"),
        ("unix://shop:pass@/run/redis.sock?namespace=a", "redis+unix://shop:***@/run/redis.sock?db=0&namespace=a"),
    ],
)
def test_a_url_names_a_server_and_is_shown_without_its_password(url: str, shown: str) -> None:
    broker = made(url)
    assert broker.url == shown and "pass" not in repr(broker.target)
    assert made(shown).url == shown


def test_a_password_may_be_percent_encoded() -> None:
    assert control.target("redis://shop:p%40s%2Fs%3A@host", Settings()).password == "p@s/s:"


def test_the_namespace_of_the_url_goes_before_that_of_the_settings() -> None:
    assert made("redis://host", namespace="a").target.namespace == "a"
    assert made("redis://host?namespace=b", namespace="a").target.namespace == "b"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis://host:port", "no usable port"),
        ("redis://host:99999", "no usable port"),
        ("redis://:pa/ss@host:6379", "no usable port"),
        ("redis://host/first", "not a database number"),
        ("redis://host/1?db=2", "gives the database twice"),
        ("redis://host?timeout=5", "'timeout' of the Redis URL is unknown"),
        ("redis://host?db=1&db=1", "is twice"),
        ("redis://host?connect_timeout=soon", "not a duration"),
        ("redis://host?connect_timeout=0s", "more than zero"),
        ("redis://host?namespace=a:b", "cannot name a namespace"),
        ("redis://host?namespace=millstream", "Millstream's own"),
        ("redis://shop@host", "no password"),
        ("unix://run/redis.sock", "three slashes"),
        ("redis+unix://", "three slashes"),
    ],
)
def test_a_url_that_cannot_work_says_why_and_shows_no_password(url: str, complaint: str) -> None:
    with pytest.raises(BadSetting, match=complaint) as caught:
        made(url)
    assert "pa/ss" not in str(caught.value)


def test_tls_is_refused_as_long_as_it_cannot_be_had() -> None:
    with pytest.raises(NotSupported, match="TLS"):
        made("rediss://host")


def test_no_other_client_is_imported() -> None:
    code = "import sys, millstream.brokers.redis.broker; sys.exit('redis' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Opening


async def test_opening_and_closing_twice_is_once(server: RedisServer) -> None:
    broker = made(server.url)
    await broker.open()
    await broker.open()
    await broker.declare(ALERTS)
    await broker.append("alerts", records(1))
    assert (await broker.read("alerts", 0, None, 10))[0].record.id == "id-0"
    await broker.close()
    await broker.close()
    with pytest.raises(BrokerError, match="not open"):
        await broker.append("alerts", records(1))
    await until(lambda: b"name=millstream" not in run_in(server, "CLIENT", "LIST"))
    await broker.open()
    assert len(await everything(broker, "alerts")) == 1
    await broker.close()


async def test_a_server_that_is_down_wrong_or_locked_is_said_at_the_opening() -> None:
    with pytest.raises(BrokerDown, match="no server at"):
        await made(f"redis://127.0.0.1:{free_port()}").open()
    with RedisServer.start("8", requirepass="s3c/ret") as server:
        with pytest.raises(BrokerRefused, match="asks for a password"):
            await made(server.url).open()
        with pytest.raises(BrokerRefused, match="wrong user name or password"):
            await made(f"redis://:guess@127.0.0.1:{server.port}/0").open()
        async with opened(f"redis://:{quote('s3c/ret', safe='')}@127.0.0.1:{server.port}/0", ALERTS) as broker:
            await broker.append("alerts", records(1))


async def test_each_danger_of_a_server_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer.start("7", maxmemory_policy="allkeys-lru") as server:
        async with opened(server.url) as broker:
            await broker.admin.streams()
            assert not caplog.records  # who only looks is not bothered
            for _ in range(2):
                await broker.declare(ALERTS)
        assert len(caplog.records) == 2
        assert "allkeys-lru" in caplog.text and "keeps nothing on disk" in caplog.text
    caplog.clear()
    with RedisServer.start("7", appendonly="yes") as server:
        async with opened(server.url, ALERTS) as broker:
            await broker.append("alerts", records(1))
            assert not caplog.records
        run_in(server, "ACL", "SETUSER", "shop", "on", ">x", "~*", "+@all", "-config")
        run_in(server, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        async with opened(f"redis://shop:x@127.0.0.1:{server.port}/0", ALERTS) as broker:
            await broker.append("alerts", records(1))
            assert not caplog.records  # what we may not ask is passed over


async def test_a_server_that_is_too_old_or_a_cluster_is_refused(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        link = await broker.control()
        link.info = {"redis_version": "6.0.16"}
        with pytest.raises(BrokerRefused, match=r"Redis 6\.0\.16; Millstream needs 6\.2"):
            await control.check(link)
        link.info = {"redis_version": "7.0.15", "redis_mode": "cluster"}
        with pytest.raises(NotSupported, match="Cluster"):
            await control.check(link)


# Declaring


async def test_a_declaration_is_recorded_once_and_compared_ever_after(server: RedisServer) -> None:
    async with opened(server.url, ORDERS, ORDERS) as broker, opened(server.url, ORDERS) as other:
        assert run_in(server, "SMEMBERS", "millstream:streams") == [b"orders"]
        assert run_in(server, "HGETALL", "{orders}:meta") == [
            *(b"v", b"1", b"partitions", b"4", b"key", b"order_id", b"codec", b"json", b"policy", b"{}")
        ]
        for changed in (
            StreamSpec("orders", partitions=8, key="order_id"),
            StreamSpec("orders", partitions=4, key="customer"),
            StreamSpec("orders", partitions=4, key="order_id", codec="msgpack"),
        ):
            with pytest.raises(
                StreamMismatch,
                match=r"partitions=4, key='order_id'.*here it is declared with partitions=.*or use another",
            ):
                await broker.declare(changed)
        assert await other.spec("orders") == ORDERS


async def test_a_policy_is_recorded_once_and_holds_for_all(server: RedisServer) -> None:
    policy = Policy(dedupe_ms=1_000, dedupe_ids=10, events=100, keep=False)
    async with opened(server.url) as broker, opened(server.url) as other:
        assert await broker.declare(ALERTS, policy) == policy
        assert await other.declare(ALERTS) == policy and await broker.declare(ALERTS, Policy(age_ms=1)) == policy
        assert await other.declare(ORDERS) == Policy() and await broker.declare(ORDERS, policy) == Policy()


async def test_a_group_can_be_made_without_a_member_and_one_that_is_there_is_left_alone(server: RedisServer) -> None:
    async with opened(server.url, ORDERS) as broker:
        await broker.append("orders", records(8, partitions=4))
        for group, order in (("billing", False), ("shipping", True)):
            subscription = Subscription(ORDERS, group, "shop", start="now", order=order)
            await broker.create(subscription)
            places = [run_in(server, "XINFO", "GROUPS", f"orders:{n}") for n in range(4)]
            await broker.append("orders", records(8, partitions=4))
            for again in (
                subscription,
                replace(subscription, start="beginning"),
                replace(subscription, order=not order),
            ):
                await broker.create(again)
            for number, before in enumerate(places):
                after = run_in(server, "XINFO", "GROUPS", f"orders:{number}")
                assert [info[:8] for info in after] == [info[:8] for info in before]
            with pytest.raises(GroupOwned):
                await broker.create(replace(subscription, owner="other"))
            await (await broker.subscribe(subscription)).close()


async def test_of_two_who_declare_at_once_one_decides(server: RedisServer) -> None:
    async with opened(server.url) as one, opened(server.url) as two:
        for n in range(20):
            ways = [StreamSpec(f"s{n}", partitions=p) for p in (2, 3)]
            ends = await asyncio.gather(one.declare(ways[0]), two.declare(ways[1]), return_exceptions=True)
            assert sorted(type(end).__name__ for end in ends) == ["Policy", "StreamMismatch"]


async def test_a_stream_is_looked_up_where_somebody_else_declared_it(server: RedisServer) -> None:
    async with opened(server.url, ORDERS), opened(server.url) as other:
        with pytest.raises(BadStream, match="not declared yet"):
            other.keys("orders")
        assert await other.spec("orders") == ORDERS
        assert other.keys("orders").log(3) == b"orders:3"
        assert len(await other.append("orders", records(8, partitions=4))) == 8
        for use in (other.append("payments", records(1)), other.read("payments", 0, None, 1)):
            with pytest.raises(BrokerRefused, match="'payments' is not declared on redis://"):
                await use
        with pytest.raises(BadStream, match="'payments' is not declared on redis://"):
            await other.spec("payments")


async def test_a_key_of_another_kind_is_refused_when_the_stream_is_declared(server: RedisServer) -> None:
    run_in(server, "SET", "orders:2", "text")
    run_in(server, "SET", "{alerts}:meta", "text")
    async with opened(server.url) as broker:
        with pytest.raises(BrokerRefused, match=r"'orders:2' on .* holds a string already"):
            await broker.declare(ORDERS)
        with pytest.raises(BrokerRefused, match="WRONGTYPE"):
            await broker.declare(ALERTS)


async def test_a_declared_stream_can_be_declared_on_a_full_server(server: RedisServer) -> None:
    async with opened(server.url, ORDERS):
        run_in(server, "CONFIG", "SET", "maxmemory", 1)
        try:
            async with opened(server.url, ORDERS) as again:
                with pytest.raises(BrokerFull):
                    await again.declare(ALERTS)
        finally:
            run_in(server, "CONFIG", "SET", "maxmemory", 0)


async def test_a_stream_of_a_newer_version_is_left_alone(server: RedisServer) -> None:
    run_in(server, "HSET", "{orders}:meta", "v", 2, "partitions", 4)
    async with opened(server.url) as broker:
        with pytest.raises(NotSupported, match="upgrade"):
            await broker.declare(ORDERS)


async def test_namespaces_and_databases_do_not_see_each_other(server: RedisServer) -> None:
    places = ["0", "0?namespace=prod", "0?namespace=test", "5"]
    for number, place in enumerate(places):
        async with opened(f"redis://127.0.0.1:{server.port}/{place}", ALERTS) as broker:
            assert await broker.append("alerts", records(number + 1))
    for number, place in enumerate(places):
        async with opened(f"redis://127.0.0.1:{server.port}/{place}") as broker:
            assert len(await everything(broker, "alerts")) == number + 1
    assert {b"alerts", b"prod:alerts", b"{test:alerts}:meta"} <= set(run_in(server, "KEYS", "*"))


async def test_a_unix_socket_serves_as_well(server: RedisServer) -> None:
    async with opened(f"redis+unix://{server.socket_path}?db=1", ALERTS) as broker:
        await broker.append("alerts", records(3))
        assert len(await everything(broker, "alerts")) == 3


def test_no_two_keys_have_one_name() -> None:
    names: list[bytes] = []
    for stream, partitions in (("a", 2), ("b", 2)):
        keys = Keys("n", stream, partitions)
        names += [*keys.logs, keys.stream_meta]
        for group in ("g", "due"):
            names += [keys.tick(group), keys.live(group), keys.fence(group, "c"), keys.fence(group, "d")]
            for p in range(partitions):
                names += [keys.due(p, group), keys.note(p, group), keys.dead(p, group), keys.stats(p, group)]
        names += [keys.meta(p) for p in range(partitions)]
    assert len(set(names)) == len(names)
    assert Keys("prod", "orders", 8).due(3, "g") == b"{prod:orders:3}:due:g"
    assert Keys("", "orders", 1).fence("g", "c") == b"{orders}:fence:g:c"


# Reading


async def test_entries_that_are_no_events_are_shown_as_they_are(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        run_in(server, "XADD", "alerts", "1-1", "hello", "world")
        run_in(server, "XADD", "alerts", "2-1", "type", "alert", "data", "{}", "id", "")
        run_in(server, "XADD", "alerts", "3-1", "type", b"\xff", "data", "{}")
        foreign, short, broken = await broker.read("alerts", 0, None, 10)
        assert (foreign.record.type, foreign.record.data, foreign.record.id) == ("", b"b'hello': b'world'", "0@1-1")
        assert (short.record.type, short.record.id, short.record.time_ms) == ("alert", "0@2-1", 2)
        assert broken.record.type == "" and broken.position == Position(0, "3-1")


async def test_a_page_holds_fewer_events_when_they_are_large(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PAGE_BYTES", 1_000_000)
    async with opened(server.url, ALERTS) as broker:
        await broker.append("alerts", records(60, size_bytes=100_000))
        assert len(await broker.read("alerts", 0, None, 1_000)) == 1_000_000 // appending.FIRST_LARGEST_BYTES
        assert len(await broker.read("alerts", 0, None, 1_000)) == 9
        assert len(await everything(broker, "alerts")) == 60
        assert await broker.read("alerts", 0, None, 0) == []


async def test_places_are_found(server: RedisServer) -> None:
    async with opened(server.url, ORDERS) as broker:
        assert await broker.locate("orders", "now") == dict.fromkeys(range(4))
        run_in(server, "XADD", "orders:1", "1000-5", "type", "t", "data", "1")
        run_in(server, "XADD", "orders:1", "2000-0", "type", "t", "data", "2")
        run_in(server, "XADD", "orders:1", "2000-1", "type", "t", "data", "3")
        run_in(server, "XGROUP", "CREATE", "orders:2", "g", "0", "MKSTREAM")
        assert await broker.locate("orders", "beginning") == dict.fromkeys(range(4))
        now = await broker.locate("orders", "now")
        assert now == {0: None, 1: Position(1, "2000-1"), 2: None, 3: None}
        assert await broker.read("orders", 1, now[1], 10) == []
        for start, wanted in ((0, 3), (1_000, 3), (1_001, 2), (2_000, 2), (2_001, 0)):
            after = (await broker.locate("orders", start))[1]
            assert len(await broker.read("orders", 1, after, 10)) == wanted
        run_in(server, "DEL", "orders:0")
        run_in(server, "SET", "orders:0", "text")
        with pytest.raises(BrokerRefused, match="WRONGTYPE"):
            await broker.locate("orders", "now")


async def test_waiting_ends_with_an_event_or_in_time(server: RedisServer) -> None:
    clock = Clock()
    async with opened(server.url, ORDERS) as broker:
        after = await broker.locate("orders", "now")
        waiting = asyncio.ensure_future(broker.wait("orders", after, 30))
        await until(lambda: b"name=millstream-wait" in run_in(server, "CLIENT", "LIST"))
        await until(lambda: b"cmd=xread" in run_in(server, "CLIENT", "LIST"))
        (position,) = await broker.append("orders", [Record(3, "1", "order.placed", b"{}")])
        await waiting
        await broker.wait("orders", after, 30)  # there is one already
        begun = clock.monotonic()
        await broker.wait("orders", {**after, 3: position}, 0.2)
        assert 0.15 < clock.monotonic() - begun < 5
        await broker.wait("orders", after, 0)
        assert run_in(server, "CLIENT", "LIST").count(b"name=millstream-wait") == 1, "one connection, used again"


async def test_a_cancelled_wait_gives_its_connection_up(server: RedisServer) -> None:
    async with opened(server.url, ALERTS) as broker:
        waiting = [asyncio.ensure_future(broker.wait("alerts", {0: None}, 30)) for _ in range(3)]
        await until(lambda: run_in(server, "CLIENT", "LIST").count(b"cmd=xread") == 3)
        for wait in waiting[:2]:
            wait.cancel()
        await until(lambda: run_in(server, "CLIENT", "LIST").count(b"name=millstream-wait") == 1)
        await broker.append("alerts", records(1))
        await waiting[2]
        assert broker._waiting == 0


async def test_with_all_connections_waiting_a_reader_looks_now_and_then(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 0)
    async with opened(server.url, ALERTS) as broker:
        await broker.wait("alerts", {0: None}, 30)
        assert b"name=millstream-wait" not in run_in(server, "CLIENT", "LIST")


async def test_a_server_that_ends_wakes_who_waits() -> None:
    with RedisServer.start("7") as server:
        async with opened(server.url, ALERTS) as broker:
            waiting = asyncio.ensure_future(broker.wait("alerts", {0: None}, 30))
            await until(lambda: b"cmd=xread" in run_in(server, "CLIENT", "LIST"))
            server.kill()
            with pytest.raises(BrokerDown):
                await waiting
            with pytest.raises(BrokerDown):
                await broker.read("alerts", 0, None, 1)


async def test_a_connection_of_ones_own_is_closed_with_the_broker_at_the_latest(server: RedisServer) -> None:
    async with opened(server.url) as broker:
        own: Link = await broker.connect("mine")
        assert await own.call("PING") == b"PONG"
    assert own.closed
