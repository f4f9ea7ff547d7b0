"""The link: one connection to a Redis server, the data plane of Millstream.

Why our own: a general client takes 13 µs for a pipelined XADD, this takes 1.4, as much as a client in C; half of a
general client's time goes into a timer and a lock per reply, its other half into building commands out of objects. It
also retries by itself, and a repeated append or read is exactly what must not happen unseen.

A link is a queue. What is written goes out in the order of the calls, each call in one write; Redis answers in that
order, so the first answer belongs to the first call that still waits:

    post ─► packed bytes ─► socket ─►  Redis  ─► hiredis.Reader ─► the oldest waiting call ─► its awaiter
              └──────────── waiting: call, call, call ────────────────┘

- **Cancelled.** The call keeps its place; its answer is read and thrown away, so the next call gets its own. What was
  sent has happened, or will.
- **Late.** A missed deadline closes the connection: behind an answer that never comes every other answer would be
  somebody else's. There is one timer for the whole queue, since a timer per call costs more than the call.
- **Lost.** All waiting calls get `BrokerDown`; what they had sent may or may not have happened. `Answers.got` says how
  far the server came. Nothing is sent again, by nobody but the caller. A closed link stays closed: make another.
- **Full.** While the socket takes no more, calls wait in line for room, in their order.

Replies are RESP2 and raw bytes. An error is an answer too: `calls` and `send` return it as a value in its place.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import hiredis

from millstream.brokers.redis.scripts import Script
from millstream.clock import Clock, Handle
from millstream.errors import BrokerDown, BrokerError, BrokerFull, BrokerRefused, GroupVanished
from millstream.units import MAX_APPEND_BYTES

Argument: TypeAlias = bytes | str | int | float

DEADLINE_S = 5.0  # a healthy server answers within milliseconds; a saving one, or a slow disk, within seconds
BLOCK_S = 1.0  # longest wait that is asked of a server: a dead peer is noticed soon after
BLOCK_MARGIN_S = 3.0  # what a blocking read may take beyond its wait: the server may be busy when it ends
MAX_UNANSWERED = 10_000  # calls in the queue; past it callers wait, as they do for a full socket
_GRACE_S = 0.05  # between a missed deadline and the end: a loop that stalled has answers lying in its socket

ReplyError = hiredis.ReplyError


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a server is, and who we are there."""

    host: str = "localhost"
    port: int = 6379
    path: str = ""
    """A unix socket, in place of host and port."""
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    namespace: str = ""
    connect_timeout_s: float = 5.0
    outputs_before: bool = False
    """Outputs are stored before their outcomes, not with them: the keys of two streams cannot be in one call."""

    @property
    def where(self) -> str:
        """Host and port, or the socket's path, for people."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL without its password, for people."""
        secret = f"{self.username}:***@" if self.password else ""
        parameter = f"namespace={self.namespace}" if self.namespace else ""
        if self.path:
            return f"redis+unix://{secret}{self.path}?db={self.db}" + (f"&{parameter}" if parameter else "")
        return f"redis://{secret}{self.where}/{self.db}" + (f"?{parameter}" if parameter else "")


def pack(*args: Argument) -> bytes:
    """A command as it goes over the wire."""
    packed: bytes = hiredis.pack_command(args)  # type: ignore[arg-type]  # its stub knows commands of one word only
    return packed


class Answers:
    """The answers to one write, in order. Awaiting gives them all, or raises `BrokerDown` when the link is lost."""

    __slots__ = ("_call", "_error", "_free", "_future", "deadline", "got", "wanted")

    def __init__(self, wanted: int, deadline: float) -> None:
        self.got: list[Any] = []
        """What has come so far."""
        self.wanted = wanted
        self.deadline = deadline
        self._future: asyncio.Future[None] | None = None
        self._call: Callable[[], object] | None = None
        self._error: BrokerError | None = None
        self._free = False

    def finish(self, error: BrokerError | None = None) -> None:
        """All have come, or no more will."""
        self._error = error
        self.leave()
        call, self._call = self._call, None  # who is called may hold us: nothing large is to wait for the collector
        if call is not None:
            call()

    def leave(self) -> None:
        """Let the awaiter go with what has come so far; the rest goes on coming into `got`."""
        self._free = True
        if self._future is not None and not self._future.done():  # done: the awaiter was cancelled
            self._future.set_result(None)

    def then(self, call: Callable[[], object]) -> None:
        """Call this in the moment in which all have come, or no more will; it may not raise.

        No future and no turn of the loop lies between, which saves 7 % of what an event costs that is published by itself.
        """
        if self._error is not None or len(self.got) == self.wanted:
            call()
        else:
            self._call = call

    def __await__(self) -> Generator[Any, None, list[Any]]:
        if not self._free:
            self._future = asyncio.get_running_loop().create_future()
            yield from self._future
        return self.result()

    def result(self) -> list[Any]:
        """As awaiting gives or raises, when all have come or no more will."""
        if self._error is not None:
            raise type(self._error)(str(self._error)) from self._error
        return self.got


class Link(asyncio.Protocol):
    """A connection that is logged in to a master, until it is closed or lost. Made by `connect`."""

    def __init__(self, target: Target, clock: Clock) -> None:
        self.target = target
        self.run_id = ""
        """The life of the server that this link talks to; another one knows nothing of what we remember. Empty where
        INFO is forbidden: then every lost connection counts as another server."""
        self.client_id = 0
        """For CLIENT KILL; 0 where we may not ask for it."""
        self.info: Mapping[str, str] = {}
        """What INFO says about the server; empty where it is forbidden."""
        self._clock = clock
        self._reader = hiredis.Reader(replyError=self._complain)
        self._waiting: deque[Answers] = deque()
        self._transport: asyncio.Transport | None = None
        self._error: BrokerError | None = None
        self._complaint = ""
        self._demoted = ""
        self._paused = False
        self._room = asyncio.Event()
        self._line = asyncio.Lock()
        self._in_line = 0
        self._timer: Handle | None = None
        self._timer_at = 0.0

    @classmethod
    async def connect(cls, target: Target, clock: Clock, *, name: str) -> Link:
        """A link to the master at the target, logged in and named (CLIENT LIST shows the name).

        Raises `BrokerDown` when nobody answers there, or somebody who is not ready; `BrokerRefused` when we are not let in.
        """
        link = cls(target, clock)
        try:
            async with clock.timeout(target.connect_timeout_s):
                await link._reach()
                await link._greet(name)
        except TimeoutError:
            link.close()
            raise BrokerDown(f"{target.where} did not answer within {target.connect_timeout_s:g} s") from None
        except PermissionError as error:
            raise BrokerRefused(f"{target.where}: no permission to open this socket ({error})") from None
        except (OSError, UnicodeError) as error:  # a host name may be no name at all
            raise BrokerDown(f"no server at {target.where}: start it, or correct the URL ({error})") from None
        except BrokerDown as error:
            if link.closed and link._complaint:  # refused at the door: the reason came before the end
                raise link.failure(ReplyError(link._complaint), "connect") from error
            link.close()
            raise
        except BaseException:
            link.close()
            raise
        return link

    @property
    def closed(self) -> bool:
        """True from the moment at which it is closed or lost; nothing can be sent any more."""
        return self._error is not None

    @property
    def error(self) -> Exception | None:
        """Why it is closed."""
        return self._error

    async def call(self, *args: Argument, deadline_s: float = DEADLINE_S) -> Any:
        """Send one command and return its answer; an error answer is raised as the `BrokerError` that it means."""
        (reply,) = await self.send(pack(*args), 1, deadline_s)
        if isinstance(reply, ReplyError):
            raise self.failure(reply, str(args[0]))
        return reply

    async def calls(self, commands: Sequence[Sequence[Argument]], deadline_s: float = DEADLINE_S) -> list[Any]:
        """Send commands in one write and return their answers in order, errors as values (`ReplyError`)."""
        return await self.send(b"".join([pack(*command) for command in commands]), len(commands), deadline_s)

    async def run(
        self, script: Script, keys: Sequence[Argument], args: Sequence[Argument], deadline_s: float = DEADLINE_S
    ) -> Any:
        """Run a script; the server learns it when it does not know it. An error answer is raised."""
        call = len(keys), *keys, *args
        (reply,) = await self.send(pack("EVALSHA", script.sha, *call), 1, deadline_s)
        if isinstance(reply, ReplyError) and str(reply).startswith("NOSCRIPT"):
            (reply,) = await self.send(pack("EVAL", script.source, *call), 1, deadline_s)
        if isinstance(reply, ReplyError):
            raise self.failure(reply, f"script {script.name}")
        return reply

    async def run_each(
        self, script: Script, calls: Sequence[tuple[Sequence[Argument], Sequence[Argument]]]
    ) -> list[Any]:
        """Run a script once for each pair of keys and arguments, in one write; errors are values (`ReplyError`)."""
        words = [(len(keys), *keys, *args) for keys, args in calls]
        replies = await self.calls([("EVALSHA", script.sha, *call) for call in words]) if words else []
        unknown = [
            index
            for index, reply in enumerate(replies)
            if isinstance(reply, ReplyError) and str(reply).startswith("NOSCRIPT")
        ]
        if unknown:
            again = await self.calls([("EVAL", script.source, *words[index]) for index in unknown])
            for index, reply in zip(unknown, again, strict=True):
                replies[index] = reply
        return replies

    async def send(self, packed: bytes, replies: int, deadline_s: float = DEADLINE_S) -> list[Any]:
        """Send prepared bytes that are answered by so many replies, and return these, errors as values."""
        return await (await self.post(packed, replies, deadline_s))

    async def post(self, packed: bytes, replies: int, deadline_s: float = DEADLINE_S) -> Answers:
        """Send prepared bytes and return the answers to be awaited, so that more can be sent meanwhile.

        Raises `BrokerDown` when nothing was sent; afterwards only `Answers` knows.
        """
        if not self._is_full:
            return self._write(packed, replies, deadline_s)
        self._in_line += 1
        try:
            async with self._line:  # first come, first served: calls leave in the order in which they were made
                while not self.closed and (self._paused or len(self._waiting) >= MAX_UNANSWERED):
                    self._room.clear()
                    await self._room.wait()
                return self._write(packed, replies, deadline_s)
        finally:
            self._in_line -= 1

    def post_now(self, packed: bytes, replies: int) -> Answers | None:
        """As `post`, without waiting in line; None where it would: nothing was sent."""
        return None if self._is_full else self._write(packed, replies, DEADLINE_S)

    def failure(self, reply: Exception, doing: str) -> BrokerError:
        """The error that an error answer of this server means."""
        return broker_error(reply, f"{doing} on {self.target.where}")

    def close(self) -> None:
        """Give the connection up; calls that still wait get `BrokerDown`."""
        self._end(BrokerDown(f"the connection to {self.target.where} was closed"))

    @property
    def _is_full(self) -> bool:
        return self._paused or self._in_line > 0 or len(self._waiting) >= MAX_UNANSWERED

    async def _reach(self) -> None:
        loop, target = asyncio.get_running_loop(), self.target
        if target.path:
            await loop.create_unix_connection(lambda: self, target.path)
        else:
            await loop.create_connection(lambda: self, target.host, target.port)

    async def _greet(self, name: str) -> None:
        target = self.target
        login: list[Sequence[Argument]] = []
        if target.password:
            login.append(("AUTH", *([target.username] if target.username else []), target.password))
        if target.db:
            login.append(("SELECT", target.db))
        asked = [("CLIENT", "SETNAME", _printable(name)), ("CLIENT", "ID"), ("INFO", "server"), ("ROLE",)]
        replies = await self.calls([*login, *asked], target.connect_timeout_s)
        for reply in replies:
            if isinstance(reply, ReplyError) and not str(reply).startswith("NOPERM"):
                raise self.failure(reply, "login")
        *_, client_id, info, role = (None if isinstance(reply, ReplyError) else reply for reply in replies)
        self.client_id = client_id or 0
        self.info = dict(line.split(":", 1) for line in (info or b"").decode().splitlines() if ":" in line)
        self.run_id = self.info.get("run_id", "")
        if role and role[0] == b"sentinel":
            raise BrokerRefused(f"{target.where} is a Sentinel: the URL must name a server that keeps data")
        if role and role[0] != b"master":
            raise BrokerDown(f"{target.where} is a replica: a failover is under way, or the URL must name its master")

    def _write(self, packed: bytes, replies: int, deadline_s: float) -> Answers:
        if self._error is not None or self._transport is None:
            raise BrokerDown(str(self._error or "not connected")) from self._error
        deadline = self._clock.monotonic() + deadline_s
        answers = Answers(replies, deadline)
        self._waiting.append(answers)
        self._transport.write(packed)
        if self._timer is None or deadline < self._timer_at:
            self._watch(deadline, deadline_s)
        return answers

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of `asyncio.Protocol`."""
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        transport.set_write_buffer_limits(high=MAX_APPEND_BYTES)  # or every large append would wait for its own end
        connection = transport.get_extra_info("socket")
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        waiting, gets = self._waiting, self._reader.gets
        try:
            self._reader.feed(data)
            reply = gets()
            while reply is not False:
                if not waiting:
                    return self._end(self._unasked(reply))
                answers = waiting[0]
                got, wanted = answers.got, answers.wanted
                while reply is not False:
                    got.append(reply)
                    reply = gets()
                    if len(got) == wanted:
                        waiting.popleft().finish()
                        break
        except hiredis.ProtocolError as error:
            return self._end(BrokerDown(f"{self.target.where} does not speak Redis's protocol ({error})"))
        self._room.set()
        if self._demoted:  # none of this is on the new master
            self._end(self.failure(ReplyError(self._demoted), "write"))

    def pause_writing(self) -> None:
        """Part of `asyncio.Protocol`."""
        self._paused = True

    def resume_writing(self) -> None:
        """Part of `asyncio.Protocol`."""
        self._paused = False
        self._room.set()

    def connection_lost(self, error: Exception | None) -> None:
        """Part of `asyncio.Protocol`."""
        self._end(BrokerDown(f"the connection to {self.target.where} was lost ({error or 'ended by the server'})"))

    def _complain(self, text: str) -> Exception:
        self._complaint = text  # the reader calls this for each error answer, so good answers cost nothing
        if _code(text) == "READONLY":
            self._demoted = text
        return ReplyError(text)

    def _unasked(self, reply: Any) -> BrokerError:
        if isinstance(reply, ReplyError):
            return self.failure(reply, "connect")
        return BrokerDown(f"{self.target.where} sent an answer that nobody asked for")

    # One timer for all deadlines: armed for the earliest that it knows, armed again while calls wait.

    def _watch(self, deadline: float, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._clock.call_later(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        now = self._clock.monotonic()
        late = min(self._waiting, key=lambda answers: answers.deadline)
        if late.deadline > now:
            self._watch(late.deadline, late.deadline - now)
        else:
            self._timer_at = now
            self._timer = self._clock.call_later(_GRACE_S, self._expire, late)

    def _expire(self, late: Answers) -> None:
        if late in self._waiting:
            self._end(BrokerDown(f"{self.target.where} did not answer in time: the connection was closed"))
        self._look()

    def _end(self, error: BrokerError) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        self._room.set()
        while self._waiting:
            self._waiting.popleft().finish(error)


# What an error answer means. Retryable ones decide nothing: wait a little and try again.
_MEANING: Mapping[str, tuple[type[BrokerError], str]] = {
    "LOADING": (BrokerDown, "the server is loading its data"),
    "READONLY": (BrokerDown, "the server is a replica: a failover is under way, or the URL must name its master"),
    "MASTERDOWN": (BrokerDown, "the server is a replica that has lost its master"),
    "BUSY": (BrokerDown, "the server is busy with a script; SCRIPT KILL ends it"),
    "CLUSTERDOWN": (BrokerDown, "the cluster is down"),
    "MOVED": (BrokerDown, "the key has moved to another node"),
    "ASK": (BrokerDown, "the key is moving to another node"),
    "TRYAGAIN": (BrokerDown, "the keys are moving to another node"),
    "NOREPLICAS": (BrokerDown, "too few replicas are in reach (min-replicas-to-write)"),
    "MISCONF": (BrokerDown, "the server cannot save to its disk and takes no writes: see its log"),
    "UNBLOCKED": (BrokerDown, "the read was ended by the server"),
    "EXECABORT": (BrokerDown, "the transaction was refused as a whole"),
    "OOM": (BrokerFull, "the server is at its maxmemory: free memory, or raise it"),
    "NOGROUP": (GroupVanished, "the group is gone"),
    "NOAUTH": (BrokerRefused, "the server asks for a password: write redis://:password@host:port/0"),
    "WRONGPASS": (BrokerRefused, "wrong user name or password"),
    "NOPERM": (BrokerRefused, "this user lacks a permission: see ACL WHOAMI and ACL SETUSER"),
    "DENIED": (BrokerRefused, "the server is in protected mode: set a password, or bind it to this address"),
    "WRONGTYPE": (BrokerRefused, "a key of this name holds something else: use another name, or a namespace"),
}

# Redis 6.2 wraps what fails inside a script: "ERR Error running script (call to f_…): @user_script:12: -OOM command …", and
# what a script catches and gives back begins with "@user_script".
_IN_SCRIPT = re.compile(r"^(?:ERR .*)?@user_script: ?\d+: ?-?([A-Z]+) ")


def broker_error(reply: Exception, doing: str) -> BrokerError:
    """The error that an error answer means. The one place that knows Redis's error codes."""
    text = str(reply)
    if text.startswith("ERR max number of clients"):
        return BrokerDown(f"{doing}: the server has no room for another client; raise its maxclients ({text})")
    kind, meaning = _MEANING.get(_code(text), (BrokerRefused, "the server refuses this"))
    return kind(f"{doing}: {meaning} ({text})")


def vanished(reply: Exception) -> Exception:
    """The error answer of a read of a group, as later servers give it.

    Redis 7.0 says UNBLOCKED when the stream or the group goes away under a blocked read, later ones say NOGROUP.
    """
    return ReplyError(f"NOGROUP {reply}") if str(reply).startswith("UNBLOCKED the stream") else reply


def _code(text: str) -> str:
    inside = _IN_SCRIPT.match(text)
    return inside[1] if inside else text.partition(" ")[0]


def _printable(name: str) -> str:
    return "".join(letter if "!" <= letter <= "~" else "-" for letter in name)
