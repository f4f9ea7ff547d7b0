"""The link alone: whose answer is whose, and what is known after a fault."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest

from millstream.brokers.redis.link import MAX_UNANSWERED, Link, Target, broker_error, pack
from millstream.brokers.redis.scripts import script
from millstream.clock import Clock
from millstream.errors import BrokerDown, BrokerError, BrokerFull, BrokerRefused, GroupVanished
from tests.servers import VERSIONS, RedisServer, free_port

GREETING = b"+OK\r\n:7\r\n$10\r\nrun_id:abc\r\n*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n"


@pytest.fixture(scope="module", params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer.start(request.param, unix=True) as started:
        yield started


def at(server: RedisServer, **more: Any) -> Target:
    return Target(host="127.0.0.1", port=server.port, **more)


@asynccontextmanager
async def linked(target: Target, name: str = "test") -> AsyncIterator[Link]:
    link = await Link.connect(target, Clock(), name=name)
    try:
        yield link
    finally:
        link.close()
        await asyncio.sleep(0)


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not met():
            await asyncio.sleep(0.002)


async def test_a_link_knows_its_server_and_is_known_there(server: RedisServer) -> None:
    async with linked(at(server), name="a name with spaces") as link:
        clients = (await link.call("CLIENT", "LIST")).decode()
        assert f"id={link.client_id} " in clients and "name=a-name-with-spaces" in clients
        assert f"run_id:{link.run_id}" in (await link.call("INFO", "server")).decode() and len(link.run_id) == 40
        assert not link.closed and link.error is None


async def test_every_call_gets_its_own_answer_whatever_is_cancelled(server: RedisServer) -> None:
    chance = random.Random(7)
    async with linked(at(server)) as link:
        for _ in range(20):
            tasks = [asyncio.ensure_future(link.call("ECHO", number)) for number in range(50)]
            await asyncio.sleep(0)  # all have written
            cancelled = {task for task in tasks if chance.random() < 0.4}
            for task in cancelled:
                task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            for number, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
                assert isinstance(answer, asyncio.CancelledError) if task in cancelled else answer == b"%d" % number
        assert await link.call("ECHO", "in step") == b"in step"


async def test_a_cancelled_blocking_read_does_not_disturb_the_next_call(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        read = asyncio.ensure_future(link.call("XREAD", "BLOCK", 100, "STREAMS", "nothing", "0"))
        await asyncio.sleep(0)
        read.cancel()
        assert await link.call("ECHO", "mine") == b"mine"


async def test_who_leaves_early_takes_what_has_come_and_the_rest_comes_after_it(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        read = pack("XREAD", "BLOCK", 100, "STREAMS", "nothing", "0")
        answers = await link.post(pack("ECHO", "first") + read, 2)
        await until(lambda: bool(answers.got))
        answers.leave()
        assert await answers == [b"first"]
        assert await link.call("ECHO", "mine") == b"mine"
        assert answers.got == [b"first", None]


async def test_who_asked_to_be_called_hears_of_the_end_whatever_it_is_and_whenever_it_was(server: RedisServer) -> None:
    heard: list[str] = []
    async with linked(at(server)) as link:
        answers = await link.post(pack("ECHO", "first") + pack("ECHO", "second"), 2)
        answers.then(lambda: heard.append("all"))
        assert not heard and await answers == [b"first", b"second"]
        assert heard == ["all"]
        answers.then(lambda: heard.append("late"))
        assert heard == ["all", "late"]
        lost = await link.post(pack("XREAD", "BLOCK", 1_000, "STREAMS", "nothing", "0"), 1)
        lost.then(lambda: heard.append("lost"))
        link.close()
        assert heard == ["all", "late", "lost"]
        with pytest.raises(BrokerDown):
            lost.result()


async def test_commands_of_one_write_are_answered_in_order_with_errors_as_values(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        one, error, nothing, two = await link.calls(
            [("ECHO", "1"), ("NO-SUCH-COMMAND",), ("GET", "absent"), ("ECHO", b"2")]
        )
        assert (one, nothing, two) == (b"1", None, b"2") and isinstance(error, hiredis.ReplyError)
        with pytest.raises(BrokerRefused, match=rf"NO-SUCH-COMMAND on 127.0.0.1:{server.port}.*unknown command"):
            await link.call("NO-SUCH-COMMAND")


async def test_an_answer_of_megabytes_arrives_whole(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        big = bytes(range(256)) * 40_000
        assert await link.call("ECHO", big) == big


async def test_a_script_is_learnt_by_the_server_and_learnt_again(server: RedisServer) -> None:
    both = script("both", b"return {KEYS[1], ARGV[1]}")
    async with linked(at(server)) as link:
        for _ in range(2):
            await link.call("SCRIPT", "FLUSH")
            assert await link.run(both, ["k"], ["a"]) == [b"k", b"a"]
        assert await link.call("EVALSHA", both.sha, 1, "k", "b") == [b"k", b"b"]
        with pytest.raises(BrokerRefused, match="script wrong on"):
            await link.run(script("wrong", b"return redis.call('LPUSH', KEYS[1])"), ["k"], [])


async def test_an_error_inside_a_script_keeps_its_meaning(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        await link.call("SET", "text", "x")
        with pytest.raises(BrokerRefused, match="holds something else"):
            await link.run(script("add", b"return redis.call('XADD', KEYS[1], '*', 'a', 'b')"), ["text"], [])


async def test_a_missed_deadline_closes_the_link_and_fails_all_that_wait(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        server.pause()
        try:
            late = asyncio.ensure_future(link.call("ECHO", "late", deadline_s=0.1))
            patient = asyncio.ensure_future(link.call("ECHO", "patient", deadline_s=50))
            answers = await asyncio.gather(late, patient, return_exceptions=True)
        finally:
            server.resume()
        assert all(type(answer) is BrokerDown and "did not answer in time" in str(answer) for answer in answers)
        assert link.closed and isinstance(link.error, BrokerDown)
        with pytest.raises(BrokerDown):
            await link.call("ECHO", "again")


async def test_a_short_deadline_behind_a_long_one_is_kept(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        blocked = asyncio.ensure_future(link.call("XREAD", "BLOCK", 20_000, "STREAMS", "none", "0", deadline_s=30))
        await asyncio.sleep(0)
        async with asyncio.timeout(3):
            with pytest.raises(BrokerDown):
                await link.call("ECHO", "behind", deadline_s=0.1)
        with pytest.raises(BrokerDown):
            await blocked


async def test_an_answer_within_the_deadline_of_a_blocking_read_closes_nothing(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        assert await link.call("XREAD", "BLOCK", 300, "STREAMS", "none", "0", deadline_s=5) is None
        for _ in range(5):  # the timer of an answered call must not fell a later one
            assert await link.call("XREAD", "BLOCK", 60, "STREAMS", "none", "0", deadline_s=0.3) is None
        assert not link.closed


async def test_calls_wait_in_line_while_the_socket_is_full_and_keep_their_order(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        await link.call("DEL", "list")
        filler = b"x" * 524_288
        server.pause()
        try:
            pushes = [asyncio.ensure_future(link.call("RPUSH", "list", b"%d:" % n + filler)) for n in range(60)]
            await until(lambda: link._in_line > 0)
        finally:
            server.resume()
        assert await asyncio.gather(*pushes) == list(range(1, 61))
        assert [value.partition(b":")[0] for value in await link.call("LRANGE", "list", 0, -1)] == [
            b"%d" % n for n in range(60)
        ]
        await link.call("DEL", "list")


async def test_who_comes_when_there_is_room_again_goes_behind_the_line(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        await link.call("DEL", "order")
        link.pause_writing()
        first = asyncio.ensure_future(link.call("RPUSH", "order", "first"))
        await until(lambda: link._in_line == 1)
        link.resume_writing()
        await link.call("RPUSH", "order", "second")  # begins before the first has woken up
        await first
        assert await link.call("LRANGE", "order", 0, -1) == [b"first", b"second"]


async def test_a_call_in_line_fails_when_the_link_is_closed(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        server.pause()
        try:
            calls = [asyncio.ensure_future(link.call("ECHO", b"x" * 1_000_000)) for _ in range(40)]
            await until(lambda: link._in_line > 0)
            link.close()
            answers = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            server.resume()
        assert all(isinstance(answer, BrokerDown) for answer in answers)


async def test_the_queue_has_a_bound_and_takes_calls_again_below_it(server: RedisServer) -> None:
    async with linked(at(server)) as link:
        server.pause()
        try:
            calls = [asyncio.ensure_future(link.call("ECHO", n)) for n in range(MAX_UNANSWERED + 50)]
            await until(lambda: link._in_line == 50)
        finally:
            server.resume()
        assert await asyncio.gather(*calls) == [b"%d" % n for n in range(MAX_UNANSWERED + 50)]


def test_the_same_happens_on_the_loop_of_the_standard_library(server: RedisServer) -> None:
    scenarios: list[Callable[[RedisServer], Coroutine[Any, Any, None]]] = [
        test_every_call_gets_its_own_answer_whatever_is_cancelled,
        test_calls_wait_in_line_while_the_socket_is_full_and_keep_their_order,
        test_a_missed_deadline_closes_the_link_and_fails_all_that_wait,
        test_a_unix_socket_is_reached_by_its_path,
    ]
    for scenario in scenarios:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(scenario(server))


async def test_a_unix_socket_is_reached_by_its_path(server: RedisServer) -> None:
    async with linked(Target(path=str(server.socket_path))) as link:
        assert await link.call("PING") == b"PONG"


async def test_a_database_is_selected(server: RedisServer) -> None:
    async with linked(at(server, db=3)) as third, linked(at(server)) as first:
        await third.call("SET", "only here", "1")
        assert await first.call("EXISTS", "only here") == 0
    with pytest.raises(BrokerRefused, match="DB index"):
        await Link.connect(at(server, db=99), Clock(), name="test")


async def test_a_dead_server_fails_what_waits_and_says_where_it_was() -> None:
    with RedisServer.start("7") as server:
        async with linked(at(server)) as link:
            waiting = asyncio.ensure_future(link.call("XREAD", "BLOCK", 5_000, "STREAMS", "none", "0"))
            await asyncio.sleep(0)
            server.kill()
            with pytest.raises(BrokerDown, match=f"127.0.0.1:{server.port} was lost"):
                await waiting
        with pytest.raises(BrokerDown, match=f"no server at 127.0.0.1:{server.port}"):
            await Link.connect(at(server), Clock(), name="test")


async def test_nobody_at_the_place_is_down() -> None:
    for target in (
        Target(host="127.0.0.1", port=free_port()),
        Target(path="/nonexistent/redis.sock"),
        Target(host="no..name"),
    ):
        with pytest.raises(BrokerDown, match="no server at"):
            await Link.connect(target, Clock(), name="test")


async def test_passwords_are_asked_for_and_never_shown() -> None:
    with RedisServer.start("7", requirepass="s3cret") as server:
        async with linked(at(server, password="s3cret")) as link:
            await link.call("ACL", "SETUSER", "shop", "on", ">own:pa/ss", "~*", "+@all")
        async with linked(at(server, username="shop", password="own:pa/ss")) as link:
            assert await link.call("ACL", "WHOAMI") == b"shop"
        with pytest.raises(BrokerRefused, match="asks for a password"):
            await Link.connect(at(server), Clock(), name="test")
        for username in ("", "shop"):
            wrong = at(server, username=username, password="gue55")
            with pytest.raises(BrokerRefused, match="wrong user name or password") as caught:
                await Link.connect(wrong, Clock(), name="test")
            assert "gue55" not in str(caught.value) + repr(wrong) + wrong.url


async def test_a_user_who_may_do_little_is_let_in() -> None:
    with RedisServer.start("7") as server:
        async with linked(at(server)) as link:
            await link.call("ACL", "SETUSER", "poor", "on", ">x", "~*", "+echo")
        async with linked(at(server, username="poor", password="x")) as link:
            assert (link.run_id, link.client_id, link.info) == ("", 0, {})
            assert await link.call("ECHO", "hello") == b"hello"
            with pytest.raises(BrokerRefused, match="lacks a permission"):
                await link.call("GET", "x")


async def test_a_replica_is_not_a_server_for_us_and_a_demoted_master_no_longer() -> None:
    with RedisServer.start("7") as server:
        async with linked(at(server)) as link:
            await link.call("REPLICAOF", "127.0.0.1", free_port())
            with pytest.raises(BrokerDown, match="READONLY"):
                await link.call("SET", "a", "b")
            assert link.closed
            with pytest.raises(BrokerDown, match="is a replica"):
                await Link.connect(at(server), Clock(), name="test")


async def test_a_full_server_is_down_and_says_why() -> None:
    with RedisServer.start("7", maxclients=1) as server:
        async with linked(at(server)):
            with pytest.raises(BrokerDown, match="maxclients"):
                await Link.connect(at(server), Clock(), name="test")


@asynccontextmanager
async def fake(*answers: bytes) -> AsyncIterator[Target]:
    """A server that answers each write with the next of these bytes, and then ends the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            if await reader.read(65_536):
                writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Target(host="127.0.0.1", port=server.sockets[0].getsockname()[1], connect_timeout_s=0.2)


async def test_what_came_before_the_end_of_the_connection_is_known() -> None:
    async with fake(GREETING, b":1\r\n:2\r\n$5\r\nhal") as target, linked(target) as link:
        assert link.run_id == "abc" and link.client_id == 7
        answers = await link.post(pack("PING") * 4, 4)
        with pytest.raises(BrokerDown, match="was lost"):
            await answers
        assert answers.got == [1, 2]


@pytest.mark.parametrize(
    ("answer", "error"), [(b"HTTP/1.1 400 Bad Request\r\n\r\n", BrokerDown), (b"-DENIED protected\r\n", BrokerRefused)]
)
async def test_somebody_else_at_the_door_is_an_error(answer: bytes, error: type[BrokerError]) -> None:
    async with fake(answer) as target:
        with pytest.raises(error):
            await Link.connect(target, Clock(), name="test")


async def test_an_answer_that_nobody_asked_for_closes_the_link() -> None:
    async with fake(GREETING, b":1\r\n:2\r\n", b"") as target, linked(target) as link:
        assert await link.call("PING") == 1
        await until(lambda: link.closed)
        assert "nobody asked for" in str(link.error)


async def test_a_server_that_says_nothing_is_down_after_the_connect_timeout() -> None:
    async with fake(b"", b"") as target:
        with pytest.raises(BrokerDown, match=r"did not answer within 0\.2 s"):
            await Link.connect(target, Clock(), name="test")


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("LOADING Redis is loading the dataset in memory", BrokerDown),
        ("READONLY You can't write against a read only replica.", BrokerDown),
        ("MASTERDOWN Link with MASTER is down", BrokerDown),
        ("BUSY Redis is busy running a script", BrokerDown),
        ("CLUSTERDOWN Hash slot not served", BrokerDown),
        ("MOVED 3999 127.0.0.1:6381", BrokerDown),
        ("ASK 3999 127.0.0.1:6381", BrokerDown),
        ("TRYAGAIN Multiple keys request during rehashing of slot", BrokerDown),
        ("NOREPLICAS Not enough good replicas to write.", BrokerDown),
        ("MISCONF Redis is configured to save RDB snapshots", BrokerDown),
        ("UNBLOCKED the stream key no longer exists", BrokerDown),
        ("EXECABORT Transaction discarded because of previous errors.", BrokerDown),
        ("OOM command not allowed when used memory > 'maxmemory'.", BrokerFull),
        (
            "ERR Error running script (call to f_9a): @user_script:3: -OOM command not allowed when used memory",
            BrokerFull,
        ),
        ("ERR Error running script (call to f_9a): @user_script: 3: WRONGTYPE Operation against", BrokerRefused),
        ("@user_script: 3: -OOM command not allowed when used memory", BrokerFull),
        ("NOGROUP No such key 'orders'", GroupVanished),
        ("NOAUTH Authentication required.", BrokerRefused),
        ("WRONGPASS invalid username-password pair", BrokerRefused),
        ("NOPERM this user has no permissions", BrokerRefused),
        ("WRONGTYPE Operation against a key", BrokerRefused),
        ("ERR max number of clients reached", BrokerDown),
        ("ERR syntax error", BrokerRefused),
    ],
)
def test_an_error_answer_means_one_error(reply: str, error: type[BrokerError]) -> None:
    meant = broker_error(hiredis.ReplyError(reply), "XADD on somewhere:6379")
    assert type(meant) is error
    assert reply in str(meant) and "somewhere:6379" in str(meant)
