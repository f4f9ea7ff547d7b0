"""A group's handlers become one table: wire type to `Route`. A route decodes, injects, calls, and says what the end means.

What a handler does not ask for costs it nothing: with neither delivery nor dependencies nor middleware, `invoke` is the
handler itself, and what `prepare` makes is the bare event. All of it is decided here, once, when a worker starts.
"""

from __future__ import annotations

import contextvars
import inspect
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from millstream.brokers.base import DONE, Claim, Dead, Done, Later, Outcome, Output, Settlement
from millstream.brokers.ledger import HELD_MS
from millstream.clock import Clock
from millstream.delivery import Delivery
from millstream.errors import BadSetting, BatchFailed, Reject, RetryLater, Skip
from millstream.handlers.depends import Plan, ProcessScope, Replacements
from millstream.handlers.subscriber import DEFAULT_TIMEOUT, NEVER, Call, Group, Handle, Subscriber
from millstream.retry import Retry
from millstream.stream import Stream
from millstream.telemetry import DEAD, HELD, POSTPONED, RETRIED, SKIPPED, Telemetry
from millstream.units import MAX_ERROR_CHARS, MAX_EVENT_BYTES, MAX_POSTPONED, seconds
from millstream.wire import codec
from millstream.worker.threads import Threads

Stage: TypeAlias = Callable[[str, str, Delivery[Any], Any, Stream[Any] | None], Output]
"""Makes an output of what a handler published: the stream and the group of its input, its delivery, what, and where to."""

_DEFAULT_RETRY = Retry()
_LONGEST_S = 100 * 365 * 86_400.0  # of a postponement: every broker can store a time this far away


class Undecodable(Exception):
    """The bytes are not an event of their type."""


class Shop(NamedTuple):
    """What all routes of a process share."""

    clock: Clock
    telemetry: Telemetry
    stage: Stage
    process: ProcessScope
    replace: Replacements
    threads: Threads


class Route:
    """How the events of one handler are called, and what becomes of them."""

    def __init__(self, subscriber: Subscriber, shop: Shop) -> None:
        self.subscriber = subscriber
        self.timeout_s = _timeout_s(subscriber)
        self._retry = subscriber.retry or _DEFAULT_RETRY
        self._never = tuple(self._retry.never)
        self._shop = shop
        self._clock = shop.clock
        self._stage = partial(shop.stage, subscriber.stream.name, subscriber.group)
        signature = subscriber.signature
        self._event, self._delivery = signature.event, signature.delivery
        self.decode = {n: codec.unchecked_decoder(c, subscriber.stream.codec) for n, c in signature.types.items()}
        """Of each wire type: bytes, whose number was looked at, become an event. Raises what `undecodable` explains."""
        self.plan = Plan(signature.depends, shop.replace, where=signature.where, batch=signature.batch)
        handler = subscriber.handler
        self._handler: Callable[..., Awaitable[None]] = _threaded(handler, shop.threads) if signature.sync else handler
        self._depends = bool(signature.depends)
        self._timeout_ms = None if self.timeout_s == float("inf") else int(self.timeout_s * 1000)
        self.delivers = bool(subscriber.middleware or signature.depends or signature.delivery)
        """Whether it is a `Delivery` that `prepare` makes, or the bare event."""
        self.prepare: Callable[[Claim], Any] = self._delivered if self.delivers else self._decoded
        """Makes of a claim what `invoke` takes, of a batch a list of these. Raises `Undecodable`."""
        self.invoke: Callable[[Any], Awaitable[None]] = self._invoked()
        """Calls the handler. What it publishes is in the delivery then."""

    def _invoked(self) -> Callable[[Any], Awaitable[None]]:
        """The cheapest way to call this handler."""
        subscriber, event = self.subscriber, self._event or ""
        if not self.delivers:
            return self._handler if _is_positional(subscriber) else lambda given: self._handler(**{event: given})
        if subscriber.signature.batch:
            inject = self._inject_batch
            handle = _composed(subscriber, lambda call: inject(call.deliveries))
            return (lambda given: handle(Call(given, subscriber))) if subscriber.middleware else inject
        inject_one = self._inject
        handle = _composed(subscriber, lambda call: inject_one(call.deliveries[0]))
        return (lambda given: handle(Call((given,), subscriber))) if subscriber.middleware else inject_one

    def undecodable(self, type_: str, error: Exception) -> Undecodable:
        """What `decode` raised, or found: the bytes are not an event of this type."""
        return Undecodable(codec.reason(self.subscriber.signature.types[type_], error))

    async def call(self, claim: Claim) -> None:
        """Decode an event and call the handler with it: all that a listener does, which settles nothing."""
        await self.invoke(self.prepare(claim))

    def prepare_all(self, claims: Sequence[Claim]) -> tuple[Sequence[Claim], list[Any], list[Settlement]]:
        """The events of a batch that can be decoded, prepared; and the ends of the others, whatever the handler does."""
        try:
            return claims, [self.prepare(claim) for claim in claims], []
        except Undecodable:
            pass
        good: list[Claim] = []
        prepared: list[Any] = []
        bad: list[Settlement] = []
        for claim in claims:
            try:
                prepared.append(self.prepare(claim))
                good.append(claim)
            except Undecodable as error:
                bad.append(Settlement(claim.position, self.outcome(claim, error)))
        return good, prepared, bad

    async def batch(self, claims: Sequence[Claim], prepared: list[Any]) -> list[Settlement] | None:
        """Call a batch handler, and settle every one of its events by itself. None: all are done, and nothing is stored."""
        failed: Mapping[int, BaseException] = {}
        try:
            await self.invoke(prepared)
        except BatchFailed as error:
            failed = _checked(error, len(claims))
        if not failed and not (self.delivers and any(delivery.staged for delivery in prepared)):
            return None
        settlements: list[Settlement] = []
        for index, claim in enumerate(claims):
            if index in failed:
                settlements.append(Settlement(claim.position, self.outcome(claim, failed[index])))
            else:
                outputs = prepared[index].staged if self.delivers else ()
                settlements.append(Settlement(claim.position, DONE, outputs))
        return settlements

    def outcome(self, claim: Claim, error: BaseException) -> Outcome:
        """What an error of the handler means for the event. Raises nothing, however odd the error is."""
        match error:
            case Skip():
                note = _storable(str(error.reason))
                self._tell(SKIPPED, claim, reason=note)
                return Done(note)
            case Reject():
                return self._dead(claim, "rejected", str(error.reason))
            case Undecodable():
                return self._dead(claim, "undecodable", str(error))
            case RetryLater() if claim.postponed < MAX_POSTPONED:
                return self._postponed(claim, error)
            case RetryLater():
                return self._dead(claim, "failed", f"put off {MAX_POSTPONED:,} times by RetryLater")
            case _ if isinstance(error, self._never):
                return self._give_up(claim, "never", _text(error), error)
            case _ if claim.attempt >= self._retry.attempts:
                return self._give_up(claim, "failed", _text(error), error)
        delay_s = self._retry.delay_s(claim.attempt, self._clock.chance())
        self._tell(RETRIED, claim, delay_s=delay_s, exception=error)
        last_line = "".join(traceback.format_exception_only(error)).strip()
        return Later(self._clock.now_ms() + int(delay_s * 1000), _storable(last_line))

    def killed(self, claim: Claim) -> Outcome | None:
        """The end of an event that took its process down once too often, the last time alone; it is not tried again."""
        if claim.suspect < 3 or claim.attempt <= self._retry.attempts:
            return None
        return self._give_up(claim, "crashed", f"its process died in {claim.attempt - 1} attempts, the last time alone")

    def _inject(self, delivery: Delivery[Any]) -> Awaitable[None]:
        arguments: dict[str, Any] = {}
        if self._event is not None:
            arguments[self._event] = delivery.event
        if self._delivery is not None:
            arguments[self._delivery] = delivery
        if not self._depends:
            return self._handler(**arguments)
        return self.plan.call(self._handler, arguments, delivery, self._shop.process)

    def _inject_batch(self, deliveries: Sequence[Delivery[Any]]) -> Awaitable[None]:
        arguments: dict[str, Any] = {}
        if self._event is not None:
            arguments[self._event] = [delivery.event for delivery in deliveries]
        if self._delivery is not None:
            arguments[self._delivery] = list(deliveries)
        if not self._depends:
            return self._handler(**arguments)
        return self.plan.call(self._handler, arguments, None, self._shop.process)

    def _decoded(self, claim: Claim) -> Any:
        record = claim.record
        data = record.data
        if len(data) > MAX_EVENT_BYTES:
            raise Undecodable(f"{len(data):,} bytes, over the limit of {MAX_EVENT_BYTES:,}")
        try:
            return self.decode[record.type](data)
        except Exception as error:  # whatever a field's own type or validator raises: the bytes are not this event
            raise self.undecodable(record.type, error) from None

    def _delivered(self, claim: Claim) -> Delivery[Any]:
        record, attempt = claim.record, claim.attempt
        return Delivery(
            self._decoded(claim),
            record.id,
            record.key,
            record.type,
            record.source,
            record.time_ms,
            record.headers,
            claim.position,
            attempt,
            attempt >= self._retry.attempts,
            None if self._timeout_ms is None else self._clock.now_ms() + self._timeout_ms,
            self._stage,
            claim.token,
        )

    def _postponed(self, claim: Claim, verdict: RetryLater) -> Outcome:
        try:
            delay_s = min(seconds(verdict.after), _LONGEST_S)
        except (BadSetting, TypeError, ValueError) as wrong:
            return self.outcome(claim, wrong)
        self._tell(POSTPONED, claim, delay_s=delay_s)
        return Later(self._clock.now_ms() + int(delay_s * 1000), "", counted=False)

    def _give_up(self, claim: Claim, reason: str, error: str, exception: BaseException | None = None) -> Outcome:
        if self._retry.then == "skip":
            return self._dead(claim, reason, error, exception)
        error = _storable(error)
        self._tell(HELD, claim, reason=reason, error=error, exception=exception)
        return Later(HELD_MS, error)

    def _dead(self, claim: Claim, reason: str, error: str, exception: BaseException | None = None) -> Dead:
        error = _storable(error)
        self._tell(DEAD, claim, reason=reason, error=error, exception=exception)
        return Dead(reason, error)

    def _tell(self, name: str, claim: Claim, **measurements: Any) -> None:
        self._shop.telemetry.emit(
            name, group=self.subscriber.group, position=claim.position, attempt=claim.attempt, **measurements
        )


def routes(group: Group, shop: Shop) -> dict[str, Route]:
    """The table of a group: wire type to route. Types that nobody handles are not in it."""
    made = {id(subscriber): Route(subscriber, shop) for subscriber in group.subscribers}
    return {name: made[id(subscriber)] for name, subscriber in group.routes.items()}


def unhandled(claim: Claim, group: Group, telemetry: Telemetry) -> Outcome:
    """What becomes of an event that no handler of the group is for."""
    record, stream = claim.record, group.stream
    if claim.fault:
        dead = Dead("undecodable", claim.fault)
    elif record.type in stream.types or stream.others == "skip":
        return DONE
    else:
        error = f"this version of stream {stream.name!r} does not name {record.type!r}; replay it after an upgrade"
        dead = Dead("unknown type", error)
    position, attempt = claim.position, claim.attempt
    telemetry.emit(DEAD, group=group.name, position=position, attempt=attempt, reason=dead.reason, error=dead.error)
    return dead


def _is_positional(subscriber: Subscriber) -> bool:
    parameter = inspect.signature(subscriber.handler).parameters[subscriber.signature.event or ""]
    return parameter.kind is not parameter.KEYWORD_ONLY


def _composed(subscriber: Subscriber, handle: Handle) -> Handle:
    for middleware in reversed(subscriber.middleware):
        handle = middleware(handle)
    return handle


def _threaded(handler: Callable[..., None], threads: Threads) -> Callable[..., Awaitable[None]]:
    async def call(*args: Any, **arguments: Any) -> None:
        await threads.run(partial(contextvars.copy_context().run, handler, *args, **arguments))

    return call


def _timeout_s(subscriber: Subscriber) -> float:
    timeout = subscriber.timeout if subscriber.timeout is not None else DEFAULT_TIMEOUT
    return float("inf") if timeout == NEVER else seconds(timeout)


def _checked(error: BatchFailed, size: int) -> Mapping[int, BaseException]:
    """A batch that names events that it does not have failed as a whole: its word cannot be trusted."""
    if all(isinstance(index, int) and 0 <= index < size for index in error.failed):
        return error.failed
    wrong = IndexError(f"BatchFailed names {list(error.failed)[:5]}, and the batch has {size} events")
    return dict.fromkeys(range(size), wrong)


def _text(error: BaseException) -> str:
    """The traceback; of a long one the end, which names the error."""
    return "".join(traceback.format_exception(error))[-MAX_ERROR_CHARS:]


def _storable(text: str) -> str:
    """As every broker can keep it: an error's text may hold half of a surrogate pair, from a file name say."""
    return text[:MAX_ERROR_CHARS].encode(errors="replace").decode()
