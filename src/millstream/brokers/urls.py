"""A URL becomes a broker. Other packages add schemes through the entry-point group `millstream.brokers`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

from millstream.brokers.base import Broker
from millstream.clock import Clock
from millstream.errors import BadSetting
from millstream.settings import Settings
from millstream.telemetry import Telemetry

ENTRY_POINTS = "millstream.brokers"

Factory: TypeAlias = Callable[[str, Settings, Clock, Telemetry], Broker]
"""What an entry point names: called with the URL, the settings, and the app's clock and telemetry. Does no I/O."""

_PASSWORD = re.compile(r"(?<=://)([^/?#\s:@]*):([^/?#\s@]*)@")
_PARAMETER = re.compile(r"([?&]password=)[^&\s]*")


def broker_for(url: str, settings: Settings, clock: Clock, telemetry: Telemetry) -> Broker:
    """A broker for this URL, not yet open. Raises `BadSetting` for an unknown scheme or a malformed URL."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise BadSetting(f"{mask(url)!r} is not a broker URL: write sqlite:///shop.db or redis://localhost:6379/0")
    return _factory(scheme, url)(url, settings, clock, telemetry)


def mask(text: str) -> str:
    """The text with the passwords of URLs replaced by ***."""
    return _PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


def _factory(scheme: str, url: str) -> Factory:
    match scheme:
        case "sqlite":
            from millstream.brokers.sqlite.broker import SQLiteBroker

            return SQLiteBroker
        case "redis" | "rediss" | "redis+unix" | "unix":
            from millstream.brokers.redis.broker import RedisBroker

            return RedisBroker
        case "memory":
            from millstream.brokers.memory.broker import MemoryBroker

            return MemoryBroker
    from importlib.metadata import entry_points  # as much to load as a broker, and few have one of another package

    for found in entry_points(group=ENTRY_POINTS, name=scheme):
        factory: Factory = found.load()
        return factory
    raise BadSetting(
        f"{mask(url)!r}: no broker knows the scheme {scheme!r}; there are sqlite, redis, redis+unix and memory, and "
        f"packages can add others (entry points {ENTRY_POINTS!r})"
    )
