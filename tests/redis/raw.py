"""A blocking connection to a Redis server, and the scripts called by hand: for tests that decide the order of each step."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import pytest
from hiredis import Reader, ReplyError, pack_command
from msgspec.msgpack import encode as packb

from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.scripts import scripts
from tests.servers import RedisServer

TIMEOUT_S = 10.0

GROUP = "g"
KEYS = Keys("", "orders", 1)
LOG, DUE, NOTE = KEYS.log(0), KEYS.due(0, GROUP), KEYS.note(0, GROUP)
DEAD, STATS, META = KEYS.dead(0, GROUP), KEYS.stats(0, GROUP), KEYS.meta(0)
LIVE, TICK = KEYS.live(GROUP), KEYS.tick(GROUP)
LEASE, PARKED, PARKINFO = KEYS.lease(0, GROUP), KEYS.parked(0, GROUP), KEYS.parkinfo(0, GROUP)
MAILS = Keys("", "mails", 2)


@pytest.fixture
def queue(server: RedisServer) -> Iterator[Raw]:
    """A group without order, with the members `c` and `d`."""
    with Raw(server.port) as redis:
        redis.join()
        redis.enter("c")
        redis.enter("d")
        yield redis
        redis.do("CONFIG", "SET", "maxmemory", 0)


@pytest.fixture
def log(server: RedisServer) -> Iterator[Raw]:
    """A group in the order of keys, with the members `a` and `b`."""
    with Raw(server.port) as redis:
        redis.found()
        redis.enter("a")
        redis.enter("b")
        yield redis
        redis.do("CONFIG", "SET", "maxmemory", 0)


def fence(consumer: str) -> bytes:
    return KEYS.fence(GROUP, consumer)


def park(key: str) -> bytes:
    return KEYS.park(0, GROUP, key)


class Out(NamedTuple):
    """An output, as scripts take it: the keys of its target, its seven values, and the policy of its stream."""

    keys: tuple[bytes, ...]
    values: tuple[str, ...]
    limits: tuple[int, int, int, int] = (0, 0, 0, 0)
    due: str = ""
    derived: bool = False

    def staged(self, keys: list[bytes], blobs: list[Any]) -> tuple[Any, ...]:
        if self.keys[0] not in keys[6:]:
            keys += self.keys
        blobs += self.values
        first = keys.index(self.keys[0], 6) + 1
        return first, *self.limits, first, 1, self.due, self.derived, len(blobs) - 6  # of one partition: its own log


def mail(name: str, partition: int = 0, **policy: Any) -> Out:
    """An output for the stream `mails`."""
    return Out(MAILS.store(partition), (name, "mail.sent", "app", "", "", "", "{}"), **policy)


def blob(part: int, blobs: list[Any]) -> tuple[int, int]:
    """The fields of an event of a pack: which blob is the first, and how many they are."""
    blobs += ["type", "t", "data", str(part)]
    return len(blobs) - 3, 4


class Raw:
    """One connection. Replies come as they are; `do` and `run` raise error replies, `calls` gives them as values."""

    def __init__(self, port: int, sources: Mapping[str, bytes] | None = None) -> None:
        """`sources` replace scripts of the package."""
        self._sources = {name: script.source for name, script in scripts.items()} | dict(sources or {})
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
        self._reader = Reader()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, *commands: tuple[Any, ...]) -> None:
        self._socket.sendall(b"".join(pack_command(command) for command in commands))

    def receive(self, count: int) -> list[Any]:
        replies: list[Any] = []
        while len(replies) < count:
            reply = self._reader.gets()
            if reply is not False:
                replies.append(reply)
                continue
            received = self._socket.recv(65_536)
            assert received, "the server ended the connection"
            self._reader.feed(received)
        return replies

    def calls(self, *commands: tuple[Any, ...]) -> list[Any]:
        self.send(*commands)
        return self.receive(len(commands))

    def do(self, *command: Any) -> Any:
        (reply,) = self.calls(command)
        if isinstance(reply, ReplyError):
            raise reply
        return reply

    def run(self, name: str, keys: list[bytes], args: list[Any]) -> Any:
        return self.do("EVAL", self._sources[name], len(keys), *keys, *args)

    # The scripts, with the keys of one group on one partition.

    def join(self, start: str = "0-0", owner: str = "app") -> Any:
        return self.run("join", [LOG, META, DUE, NOTE], [GROUP, owner, start])

    def enter(self, consumer: str, nonce: str = "") -> Any:
        return self.run("enter", [fence(consumer), LIVE, TICK], [consumer, nonce or f"n-{consumer}"])

    def beat(self, consumer: str, nonce: str = "") -> Any:
        return self.run("beat", [fence(consumer), LIVE, TICK, DUE], [consumer, nonce or f"n-{consumer}"])

    def ack(self, consumer: str, *ids: bytes) -> Any:
        return self.run("ack", [LOG, fence(consumer)], [GROUP, f"n-{consumer}", *ids])

    def settle(
        self,
        consumer: str,
        *items: tuple[Any, ...],
        max_dead: int = 100,
        outputs: Mapping[int, list[Out]] | None = None,
        letters: Mapping[int, list[int]] | None = None,
    ) -> Any:
        """`outputs` by the number of their item, from 1; `letters` too: the events of a pack that are given up."""
        words = [word for item in items for word in (*item, "", "")[:5]]
        keys, blobs = [LOG, fence(consumer), DUE, NOTE, DEAD, STATS], list[Any]()
        staged = {n: [out.staged(keys, blobs) for out in those] for n, those in (outputs or {}).items()}
        dying = {
            n: [(part, "failed", "why", *blob(part, blobs)) for part in parts] for n, parts in (letters or {}).items()
        }
        packed = packb(staged) + packb(dying) if staged or dying else b""
        args = [GROUP, consumer, f"n-{consumer}", 0, max_dead, len(items), packed]
        return self.run("settle", keys, [*args, *words, *blobs])

    def take(self, consumer: str, limit: int = 100) -> Any:
        return self.run("take", [LOG, fence(consumer), DUE, NOTE, STATS], [GROUP, consumer, f"n-{consumer}", limit])

    def recall(self, consumer: str, *ids: bytes) -> Any:
        return self.run("recall", [LOG, fence(consumer), NOTE, STATS], [GROUP, consumer, f"n-{consumer}", *ids])

    def mark(self, consumer: str, *ids: bytes) -> Any:
        return self.run("mark", [NOTE, fence(consumer)], [f"n-{consumer}", *ids])

    def evict(self, consumer: str, score: Any, limit: int = 200, *, crashed: int = 1, lone: int = 0) -> Any:
        keys = [LOG, fence(consumer), LIVE, DUE, NOTE, STATS]
        return self.run("evict", keys, [GROUP, consumer, score, limit, crashed, lone])

    def bury(self, consumer: str, score: Any) -> Any:
        return self.run("bury", [fence(consumer), LIVE], [consumer, score])

    def adopt(self, consumer: str, idle_ms: int, limit: int = 200) -> Any:
        return self.run("adopt", [LOG, DUE, STATS], [GROUP, consumer, idle_ms, limit])

    def sweep(self, cursor: bytes | str = "-", often_ms: int = 0, limit: int = 200) -> Any:
        return self.run("sweep", [LOG, META, DUE, NOTE, STATS, LEASE], [GROUP, cursor, often_ms, limit])

    def replay(self, letter: bytes, id_: bytes) -> Any:
        return self.run("replay", [LOG, DUE, DEAD, STATS, NOTE], [GROUP, letter, id_])

    def give_again(self, *ids: bytes) -> Any:
        return self.run("give", [LOG, DUE, STATS, NOTE], [GROUP, *ids])

    def drop(self, letter: bytes) -> Any:
        return self.run("drop", [DEAD, STATS], [letter])

    # The same, in the order of keys.

    def found(self, start: str = "0-0", mode: str = "log") -> Any:
        return self.run("join", [LOG, META, DUE, NOTE, LEASE], [GROUP, "app", start, mode])

    def acquire(self, member: str, silent: Any = "", *formers: str, seen: tuple[bytes, bytes] | None = None) -> Any:
        owner, epoch = seen or (self.lease("owner") or b"", self.lease("epoch") or b"0")
        keys = [LOG, fence(member), LIVE, LEASE, META, PARKED, PARKINFO, NOTE, STATS]
        return self.run("acquire", keys, [GROUP, member, f"n-{member}", owner, epoch, silent, *formers])

    def commit(
        self,
        member: str,
        epoch: bytes,
        seq: int,
        w: bytes,
        wn: int | bytes | str = "",
        *effects: tuple[Any, ...],
        h: bytes = b"",
        opened: bytes = b"",
        done: int = 0,
        max_dead: int = 100,
        outputs: Sequence[Out] = (),
    ) -> Any:
        """An effect names its event key where the script wants the number of a list, and bytes where it wants blobs."""
        keys, blobs, packed = [LOG, LEASE, PARKED, PARKINFO, NOTE, DEAD], list[Any](), []
        for kind, *words in effects:
            if kind == "dead":
                *words, fields = words
                words += [len(blobs) + 1, len(fields)]
                blobs += fields
            else:
                keys.append(park(words[0]))
                words = [len(keys), *words]
            for index, word in enumerate(words):
                if isinstance(word, bytes):
                    blobs.append(word)
                    words[index] = len(blobs)
            packed.append([kind, *words])
        staged = [out.staged(keys, blobs) for out in outputs]
        args = [GROUP, member, epoch, seq, w, wn, h, opened, done, 0, 0, max_dead, ""]
        args += [packb(words) if words else b"" for words in (packed, staged)]
        return self.run("commit", keys, [*args, *blobs])

    def heads(self, member: str, epoch: bytes, *keys: str) -> Any:
        return self.run("heads", [LEASE, PARKED, PARKINFO, NOTE, *(park(key) for key in keys)], [member, epoch, *keys])

    def begin(self, member: str, epoch: bytes, *ids: bytes) -> Any:
        return self.run("begin", [LEASE, NOTE], [member, epoch, *ids])

    def give(self, member: str, epoch: bytes, heir: str = "") -> Any:
        return self.run("yield", [LEASE], [member, epoch, heir])

    def lease(self, name: str) -> bytes | None:
        found: bytes | None = self.do("HGET", LEASE, name)
        return found

    # What there is.

    def add(self, count: int = 1) -> list[bytes]:
        return [self.do("XADD", LOG, "*", "type", "t", "data", "{}") for _ in range(count)]

    def read(self, consumer: str, count: int = 100) -> list[bytes]:
        found = self.do("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count, "STREAMS", LOG, ">")
        return [id_ for id_, _ in found[0][1]] if found else []

    def pending(self, consumer: str | None = None) -> list[tuple[bytes, bytes, int]]:
        rows = self.do("XPENDING", LOG, GROUP, "-", "+", 10_000, *([consumer] if consumer else []))
        return [(id_, owner, count) for id_, owner, _, count in rows]

    def mails(self, partition: int = 0) -> list[str]:
        """The ids of the outputs that are stored."""
        return [fields[1].decode() for _, fields in self.do("XRANGE", MAILS.log(partition), "-", "+")]

    def score(self, consumer: str) -> bytes:
        found: bytes | None = self.do("ZSCORE", LIVE, consumer)
        return found or b""

    def group(self) -> dict[bytes, Any]:
        (info,) = self.do("XINFO", "GROUPS", LOG)
        return dict(zip(info[::2], info[1::2], strict=True))
