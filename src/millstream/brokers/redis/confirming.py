"""How far an event has come when its append returns: in the server's memory, on its disk, on another server.

The question goes out behind the events, in the same write; the server holds its answer back until the events are there, or
its patience ends. It asks about all that this connection wrote, so a repeat must write too: it was perhaps the first time
that nobody confirmed. While a server holds an answer back it does nothing else for this connection, hence each level has one
of its own.

    replicated   WAIT 1       a replica has it in its memory
    fsync        WAITAOF 1 0  it is on the disk; before 7.2, which lacks this, a server that calls fsync before each answer
                              says so: CONFIG GET, after the events, since the setting can be changed
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hiredis import ReplyError
from msgspec import Struct

from millstream.brokers.base import Confirm
from millstream.brokers.redis.link import DEADLINE_S, Link, pack
from millstream.errors import NotSupported

PATIENCE_MS = 3_000  # a disk that is called every second, and is busy, needs two

_NEED = {
    "fsync": "CONFIG SET appendonly yes; before Redis 7.2 appendfsync always too",
    "replicated": "connect a replica to it",
}


class Level(Struct, frozen=True):
    """What is asked behind each write, and what an answer lacks ('' when the events are where they should be)."""

    command: bytes = b""
    lacks: Callable[[Any], str] = str
    deadline_s: float = DEADLINE_S


MEMORY = Level()


async def confirms(link: Link) -> frozenset[Confirm]:
    """The levels that this server can reach now; what we may not ask is not among them."""
    info, config, known = await link.calls([("INFO",), ("CONFIG", "GET", "append*"), ("COMMAND", "INFO", "WAITAOF")])
    if isinstance(info, ReplyError):
        return frozenset({"memory"})
    said = dict(line.split(":", 1) for line in info.decode(errors="replace").splitlines() if ":" in line)
    found: set[Confirm] = {"memory"}
    if any("state=online" in text for name, text in said.items() if name.startswith("slave")):
        found.add("replicated")
    if (said.get("aof_enabled") == "1" and _is_known(known)) or not _unsynced(config):
        found.add("fsync")
    return frozenset(found)


async def level(link: Link, confirm: Confirm) -> Level:
    """How to ask the server of this link for more than its memory."""
    deadline_s = DEADLINE_S + PATIENCE_MS / 1000
    if confirm == "replicated":
        return Level(pack("WAIT", 1, PATIENCE_MS), _alone, deadline_s)
    (known,) = await link.calls([("COMMAND", "INFO", "WAITAOF")])
    if _is_known(known):
        return Level(pack("WAITAOF", 1, 0, PATIENCE_MS), _unwritten, deadline_s)
    return Level(pack("CONFIG", "GET", "append*"), _unsynced, deadline_s)


def check_confirm(confirm: Confirm, able: frozenset[Confirm], url: str) -> None:
    """Raise `NotSupported` for a level that the server cannot reach."""
    if confirm not in able:
        raise NotSupported(f"{url} cannot confirm {confirm!r}, only {', '.join(sorted(able))}: {_NEED[confirm]}")


def _is_known(reply: Any) -> bool:
    return isinstance(reply, list) and bool(reply) and bool(reply[0])  # an unknown command is nil, or an empty list


def _alone(replicas: Any) -> str:
    if isinstance(replicas, ReplyError):
        return f"no replica was asked ({replicas})"
    return "" if replicas else f"no replica has it after {PATIENCE_MS / 1000:g} s"


def _unwritten(places: Any) -> str:
    if isinstance(places, ReplyError):
        return f"it is not on the disk ({places})"
    return "" if places[0] else f"it is not on the disk after {PATIENCE_MS / 1000:g} s"


def _unsynced(config: Any) -> str:
    if isinstance(config, ReplyError):
        return f"the server does not say whether it is on the disk ({config})"
    said = dict(zip(config[::2], config[1::2], strict=True))
    safe = said.get(b"appendonly") == b"yes" and said.get(b"appendfsync") == b"always"
    return "" if safe else "it is not on the disk: appendonly is not yes, or appendfsync is not always"
