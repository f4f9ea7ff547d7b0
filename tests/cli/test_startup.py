"""What the command loads: nothing that it does not use."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.conftest import Project

LOADED = "import sys; from millstream.cli.main import main\ntry: main()\nexcept SystemExit: print(*sys.modules)"


def loaded(project: Project, *words: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words], cwd=project.path, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_help_loads_neither_brokers_nor_redis_nor_rich(project: Project) -> None:
    for words in (("--help",), (), ("--version",)):
        modules = loaded(project, *words)
        assert "millstream.cli.main" in modules
        assert not {name for name in modules if name.split(".")[0] in ("redis", "rich", "asyncio")}
        assert not {
            name
            for name in modules
            if name.startswith("millstream.") and name.split(".")[1] not in ("cli", "errors", "event", "units")
        }


@pytest.mark.parametrize("words", [("stream", "ls"), ("tail", "orders"), ("publish", "orders", "t", "order_id=1")])
def test_a_command_on_sqlite_without_a_terminal_loads_neither_redis_nor_rich(
    project: Project, words: tuple[str, ...]
) -> None:
    assert project("publish", "orders", "order.placed", "order_id=1").exit_code == 0
    modules = loaded(project, *words, "--broker", "sqlite:///shop.db")
    assert "millstream.brokers.sqlite.broker" in modules
    assert not {name for name in modules if name.split(".")[0] in ("redis", "rich")}


def test_the_package_can_be_run_as_a_module(project: Project) -> None:
    done = subprocess.run([sys.executable, "-m", "millstream", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("millstream ")
