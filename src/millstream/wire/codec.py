"""An event becomes JSON or MessagePack, and back: Structs, dataclasses and pydantic models.

A pydantic model means in MessagePack what it means in JSON, dates as text included: so its validators and strictness
see the same values whatever the codec of a stream. Structs and dataclasses use MessagePack's own types for bytes and
times.

pydantic is looked for among the modules that are loaded already, and never loaded from here: whoever has no model does
not pay for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec

from millstream.errors import WireError
from millstream.units import MAX_EVENT_BYTES

Codec: TypeAlias = Literal["json", "msgpack"]

JSON: Codec = "json"
MSGPACK: Codec = "msgpack"

_to_json = msgspec.json.Encoder().encode
_to_msgpack = msgspec.msgpack.Encoder().encode
_from_msgpack = msgspec.msgpack.Decoder().decode


def encoder(cls: type, codec: Codec = JSON) -> Callable[[Any], bytes]:
    """A function that turns an event of this class into bytes. It raises what the event's own fields raise."""
    if not _is_model(cls):
        return _to_json if codec == JSON else _to_msgpack
    if codec == JSON:
        return lambda event: event.model_dump_json(by_alias=True).encode()
    return lambda event: _to_msgpack(event.model_dump(mode="json", by_alias=True))


def decoder(cls: type, codec: Codec = JSON) -> Callable[[bytes], Any]:
    """A function that turns bytes into an event of this class, or raises `WireError` that names the field."""
    decode = unchecked_decoder(cls, codec)

    def checked(data: bytes) -> Any:
        if len(data) > MAX_EVENT_BYTES:
            raise WireError(f"{len(data):,} bytes, over the limit of {MAX_EVENT_BYTES:,}")
        try:
            return decode(data)
        except Exception as error:  # whatever a field's own type or validator raises: the bytes are not this event
            raise WireError(reason(cls, error)) from None

    return checked


def reason(cls: type, error: Exception) -> str:
    """Why bytes are no event of this class, from what its decoder raised: one line that names the field."""
    return f"{cls.__name__}: {_one_line(error)}"


def unchecked_decoder(cls: type, codec: Codec = JSON) -> Callable[[bytes], Any]:
    """The same for bytes whose number was looked at before; it raises whatever a field's own type or validator does."""
    validate: Callable[[bytes], Any] | None = getattr(cls, "model_validate_json", None)
    if validate is None:
        return msgspec.json.Decoder(cls).decode if codec == JSON else msgspec.msgpack.Decoder(cls).decode
    return validate if codec == JSON else lambda data: validate(_to_json(_from_msgpack(data)))


def _is_model(cls: type) -> bool:
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and issubclass(cls, pydantic.BaseModel)


def _one_line(error: Exception) -> str:
    details = getattr(error, "errors", None)
    if callable(details):  # pydantic: several lines of prose; its own list is shorter
        return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in details()[:3])
    return " ".join(str(error).split())[:300] or type(error).__name__
