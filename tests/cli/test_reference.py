"""docs/commands.md says what the commands say: the tree, every --help, every exit code."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable

import pytest

from millstream.cli import main, target
from millstream.errors import (
    BadSetting,
    BrokerDown,
    BrokerFull,
    BrokerRefused,
    GroupOwned,
    GroupVanished,
    MillstreamError,
    StreamMismatch,
    TooLarge,
    Unconfirmed,
    Unroutable,
    WireError,
)
from tests.cli import reference
from tests.cli.conftest import Project
from tests.servers import free_port


def test_the_page_has_the_tree_every_help_and_every_exit_code() -> None:
    page = reference.PAGE.read_text("utf-8")
    parts, written = reference.parts(), reference.written(page)
    assert written.keys() == parts.keys()
    for name, text in parts.items():
        assert written[name] == text, f"`python -m tests.cli.reference` writes {name!r} anew"


def test_every_command_of_the_table_is_in_its_module() -> None:
    for name, (module, _) in main.COMMANDS.items():
        assert getattr(importlib.import_module(f"millstream.cli.{module}"), name).name == name


def test_every_command_takes_the_shared_options() -> None:
    for name, text in reference.helps().items():
        for option in ("--app MODULE:NAME", "--broker URL", "--factory", "--debug", "--help"):
            assert option in text, f"{name}: {option}"


def _fault(project: Project, patch: pytest.MonkeyPatch) -> int:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("what nobody thought of")

    patch.setattr(target, "find", broken)
    done = project("stream", "ls")
    line = (
        "millstream: a fault of Millstream, please report it: RuntimeError: what nobody thought of; --debug shows where"
    )
    assert done.stderr.splitlines() == [line]
    return done.exit_code


def _interrupted(project: Project, _: pytest.MonkeyPatch) -> int:
    project("publish", "orders", "order.placed", "order_id=1")
    program = project.start("tail", "orders", "-f")
    program.until(lambda: "order.placed" in program.out)
    return program.interrupt(signal.SIGINT)


def _mismatch(project: Project, _: pytest.MonkeyPatch) -> int:
    publish = ("publish", "orders", "order.placed", "order_id=1")
    assert project(*publish).exit_code == 0
    project.write("changed.py", (project.path / "shop.py").read_text().replace("partitions=4", "partitions=5"))
    return project(*publish, "--app", "changed:app").exit_code


WAYS: dict[int, Callable[[Project, pytest.MonkeyPatch], int]] = {
    0: lambda project, _: project("stream", "ls").exit_code,
    1: lambda project, _: project("publish", "orders", "--file", "-", input="no json\n").exit_code,
    2: lambda project, _: project("stream", "show", "nothing").exit_code,
    3: lambda project, _: project("stream", "ls", "--broker", f"redis://127.0.0.1:{free_port()}").exit_code,
    4: _mismatch,
    70: _fault,
    130: _interrupted,
}


@pytest.mark.parametrize("code", main.EXIT_CODES)
def test_every_exit_code_is_what_its_line_says(project: Project, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    assert WAYS[code](project, monkeypatch) == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadSetting("x"), 2),
        (Unroutable("x"), 2),
        (TooLarge("x"), 2),
        (StreamMismatch("x"), 4),
        (GroupOwned("x"), 4),
        (BrokerDown("x"), 3),
        (BrokerFull("x"), 3),
        (BrokerRefused("x"), 3),
        (GroupVanished("x"), 3),
        (Unconfirmed("x"), 3),
        (WireError("x"), 70),
        (MillstreamError("x"), 70),
        (ValueError("x"), 70),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_one_place_decides_what_an_error_means_to_the_shell(error: BaseException, code: int) -> None:
    assert main.exit_code(error) == code
