"""`tail`: what it shows, from where, how it follows, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import redis

from tests.cli.conftest import Project
from tests.servers import RedisServer


def publish(project: Project, *orders: str) -> None:
    for order in orders:
        assert project("publish", "orders", "order.placed", f"order_id={order}").exit_code == 0


def shown(project: Project, *words: str) -> list[str]:
    done = project("tail", "orders", "-o", "jsonl", *words)
    assert done.exit_code == 0, done.output
    return [json.loads(line)["key"] for line in done.stdout.splitlines()]


def test_the_last_ten_are_shown_oldest_first_whatever_their_partition(project: Project) -> None:
    publish(project, *(str(n) for n in range(15)))
    assert shown(project) == [str(n) for n in range(5, 15)]
    assert shown(project, "--limit", "3") == ["12", "13", "14"]
    assert shown(project, "--since", "today", "--limit", "3") == ["0", "1", "2"]
    assert shown(project, "--since", "1h") == [str(n) for n in range(15)]


def test_types_and_keys_choose_what_is_shown(project: Project) -> None:
    publish(project, "1", "2")
    project("publish", "orders", "order.cancelled", "order_id=1")
    assert shown(project, "--key", "1") == ["1", "1"]
    assert shown(project, "--type", "order.cancelled") == ["1"]
    assert shown(project, "--type", "order.cancelled", "--key", "2") == []


@pytest.mark.parametrize("time", ["2020-01-01", "2020-01-01T12:00Z", "2020-01-01 12:00", "90s", "1.5h", "today"])
def test_times_are_written_in_many_ways(project: Project, time: str) -> None:
    publish(project, "1")
    assert shown(project, "--since", time) == ["1"]


def test_a_time_in_the_future_shows_nothing_and_nonsense_is_refused(project: Project) -> None:
    publish(project, "1")
    assert shown(project, "--since", "2222-01-01") == []
    done = project("tail", "orders", "--since", "yesterday-ish")
    assert done.exit_code == 2 and "'yesterday-ish' is not a time: write 5m (ago)" in done.stderr


def test_lines_for_people_hold_everything_and_json_is_one_array(project: Project) -> None:
    publish(project, "1")
    time, position, kind, key, _, data = project("tail", "orders").stdout.rstrip().split("  ")
    assert time.endswith("Z") and "@" in position
    assert (kind, key, json.loads(data)["order_id"]) == ("order.placed", "1", "1")
    publish(project, "2")
    assert [event["key"] for event in json.loads(project("tail", "orders", "-o", "json").stdout)] == ["1", "2"]
    assert json.loads(project("tail", "orders", "--key", "no", "-o", "json").stdout) == []


def test_a_stream_that_only_the_app_knows_is_empty_and_one_that_nobody_knows_is_an_error(project: Project) -> None:
    done = project("tail", "orders")
    assert (done.exit_code, done.stdout) == (0, "") and "no events" in done.stderr
    done = project("tail", "ordrs")
    assert done.exit_code == 2 and "There is no stream 'ordrs'; there are: orders." in done.stderr


def test_an_entry_that_is_no_event_is_shown_as_such(project: Project) -> None:
    with RedisServer.start("7") as server:
        project.environment["MILLSTREAM_BROKER"] = server.url
        publish(project, "1")
        with redis.Redis.from_url(server.url) as client:
            client.xadd("orders:0", {"foo": "bar\x1b[2J"})
        done = project("tail", "orders", "--since", "1h")
        assert done.exit_code == 0 and len(done.stdout.splitlines()) == 2
        (foreign,) = [line for line in done.stdout.splitlines() if "(no event)" in line]
        assert "foo" in foreign and "\x1b" not in foreign
        (fault,) = [
            e["fault"]
            for e in map(json.loads, project("tail", "orders", "-o", "jsonl").stdout.splitlines())
            if not e["type"]
        ]
        assert "foo" in fault


def test_following_shows_what_comes_until_it_is_interrupted(project: Project) -> None:
    publish(project, "1")
    program = project.start("tail", "orders", "--follow")
    program.until(lambda: program.out.count("order.placed") == 1)
    publish(project, "2", "3")
    program.until(lambda: program.out.count("order.placed") == 3)
    assert program.interrupt() == 130
    assert program.err.splitlines()[-1] == "millstream: interrupted"


def test_following_ends_after_as_many_events_as_were_asked_for(project: Project) -> None:
    publish(project, "1")
    program = project.start("tail", "orders", "-f", "--limit", "2")
    program.until(lambda: program.out.count("order.placed") == 1)
    publish(project, "2")
    assert program.wait() == 0
    assert program.out.count("order.placed") == 2


def test_a_reader_that_has_seen_enough_ends_it_quietly(project: Project) -> None:
    lines = "".join(f'{{"type":"order.placed","order_id":"{n}"}}\n' for n in range(5_000))
    project("publish", "orders", "--file", "-", input=lines)
    command = f"set -o pipefail; {sys.executable} -m millstream tail orders --since 1h | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=project.path, capture_output=True, text=True, check=False)
    assert done.returncode == 2  # no app is named here
    project.write("pyproject.toml", '[tool.millstream]\napp = "shop:app"\n')
    done = subprocess.run(["bash", "-c", command], cwd=project.path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("order.placed")) == (0, 1)
    assert len(done.stderr.splitlines()) == 1
