"""An event becomes JSON, and back: Structs, dataclasses and pydantic models.

pydantic is looked for among the modules that are loaded already, and never loaded from here: whoever has no model does
not pay for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import msgspec

from millstream.errors import WireError
from millstream.units import MAX_EVENT_BYTES

JSON = "json"

_encode = msgspec.json.Encoder().encode


def encoder(cls: type) -> Callable[[Any], bytes]:
    """A function that turns an event of this class into bytes. It raises what the event's own fields raise."""
    if _is_model(cls):
        return lambda event: event.model_dump_json(by_alias=True).encode()
    return _encode


def decoder(cls: type) -> Callable[[bytes], Any]:
    """A function that turns bytes into an event of this class, or raises `WireError` that names the field."""
    decode: Callable[[bytes], Any] = getattr(cls, "model_validate_json", None) or msgspec.json.Decoder(cls).decode

    def checked(data: bytes) -> Any:
        if len(data) > MAX_EVENT_BYTES:
            raise WireError(f"{len(data):,} bytes, over the limit of {MAX_EVENT_BYTES:,}")
        try:
            return decode(data)
        except Exception as error:  # whatever a field's own type or validator raises: the bytes are not this event
            raise WireError(f"{cls.__name__}: {_one_line(error)}") from None

    return checked


def _is_model(cls: type) -> bool:
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and issubclass(cls, pydantic.BaseModel)


def _one_line(error: Exception) -> str:
    details = getattr(error, "errors", None)
    if callable(details):  # pydantic: several lines of prose; its own list is shorter
        return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in details()[:3])
    return " ".join(str(error).split())[:300] or type(error).__name__
