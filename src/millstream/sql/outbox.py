"""Outbox: events are written into the user's database, in the transaction of what they tell about, and published later.

    async with session.begin():
        session.add(order)
        await outbox.publish(session, OrderPlaced(order_id=order.id))

    app = App("shop", include=[outbox.relay(engine)])

Both are stored or neither is. A relay publishes what was committed; `relay` tells how it keeps order and does nothing twice.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar, cast, overload

from msgspec import Struct
from msgspec.structs import replace

from millstream.brokers.base import Broker, Traits
from millstream.clock import Clock
from millstream.delivery import Envelope
from millstream.errors import BadSetting, Unroutable
from millstream.publisher.records import Records
from millstream.sql import tables
from millstream.sql.connections import (
    Asynchronous,
    Row,
    Statement,
    Work,
    check_in_transaction,
    checked_dialect,
    dialect_of,
    perform,
)
from millstream.sql.relay import Relay
from millstream.sql.rows import SHARDS
from millstream.stream import Stream
from millstream.units import Duration
from millstream.wire.partition import partition_of

E = TypeVar("E")

UNKNOWN = "its stream is not one of this outbox"


class Stuck(Struct, frozen=True):
    """An event that the relay has set aside, since it cannot be published. Later ones of its key wait behind it."""

    seq: int
    stream: str
    shard: int
    id: str
    type: str
    key: str | None
    error: str
    created_ms: int


class Lag(Struct, frozen=True):
    """How far the relay is behind."""

    waiting: int = 0
    """Events that are not published yet."""
    oldest_ms: int | None = None
    """When the first of them was written; None without one."""
    aside: int = 0
    """Events that cannot be published, and those that wait behind them."""


class _Anywhere:
    """Where a relay will publish is not known yet; whether it can publish for later, the relay will see."""

    url = "outbox"
    traits = Traits(delayed=True)


class Outbox:
    """Events on their way to these streams, in a table of the user's database.

    The streams must remember ids (`dedupe=`): a relay that dies publishes again what it had not crossed off. Let them
    remember for longer than the database or all relays may be down. `source` names the app that writes. With a connection
    or session that is asynchronous, each call is awaited.
    """

    def __init__(self, *streams: Stream[Any], source: str = "") -> None:
        if not streams:
            raise BadSetting("Outbox() carries nothing: name its streams, Outbox(orders, payments)")
        for stream in streams:
            if stream.dedupe is None:
                raise BadSetting(
                    f"outbox: stream {stream.name!r} does not remember ids, so a relay that dies would double events; "
                    f"declare it with Stream({stream.name!r}, …, dedupe='24h')"
                )
        self.streams = {stream.name: stream for stream in streams}
        self.source = source
        self._clock = Clock()
        self._records = Records(streams, source=source, broker=cast("Broker", _Anywhere()), clock=self._clock)

    # Two shapes each: without `to`, mypy takes an Envelope for one of nothing.
    @overload
    def publish(
        self, connection: Asynchronous, event: Envelope[Any], *, to: None = None
    ) -> Coroutine[Any, Any, str]: ...
    @overload
    def publish(
        self, connection: Asynchronous, event: E | Envelope[E], *, to: Stream[E] | None = None
    ) -> Coroutine[Any, Any, str]: ...
    @overload
    def publish(self, connection: Any, event: Envelope[Any], *, to: None = None) -> str: ...
    @overload
    def publish(self, connection: Any, event: E | Envelope[E], *, to: Stream[E] | None = None) -> str: ...
    def publish(self, connection: Any, event: Any, *, to: Stream[Any] | None = None) -> str | Coroutine[Any, Any, str]:
        """Write an event that is published when this transaction has been committed, and return its id.

        Events of one key are published in the order in which they were written, where one transaction had ended before the
        other called this: lock what the key stands for first, or write it. `to` may be left out while exactly one stream of
        the outbox carries the type. Raises `Unroutable`, `BadEvent` and `TooLarge` as `App.publish`, `MillstreamError`
        outside of a transaction, and what the driver raises.
        """
        values = self._values(event, to)
        check_in_transaction(connection)
        return perform(connection, _insert(values))

    @overload
    def stuck(self, connection: Asynchronous, *, limit: int = 100) -> Coroutine[Any, Any, list[Stuck]]: ...
    @overload
    def stuck(self, connection: Any, *, limit: int = 100) -> list[Stuck]: ...
    def stuck(self, connection: Any, *, limit: int = 100) -> list[Stuck] | Coroutine[Any, Any, list[Stuck]]:
        """The events that were set aside, and those of streams that this outbox does not name, the oldest first.

        A relay looks at them again from time to time, with the code that it has: one whose type was not known yet goes on by
        itself.
        """
        return perform(connection, self._stuck(limit))

    @overload
    def discard(self, connection: Asynchronous, stuck: Stuck) -> Coroutine[Any, Any, bool]: ...
    @overload
    def discard(self, connection: Any, stuck: Stuck) -> bool: ...
    def discard(self, connection: Any, stuck: Stuck) -> bool | Coroutine[Any, Any, bool]:
        """Give up an event that was set aside, for ever: the later ones of its key go on. False when it is not there."""
        return perform(connection, _discard(stuck))

    @overload
    def lag(self, connection: Asynchronous) -> Coroutine[Any, Any, dict[str, Lag]]: ...
    @overload
    def lag(self, connection: Any) -> dict[str, Lag]: ...
    def lag(self, connection: Any) -> dict[str, Lag] | Coroutine[Any, Any, dict[str, Lag]]:
        """For each stream that has rows, how far the relay is behind. Counts all of them."""
        return perform(connection, _lag())

    def relay(self, connect: Any, *, poll: Duration = "500ms") -> Relay:
        """What publishes, to be included by an app: `App(include=[outbox.relay(engine)])`.

        `connect` is an engine of SQLAlchemy, blocking or asynchronous, or a function that opens a connection, awaited where
        that has to be. Several processes may run one: they share the work. `poll` is how long an event may wait for an idle
        relay to look.
        """
        return Relay(self.streams, connect, source=self.source, poll=poll)

    @overload
    def create(self, connection: Asynchronous) -> Coroutine[Any, Any, None]: ...
    @overload
    def create(self, connection: Any) -> None: ...
    def create(self, connection: Any) -> Coroutine[Any, Any, None] | None:
        """Make the tables, unless they are there. Commit it yourself."""
        return perform(connection, _create(tables.tables(dialect_of(connection))))

    @staticmethod
    def ddl(dialect: str) -> str:
        """The statements that make the tables, for a migration. Raises `NotSupported` for an unknown dialect."""
        return "".join(f"{text};\n" for text in tables.tables(checked_dialect(dialect)))

    def _values(self, event: Any, to: Stream[Any] | None) -> dict[str, Any]:
        if to is not None and self.streams.get(to.name) is not to:
            raise Unroutable(
                f"this outbox does not carry {to!r}: name it, Outbox({', '.join(self.streams)}, {to.name})"
            )
        route = self._records.route(event, to)
        record = self._records.record(route, event)
        return {
            "stream": route.stream.name,
            "shard": partition_of(record.id if record.key is None else record.key, SHARDS),
            "event_id": record.id,
            "type": record.type,
            "key": record.key,
            "headers": record.headers,
            "data": record.data,
            "created_ms": record.time_ms or self._clock.now_ms(),
            "due_ms": record.due_ms,
        }

    def _stuck(self, limit: int) -> Work[list[Stuck]]:
        found: list[Row] = []
        for stream in self.streams:
            found += yield Statement(tables.STUCK, {"stream": stream, "limit": limit})
        names = {f"stream{index}": stream for index, stream in enumerate(self.streams)}
        found += yield Statement(tables.strays(len(names)), names | {"limit": limit})
        return [
            Stuck(seq, stream, shard, id_, type_, key, error or UNKNOWN, created_ms)
            for seq, stream, shard, id_, type_, key, error, created_ms in sorted(found)[:limit]
        ]


def _insert(values: Mapping[str, Any]) -> Work[str]:
    yield Statement(tables.INSERT, values)
    return str(values["event_id"])


def _lag() -> Work[dict[str, Lag]]:
    lags: dict[str, Lag] = {}
    for stream, aside, count, oldest_ms in (yield Statement(tables.LAG)):
        lag = lags.get(stream, Lag())
        lags[stream] = replace(lag, aside=count) if aside else replace(lag, waiting=count, oldest_ms=oldest_ms)
    return lags


def _discard(stuck: Stuck) -> Work[bool]:
    row = {"stream": stuck.stream, "seq": stuck.seq}
    yield Statement(tables.SEIZE, {"stream": stuck.stream, "shard": stuck.shard})
    if not (yield Statement(tables.DISCARD, row)):
        return False
    yield Statement(tables.PUT_BACK_LATER, {"stream": stuck.stream, "key": stuck.key})
    return True


def _create(statements: list[str]) -> Work[None]:
    for text in statements:
        yield Statement(text)
