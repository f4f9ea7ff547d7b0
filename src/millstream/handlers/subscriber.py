"""Subscriber: a handler bound to a stream under a group. Group: all handlers that share one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal, TypeAlias

from millstream.delivery import Delivery
from millstream.errors import BadHandler
from millstream.handlers.signature import Signature
from millstream.retry import Batch, Retry
from millstream.stream import Stream
from millstream.units import Duration

StartAt: TypeAlias = Literal["beginning", "now"] | datetime | timedelta
"""Where a group begins at its birth: with the first event kept, the next one, a time, or that long ago."""

Order: TypeAlias = Literal["key", "none"]
"""Events of one key one after the other, in the order in which they were published; or all in any order."""

DEFAULT_TIMEOUT = "1m"  # a hung handler holds its event for ever and looks like slowness
NEVER = "never"


class Call:
    """One call of one handler: its delivery, or the deliveries of a batch."""

    __slots__ = ("deliveries", "subscriber")

    def __init__(self, deliveries: Sequence[Delivery[Any]], subscriber: Subscriber) -> None:
        self.deliveries = deliveries
        self.subscriber = subscriber


Handle: TypeAlias = Callable[[Call], Awaitable[None]]
"""Carries out a call. Exceptions travel through: the worker alone makes outcomes of them."""

Middleware: TypeAlias = Callable[[Handle], Handle]
"""Wraps the carrying out of calls. Composed once, when a worker starts."""


@dataclass(frozen=True)
class Subscriber:
    """A handler, bound to a stream under a group. `None` means the default of what includes it."""

    stream: Stream[Any]
    group: str
    """Empty for a listener: every running process, from now on, nothing kept."""
    handler: Callable[..., Any]
    signature: Signature
    batch: Batch | None = None
    retry: Retry | None = None
    timeout: Duration | None = None
    concurrency: int | None = None
    start: StartAt | None = None
    order: Order | None = None
    middleware: tuple[Middleware, ...] = ()

    def within(self, retry: Retry | None, timeout: Duration | None, middleware: tuple[Middleware, ...]) -> Subscriber:
        """The same, with the defaults of what includes it; its middleware goes around ours."""
        return replace(
            self,
            retry=self.retry if self.retry is not None else retry,
            timeout=self.timeout if self.timeout is not None else timeout,
            middleware=middleware + self.middleware,
        )


class Group:
    """The handlers of one group on a stream: they share its events by type. Raises `BadHandler` where they clash."""

    def __init__(self, subscribers: Sequence[Subscriber]) -> None:
        first = subscribers[0]
        self.stream = first.stream
        self.name = first.group
        self.subscribers = subscribers
        self.routes: dict[str, Subscriber] = {}
        """The wire name of each type that is handled, and by whom."""
        for subscriber in subscribers:
            self._add(subscriber)
        self.batch: Batch | None = None
        if any(subscriber.signature.batch for subscriber in subscribers):
            if len(subscribers) > 1:
                raise BadHandler(f"{self._where(subscribers)}: a batch handler must be the only one of its group")
            self.batch = first.batch or Batch()
        self.concurrency: int | None = self._one("concurrency")
        self.start: StartAt = self._one("start") or "beginning"
        self.order: Order = self._one("order") or ("key" if self.stream.key is not None else "none")
        """Of the group as a whole: its handlers share one order, across all types."""
        for subscriber in subscribers:
            if self.order == "none" and subscriber.retry is not None and subscriber.retry.then == "hold":
                raise BadHandler(
                    f"{subscriber.signature.where}: Retry(then='hold') makes a key wait, and group {self.name!r} has no "
                    "order of keys: give its stream a key, or write then='skip'"
                )

    def _add(self, subscriber: Subscriber) -> None:
        if subscriber.stream is not self.stream:
            raise BadHandler(
                f"{subscriber.signature.where}: two different Stream objects are named {self.stream.name!r}; declare the "
                "stream once, in a module that both import"
            )
        for name in subscriber.signature.types:
            other = self.routes.setdefault(name, subscriber)
            if other is not subscriber:
                raise BadHandler(
                    f"{subscriber.signature.where}: {name!r} is handled by {other.signature.name} in group {self.name!r} "
                    "already; give one of them another group"
                )

    def _one(self, option: str) -> Any:
        said = [s for s in self.subscribers if getattr(s, option) is not None]
        if len(said) > 1:
            raise BadHandler(f"{self._where(said)}: {option}= belongs to the group, so only one of them may say it")
        return getattr(said[0], option) if said else None

    def _where(self, subscribers: Iterable[Subscriber]) -> str:
        return f"group {self.name!r} of {', '.join(s.signature.name for s in subscribers)}"


def groups(subscribers: Iterable[Subscriber]) -> list[Group]:
    """The groups of these subscribers, listeners left out. Raises `BadHandler` where their handlers clash."""
    found: dict[tuple[str, str], list[Subscriber]] = {}
    for subscriber in subscribers:
        if subscriber.group:
            found.setdefault((subscriber.stream.name, subscriber.group), []).append(subscriber)
    return [Group(members) for members in found.values()]
