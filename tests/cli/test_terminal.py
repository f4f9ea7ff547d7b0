"""On a terminal: questions, bars, colour, width; and nothing of that elsewhere."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cli.conftest import WITHIN_S, Project
from tests.cli.test_looking import FAILED, happen, letters
from tests.servers import wait_until


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, project: Project, words: tuple[str, ...], columns: int, environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "millstream", *words],
            cwd=project.path,
            env=clean | {"TERM": "xterm-256color"} | project.environment | environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def until(self, words: str) -> None:
        try:
            wait_until(lambda: words in self._read(), WITHIN_S, f"no {words!r}")
        except RuntimeError as error:
            raise AssertionError(f"{error}: {self.text!r}") from None

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def ended(self) -> int:
        wait_until(lambda: self._read() is not None and self.process.poll() is not None, WITHIN_S, "it runs on")
        self._read()
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self) -> str:
        while select.select([self._master], [], [], 0)[0]:
            try:
                self.text += os.read(self._master, 65_536).decode(errors="replace")
            except OSError:  # the other side is closed
                break
        return self.text


@contextmanager
def terminal(project: Project, *words: str, columns: int = 80, **environment: str) -> Iterator[Terminal]:
    opened = Terminal(project, words, columns, environment)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def alone(project: Project) -> Project:
    project.environment = {"MILLSTREAM_BROKER": "sqlite:///shop.db"}
    happen(project, "billing", [FAILED, FAILED])
    return project


def test_a_terminal_is_asked_and_yes_does_it(alone: Project) -> None:
    with terminal(alone, "dead", "replay") as screen:
        screen.until("Replay 2 dead letters? [y/N]")
        assert len(letters(alone)) == 2
        screen.type("y\n")
        assert screen.ended() == 0
        assert "replayed 2 dead letters" in screen.text
    assert letters(alone) == []


@pytest.mark.parametrize(("keys", "code"), [("n\n", 4), ("\n", 4), ("\x04", 130)])
def test_any_other_answer_changes_nothing(alone: Project, keys: str, code: int) -> None:
    with terminal(alone, "dead", "drop") as screen:
        screen.until("Drop 2 dead letters? [y/N]")
        screen.type(keys)
        assert screen.ended() == code
    assert len(letters(alone)) == 2


def test_interrupting_the_question_changes_nothing(alone: Project) -> None:
    with terminal(alone, "dead", "drop") as screen:
        screen.until("[y/N]")
        screen.process.send_signal(signal.SIGINT)
        assert screen.ended() == 130
        assert screen.text.splitlines()[-1] == "millstream: interrupted"
    assert len(letters(alone)) == 2


def test_tables_are_drawn_for_the_width_of_the_terminal(alone: Project) -> None:
    for columns, shown in ((60, False), (120, True)):
        with terminal(alone, "dead", "ls", columns=columns, NO_COLOR="1") as screen:
            assert screen.ended() == 0
            lines = screen.text.splitlines()[1:]
            assert all(len(line) <= columns for line in lines) and ("TRIES" in lines[0]) is shown
            assert "─" in screen.text and "ValueError: too" in screen.text


def test_colour_is_for_terminals_that_want_it(alone: Project) -> None:
    with terminal(alone, "tail", "orders") as screen:
        assert screen.ended() == 0 and "\x1b[" in screen.text
    with terminal(alone, "tail", "orders", NO_COLOR="1") as screen:
        assert screen.ended() == 0 and "\x1b[" not in screen.text
    assert "\x1b[" not in alone("tail", "orders").output
    assert "\x1b[" not in alone("dead", "ls").output


def test_long_lines_of_events_are_cut_at_the_edge_of_a_terminal_only(alone: Project) -> None:
    data = json.dumps({"type": "t", "order_id": "1", "text": "x" * 500})
    assert alone("publish", "orders", "--file", "-", input=data).exit_code == 0
    with terminal(alone, "tail", "orders", "--limit", "1", columns=100, NO_COLOR="1") as screen:
        assert screen.ended() == 0
        assert len(screen.text.splitlines()[-1]) == 100 and screen.text.rstrip().endswith("…")
    assert "x" * 500 in alone("tail", "orders", "--limit", "1").stdout


def test_loading_shows_a_bar_on_a_terminal(alone: Project) -> None:
    alone.write("lines", "".join(json.dumps({"type": "t", "order_id": str(n)}) + "\n" for n in range(100_000)))
    with terminal(alone, "publish", "orders", "--file", "lines", columns=100) as screen:
        assert screen.ended() == 0
        assert "━" in screen.text and "/s" in screen.text and "left" in screen.text
        assert "100,000 published" in screen.text
