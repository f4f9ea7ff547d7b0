"""`run`: what it says, how it ends, and what keeps it from starting."""

from __future__ import annotations

import json
import signal

import pytest
import redis

from millstream.worker import collector
from tests.cli.conftest import Program, Project
from tests.servers import RedisServer, free_port


def done(project: Project, group: str = "billing") -> int:
    """How many events a group has finished."""
    shown = project("group", "show", group, "-o", "json")
    return int(json.loads(shown.stdout)["done"]) if shown.exit_code == 0 else 0


def running(project: Project, *words: str) -> Program:
    """A worker that has handled an event."""
    program = project.start("run", *words)
    assert project("publish", "orders", "order.placed", "order_id=1").exit_code == 0
    program.until(lambda: done(project) == 1)
    return program


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_handles_events_and_a_signal_drains_it(project: Project, number: int) -> None:
    program = running(project)
    assert program.interrupt(number) == 0
    assert program.out == ""
    lines = program.err.splitlines()
    assert lines[:3] == [
        f"broker sqlite:///{project.path}/shop.db, app shop",
        "group orders/billing: order.placed",
        "group orders/warehouse: order.placed, order.cancelled",
    ]
    assert "Traceback" not in program.err


def test_work_that_the_grace_cuts_off_is_told_by_the_exit_code(project: Project) -> None:
    program = running(project, "shop:app", "--grace", "100ms", "--log-level", "warning")
    project("publish", "orders", "order.placed", "order_id=2", "customer=slow")
    program.until(lambda: "handling" in program.out)
    assert program.interrupt(signal.SIGTERM) == 1


def test_a_second_signal_cuts_off_what_still_runs(project: Project) -> None:
    program = running(project)
    project("publish", "orders", "order.placed", "order_id=2", "customer=slow")
    program.until(lambda: "handling" in program.out)
    program.process.send_signal(signal.SIGINT)
    program.process.send_signal(signal.SIGTERM)
    assert program.wait() == 1


def test_an_app_with_nothing_but_a_schedule_runs(project: Project) -> None:
    (project.path / "clock.py").write_text(
        "from millstream import App, Event, Stream, every\n"
        "class Tick(Event, type='tick'): pass\n"
        "ticks = Stream('ticks', Tick)\n"
        "app = App('clock', include=[every('100ms', Tick, to=ticks, name='beat')])\n"
    )
    program = project.start("run", "clock:app")
    program.until(lambda: project("tail", "ticks", "--app", "clock:app").stdout.count("tick") > 1)
    program.until(lambda: "schedule beat: every 100ms to ticks" in program.err)
    assert program.interrupt(signal.SIGTERM) == 0


WATCHED = """
import gc
from millstream import App, Event, Stream, every
{before}
class Tick(Event, type="tick"): pass
ticks = Stream("ticks", Tick)
app = App("clock", include=[every("100ms", Tick, to=ticks, name="beat")])

@app.subscriber(ticks, "watch")
async def look(event: Tick) -> None:
    print(gc.get_threshold()[0], gc.get_freeze_count() > 1_000, flush=True)
"""


@pytest.mark.parametrize(
    ("before", "seen"), [("", f"{collector.OBJECTS} True"), ("gc.set_threshold(1_234)", "1234 True")]
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_collector_looks_seldom_unless_the_app_says_how_often(
    project: Project, before: str, seen: str, workers: str
) -> None:
    project.write("clock.py", WATCHED.format(before=before))
    program = project.start("run", "clock:app", "--workers", workers)
    program.until(lambda: "\n" in program.out)
    assert program.interrupt(signal.SIGTERM) == 0
    assert set(program.out.splitlines()) == {seen}


@pytest.mark.parametrize("only", [("--only", "billing"), ("--only", "orders/billing"), ("--only", "billing,billing")])
def test_only_the_groups_that_were_named_are_handled(project: Project, only: tuple[str, ...]) -> None:
    program = running(project, *only)
    assert program.interrupt() == 0
    listed = json.loads(project("group", "ls", "-o", "json").stdout)
    assert [group["name"] for group in listed] == ["orders/billing"]
    assert "warehouse" not in program.err


def test_several_workers_say_once_what_they_run_and_end_together(project: Project) -> None:
    program = running(project, "--workers", "2")
    assert program.interrupt(signal.SIGTERM) == 0
    assert program.err.count("broker sqlite:") == 1 and program.err.count("group orders/billing:") == 1


def test_a_handlers_failure_is_one_line_in_the_log_unless_tracebacks_are_asked_for(project: Project) -> None:
    project("publish", "orders", "order.placed", "order_id=2", "total:=-5")
    program = running(project)
    program.until(lambda: len(json.loads(project("dead", "ls", "-o", "json").stdout)) == 1)
    assert program.interrupt() == 0
    assert "Traceback" not in program.err


def test_a_type_that_this_version_does_not_know_becomes_a_dead_letter_that_a_later_one_can_replay(
    project: Project,
) -> None:
    program = running(project)
    del project.environment["MILLSTREAM_APP"]
    alone = ("--broker", "sqlite:///shop.db")
    assert project("publish", "orders", "order.returned", "order_id=1", *alone).exit_code == 0
    program.until(lambda: len(json.loads(project("dead", "ls", "-o", "json", *alone).stdout)) == 2)
    assert program.interrupt() == 0
    assert "unknown type" in project("dead", "ls", *alone).stdout
    assert project("dead", "replay", "--yes", *alone).exit_code == 0


def test_an_entry_that_is_not_ours_becomes_a_dead_letter_and_the_group_goes_on(project: Project) -> None:
    with RedisServer.start("7") as server:
        project.environment["MILLSTREAM_BROKER"] = server.url
        assert project("publish", "orders", "order.placed", "order_id=0").exit_code == 0
        with redis.Redis.from_url(server.url) as client:
            client.xadd("orders:0", {"foo": "bar"})
        program = project.start("run")
        program.until(lambda: len(json.loads(project("dead", "ls", "-o", "json").stdout)) == 2)
        program.until(lambda: done(project) == 1)
        assert program.interrupt() == 0
        (position,) = {letter["position"] for letter in json.loads(project("dead", "ls", "-o", "json").stdout)}
        assert "foo" in project("dead", "show", position, "--group", "billing").stdout


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["shop:empty"], 2, "empty has no handlers"),
        (["shop:app", "--only", "nobody"], 2, "shop has no group 'nobody'; it has: billing, warehouse."),
        (["shop:app", "--grace", "soon"], 2, "'soon' is not a duration"),
        (["shop:app", "--workers", "0"], 2, "0 is not in the range 1<=x<=256"),
        (["shop:app", "--broker", "gopher://there"], 2, "no broker knows the scheme 'gopher'"),
        (["shop:app", "--broker", "sqlite:////proc/no/shop.db"], 3, "/proc/no/shop.db"),
        (["nowhere:app"], 2, "Cannot load the app 'nowhere:app'"),
    ],
    ids=range(7),
)
def test_what_keeps_it_from_starting_is_one_line(project: Project, words: list[str], code: int, complaint: str) -> None:
    program = project.finish("run", *words)
    assert program.process.returncode == code, program.err
    assert complaint in program.err.splitlines()[-1] and "Traceback" not in program.err


def test_an_outbox_without_its_tables_is_wrong_usage_not_a_fault(project: Project) -> None:
    project.write(
        "relaying.py",
        "import sqlite3\n"
        "from millstream import App, Event, Stream\n"
        "from millstream.sql import Outbox\n"
        "class Placed(Event, type='order.placed'): ...\n"
        "outbox = Outbox(Stream('orders', Placed, dedupe='1h'))\n"
        "app = App('relaying', include=[outbox.relay(lambda: sqlite3.connect('own.db'))])\n",
    )
    program = project.finish("run", "relaying:app")
    assert program.process.returncode == 2, program.err
    assert "were the tables made, with `outbox.create(connection)`" in program.err.splitlines()[-1]


def test_without_an_app_there_is_nothing_to_run(project: Project) -> None:
    project.environment = {"MILLSTREAM_BROKER": "sqlite:///shop.db"}
    program = project.finish("run")
    assert program.process.returncode == 2 and "Run which app?" in program.err


def test_a_server_that_is_down_or_refuses_us_is_exit_code_3(project: Project) -> None:
    program = project.finish("run", "--broker", f"redis://127.0.0.1:{free_port()}/0")
    assert program.process.returncode == 3 and "no server at 127.0.0.1" in program.err.splitlines()[-1]
    with RedisServer.start("7", requirepass="right") as server:
        program = project.finish("run", "--broker", server.url.replace("//", "//:wrong@"))
        assert program.process.returncode == 3 and "password" in program.err.splitlines()[-1]
        assert "wrong@" not in program.err


def test_a_group_of_another_app_and_a_stream_declared_otherwise_are_exit_code_4(project: Project) -> None:
    assert running(project).interrupt() == 0
    program = project.finish("run", "shop:other")
    assert program.process.returncode == 4 and "belongs to the app 'shop'" in program.err.splitlines()[-1]
    assert project("group", "adopt", "billing", "--app", "shop:other", "--yes").exit_code == 0
    program = project.finish("run", "shop:app")
    assert program.process.returncode == 4
    project.write("shop.py", (project.path / "shop.py").read_text().replace("partitions=4", "partitions=5"))
    program = project.finish("run", "shop:other")
    assert program.process.returncode == 4 and "partitions" in program.err.splitlines()[-1]


def test_an_error_of_the_apps_own_lifespan_is_one_line_that_names_its_place(project: Project) -> None:
    project.write(
        "broken.py",
        "from contextlib import asynccontextmanager\nfrom millstream import App\nimport shop\n"
        "@asynccontextmanager\nasync def life(app):\n    raise OSError('no database')\n    yield\n"
        "app = App('broken', include=[shop.parts], lifespan=life)\n",
    )
    program = project.finish("run", "broken:app")
    assert program.process.returncode == 1
    assert program.err.splitlines()[-1] == "millstream: broken ended: broken.py, line 6: OSError: no database"
