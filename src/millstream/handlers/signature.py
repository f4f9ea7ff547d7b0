"""What a handler's annotations ask for, read once at registration, or `BadHandler`: file, line, parameter, remedy.

An event, a base class or a union of them is the event; `list[…]` makes it a batch handler; `Delivery` or `Delivery[…]` is
the envelope with its attempt and `publish`; `Annotated[T, Depends(f)]` is a dependency.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from millstream.delivery import Delivery
from millstream.errors import BadHandler
from millstream.event import field_names, members
from millstream.handlers.depends import Depends, Plan, find
from millstream.stream import Stream


@dataclass(frozen=True)
class Signature:
    """What a handler asks for."""

    name: str
    where: str
    """File and line, for messages."""
    types: Mapping[str, type]
    """Wire name and class of each type that it handles, among those of its stream."""
    event: str | None
    """The parameter that gets the event (of a batch handler: the list of events)."""
    delivery: str | None
    """The parameter that gets the delivery (of a batch handler: the list of deliveries)."""
    batch: bool
    depends: Mapping[str, Depends]
    sync: bool
    """A plain function: it runs in a thread."""


def read(handler: Callable[..., Any], stream: Stream[Any]) -> Signature:
    """Read a handler's signature. Raises `BadHandler`."""
    where = _where(handler)
    _check_kind(handler, where)
    wanted: dict[str, tuple[bool, bool, tuple[Any, ...]]] = {}  # parameter -> in a list, a delivery, classes
    depends: dict[str, Depends] = {}
    for name, annotation in _parameters(handler, where).items():
        found = find(annotation)
        if found is not None:
            depends[name] = found
        else:
            wanted[name] = _event_parameter(name, annotation, where)
    if not wanted:
        raise BadHandler(f"{where}: it takes no event; write a parameter such as event: {_example(stream)}")
    events = [name for name, (_, is_delivery, _) in wanted.items() if not is_delivery]
    deliveries = [name for name, (_, is_delivery, _) in wanted.items() if is_delivery]
    if len(events) > 1 or len(deliveries) > 1:
        raise BadHandler(f"{where}: more than one parameter for the event: {', '.join(events + deliveries)}")
    listed = {in_list for in_list, _, _ in wanted.values()}
    if len(listed) > 1:
        raise BadHandler(f"{where}: a batch handler takes lists: list[{_example(stream)}] and list[Delivery]")
    batch = listed.pop()
    Plan(depends, {}, where=where, batch=batch)  # finds what is wrong with the dependencies now
    return Signature(
        name=_name(handler),
        where=where,
        types=_types(tuple(cls for _, _, classes in wanted.values() for cls in classes), stream, where),
        event=events[0] if events else None,
        delivery=deliveries[0] if deliveries else None,
        batch=batch,
        depends=depends,
        sync=not inspect.iscoroutinefunction(_function(handler)),
    )


def _event_parameter(name: str, annotation: Any, where: str) -> tuple[bool, bool, tuple[Any, ...]]:
    inner, in_list = annotation, False
    if typing.get_origin(inner) is list:
        inner, in_list = typing.get_args(inner)[0], True
    elif inner is list:
        raise BadHandler(f"{where}: parameter {name!r} is a list of what? write list[OrderPlaced]")
    if inner is Delivery:
        return in_list, True, ()
    if typing.get_origin(inner) is Delivery:
        return in_list, True, members(typing.get_args(inner)[0])
    classes = members(inner)
    for cls in classes:
        if not isinstance(cls, type) or (field_names(cls) is None and cls is not object):
            raise BadHandler(
                f"{where}: parameter {name!r} asks for {inner!r}, which is no event; it may be an event class or a union of "
                "them, list[…] of these, Delivery, or Annotated[T, Depends(f)]"
            )
    return in_list, False, classes


def _types(classes: tuple[Any, ...], stream: Stream[Any], where: str) -> dict[str, type]:
    """The stream's types that the annotation covers, base classes included; all of them for a bare `Delivery`."""
    wanted = tuple(cls for cls in classes if cls is not typing.Any)
    if not wanted:
        return dict(stream.types)
    carried = ", ".join(cls.__name__ for cls in stream.types.values())
    for cls in wanted:
        if not any(issubclass(other, cls) for other in stream.types.values()):
            raise BadHandler(f"{where}: stream {stream.name!r} does not carry {cls.__name__}; it carries {carried}")
    return {name: cls for name, cls in stream.types.items() if issubclass(cls, wanted)}


def _parameters(handler: Callable[..., Any], where: str) -> dict[str, Any]:
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):
        raise BadHandler(f"{where}: its signature cannot be read; wrap it in a function") from None
    hints = _hints(handler, where)
    found: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        _check_parameter(name, parameter, hints, where)
        if parameter.default is parameter.empty:
            found[name] = hints[name]
    returned = hints.get("return")
    if returned not in (None, type(None), NoReturn, typing.Never):
        raise BadHandler(
            f"{where}: it returns {returned!r}, and a handler returns nothing; publish with delivery.publish(event, to=…)"
        )
    return found


def _check_parameter(name: str, parameter: inspect.Parameter, hints: Mapping[str, Any], where: str) -> None:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
        raise BadHandler(f"{where}: parameter {name!r} must be an ordinary one, with an annotation")
    if isinstance(parameter.default, Depends):
        raise BadHandler(f"{where}: write {name}: Annotated[T, Depends(…)], not as a default value")
    if parameter.default is parameter.empty and name not in hints:
        raise BadHandler(f"{where}: parameter {name!r} has no annotation; the annotation decides what it gets")


def _hints(handler: Callable[..., Any], where: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(_function(handler), include_extras=True)
    except NameError as error:
        raise BadHandler(
            f"{where}: cannot resolve an annotation: {error}; import it at run time, not under TYPE_CHECKING (and define it "
            "outside of functions where annotations are strings)"
        ) from None


def _check_kind(handler: Callable[..., Any], where: str) -> None:
    if not callable(handler):
        raise BadHandler(f"{handler!r} is not callable")
    if isinstance(handler, type):
        raise BadHandler(f"{where}: it is a class; give a function, a method, or an object that can be called")
    function = _function(handler)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise BadHandler(f"{where}: it is a generator, and a handler yields nothing; use delivery.publish(event, to=…)")


def _function(handler: Any) -> Any:
    """The function behind a method, a partial or an object with `__call__`."""
    while isinstance(handler, partial):
        handler = handler.func
    return handler if inspect.isroutine(handler) else type(handler).__call__


def _where(handler: Any) -> str:
    code = getattr(inspect.unwrap(_function(handler)) if callable(handler) else handler, "__code__", None)
    place = f"{code.co_filename}:{code.co_firstlineno}: " if code else ""
    return f"{place}handler {_name(handler)}"


def _name(handler: Any) -> str:
    return str(getattr(handler, "__qualname__", None) or getattr(_function(handler), "__qualname__", repr(handler)))


def _example(stream: Stream[Any]) -> str:
    return next(iter(stream.types.values())).__name__
