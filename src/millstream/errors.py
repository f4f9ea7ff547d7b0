"""The tree of errors, and the four verdicts.

Every error says what happened, in which state that leaves things, and what to do next. `retryable` tells whether
trying the same again can help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime, timedelta


class MillstreamError(Exception):
    """Anything that Millstream raises, verdicts apart."""

    retryable = False


class ConfigError(MillstreamError):
    """Something was declared wrongly: found when it is registered, or when the app starts."""


class BadEvent(ConfigError):
    """A class cannot be an event, or what goes with an event (id, key, headers, due) is unusable. Nothing was stored."""


class BadHandler(ConfigError):
    """A handler asks for something that it cannot get."""


class BadStream(ConfigError):
    """A stream cannot be declared like this."""


class BadSetting(ConfigError):
    """A name, duration, size, URL or other setting has no usable value."""


class StreamMismatch(ConfigError):
    """The stream exists and was declared differently."""


class GroupOwned(ConfigError):
    """The group belongs to another app."""


class NotSupported(ConfigError):
    """The broker lacks a power that was asked for."""


class PublishError(MillstreamError):
    """An event could not be published."""


class Unroutable(PublishError):
    """No stream, or more than one, carries this type."""


class TooLarge(PublishError):
    """An event is over a limit."""


class Unconfirmed(PublishError):
    """Events may or may not be stored: the connection ended before the answer.

    `envelopes` are what to publish again (their ids are kept, so that the repeats can be told). `results` says for each
    record of the call what is known: its position, the error that refused it, or None where nothing is known. Until
    `retry_until` (UTC) the stream tells a repeat from a second event; None where it has no dedupe.
    """

    retryable = True

    def __init__(
        self,
        message: str,
        *,
        envelopes: Sequence[Any] = (),
        results: Sequence[Any] = (),
        retry_until: datetime | None = None,
    ) -> None:
        super().__init__(message)
        self.envelopes = envelopes
        self.results = results
        self.retry_until = retry_until


class WireError(MillstreamError):
    """Bytes that are not an event, or are over a limit."""


class BrokerError(MillstreamError):
    """The broker could not do what it was asked to."""


class BrokerDown(BrokerError):
    """The broker cannot be reached now. After a write, nothing is known about its fate."""

    retryable = True


class BrokerFull(BrokerError):
    """The broker has no room: `maxmemory`, a full disk, or a limit of a stream. Nothing was stored."""

    retryable = True


class BrokerRefused(BrokerError):
    """The broker will not do this for us: wrong password, missing permission, a key of another kind."""


class GroupVanished(BrokerError):
    """The group disappeared (flush, eviction, failover). It is made again at a known position or the beginning."""

    retryable = True


class LeaseLost(BrokerError):
    """Somebody else has taken over what we held."""


class LogRegressed(BrokerError):
    """A log ends before what was settled: the server came back with less. It is consumed from its first event again."""


class Verdict(Exception):
    """Raised by a handler to decide the outcome itself."""


class Skip(Verdict):
    """Settle the event as done, with a note that says why nothing was done."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class Reject(Verdict):
    """Give the event up at once: it becomes a dead letter with this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RetryLater(Verdict):
    """Try again after a while. Uses up no attempt, at most 1,000 times per event."""

    def __init__(self, after: str | float | timedelta) -> None:
        super().__init__(f"try again after {after}")
        self.after = after


class BatchFailed(Verdict):
    """Some events of a batch failed: `{index in the list: its error}`. An error may be a verdict. The others are done."""

    def __init__(self, failed: Mapping[int, Exception]) -> None:
        super().__init__(f"{len(failed)} of the batch failed: {dict(list(failed.items())[:3])!r}")
        self.failed = failed
