"""`publish`: one event, JSON lines, and every way in which they can be wrong."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Project
from tests.servers import RedisServer


def events(project: Project) -> list[dict[str, Any]]:
    shown = project("tail", "orders", "--since", "1h", "-o", "jsonl")
    return [json.loads(line) for line in shown.stdout.splitlines()]


def placed(count: int, **fields: Any) -> str:
    return "".join(
        json.dumps({"type": "order.placed", "order_id": f"o-{n}", **fields}) + "\n" for n in range(1, count + 1)
    )


def test_one_event_is_published_and_its_words_take_the_types_of_its_fields(project: Project) -> None:
    done = project(
        *("publish", "orders", "order.placed", "order_id=17", "total=1999", 'tags:=["new"]'),
        *("--key", "k", "--id", "my-1", "--header", "a=b=c"),
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.split()[1] == "my-1"
    (event,) = events(project)
    assert event["data"] == {"order_id": "17", "customer": "anonymous", "total": 1999, "tags": ["new"]}
    assert (event["key"], event["headers"], event["source"]) == ("k", {"a": "b=c"}, "shop")
    assert event["position"] == done.stdout.split()[0]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["order.placed", "order_id=1", "total=much"], "OrderPlaced: Expected `int`, got `str` - at `$.total`"),
        (["order.placed", "total=1"], "OrderPlaced: Object missing required field `order_id`"),
        (
            ["order.placed", "order_id=1", "totl=1"],
            "OrderPlaced has no field totl, but order_id, customer, total, tags",
        ),
        (["order.lost", "order_id=1"], "'orders' has no type 'order.lost', but order.placed, order.cancelled"),
        (["order.placed", "order_id"], "'order_id' is not a field: write NAME=VALUE"),
        (["order.placed", "order_id:=x"], "'order_id:=x' is not JSON"),
        (["order.placed", "order_id=1", "customer=" + "x" * 1_100_000], "over the limit of 1,048,576"),
        (
            ["order.placed", "order_id=1", "--id", "x" * 65],
            "'xxxxxxxxxxxxxxxxxxxx'… of 65 characters: 1 to 64 printable ASCII characters; of what is longer, take a hash",
        ),
        (["order.placed", "order_id=1", "--id", ""], "id '': 1 to 64 printable ASCII"),
        (["order.placed", "order_id=1", "--key", "x" * 1_025], "the key is over its limit of 1,024 bytes"),
        (["order.placed", "order_id=1", "--header", "a=" + "x" * 20_000], "the headers are over their limit"),
        ([], "Publish what? Give TYPE and fields, or --file."),
        (["order.placed", "--file", "shop.py"], "each line gives its own type"),
    ],
)
def test_what_does_not_fit_is_refused_with_one_line(project: Project, words: list[str], complaint: str) -> None:
    done = project("publish", "orders", *words)
    assert done.exit_code == 2
    assert complaint in done.stderr.splitlines()[-1]
    assert events(project) == []


def test_a_stream_with_pydantic_models_and_dataclasses_takes_words_too(project: Project) -> None:
    project.write(
        "other.py",
        """
from dataclasses import dataclass
from pydantic import BaseModel
from millstream import App, Stream, event

@event("a")
@dataclass
class A:
    n: int

@event("b")
class B(BaseModel):
    n: int

app = App("other", streams=[Stream("orders", A | B)])
""",
    )
    project.environment["MILLSTREAM_APP"] = "other:app"
    assert project("publish", "orders", "a", "n=1").exit_code == 0
    assert project("publish", "orders", "b", "n=2").exit_code == 0
    assert [event["data"] for event in events(project)] == [{"n": 1}, {"n": 2}]
    for kind, complaint in (("a", "A: Expected `int`"), ("b", "B: n: Input should be a valid integer")):
        done = project("publish", "orders", kind, "n=x")
        assert (done.exit_code, complaint in done.stderr) == (2, True)


def test_with_a_broker_alone_an_event_is_stored_as_it_is(project: Project) -> None:
    project("publish", "orders", "order.placed", "order_id=1")
    del project.environment["MILLSTREAM_APP"]
    alone = ("--broker", "sqlite:///shop.db")
    assert project("publish", "orders", "new.type", "order_id=1", "n:=5", *alone).exit_code == 0
    typed, raw = events_of(project, *alone)
    assert raw["type"] == "new.type" and raw["data"] == {"order_id": "1", "n": 5} and raw["key"] == "1"
    assert raw["position"].split("@")[0] == typed["position"].split("@")[0]
    keyless = project("publish", "orders", "new.type", "n:=5", *alone)
    assert keyless.exit_code == 2 and "the key 'order_id' of 'orders' must be text or a whole number" in keyless.stderr
    unknown = project("publish", "ordrs", "new.type", *alone)
    assert unknown.exit_code == 2 and "There is no stream 'ordrs'; there are: orders." in unknown.stderr


def events_of(project: Project, *words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in project("tail", "orders", "-o", "jsonl", *words).stdout.splitlines()]


def test_a_key_made_by_a_function_must_be_given_where_no_app_can_make_it(project: Project) -> None:
    project.write(
        "other.py",
        "from millstream import *\nclass A(Event, type='a'):\n    n: int\n"
        "app = App('other', broker='sqlite:///shop.db', streams=[Stream('orders', A, key=lambda event: event.n)])\n",
    )
    assert project("publish", "orders", "a", "n=7", "--app", "other:app").exit_code == 0
    del project.environment["MILLSTREAM_APP"]
    project.environment["MILLSTREAM_BROKER"] = "sqlite:///shop.db"
    assert "a function makes the keys of 'orders'" in project("publish", "orders", "a", "n=7").stderr
    assert project("publish", "orders", "a", "n=7", "--key", "7").exit_code == 0
    first, second = events(project)
    assert first["key"] == second["key"] == "7"


def test_json_lines_come_from_a_file_a_packed_file_or_stdin(project: Project) -> None:
    text = placed(1_500) + "\n  \n" + placed(1).rstrip()
    project.write("plain.jsonl", text)
    project.write("packed.jsonl.gz", gzip.compress(text.encode()))
    for words, input in ((["plain.jsonl"], None), (["packed.jsonl.gz"], None), (["-"], text)):
        done = project("publish", "orders", "--file", *words, input=input)
        assert (done.exit_code, done.stdout) == (0, "1,501 published\n"), done.output
        assert "1,501 events in" in done.stderr
    assert len(events(project)) == 4_503


def test_an_empty_file_is_done_with_nothing(project: Project) -> None:
    project.write("empty", "")
    for words, input in ((["empty"], None), (["-"], "")):
        done = project("publish", "orders", "--file", *words, input=input)
        assert (done.exit_code, done.stdout) == (0, "0 published\n")
    assert project.finish("publish", "orders", "--file", "-").out == "0 published\n"  # stdin is /dev/null


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            b'{"type":"order.placed","order_id":"x","total":"much"}',
            "OrderPlaced: Expected `int`, got `str` - at `$.total`",
        ),
        (b'{"type":"order.lost"}', "'orders' has no type 'order.lost'"),
        (b'{"order_id":"x"}', "it has no type"),
        (b'{"type":5}', "it has no type"),
        (b'{"type":"order.placed","order_id":"\xff"}', "not a JSON object: 'utf-8' codec can't decode"),
        (b'{"type":"order.placed",', "not a JSON object: Input data was truncated"),
        (b'{"type":"order.placed","tags":' + b"[" * 100_000, "not a JSON object: maximum recursion depth"),
        (b"5", "not a JSON object: Expected `object`, got `int`"),
        (
            b'{"type":"order.placed","data":{"order_id":"1"},"headers":{"a":1}}',
            "Expected `str`, got `int` - at `$.headers",
        ),
        (b'{"type":"order.placed","data":{"order_id":"1"},"id":"\\u00fc"}', "printable ASCII"),
        (b'{"type":"order.placed","order_id":"' + b"x" * 5_000_000 + b'"}', "the line is over its limit"),
        (
            b'{"type":"order.placed","order_id":"1","customer":"' + b"x" * 1_100_000 + b'"}',
            "over the limit of 1,048,576",
        ),
    ],
    ids=range(12),
)
def test_a_line_that_does_not_fit_is_named_and_what_was_stored_is_counted(
    project: Project, line: bytes, complaint: str
) -> None:
    project.write("lines", placed(5).encode() + b"\n" + line + b"\n" + placed(2).encode())
    done = project("publish", "orders", "--file", "lines")
    assert (done.exit_code, done.stdout) == (1, "5 published\n")
    assert done.stderr.splitlines()[-1].startswith("line 7: ") and complaint in done.stderr
    assert done.stderr.endswith("; 5 events stored before it; correct it and go on with --from-line 7\n")
    rest = project("publish", "orders", "--file", "lines", "--from-line", "8")
    assert (rest.exit_code, rest.stdout) == (0, "2 published\n")
    assert len(events(project)) == 7


def test_a_packed_file_that_is_cut_off_is_published_as_far_as_it_goes(project: Project) -> None:
    packed = gzip.compress(placed(3_000).encode())
    project.write("cut.gz", packed[: len(packed) // 2])
    done = project("publish", "orders", "--file", "cut.gz")
    stored = len(events(project))
    assert done.exit_code == 1 and 0 < stored < 3_000
    assert f"behind line {stored}: Compressed file ended" in done.stderr
    assert f"--from-line {stored + 1}" in done.stderr


def test_what_tail_prints_can_be_published_again_whole(project: Project) -> None:
    project("publish", "orders", "order.placed", "order_id=1", "--id", "one", "--key", "k", "--header", "a=b")
    copied = project("tail", "orders", "-o", "jsonl").stdout
    again = project("publish", "orders", "--file", "-", "--broker", "sqlite:///copy.db", input=copied)
    assert again.exit_code == 0, again.output
    shown = project("tail", "orders", "-o", "jsonl", "--broker", "sqlite:///copy.db").stdout
    first, second = json.loads(copied), json.loads(shown)
    assert {**first, "time": ""} == {**second, "time": ""}
    raw = project("publish", "copies", "--file", "-", "--app", "copies:app", input=copied)
    assert raw.exit_code == 2  # no such app


def test_a_copy_with_a_broker_alone_keeps_time_and_source(project: Project) -> None:
    project("publish", "orders", "order.placed", "order_id=1")
    copied = project("tail", "orders", "-o", "jsonl").stdout
    del project.environment["MILLSTREAM_APP"]
    project.environment["MILLSTREAM_BROKER"] = "sqlite:///shop.db"
    assert project("publish", "orders", "--file", "-", input=copied).exit_code == 0
    first, second = events(project)
    assert {**first, "position": ""} == {**second, "position": ""}


def test_an_event_that_has_a_field_named_data_survives_the_round_trip(project: Project) -> None:
    project.write(
        "other.py",
        "from millstream import *\nclass A(Event, type='a'):\n    id: str\n    data: dict[str, int]\n"
        "app = App('other', streams=[Stream('orders', A)])\n",
    )
    project.environment["MILLSTREAM_APP"] = "other:app"
    line = '{"type":"a","id":"x","data":{"n":1}}\n'
    assert project("publish", "orders", "--file", "-", input=line).exit_code == 0
    copied = project("tail", "orders", "-o", "jsonl").stdout
    assert json.loads(copied)["data"] == {"id": "x", "data": {"n": 1}}
    assert project("publish", "orders", "--file", "-", input=copied).exit_code == 0
    assert [event["data"] for event in events(project)] == [{"id": "x", "data": {"n": 1}}] * 2


def test_an_interrupted_load_says_with_which_line_to_go_on(project: Project) -> None:
    program = project.start("publish", "orders", "--file", "-", stdin=subprocess.PIPE)
    assert program.process.stdin is not None
    program.process.stdin.write(placed(1_200).encode())
    program.process.stdin.flush()
    program.until(lambda: (project.path / "shop.db").exists() and len(events(project)) == 1_200)
    assert program.interrupt() == 130
    program.process.stdin.close()
    assert program.out == "1,200 published\n"
    assert "stopped: go on with --from-line 1201\n" in program.err


def test_a_full_broker_stops_a_load_with_the_line_to_go_on_from(project: Project) -> None:
    with RedisServer.start("7", maxmemory="3mb") as server:
        project.environment["MILLSTREAM_BROKER"] = server.url
        project.write("lines", placed(20_000, customer="x" * 200))
        done = project("publish", "orders", "--file", "lines")
        stored = int(done.stdout.split()[0].replace(",", ""))
        assert done.exit_code == 3 and 0 < stored < 20_000
        assert "maxmemory" in done.stderr.splitlines()[-1]
        assert f"go on with --from-line {stored + 1}" in done.stderr.splitlines()[-1]
        assert len(events(project)) == stored


def test_progress_goes_to_stderr_and_only_results_to_stdout(project: Project, tmp_path: Path) -> None:
    project.write("lines", placed(10))
    program = project.finish("publish", "orders", "--file", "lines")
    assert program.out == "10 published\n"
    assert program.err.splitlines()[0] == f"broker sqlite:///{tmp_path}/shop.db, app shop"


def test_interrupting_while_nothing_comes_in_ends_at_once(project: Project) -> None:
    reader, writer = os.pipe()
    try:
        program = project.start("publish", "orders", "--file", "-", stdin=reader)
        program.until(lambda: (project.path / "shop.db").exists())
        program.until(lambda: "orders" in project("stream", "ls").stdout)
        assert program.interrupt() == 130
    finally:
        os.close(reader)
        os.close(writer)
    assert program.out == "0 published\n"


def test_an_event_may_be_published_for_later(project: Project) -> None:
    done = project("publish", "orders", "order.placed", "order_id=1", "--due", "5m")
    assert done.exit_code == 0, done.output
    assert done.stdout.split()[0].endswith("@later")
    assert events(project) == []
    done = project("publish", "orders", "order.placed", "order_id=2", "--due", "2026-01-01T12:00Z")
    assert done.exit_code == 2 and "is past: publish it without due" in done.stderr
    done = project("publish", "orders", "order.placed", "order_id=2", "--due", "9000d")
    assert done.exit_code == 2 and "over 366 days ahead" in done.stderr
    done = project("publish", "orders", "order.placed", "order_id=2", "--due", "noon")
    assert done.exit_code == 2 and "'noon' is not a time: write 5m (from now) or" in done.stderr
    done = project("publish", "orders", "--file", "shop.py", "--due", "5m")
    assert done.exit_code == 2 and "none is --due later" in done.stderr


def test_an_event_may_be_confirmed_at_a_level_that_the_broker_can_give(project: Project) -> None:
    assert project("publish", "orders", "order.placed", "order_id=1", "--confirm", "fsync").exit_code == 0
    done = project("publish", "orders", "order.placed", "order_id=2", "--confirm", "replicated")
    assert done.exit_code == 2 and "cannot confirm 'replicated', which needs" in done.stderr
    project.write("lines", placed(3))
    assert project("publish", "orders", "--file", "lines", "--confirm", "fsync").exit_code == 0
    done = project("publish", "orders", "--file", "lines", "--confirm", "replicated")
    assert done.exit_code == 2 and "cannot confirm 'replicated'" in done.stderr
    assert len(events(project)) == 4


def test_with_a_broker_alone_events_may_be_due_and_confirmed_too(project: Project) -> None:
    project("publish", "orders", "order.placed", "order_id=0")
    project.environment = {"MILLSTREAM_APP": "", "MILLSTREAM_BROKER": "sqlite:///shop.db"}
    done = project("publish", "orders", "order.placed", "order_id=1", "--due", "5m", "--confirm", "fsync")
    assert done.exit_code == 0 and done.stdout.split()[0].endswith("@later"), done.output
    done = project("publish", "orders", "order.placed", "order_id=1", "--due", "9000d")
    assert done.exit_code == 2 and "over 366 days ahead" in done.stderr
    done = project("publish", "orders", "order.placed", "order_id=2", "--confirm", "replicated")
    assert done.exit_code == 2 and "cannot confirm 'replicated', which needs" in done.stderr
