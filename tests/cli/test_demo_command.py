"""`demo`: a summary for people, one object for machines, and a board on a terminal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Project
from tests.cli.test_terminal import terminal

FEW = ("demo", "--events", "600", "--speed", "max")


def test_the_summary_for_machines_is_one_object_and_nothing_is_lost(project: Project) -> None:
    program = project.finish(*FEW, "-o", "json")
    summary = json.loads(program.out)
    assert program.process.returncode == 0 and summary["published"] == 600
    assert {group: figures["lost"] for group, figures in summary["groups"].items()} == {
        "board": 0,
        "delays": 0,
        "alerts": 0,
    }
    assert summary["groups"]["alerts"]["replayed"] == 1 and summary["groups"]["alerts"]["dead"] == 0
    assert program.err.splitlines()[0] == "broker sqlite, a new file" and "Traceback" not in program.err


def test_the_summary_for_people_says_what_became_of_everything(project: Project) -> None:
    program = project.finish(*FEW)
    assert program.process.returncode == 0
    header, board, *_, alerts, last = (line for line in program.out.splitlines() if "──" not in line)
    assert header.split() == ["GROUP", "HANDLED", "RETRIED", "DIED", "REPLAYED", "DEAD", "LOST"]
    assert board.split() == ["board", "600", "0", "0", "0", "0", "0"]
    assert alerts.split()[3:] == ["1", "1", "0", "0"]
    assert last.startswith("600 events published, ") and "nothing lost" in last


def test_what_is_kept_can_be_looked_at_with_the_other_commands(project: Project) -> None:
    program = project.finish(*FEW, "--keep", "--broker", f"sqlite:///{project.path}/kept.db")
    export, command = (line.strip() for line in program.out.splitlines()[-2:])
    assert command == "millstream group ls"
    looked = subprocess.run(
        ["bash", "-c", f"unset MILLSTREAM_APP; {export}; millstream group ls -o json"],
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert looked.returncode == 0, looked.stderr
    assert {group["name"]: group["done"] for group in json.loads(looked.stdout)} == {
        "flights/alerts": 600,
        "flights/board": 600,
        "flights/delays": 600,
    }


@pytest.mark.parametrize("speed", ["0", "-1", "fast", "inf", "nan"])
def test_a_speed_that_is_none_is_refused(project: Project, speed: str) -> None:
    done = project("demo", "--speed", speed)
    assert done.exit_code == 2 and "a number above zero, or max" in done.stderr


def test_a_terminal_shows_the_board_within_24_lines_of_80(project: Project) -> None:
    with terminal(project, *FEW, columns=80, NO_COLOR="1") as screen:
        assert screen.ended() == 0
        first = screen.text.split("Flights from New York")[1]
        assert len(first.splitlines()) <= 24
        for words in ("AIRPORT", "JFK", "GROUP", "alerts", "AIRLINE", "ALERTS", "of 600 events", "HANDLED"):
            assert words in screen.text


def test_interrupting_the_demo_ends_it(project: Project) -> None:
    with terminal(project, "demo", "--speed", "1", columns=80) as screen:
        screen.until("AIRPORT")
        screen.process.send_signal(signal.SIGINT)
        assert screen.ended() == 130
        assert screen.text.rstrip().endswith("millstream: interrupted")
