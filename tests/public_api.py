"""The public API as text: every public name with its signature, its public methods and attributes.

`make api` writes it to public_api.txt, which a test compares: a change of the API is then a line in a diff, on purpose.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).with_name("public_api.txt")

MODULES = ("millstream", "millstream.sql", "millstream.testing", "millstream.brokers.base")
_HOME = re.compile(r"\b(?:millstream|typing|collections)(?:\.\w+)*\.(?=[A-Z])")  # said in full by some Pythons only
SPOKEN = {"__aenter__", "__aexit__", "__aiter__", "__anext__", "__call__", "__enter__", "__exit__", "__iter__"}


class Bare:
    """Shows an annotation as it was written, without the quotes of a string."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def describe() -> str:
    """All public modules, as the snapshot has them."""
    return _HOME.sub("", "\n".join(line for name in MODULES for line in module_lines(name))) + "\n"


def module_lines(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    yield f"# {name}"
    for public in sorted(module.__all__, key=lambda word: (word.lower(), word)):
        yield from value_lines(public, getattr(module, public))
    yield ""


def value_lines(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        yield from class_lines(name, value)
    elif inspect.isroutine(value):
        yield f"{async_word(value)}def {name}{signature(value)}"
    else:
        yield f"{name} = {value!r}"


def class_lines(name: str, cls: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    yield f"class {name}({bases})" if bases else f"class {name}"
    if is_constructed(cls):
        yield f"    {name}{signature(cls)}"
    for member in sorted({*vars(cls), *assigned(cls)}):
        if not member.startswith("_") or member in SPOKEN:
            yield f"    {member_line(member, inspect.getattr_static(cls, member, None))}"


def member_line(name: str, value: Any) -> str:
    if isinstance(value, classmethod | staticmethod):
        return f"{type(value).__name__} {name}{signature(value.__func__)}"
    if isinstance(value, property):
        returns = inspect.signature(value.fget).return_annotation if value.fget else Any
        return f"property {name}: {returns}"
    if inspect.isroutine(value) and not inspect.isdatadescriptor(value):
        return f"{async_word(value)}def {name}{signature(value)}"
    if value is None or inspect.isdatadescriptor(value):
        return name
    return f"{name} = {value!r}"


def is_constructed(cls: type) -> bool:
    """Whether a user makes instances with arguments that Millstream chose: not protocols, not plain exceptions."""
    if getattr(cls, "_is_protocol", False):
        return False
    if not issubclass(cls, BaseException):
        return True
    return any("__init__" in vars(base) for base in cls.__mro__ if base.__module__.startswith("millstream"))


def assigned(cls: type) -> set[str]:
    """The attributes that a class declares in its body, and those that its constructor sets."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return set()
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    declared = {
        node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    constructors = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    return declared | {
        node.attr
        for constructor in constructors
        for node in ast.walk(constructor)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value)
    }


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def signature(value: Callable[..., Any]) -> str:
    found = inspect.signature(value)
    returns = found.return_annotation
    parameters = [p.replace(annotation=bare(p.annotation)) for p in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=bare(returns)))


def bare(annotation: Any) -> Any:
    return Bare(annotation) if isinstance(annotation, str) else annotation


def async_word(value: Any) -> str:
    return "async " if inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value) else ""


if __name__ == "__main__":
    print(describe(), end="")
