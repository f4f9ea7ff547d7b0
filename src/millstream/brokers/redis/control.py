"""A URL becomes a target; and is this server fit to keep events? Nothing here is on the way of an event."""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import hiredis

from millstream.brokers.redis.link import Link, Target
from millstream.errors import BadSetting, BrokerRefused, NotSupported
from millstream.settings import Settings
from millstream.telemetry import logger
from millstream.units import check_name, seconds

T = TypeVar("T", str, int)

OLDEST = (6, 2)  # XAUTOCLAIM, exclusive ranges and `XGROUP CREATECONSUMER` came with it

_PARAMETERS = ("namespace", "db", "username", "password", "connect_timeout", "outputs")
_OUTPUTS = ("together", "before")  # with their outcomes in one step, or before them
_FORMS = (
    "redis://[user][:password@]host[:port][/db][?namespace=…&connect_timeout=5s&outputs=before], or for a socket "
    "redis+unix:///path?db=0[&username=…&password=…]"
)


def target(url: str, settings: Settings) -> Target:
    """What the URL names. Raises `BadSetting` with the accepted forms; no message of it shows the password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BadSetting(
            f"the Redis URL has no usable port or host; in a password write / # ? @ : as %2F %23 %3F %40 %3A: {_FORMS}"
        ) from None
    if parts.scheme == "rediss":
        raise NotSupported("rediss:// asks for TLS, which Millstream cannot do yet: use redis:// inside a tunnel")
    given = _parameters(parts)
    username = _once("username", unquote(parts.username or ""), given.get("username", ""))
    password = _once("password", unquote(parts.password or ""), given.get("password", ""))
    if username and not password:
        raise BadSetting(f"the Redis URL has a user name and no password: {_FORMS}")
    namespace = given.get("namespace", settings.namespace)
    if namespace:
        check_name("namespace", namespace)
    if namespace == "millstream":  # its stream `streams` would be the list of all streams
        raise BadSetting("the namespace cannot be 'millstream', which is Millstream's own: choose another")
    timeout_s = seconds(given.get("connect_timeout", 5.0))
    if not timeout_s:
        raise BadSetting("connect_timeout=0 in the Redis URL: it must be more than zero")
    outputs = given.get("outputs", _OUTPUTS[0])
    if outputs not in _OUTPUTS:
        raise BadSetting(f"outputs={outputs!r} in the Redis URL: it must be one of {', '.join(_OUTPUTS)}")
    host, path = _place(parts)
    return Target(
        host=host,
        port=6379 if port is None else port,
        path=path,
        db=_database(parts, given),
        username=username,
        password=password,
        namespace=namespace,
        connect_timeout_s=timeout_s,
        outputs_before=outputs == "before",
    )


async def check(link: Link) -> None:
    """Refuse a server that cannot work: `BrokerRefused` if it is too old, `NotSupported` if it is a cluster."""
    where, version = link.target.where, link.info.get("redis_version", "")
    if version and _numbers(version) < OLDEST:
        raise BrokerRefused(f"{where} runs Redis {version}; Millstream needs 6.2 or later")
    if link.info.get("redis_mode") == "cluster":
        raise NotSupported(f"{where} is part of a Redis Cluster, which Millstream cannot use yet: name a single server")


async def warn(link: Link) -> None:
    """Warn of settings under which events can be lost. What we may not ask is passed over."""
    where = link.target.where
    asked = ("maxmemory-policy", "save", "appendonly")
    replies = await link.calls([("CONFIG", "GET", name) for name in asked])
    if any(isinstance(reply, hiredis.ReplyError) or len(reply) != 2 for reply in replies):
        return
    policy, save, appendonly = (reply[1].decode() for reply in replies)
    if policy != "noeviction":
        logger.warning(
            "%s may evict whole streams with their groups (maxmemory-policy %s): CONFIG SET maxmemory-policy noeviction",
            where,
            policy,
        )
    if not save and appendonly != "yes":
        logger.warning(
            "%s keeps nothing on disk: its restart loses all events. CONFIG SET appendonly yes, and in its redis.conf",
            where,
        )


def _parameters(parts: SplitResult) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _PARAMETERS or name in given:
            why = "twice" if name in given else f"unknown; there are {', '.join(_PARAMETERS)}"
            raise BadSetting(f"parameter {name!r} of the Redis URL is {why}")
        given[name] = value
    return given


def _once(name: str, first: T, second: T) -> T:
    if first and second and first != second:
        raise BadSetting(f"the Redis URL gives the {name} twice, and differently")
    return first or second


def _place(parts: SplitResult) -> tuple[str, str]:
    if parts.scheme == "redis":
        return parts.hostname or "localhost", ""
    if parts.hostname or not parts.path.strip("/"):
        raise BadSetting(f"the URL of a Redis socket needs an absolute path, with three slashes: {_FORMS}")
    return "", unquote(parts.path)


def _database(parts: SplitResult, given: dict[str, str]) -> int:
    path = parts.path.strip("/") if parts.scheme == "redis" else ""
    text = _once("database", path, given.get("db", ""))
    if not text:
        return 0
    if not text.isdecimal() or len(text) > 5:
        raise BadSetting(f"{text!r} is not a database number of Redis: {_FORMS}")
    return int(text)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
