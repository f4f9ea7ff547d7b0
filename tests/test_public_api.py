"""The public API is what public_api.txt says, every name is there, and importing it is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import millstream
from millstream import errors
from tests import public_api

COSTLY = ("redis", "hiredis", "rich", "click", "asyncio", "uvloop", "sqlite3", "ssl", "pydantic", "json")


def test_the_public_api_is_the_one_of_the_snapshot() -> None:
    now, then = public_api.describe(), public_api.SNAPSHOT.read_text("utf-8")
    assert now.splitlines() == then.splitlines(), "the public API changed; when that is meant, run `make api`"


def test_a_changed_signature_or_a_new_attribute_changes_the_description() -> None:
    class Before:
        def __init__(self, name: str) -> None:
            self.name = name

    class After:
        def __init__(self, name: str, *, size: int = 1) -> None:
            self.name = name
            self.size = size

    assert list(public_api.class_lines("Thing", Before)) == ["class Thing", "    Thing(name: str) -> None", "    name"]
    assert list(public_api.class_lines("Thing", After)) == [
        "class Thing",
        "    Thing(name: str, *, size: int = 1) -> None",
        "    name",
        "    size",
    ]


def test_every_public_name_can_be_imported_and_no_other() -> None:
    for name in millstream.__all__:
        assert getattr(millstream, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Topic'"):
        _ = vars(millstream)["__getattr__"]("Topic")


def test_every_error_is_a_public_name() -> None:
    declared = {name for name, value in vars(errors).items() if is_error(value)}
    assert declared <= set(millstream.__all__)


def test_checkers_see_the_same_names_as_the_interpreter() -> None:
    tree = ast.parse(Path(millstream.__file__).read_text("utf-8"))
    seen = {
        alias.asname: f"{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("millstream.")
        for alias in node.names
    }
    assert seen == vars(millstream)["_MODULES"]
    assert set(seen) == set(millstream.__all__) == set(dir(millstream))
    assert len(millstream.__all__) == len(set(millstream.__all__))


def test_event_is_the_decorator_even_after_its_module_was_imported() -> None:
    done = in_new_process("import millstream.event; from millstream.event import Event; import millstream; ")
    assert done.returncode == 0, done.stderr
    assert "EventType" not in done.stdout
    assert callable(millstream.event)


@pytest.mark.parametrize("words", ["import millstream", "from millstream import Event, Stream, Retry, Skip, event"])
def test_importing_the_words_loads_nothing_costly(words: str) -> None:
    done = in_new_process(f"import sys; before = set(sys.modules); {words}; print(*set(sys.modules) - before)")
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "millstream" in loaded, done.stderr
    assert loaded.isdisjoint(COSTLY)
    assert len(done.stdout.split()) < 120


@pytest.mark.parametrize("name", ["App", "Router", "Depends", "Call"])
def test_declaring_an_app_loads_neither_redis_nor_rich(name: str) -> None:
    done = in_new_process(f"import sys; from millstream import {name}; print(*sys.modules)")
    loaded = {module.partition(".")[0] for module in done.stdout.split()}
    assert "millstream" in loaded, done.stderr
    assert loaded.isdisjoint({"redis", "hiredis", "rich", "click", "pydantic"})


def in_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Exception) and value.__module__ == errors.__name__
