"""What `publish` is given becomes events: checked by their type where an app declares the stream, else as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, NoReturn, Protocol

import msgspec

from millstream.app import App
from millstream.brokers.base import Broker, Confirm, Position, Record, StreamSpec
from millstream.cli import show, target
from millstream.cli.main import Mistake
from millstream.cli.target import Target
from millstream.clock import Clock
from millstream.delivery import Envelope
from millstream.errors import BrokerError, MillstreamError, Unconfirmed
from millstream.event import field_names
from millstream.publisher import check_confirm, due_ms
from millstream.stream import Stream
from millstream.units import MAX_EVENT_BYTES, MAX_HEADERS_BYTES, MAX_ID_CHARS, MAX_KEY_BYTES, MAX_TYPE_CHARS, Duration
from millstream.wire import codec
from millstream.wire.partition import partition_of

MAX_LINE_BYTES = 4 * MAX_EVENT_BYTES  # an event at its limit, with escapes and its envelope


class Unfit(Mistake):
    """An event cannot be published as it was written."""


class Draft(msgspec.Struct):
    """An event as the arguments or a line give it, not yet checked against its type."""

    type: str = ""
    data: dict[str, Any] = {}
    id: str | None = None
    key: str | int | None = None
    headers: dict[str, str] = {}
    time: datetime | None = None
    source: str = ""
    position: str = ""

    @property
    def time_ms(self) -> int:
        """0: when it is stored."""
        if self.time is None:
            return 0
        return int((self.time if self.time.tzinfo else self.time.replace(tzinfo=UTC)).timestamp() * 1000)


_OUTSIDE = frozenset(Draft.__struct_fields__)


class Outlet(Protocol):
    """Where events go: checked by their type, or as they are."""

    def fields(self, kind: str) -> Collection[str]:
        """The names of a type's fields, as far as they are known."""
        ...

    def fit(self, draft: Draft, *, words: bool = False, due: datetime | Duration | None = None) -> Any:
        """What `store` takes; it has an `id`. `words`: values may be text that a field's type converts. Raises `Unfit`."""
        ...

    async def store(self, events: Sequence[Any]) -> Sequence[Position]:
        """Store events, at most as many as one write takes. Raises what `App.publish_many` raises."""
        ...


@asynccontextmanager
async def outlet(meant: Target, name: str, confirm: Confirm | None = None) -> AsyncIterator[Outlet]:
    """Where events of this stream go, open. Raises `Mistake` for an unknown stream, `NotSupported` for `confirm`."""
    declared = meant.stream(name)
    if meant.app is not None and declared is not None:
        async with meant.app:
            yield _Typed(meant.app, declared, confirm)
        return
    async with meant.opened() as broker:
        info = await target.find_stream(broker, name, meant)
        if meant.app is not None:
            show.note(f"{meant.app.name} does not declare {name!r}: events are stored as they are")
        check_confirm(broker, confirm or "memory", f"stream {name!r}")
        yield _Raw(broker, info.spec, meant.clock, confirm or "memory")


class _Typed:
    """Events of a stream that an app declares."""

    def __init__(self, app: App, stream: Stream[Any], confirm: Confirm | None) -> None:
        self._app = app
        self._stream = stream
        self._confirm = confirm
        self._decoders = {name: codec.decoder(cls) for name, cls in stream.types.items()}
        self._encoders = {name: codec.encoder(cls, stream.codec) for name, cls in stream.types.items()}

    def fields(self, kind: str) -> Collection[str]:
        """As its class says."""
        return field_names(self._stream.types.get(kind, object)) or ()

    def fit(self, draft: Draft, *, words: bool = False, due: datetime | Duration | None = None) -> Envelope[Any]:
        """Make the event, as its class."""
        cls = self._stream.types.get(draft.type)
        if cls is None:
            _unfit(f"{self._stream.name!r} has no type {draft.type!r}, but {', '.join(self._stream.types)}")
        try:
            decode = self._decoders[draft.type]
            event = _from_words(cls, draft.data) if words else decode(msgspec.json.encode(draft.data))
            data = self._encoders[draft.type](event)
            key = str(draft.key) if draft.key is not None else self._stream.key_of(event)
        except (MillstreamError, ValueError) as error:
            _unfit(str(error))
        _check(draft, key, data)
        envelope = Envelope(event, id=draft.id or self._app.clock.new_id(), key=key, headers=draft.headers, due=due)
        envelope.time_ms = draft.time_ms
        return envelope

    async def store(self, events: Sequence[Envelope[Any]]) -> Sequence[Position]:
        """Through the app."""
        return await self._app.publish_many(events, to=self._stream, confirm=self._confirm)


class _Raw:
    """Events of a stream of which only the broker knows."""

    def __init__(self, broker: Broker, spec: StreamSpec, clock: Clock, confirm: Confirm) -> None:
        self._broker = broker
        self._spec = spec
        self._encode = codec.encoder(dict, codec.MSGPACK if spec.codec == codec.MSGPACK else codec.JSON)
        self._clock = clock
        self._confirm = confirm

    def fields(self, kind: str) -> Collection[str]:
        """Unknown."""
        return ()

    def fit(self, draft: Draft, *, words: bool = False, due: datetime | Duration | None = None) -> Record:
        """Make the record."""
        if not 0 < len(draft.type) <= MAX_TYPE_CHARS or not draft.type.isprintable():
            _unfit(f"{draft.type[:50]!r} cannot name a type: 1 to {MAX_TYPE_CHARS} printable characters")
        key, data = self._key(draft), self._encode(draft.data)
        _check(draft, key, data)
        id_ = draft.id or self._clock.new_id()
        partition = partition_of(id_ if key is None else key, self._spec.partitions)
        headers = msgspec.json.encode(draft.headers) if draft.headers else b""
        at_ms = None if due is None else due_ms(due, self._broker, self._clock)
        return Record(partition, id_, draft.type, data, key, draft.time_ms, headers, at_ms, draft.source)

    async def store(self, events: Sequence[Record]) -> Sequence[Position]:
        """Straight to the broker; what fails is told as `App.publish_many` tells it."""
        try:
            return await self._broker.append(self._spec.name, events, self._confirm)
        except Unconfirmed as error:
            answers = list(zip(events, error.results, strict=True))
            doubtful = [event for event, result in answers if not isinstance(result, Position)]
            stored = [result for _, result in answers if isinstance(result, Position)]
            raise Unconfirmed(str(error), envelopes=doubtful, results=stored) from error
        except BrokerError as error:
            raise Unconfirmed(f"{error}; none of these was stored", envelopes=events) from error

    def _key(self, draft: Draft) -> str | None:
        """The key that was given, else the field that the stream names."""
        if draft.key is not None or not self._spec.key:
            return None if draft.key is None else str(draft.key)
        if self._spec.key == "()":
            _unfit(f"a function makes the keys of {self._spec.name!r}: give a key, or --app")
        value = draft.data.get(self._spec.key)
        if not isinstance(value, str | int) or isinstance(value, bool):
            _unfit(f"the key {self._spec.key!r} of {self._spec.name!r} must be text or a whole number, not {value!r}")
        return str(value)


def read_line(line: bytes, outlet: Outlet) -> Draft:
    """The event of a JSON line: its fields beside its `type`, or what `tail -o jsonl` prints. Raises `Unfit`."""
    if len(line) > MAX_LINE_BYTES:
        _unfit(f"the line is over its limit of {MAX_LINE_BYTES:,} bytes")
    try:
        found = msgspec.json.decode(line, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        _unfit(f"not a JSON object: {error}")
    kind = found.get("type")
    if not kind or not isinstance(kind, str):
        _unfit("it has no type")
    if _is_whole(found, outlet.fields(kind)):
        try:
            return msgspec.convert(found, Draft)
        except msgspec.ValidationError as error:
            _unfit(str(error))
    del found["type"]
    return Draft(kind, found)


def _is_whole(found: dict[str, Any], fields: Collection[str]) -> bool:
    """True when `data` holds the event. `position` settles it for a type that has a field `data` itself."""
    if not isinstance(found.get("data"), dict) or not found.keys() <= _OUTSIDE:
        return False
    return "data" not in fields or "position" in found


def _check(draft: Draft, key: str | None, data: bytes) -> None:
    """The limits of an event. Checked for each line, so that the line can be named."""
    if len(data) > MAX_EVENT_BYTES:
        _unfit(f"the event is {len(data):,} bytes, over the limit of {MAX_EVENT_BYTES:,}; publish a reference to it")
    if key is not None and len(key.encode()) > MAX_KEY_BYTES:
        _unfit(f"the key is over its limit of {MAX_KEY_BYTES:,} bytes; use a hash of it")
    if draft.headers and len(msgspec.json.encode(draft.headers)) > MAX_HEADERS_BYTES:
        _unfit(f"the headers are over their limit of {MAX_HEADERS_BYTES:,} bytes")
    if draft.id is not None and not (
        0 < len(draft.id) <= MAX_ID_CHARS and draft.id.isascii() and draft.id.isprintable()
    ):
        _unfit(f"id {_head(draft.id)}: 1 to {MAX_ID_CHARS} printable ASCII characters; of what is longer, take a hash")


def _from_words(cls: type, data: Mapping[str, Any]) -> Any:
    """An event from text: a number where the field is one. A misspelt field would be lost, so it is refused."""
    names = getattr(cls, "__struct_encode_fields__", None) or field_names(cls) or ()
    validate: Callable[[Any], Any] | None = getattr(cls, "model_validate", None)
    unknown = data.keys() - set(names)
    if unknown and validate is None:
        _unfit(f"{cls.__name__} has no field {', '.join(sorted(unknown))}, but {', '.join(names)}")
    try:
        return validate(data) if validate else msgspec.convert(data, cls, strict=False, str_keys=True)
    except ValueError as error:
        details: Any = getattr(error, "errors", list)()  # pydantic's own list: its text has several lines
        words = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in details[:3])
        _unfit(f"{cls.__name__}: {words or error}")


def field(word: str) -> tuple[str, Any]:
    """`F=V` or `F:=JSON`."""
    name, value = pair(word, "field")
    if not name.endswith(":"):
        return name, value
    try:
        return name[:-1], msgspec.json.decode(value)
    except msgspec.DecodeError as error:
        raise Unfit(f"{word!r} is not JSON behind := ({error}); text is written {name[:-1]}={value}") from None


def pair(word: str, kind: str) -> tuple[str, str]:
    """`NAME=VALUE`."""
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise Unfit(f"{word!r} is not a {kind}: write NAME=VALUE.")
    return name, value


def _head(words: str) -> str:
    return repr(words) if len(words) <= MAX_ID_CHARS else f"{words[:20]!r}… of {len(words):,} characters"


def _unfit(message: str) -> NoReturn:
    raise Unfit(message)
