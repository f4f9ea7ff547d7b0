"""`bench`: a table for people, one object for machines, and no figures where it must not run."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest
from redis import Redis

from millstream.bench.scenarios import SCENARIOS
from tests.cli.conftest import Project
from tests.cli.test_terminal import terminal
from tests.servers import RedisServer

FEW = ("--events", "600")
FIELDS = ("scenario", "broker", "events", "seconds", "rate", "engine_rate", "ratio", "p50_ms", "p99_ms")


@pytest.fixture
def server(project: Project) -> Iterator[RedisServer]:
    with RedisServer.start("7") as server:
        project.environment = {"MILLSTREAM_BROKER": server.url}
        yield server


def test_one_scenario_is_one_object_for_machines(project: Project, server: RedisServer) -> None:
    done = project("bench", "handle", *FEW, "-o", "json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert tuple(found) == (*FIELDS, "bytes_per_event")
    assert found["scenario"] == "handle" and found["events"] == 600 and found["broker"] == server.url
    assert found["rate"] == pytest.approx(600 / found["seconds"])
    assert found["ratio"] == pytest.approx(found["rate"] / found["engine_rate"])
    assert found["p50_ms"] is None and found["p99_ms"] is None and 200 < found["bytes_per_event"] < 600
    last = done.stderr.splitlines()[-1]
    assert last.startswith("handle: ") and last.endswith("Engine: our own connection, prepared bytes.")
    with Redis(port=server.port) as client:
        assert client.keys() == []


@pytest.mark.parametrize("words", [(), ("--yes",)])
def test_a_file_in_no_folder_is_refused(project: Project, words: tuple[str, ...]) -> None:
    done = project("bench", "handle", *FEW, *words, "--broker", "sqlite:////nowhere/shop.db")
    assert done.exit_code == 3 and "/nowhere is no directory: create it" in done.stderr


def test_several_scenarios_are_a_list_and_lines(project: Project) -> None:
    words = ("bench", "both", "publish-many", *FEW, "--broker", "memory://")
    listed = json.loads(project(*words, "-o", "json").stdout)
    lines = [json.loads(line) for line in project(*words, "-o", "jsonl").stdout.splitlines()]
    assert [found["scenario"] for found in listed] == [found["scenario"] for found in lines] == ["publish-many", "both"]
    assert listed[0]["engine_rate"] is None and listed[0]["ratio"] is None


def test_people_get_a_table_and_a_sentence_for_each(project: Project) -> None:
    done = project("bench", "publish-many", "handle-ordered", *FEW, "--size", "1KB", "--broker", "sqlite:///shop.db")
    assert done.exit_code == 0, done.output
    header, first, second, empty, *sentences = done.stdout.splitlines()
    assert header.split()[:3] == ["SCENARIO", "EVENTS", "SECONDS"] and not empty
    assert first.split()[:2] == ["publish-many", "600"] and second.split()[:2] == ["handle-ordered", "600"]
    assert [line.split(":")[0] for line in sentences] == ["publish-many", "handle-ordered"]
    assert all("Engine: bare sqlite3" in line for line in sentences)
    assert {path.name for path in project.path.iterdir() if "bench" in path.name} == set()


def test_every_scenario_is_named_in_help_and_in_a_mistake(project: Project) -> None:
    text, done = " ".join(project("bench", "--help").output.split()), project("bench", "handel")
    assert done.exit_code == 2
    for name in (*SCENARIOS, "all"):
        assert name in text and name in done.stderr


@pytest.mark.parametrize("size", ["10", "10B", "2MB", "big"])
def test_a_size_that_no_event_has_is_refused(project: Project, size: str) -> None:
    done = project("bench", "handle", "--size", size, "--broker", "memory://")
    assert done.exit_code == 2 and "--size" in done.stderr


def test_a_server_with_keys_of_others_is_left_alone_unless_somebody_says_yes(
    project: Project, server: RedisServer
) -> None:
    with Redis(port=server.port) as client:
        client.set("theirs", "1")
        done = project("bench", "publish-many", *FEW)
        assert done.exit_code == 4 and not done.stdout
        assert done.stderr.splitlines()[-1] == (
            "millstream: nothing was run: it holds keys of others (1); --yes runs it all the same"
        )
        assert project("bench", "publish-many", *FEW, "--yes").exit_code == 0
        assert client.keys() == [b"theirs"]


def test_interrupting_removes_everything(project: Project, server: RedisServer) -> None:
    with terminal(project, "bench", "latency", columns=100) as screen, Redis(port=server.port) as client:
        screen.until("latency")
        assert client.keys()
        screen.process.send_signal(signal.SIGINT)
        assert screen.ended() == 130
        assert screen.text.rstrip().endswith("millstream: interrupted")
        assert client.keys() == []
