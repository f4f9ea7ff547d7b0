"""Event and @event: what happened, as the user wrote it, and the name and version of its type.

A type's name is written down, never derived from the class name: a rename would change the wire. A class without a name
is a base class: usable in annotations, not publishable.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from types import UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, Union, dataclass_transform

import msgspec

from millstream.errors import BadEvent
from millstream.units import MAX_TYPE_CHARS

T = TypeVar("T")

_MARK = "__millstream__"
_NAME = re.compile(r"[A-Za-z0-9._:/-]+")
_OURS = "millstream."
_VERSIONED = re.compile(r"\.v\d+$")


class EventType(NamedTuple):
    """The name and version under which a class travels."""

    name: str
    version: int

    @property
    def wire(self) -> str:
        """As it stands on the wire: `order.placed` for version 1, `order.placed.v2` for version 2."""
        return self.name if self.version == 1 else f"{self.name}.v{self.version}"


if TYPE_CHECKING:
    # Checkers see a frozen, keyword-only data class: they cannot see through a subclass of StructMeta.
    @dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
    class Event:
        """Something that happened: a typed, immutable value whose field names are all the user's."""

        def __init_subclass__(cls, *, type: str | None = None, version: int = 1) -> None: ...
        def __replace__(self, **changes: Any) -> Self: ...
else:

    class EventMeta(msgspec.StructMeta):
        """Takes the class keywords `type` and `version`, which `StructMeta` itself would refuse."""

        def __new__(mcls, name, bases, namespace, /, *, type=None, version=1, **options):  # noqa: D102 - a dunder
            cls = super().__new__(mcls, name, bases, namespace, **({"frozen": True, "kw_only": True} | options))
            if type is not None:
                setattr(cls, _MARK, _event_type(cls, type, version))
            return cls

    class Event(msgspec.Struct, metaclass=EventMeta):
        """Something that happened: a typed, immutable value whose field names are all the user's."""

        def __replace__(self, **changes):
            return msgspec.structs.replace(self, **changes)


def event(name: str, *, version: int = 1) -> Callable[[type[T]], type[T]]:
    """Name the type of a class that exists already: a dataclass, a pydantic v2 model, a msgspec Struct.

    Raises `BadEvent` for any other class and for an unusable name.
    """

    def mark(cls: type[T]) -> type[T]:
        if field_names(cls) is None:
            raise BadEvent(f"{cls.__qualname__} is not a dataclass, a pydantic v2 model or a Struct: put @event on top")
        setattr(cls, _MARK, _event_type(cls, name, version))
        return cls

    return mark


def type_of(cls: type) -> EventType | None:
    """The class's own name and version, or None for a base class. Never a parent's: that would be another type."""
    mark = vars(cls).get(_MARK)
    return mark if isinstance(mark, EventType) else None


def field_names(cls: type) -> tuple[str, ...] | None:
    """The names of an event class's fields; None when it is no kind of class that Millstream can send."""
    for attribute in ("__struct_fields__", "__dataclass_fields__", "model_fields"):
        fields = getattr(cls, attribute, None)
        if fields is not None:
            return tuple(fields)
    return None


def members(form: Any) -> tuple[Any, ...]:
    """The classes of an annotation: unwraps `A | B`, `Union[A, B]`, `Annotated[A, …]` and `type X = …` aliases."""
    while (value := getattr(form, "__value__", None)) is not None:
        form = value
    origin = typing.get_origin(form)
    if origin is Union or origin is UnionType:
        return tuple(dict.fromkeys(cls for part in typing.get_args(form) for cls in members(part)))
    if origin is typing.Annotated:
        return members(typing.get_args(form)[0])
    return (form,)


def _event_type(cls: type, name: str, version: int) -> EventType:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_TYPE_CHARS - 8:
        raise BadEvent(f"{cls.__qualname__}: {name!r} cannot name a type; use letters, digits and . _ : / -")
    if name.startswith(_OURS):
        raise BadEvent(f"{cls.__qualname__}: {name!r} cannot name a type: names in {_OURS!r} are Millstream's own")
    if _VERSIONED.search(name):
        raise BadEvent(f"{cls.__qualname__}: write the version of {name!r} as version=N, not into the name")
    if not isinstance(version, int) or version < 1:
        raise BadEvent(f"{cls.__qualname__}: version {version!r} must be a whole number from 1")
    return EventType(name, version)
