"""The import rule: floors, and who may import what, read from every import in the source; and how long things may be.

Read are the imports inside functions and under `TYPE_CHECKING` too: what only a checker imports is a bond all the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import millstream

SOURCE = Path(millstream.__file__).parent

WORDS = ("clock", "errors", "units", "telemetry", "settings", "event", "stream", "retry", "delivery")
FLOORS = {
    **dict.fromkeys(WORDS, 0),
    "wire": 1,
    "brokers": 2,
    "handlers": 3,
    "publisher": 4,
    "worker": 5,
    **dict.fromkeys(("monitor", "sourcing", "pipelines", "connect", "sql", "blocking"), 6),
    "app": 7,
    **dict.fromkeys(("demo", "bench", "testing"), 8),
    "cli": 9,
    "__main__": 10,  # python -m millstream
}
LATE = {"__init__.py", "brokers/urls.py", "cli/main.py"}
ONLY_IN = {"click": "cli", "rich": "cli", "pytest": "testing"}
PRIVATE_BROKERS = ("brokers.redis", "brokers.sqlite")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_LINES = {"worker/worker.py": 200}


class Import(NamedTuple):
    """One imported module; ours without the leading `millstream.`."""

    file: str
    line: int
    module: str
    ours: bool
    late: bool

    @property
    def importer(self) -> str:
        return self.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_every_import_in_the_source_keeps_the_rule() -> None:
    assert import_complaints(SOURCE) == []


def test_no_file_and_no_function_in_the_source_is_too_long() -> None:
    assert length_complaints(SOURCE) == []


def test_every_module_of_the_source_is_read() -> None:
    importers = {found.importer for found in imports(SOURCE)}
    assert {"brokers.urls", "wire.entry", "delivery", "stream", "handlers.router"} <= importers
    assert any(found.late for found in imports(SOURCE))


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("wire/entry.py", "from millstream.brokers.base import Broker", "wire is below brokers"),
        ("wire/entry.py", "import millstream.brokers.base", "wire is below brokers"),
        ("wire/entry.py", "from millstream.brokers import base", "wire is below brokers"),
        ("wire/entry.py", "from ..brokers.base import Broker", "wire is below brokers"),
        ("wire/entry.py", "from millstream import App", "wire is below app"),
        ("wire/entry.py", "if TYPE_CHECKING:\n    from millstream.app import App", "wire is below app"),
        ("worker/worker.py", "from millstream.testing.clock import VirtualClock", "worker is below testing"),
        ("stream.py", "from millstream.delivery import Envelope", "stream comes before delivery"),
        ("units.py", "from millstream.settings import Settings", "units comes before settings"),
        ("errors.py", "from . import units", "errors comes before units"),
        ("bench/scenarios.py", "from millstream.demo.app import app", "bench and demo are on one floor"),
        ("blocking.py", "import millstream.app", "blocking is below app"),
        ("blocking.py", "import millstream.sql", "blocking and sql are on one floor"),
        ("cli/show.py", "def show():\n    from millstream.app import App", "may not import our modules late"),
        ("worker/call.py", "def call():\n    import millstream.units", "may not import our modules late"),
        ("worker/call.py", "from millstream.brokers.redis.link import Link", "inside of brokers.redis"),
        ("brokers/memory/broker.py", "from millstream.brokers.sqlite import writer", "inside of brokers.sqlite"),
        ("brokers/sqlite/broker.py", "from ..redis import keys", "inside of brokers.redis"),
        ("brokers/urls.py", "from millstream.brokers.redis.link import Link", "inside of brokers.redis"),
        ("app.py", "import click", "click belongs to cli"),
        ("app.py", "def run():\n    from rich.table import Table", "rich belongs to cli"),
        ("worker/worker.py", "import pytest", "pytest belongs to testing"),
        ("wire/codec.py", "def is_model():\n    import pydantic", "never loads pydantic"),
        ("helpers/text.py", "import re", "helpers is on no floor"),
        ("wire/entry.py", "from millstream.helpers import text", "helpers is on no floor"),
        ("wire/entry.py", "from millstream import nothing", "nothing is on no floor"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    write_tree(tmp_path, {file: text})
    found = import_complaints(tmp_path)
    assert len(found) == 1
    assert complaint in found[0]
    assert found[0].startswith(f"{file}:")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "brokers/memory/broker.py",
            "from millstream.brokers.base import Broker\nfrom millstream.wire.entry import Record",
        ),
        ("brokers/redis/broker.py", "from millstream.brokers.redis.link import Link\nfrom . import keys"),
        ("brokers/urls.py", "def pick():\n    from millstream.brokers.redis.broker import RedisBroker"),
        ("cli/main.py", "import click\ndef command():\n    from millstream.cli.run import run"),
        ("demo/app.py", "from millstream import App, Router, __version__"),
        ("worker/call.py", "def call():\n    import json"),
        ("testing/conformance.py", "import pytest"),
        ("delivery.py", "from millstream.stream import Position"),
        ("__init__.py", "from millstream.app import App"),
    ],
)
def test_a_permitted_import_is_left_alone(tmp_path: Path, file: str, text: str) -> None:
    write_tree(tmp_path, {file: text})
    assert import_complaints(tmp_path) == []


def test_what_is_too_long_is_found(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "app.py": "x = 1\n" * (MAX_FILE_LINES + 1),
            "stream.py": "x = 1\n" * MAX_FILE_LINES,
            "worker/worker.py": "x = 1\n" * 201,
            "worker/call.py": "class Call:\n    async def call(self):\n" + "        x = 1\n" * MAX_FUNCTION_LINES,
            "worker/lanes.py": "def run():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1),
        },
    )
    assert length_complaints(tmp_path) == [
        "app.py: 501 lines, at most 500",
        "worker/call.py:2: call() has 61 lines, at most 60",
        "worker/worker.py: 201 lines, at most 200",
    ]


def import_complaints(root: Path) -> list[str]:
    """Every import below this folder that breaks the rule: `file:line: why`."""
    return [f"{found.file}:{found.line}: {why}" for found in imports(root) if (why := complaint(found))]


def complaint(found: Import) -> str | None:
    """Why this import is forbidden; None when it is not."""
    here, there = found.importer.partition(".")[0], found.module.partition(".")[0]
    if found.file == "__init__.py":
        return None
    if here not in FLOORS:
        return f"{here} is on no floor: give it one in the import rule"
    if not found.ours:
        return foreign_complaint(here, found)
    if there not in FLOORS:
        return f"{there} is on no floor: give it one in the import rule"
    if found.late and found.file not in LATE:
        return f"it may not import our modules late, and imports {found.module} inside of a function"
    return floor_complaint(here, there) or private_complaint(found)


def foreign_complaint(here: str, found: Import) -> str | None:
    package = found.module.partition(".")[0]
    if ONLY_IN.get(package, here) != here:
        return f"{package} belongs to {ONLY_IN[package]}"
    if package == "pydantic" and found.file == "wire/codec.py":
        return "the codec looks for pydantic among the loaded modules, and never loads pydantic"
    return None


def floor_complaint(here: str, there: str) -> str | None:
    if here == there:
        return None
    if FLOORS[here] < FLOORS[there]:
        return f"{here} is below {there}"
    if FLOORS[here] > FLOORS[there]:
        return None
    if FLOORS[here]:
        return f"{here} and {there} are on one floor, and may not import each other"
    return f"{here} comes before {there}" if WORDS.index(here) < WORDS.index(there) else None


def private_complaint(found: Import) -> str | None:
    for broker in PRIVATE_BROKERS:
        if not is_inside(found.module, broker) or is_inside(found.importer, broker):
            continue
        if found.file != "brokers/urls.py" or found.module != f"{broker}.broker":
            return f"{found.module} lies inside of {broker}; only brokers/urls.py may import its broker"
    return None


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imports(root: Path) -> Iterator[Import]:
    """Every import below this folder, which stands for the package `millstream`."""
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"), str(path))
        late = {id(node) for function in functions(tree) for node in ast.walk(function)}
        for node in ast.walk(tree):
            for name in imported(node, root, path):
                module = name.removeprefix("millstream.")
                if name != "millstream":
                    file = path.relative_to(root).as_posix()
                    yield Import(file, getattr(node, "lineno", 0), module, module != name, id(node) in late)


def imported(node: ast.AST, root: Path, path: Path) -> Iterator[str]:
    """The full names of the modules that this statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = ["millstream", *path.relative_to(root).parent.parts]
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        yield from dict.fromkeys(module_of(base, alias.name, root) for alias in node.names)


def module_of(base: str, name: str, root: Path) -> str:
    """The module that `from base import name` comes from: a submodule, the home of a public name, or base itself."""
    if base == "millstream":
        if name == "__version__":
            return base
        return public_homes().get(name, f"{base}.{name}")
    if base.startswith("millstream."):
        folder = root.joinpath(*base.split(".")[1:])
        if (folder / f"{name}.py").exists() or (folder / name).is_dir():
            return f"{base}.{name}"
    return base


def public_homes() -> Mapping[str, str]:
    homes: dict[str, str] = vars(millstream)["_MODULES"]
    return homes


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length_complaints(root: Path) -> list[str]:
    """Every file and function below this folder that has too many lines."""
    found = []
    for path in sorted(root.rglob("*.py")):
        file, text = path.relative_to(root).as_posix(), path.read_text("utf-8")
        lines, most = len(text.splitlines()), MAX_LINES.get(file, MAX_FILE_LINES)
        if lines > most:
            found.append(f"{file}: {lines} lines, at most {most}")
        for function in functions(ast.parse(text)):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(
                    f"{file}:{function.lineno}: {function.name}() has {lines} lines, at most {MAX_FUNCTION_LINES}"
                )
    return found


def write_tree(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
