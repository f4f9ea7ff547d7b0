"""Millstream: an event-driven platform. Typed events, groups of handlers, at-least-once delivery.

The public names, each imported on first use, so that `import millstream` costs a few milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# The one name that cannot wait: importing the module of the same name would later put itself in this place.
from millstream.event import event as event

if TYPE_CHECKING:
    from millstream.app import App as App
    from millstream.delivery import Delivery as Delivery
    from millstream.delivery import Envelope as Envelope
    from millstream.errors import BadEvent as BadEvent
    from millstream.errors import BadHandler as BadHandler
    from millstream.errors import BadSetting as BadSetting
    from millstream.errors import BadStream as BadStream
    from millstream.errors import BatchFailed as BatchFailed
    from millstream.errors import BrokerDown as BrokerDown
    from millstream.errors import BrokerError as BrokerError
    from millstream.errors import BrokerFull as BrokerFull
    from millstream.errors import BrokerRefused as BrokerRefused
    from millstream.errors import ConfigError as ConfigError
    from millstream.errors import GroupOwned as GroupOwned
    from millstream.errors import GroupVanished as GroupVanished
    from millstream.errors import LeaseLost as LeaseLost
    from millstream.errors import LogRegressed as LogRegressed
    from millstream.errors import MillstreamError as MillstreamError
    from millstream.errors import NotSupported as NotSupported
    from millstream.errors import PublishError as PublishError
    from millstream.errors import Reject as Reject
    from millstream.errors import RetryLater as RetryLater
    from millstream.errors import Skip as Skip
    from millstream.errors import StreamMismatch as StreamMismatch
    from millstream.errors import TooLarge as TooLarge
    from millstream.errors import Unconfirmed as Unconfirmed
    from millstream.errors import Unroutable as Unroutable
    from millstream.errors import Verdict as Verdict
    from millstream.errors import WireError as WireError
    from millstream.event import Event as Event
    from millstream.handlers.depends import Depends as Depends
    from millstream.handlers.router import Part as Part
    from millstream.handlers.router import Router as Router
    from millstream.handlers.subscriber import Call as Call
    from millstream.handlers.subscriber import Handle as Handle
    from millstream.handlers.subscriber import Middleware as Middleware
    from millstream.retry import Batch as Batch
    from millstream.retry import Retry as Retry
    from millstream.settings import Settings as Settings
    from millstream.stream import Dedupe as Dedupe
    from millstream.stream import Pack as Pack
    from millstream.stream import Position as Position
    from millstream.stream import Retention as Retention
    from millstream.stream import Stream as Stream
    from millstream.worker.schedule import every as every
    from millstream.worker.schedule import schedule as schedule

__version__ = "0.1.0"

_HOMES = {
    "app": "App",
    "delivery": "Delivery Envelope",
    "errors": "BadEvent BadHandler BadSetting BadStream BatchFailed BrokerDown BrokerError BrokerFull BrokerRefused "
    "ConfigError GroupOwned GroupVanished LeaseLost LogRegressed MillstreamError NotSupported PublishError Reject "
    "RetryLater Skip StreamMismatch TooLarge Unconfirmed Unroutable Verdict WireError",
    "event": "Event event",
    "handlers.depends": "Depends",
    "handlers.router": "Part Router",
    "handlers.subscriber": "Call Handle Middleware",
    "retry": "Batch Retry",
    "settings": "Settings",
    "stream": "Dedupe Pack Position Retention Stream",
    "worker.schedule": "every schedule",
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "App",
    "Router",
    "Part",
    "Event",
    "event",
    "Stream",
    "Retention",
    "Dedupe",
    "Pack",
    "Position",
    "Envelope",
    "Delivery",
    "Depends",
    "Retry",
    "Batch",
    "schedule",
    "every",
    "Settings",
    "Call",
    "Handle",
    "Middleware",
    "Verdict",
    "Skip",
    "Reject",
    "RetryLater",
    "BatchFailed",
    "MillstreamError",
    "ConfigError",
    "BadEvent",
    "BadHandler",
    "BadSetting",
    "BadStream",
    "StreamMismatch",
    "GroupOwned",
    "NotSupported",
    "PublishError",
    "Unroutable",
    "TooLarge",
    "Unconfirmed",
    "WireError",
    "BrokerError",
    "BrokerDown",
    "BrokerFull",
    "BrokerRefused",
    "GroupVanished",
    "LeaseLost",
    "LogRegressed",
]

if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name for a public one

    def __getattr__(name: str) -> object:
        """Import a public name's module when the name is first used, and keep the name."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """The public names, whether they are loaded or not."""
        return __all__
