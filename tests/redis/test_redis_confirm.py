"""How far an event has come when its append returns: on a disk, on another server; each with the real thing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest
from msgspec.structs import replace

from millstream.brokers.base import Confirm, Policy, StreamSpec
from millstream.brokers.redis import confirming
from millstream.errors import BrokerDown, BrokerRefused, NotSupported, Unconfirmed
from millstream.stream import Position
from tests.redis.brokers import ALERTS, ORDERS, everything, opened, records, run_in
from tests.servers import VERSIONS, RedisServer, Version

KEPT = StreamSpec("kept", partitions=2)
HOUR = Policy(dedupe_ms=3_600_000, dedupe_ids=1_000)
ROUNDS = 5
LANES = 4

BY_VERSION = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirming, "PATIENCE_MS", 200)


@pytest.fixture(params=VERSIONS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A server and its replica."""
    with RedisServer.start(request.param) as server, server.replica(request.param) as replica:
        yield server, replica


@BY_VERSION
@pytest.mark.parametrize(
    ("config", "before_7_2", "now"),
    [
        ({}, False, False),
        ({"appendonly": "yes"}, False, True),
        ({"appendonly": "yes", "appendfsync": "always"}, True, True),
        ({"appendfsync": "always"}, False, False),
    ],
    ids=["nothing", "every second", "always", "no file"],
)
async def test_what_a_server_can_confirm_is_known_once_it_is_open(
    version: Version, config: dict[str, str], before_7_2: bool, now: bool
) -> None:
    with RedisServer.start(version, unix=False, dir=None, **config) as server:
        waits = bool(run_in(server, "COMMAND", "INFO", "WAITAOF")[0:1][0])
        async with opened(server.url, ALERTS) as broker:
            assert ("fsync" in broker.traits.confirms) is (now if waits else before_7_2)
            assert "replicated" not in broker.traits.confirms
            with pytest.raises(NotSupported, match=r"cannot confirm 'replicated', only .*memory.*: connect a replica"):
                await broker.append("alerts", records(1), "replicated")
            if "fsync" not in broker.traits.confirms:
                with pytest.raises(NotSupported, match=r"cannot confirm 'fsync'.*appendonly yes"):
                    await broker.append("alerts", records(1), "fsync")
            else:
                assert await broker.append("alerts", records(3), "fsync") == [
                    *(await everything(broker, "alerts")).values()
                ]


@BY_VERSION
async def test_who_may_not_ask_a_server_about_itself_gets_no_promise(version: Version) -> None:
    with RedisServer.start(version, appendonly="yes", appendfsync="always") as server:
        run_in(server, "ACL", "SETUSER", "poor", "on", ">x", "~*", "+@all", "-info", "-config", "-command")
        async with opened(f"redis://poor:x@127.0.0.1:{server.port}/0", ALERTS) as broker:
            assert broker.traits.confirms == {"memory"}
            assert len(await broker.append("alerts", records(3))) == 3


async def publish_until_it_dies(
    server: RedisServer, policy: Policy, confirm: Confirm, first: int
) -> dict[str, Position]:
    """What was confirmed before the server was killed in the middle of publishing."""
    confirmed: dict[str, Position] = {}

    async def publish(lane: int) -> None:
        for number in range(first, first + 1_000):
            some = [replace(record, id=f"{lane}-{record.id}") for record in records(3, partitions=2, first=3 * number)]
            try:
                positions = await broker.append("kept", some, confirm)
            except (Unconfirmed, BrokerDown):
                return
            confirmed.update((record.id, at) for record, at in zip(some, positions, strict=True))
            if len(confirmed) >= 60:
                server.kill()

    async with opened(server.url) as broker:
        await broker.declare(KEPT, policy)
        await asyncio.gather(*(publish(lane) for lane in range(LANES)))
    return confirmed


async def check_survived(server: RedisServer, confirmed: Mapping[str, Position]) -> None:
    async with opened(server.url, KEPT) as broker:
        stored = await everything(broker, "kept") | await everything(broker, "kept", 1)
    assert confirmed.items() <= stored.items()
    assert len(stored) <= len(confirmed) + 3 * LANES * ROUNDS


@BY_VERSION
@pytest.mark.parametrize("policy", [Policy(), HOUR], ids=["plain", "dedupe"])
async def test_what_was_confirmed_on_the_disk_survives_the_death_of_the_server(
    version: Version, policy: Policy
) -> None:
    with RedisServer.start(version, appendonly="yes", appendfsync="always") as server:
        confirmed: dict[str, Position] = {}
        for number in range(ROUNDS):
            confirmed |= await publish_until_it_dies(server, policy, "fsync", 1_000 * number)
            server.restart()
            await check_survived(server, confirmed)


@BY_VERSION
@pytest.mark.parametrize("policy", [Policy(), HOUR], ids=["plain", "dedupe"])
async def test_what_was_confirmed_elsewhere_survives_the_death_of_the_server(version: Version, policy: Policy) -> None:
    with ExitStack() as servers:
        confirmed: dict[str, Position] = {}
        server = servers.enter_context(RedisServer.start(version))
        for number in range(ROUNDS):
            replica = servers.enter_context(server.replica(version))
            confirmed |= await publish_until_it_dies(server, policy, "replicated", 1_000 * number)
            run_in(replica, "REPLICAOF", "NO", "ONE")
            await check_survived(replica, confirmed)
            server = replica


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("policy", [Policy(), HOUR], ids=["plain", "dedupe"])
async def test_what_no_replica_has_is_in_doubt_although_it_is_stored(
    pair: tuple[RedisServer, RedisServer], policy: Policy
) -> None:
    server, replica = pair
    async with opened(server.url) as broker:
        await broker.declare(KEPT, policy)
        await broker.append("kept", records(1))
        replica.pause()
        some = records(3, first=1)
        with pytest.raises(Unconfirmed, match=r"3 are in doubt: .* stored, and not confirmed: no replica") as caught:
            await broker.append("kept", some, "replicated")
        assert caught.value.results == [None] * 3
        assert [*await everything(broker, "kept")] == [f"id-{n}" for n in range(4)]
        await broker.append("kept", records(1, first=4))  # others do not wait


@pytest.mark.usefixtures("brief")
async def test_a_repeat_is_confirmed_only_when_the_first_one_is(pair: tuple[RedisServer, RedisServer]) -> None:
    server, replica = pair
    async with opened(server.url) as broker, opened(server.url) as other:
        await broker.declare(KEPT, HOUR)
        replica.pause()
        some = records(3)
        for publisher in (broker, other, broker):
            with pytest.raises(Unconfirmed, match="no replica"):
                await publisher.append("kept", some, "replicated")
        replica.resume()

        async def confirmed() -> list[Position]:
            while True:
                try:
                    return await other.append("kept", some, "replicated")
                except Unconfirmed:
                    continue  # it is on its way; the server waited for us

        assert await confirmed() == [*(await everything(broker, "kept")).values()]
        assert run_in(server, "XLEN", "kept:0") == 3


@pytest.mark.usefixtures("brief")
async def test_a_server_that_stops_to_write_its_file_confirms_nothing_any_more() -> None:
    for version in VERSIONS:
        with RedisServer.start(version, appendonly="yes", appendfsync="always") as server:
            async with opened(server.url, ALERTS) as broker:
                await broker.append("alerts", records(1), "fsync")
                run_in(server, "CONFIG", "SET", "appendonly", "no")
                with pytest.raises(Unconfirmed, match="not on the disk"):
                    await broker.append("alerts", records(1, first=1), "fsync")


async def test_a_refused_record_is_refused_at_every_level(pair: tuple[RedisServer, RedisServer]) -> None:
    server, _ = pair
    levels: tuple[Confirm, ...] = ("memory", "replicated")
    async with opened(server.url, ORDERS) as broker:
        run_in(server, "SET", "orders:1", "text")
        for confirm in levels:
            with pytest.raises(Unconfirmed, match="3 are stored, 1 are not, 0 are in doubt"):
                await broker.append("orders", records(4, partitions=4), confirm)
            with pytest.raises(BrokerRefused, match="WRONGTYPE"):
                await broker.append("orders", records(2, partitions=2)[1:], confirm)
