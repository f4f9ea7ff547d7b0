"""What type checkers tell a user: nothing about a sound project, and something about every typical mistake.

`typing/` is a user's project, written against the public API only. mypy and pyright (as basedpyright, which brings its own
node) check it in strict mode, with the installed package, as they would on the user's machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = Path(__file__).with_name("typing")
MISTAKES = "mistakes.py"
CHECKERS = ("mypy", "pyright")
CHECK_S = 110  # the first run of mypy reads msgspec and pydantic; later ones find its cache

_MYPY_ERROR = re.compile(r"(?P<file>[^:]+):(?P<line>\d+): error: (?P<text>.*)")


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_sound_project_passes_in_strict_mode(checker: str) -> None:
    found = [problem for problem in problems(checker) if not problem.startswith(MISTAKES)]
    assert found == []


@pytest.mark.parametrize("checker", CHECKERS)
def test_every_typical_mistake_is_flagged_and_nothing_beside_them(checker: str) -> None:
    flagged = {int(problem.split(":")[1]) for problem in problems(checker) if problem.startswith(MISTAKES)}
    marked = marked_lines()
    assert len(marked) >= 40
    assert [marked[line] for line in sorted(marked.keys() - flagged)] == [], f"{checker} does not see these"
    assert sorted(flagged - marked.keys()) == [], f"{checker} complains about these lines without a mark"


def test_the_project_does_what_its_own_test_says() -> None:
    code = "import asyncio; from tests.test_shop import *; asyncio.run(test_a_placed_order_is_charged())"
    done = run([sys.executable, "-W", "error", "-c", code])
    assert done.returncode == 0, done.stderr


@cache
def problems(checker: str) -> tuple[str, ...]:
    """What the checker complains about, as `file:line: text`, after a check of the whole project."""
    return mypy_problems() if checker == "mypy" else pyright_problems()


def mypy_problems() -> tuple[str, ...]:
    cache_dir = ROOT / ".mypy_cache" / "typing"
    # An empty --config-file keeps the repository's own configuration out of it.
    done = run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache_dir}", "--no-pretty", "."]
    )
    assert done.returncode == 1, f"mypy should find the mistakes: {done.stdout}{done.stderr}"
    matches = filter(None, map(_MYPY_ERROR.fullmatch, done.stdout.splitlines()))
    return tuple(f"{match['file']}:{match['line']}: {match['text']}" for match in matches)


def pyright_problems() -> tuple[str, ...]:
    done = run([sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable])
    assert done.returncode == 1, f"pyright should find the mistakes: {done.stdout}{done.stderr}"
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] >= 10
    return tuple(
        f"{Path(item['file']).relative_to(PROJECT)}:{item['range']['start']['line'] + 1}: {item['message']}"
        for item in report["generalDiagnostics"]
        if item["severity"] == "error"
    )


def marked_lines() -> dict[int, str]:
    lines = (PROJECT / MISTAKES).read_text("utf-8").splitlines()
    return {number: line.strip() for number, line in enumerate(lines, 1) if "  # mistake: " in line}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MYPY", "PYTHON"))}
    return subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=CHECK_S, check=False
    )
