"""The benchmark tool: it runs from end to end, its figures can be wrong, and its gate closes."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from benchmarks import bytecodes, limits, others, ours, profiling, record, run
from benchmarks.chart import chart
from benchmarks.figures import OURS, Line, factors, line, markdown, table
from benchmarks.limits import Limit
from benchmarks.scenarios import CORE, SCENARIOS
from millstream.bench.scenarios import GROUP, Miscounted, Run
from tests.servers import RedisServer

EVENTS = 200
HANDLED = Line("redis", "handle", EVENTS, 200, 60_000, 50_000, 70_000, "consume", 100_000, 0.6)


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    """What the tools do not want to be told, other tests do."""
    before = logging.getLogger("millstream").level
    yield
    logging.getLogger("millstream").setLevel(before)


@pytest.fixture(scope="module")
def engine() -> Path:
    try:
        return limits.build()
    except limits.Missing as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer.start("7") as running:
        yield running


@pytest.fixture(scope="module")
def tally() -> ModuleType:
    """What peers share; in their environments it is on the path."""
    spec = importlib.util.spec_from_file_location("tally", others.PEERS_HERE / "tally.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_runs_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "recorded.json", tmp_path / "chart.svg"
    words = ["publish-many", "handle", "--broker", "all", "--events", str(EVENTS), "--rounds", "1", "-o", "json"]
    assert run.main([*words, "--file", str(file), "--record", "--svg", str(picture)]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [(found["who"], found["scenario"]) for found in lines] == [
        (who, name) for who in OURS for name in ("publish-many", "handle")
    ]
    assert all(found["rate"] > 0 and found["cpu_us"] > 0 for found in lines)
    assert {found["who"] for found in lines if "ratio" in found} >= {"sqlite"}
    recorded = json.loads(file.read_text())
    assert recorded["lines"] == lines
    assert recorded["versions"]["redis-server"][0].isdigit()
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


WAYS = [
    "publish-one",
    "publish-concurrent",
    "handle-all",
    "one-key-fails",
    "ten-groups",
    "256-partitions",
    "both",
    "latency",
]


@pytest.mark.parametrize("name", WAYS)
def test_the_other_ways_of_ours_measure_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [name, "--broker", "memory", "--events", "2000", "--rounds", "1", "-o", "json"]
    assert run.main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert ("p99_ms" in found) == (name == "latency")


@pytest.mark.parametrize("name", ["ten-groups", "one-key-fails"])
async def test_no_figures_where_a_group_handled_an_event_twice(name: str) -> None:
    scenario = ours.MEASURES[name]

    def twice(run: Run) -> None:
        assert scenario.subscribe is not None
        scenario.subscribe(run)
        list(run.counts.values())[-1].times[ours.POISON + 1] += 1

    with pytest.raises(Miscounted, match=r"handled: .* no figures"):
        await replace(scenario, subscribe=twice).run("memory://", "", EVENTS, 200)


async def test_no_figures_where_a_group_has_something_left() -> None:
    def in_haste(run: Run) -> None:
        ours.with_a_failing_key(run)
        run.counts[GROUP].expected += 1

    with pytest.raises(Miscounted, match=r"handled: .* no figures"):
        await replace(ours.MEASURES["one-key-fails"], subscribe=in_haste).run("memory://", "", EVENTS, 200)


def test_partitions_and_groups_are_as_many_as_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ours", "handle", "memory://", "--events", str(EVENTS), "--groups", "3", "--partitions", "2"]
    monkeypatch.setattr(sys, "argv", words)
    ours.main()
    found = json.loads(capsys.readouterr().out)
    assert found["rate"] == pytest.approx(3 * EVENTS / found["seconds"], rel=0.01)
    assert ours.spread(2).partitions == 2


async def test_start_and_drain_are_told_and_are_part_of_the_time() -> None:
    result = await ours.MEASURES["ten-groups"].run("memory://", "", EVENTS, 200)
    assert result.start_ms is not None and result.drain_ms is not None
    assert result.start_ms > 0 and result.drain_ms > 0
    assert result.start_ms + result.drain_ms <= result.cost.seconds * 1_000
    assert result.rate == pytest.approx(ours.GROUPS * EVENTS / result.cost.seconds)


def test_growth_is_counted_from_a_tenth_on(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, sizes = ours.Memory(100), iter((30.0, 34.5))
    monkeypatch.setattr(memory, "_mb", lambda name: next(sizes) if name == "VmRSS" else 40.0)
    memory.look(9)
    memory.look(10)
    memory.look(50)
    assert memory.found() == {"peak_mb": 40.0, "grown_mb": 4.5}


def test_a_sample_counts_for_the_innermost_frame_of_python() -> None:
    outer, send = "main (ours.py:9)", "Link._write (millstream/brokers/redis/link.py:299)"
    stacks = [([outer, send, "__libc_send (libc.so.6)"], 2), ([outer, send.replace("299", "301")], 1), (["uv_run"], 5)]
    found = profiling.shares(stacks)
    assert found["function"] == {"Link._write  millstream/brokers/redis/link.py": 3}
    assert found["line"]["millstream/brokers/redis/link.py:299  Link._write"] == 2
    assert found["C"] == {"__libc_send": 2}
    assert profiling.table(found["C"], 3) == " 66.7%  __libc_send"


@pytest.mark.parametrize(
    ("mode", "options"),
    [("publish", "-b 10"), ("consume", "-k 3 -b 10"), ("both", "-a 2"), ("latency", "-r 2000"), ("publish", "-s 64")],
)
def test_the_engine_is_measured_in_c(mode: str, options: str, engine: Path, server: RedisServer) -> None:
    words = [str(engine), mode, "-p", str(server.port), "-n", str(EVENTS), *options.split()]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert found["events"] == EVENTS and found["rate"] > 0 and found["server_us"] >= 0
    assert (0 < found.get("p50_ms", 0) <= found.get("p99_ms", 0)) == (mode == "latency")


@pytest.mark.parametrize("words", [[], ["publ"], ["publish", "-s", "63"], ["publish", "-p", "1"]])
def test_the_engine_prints_nothing_when_something_is_wrong(words: list[str], engine: Path) -> None:
    ran = subprocess.run([engine, *words], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("engine: ")


def test_a_limit_is_the_best_of_several_ways(engine: Path, server: RedisServer) -> None:
    found = limits.of(server.url, Limit("publish", (1, 100)), EVENTS, 200)
    assert found is not None and found["batch"] == 100
    slow, fast = {"p50_ms": 2.0, "rate": 500}, {"p50_ms": 1.0, "rate": 499}
    assert limits.best([slow, fast]) == fast


def test_large_events_are_written_fewer_at_once(engine: Path, server: RedisServer) -> None:
    found = limits.of(server.url, Limit("publish"), 20, 65_536)
    assert found is not None and found["batch"] == 16


def test_a_ratio_is_one_of_medians() -> None:
    runs = [{"events": 9, "size": 200, "rate": rate} for rate in (10, 30, 90)]
    found = line("redis", "handle", "consume", runs, [{"rate": 50}, {"rate": 60}, {"rate": 100}])
    assert (found.rate, found.least, found.most, found.limit, found.ratio) == (30, 10, 90, 60, 0.5)


def test_a_ratio_of_latencies_is_smaller_when_ours_takes_longer() -> None:
    ours_took = {"events": 9, "size": 200, "rate": 500, "p50_ms": 0.4, "p99_ms": 4}
    found = line("redis", "latency", "latency", [ours_took], [{"rate": 500, "p50_ms": 0.1, "p99_ms": 1}])
    assert found.ratio == 0.25


def test_the_best_ratio_is_that_of_each_sides_best_run() -> None:
    runs = [{"events": 9, "size": 200, "rate": rate} for rate in (10, 20, 30)]
    found = line("redis", "handle", "consume", runs, [{"rate": 20}, {"rate": 60}, {"rate": 30}])
    assert (found.ratio, found.best, found.limit_swing) == (20 / 30, 0.5, 3.0)
    ours_took = [{"events": 9, "size": 200, "rate": 500, "p50_ms": p50_ms, "p99_ms": 4} for p50_ms in (0.8, 0.25)]
    found = line("redis", "latency", "latency", ours_took, [{"rate": 500, "p50_ms": p50_ms} for p50_ms in (0.5, 0.125)])
    assert (found.best, found.limit_swing) == (0.5, 4.0)


def test_without_a_limit_there_is_no_ratio() -> None:
    found = line("memory", "handle", "consume", [{"events": 9, "size": 200, "rate": 10}], [])
    assert (found.rate, found.limit, found.ratio) == (10, None, None)


@pytest.mark.parametrize("shown", [table, markdown])
def test_what_has_no_figure_is_shown_with_its_reason(shown: object) -> None:
    assert callable(shown)
    text = shown([HANDLED, Line("arq", "", missing="cannot be installed")])
    assert "60,000" in text and "0.600" in text
    assert "no figure for arq : cannot be installed" in text


def test_factors_compare_the_same_scenario_of_peers_only() -> None:
    peer, sqlite = replace(HANDLED, who="other 1.0", rate=1_000), replace(HANDLED, who="sqlite", rate=1_000)
    batch = replace(peer, scenario="handle-batch")
    assert factors([HANDLED, sqlite, peer, batch]) == ["handle: 60.0 × other 1.0"]


def test_the_longest_bar_of_a_section_is_its_limit() -> None:
    root = ElementTree.fromstring(chart([HANDLED, replace(HANDLED, who="a<b 1.0", rate=1_000)]))
    widths = [int(bar.attrib["width"]) for bar in root if bar.tag.endswith("rect")]
    assert len(widths) == 3 and widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        (replace(HANDLED, ratio=0.52), None),
        (replace(HANDLED, ratio=0.50), "redis handle: 0.500 of the limit, 17% below the recorded 0.600"),
        (replace(HANDLED, ratio=None, missing="crashed"), "redis handle: no ratio, recorded 0.600: crashed"),
        (replace(HANDLED, scenario="new", ratio=0.01), None),
        (replace(HANDLED, who="sqlite", ratio=0.01), None),
    ],
)
def test_the_gate_closes_below_85_percent_of_what_is_recorded(now: Line, complaint: str | None, tmp_path: Path) -> None:
    file = tmp_path / "recorded.json"
    record.save(file, [HANDLED, Line("memory", "handle")], rounds=3, server=None)
    assert record.complaints(json.loads(file.read_text()), [now]) == ([complaint] if complaint else [])


@pytest.mark.parametrize(
    ("best", "swing", "complaint"),
    [
        (0.69, 3.0, None),
        (0.6, 1.2, "redis handle: 0.600 of the limit, 25% below the recorded 0.800"),
        (
            0.6,
            2.0,
            "redis handle: 0.600 of the limit, 25% below the recorded 0.800; noise? the limit swings 2.0 times",
        ),
    ],
)
def test_the_gate_compares_the_best_runs_and_tells_of_a_restless_machine(
    best: float, swing: float, complaint: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "recorded.json"
    record.save(file, [replace(HANDLED, best=0.8)], rounds=3, server=None)
    now = replace(HANDLED, ratio=0.1, best=best, limit_swing=swing)
    assert record.complaints(json.loads(file.read_text()), [now]) == ([complaint] if complaint else [])


@pytest.mark.parametrize(("bests", "code"), [([0.1, 0.1, 0.6], 0), ([0.1] * 9, 1)])
def test_what_is_slower_is_run_again_alone_before_the_gate_says_so(
    bests: list[float], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ran, left = tmp_path / "recorded.json", list[tuple[object, ...]](), iter([*bests, 0.6])

    class Scripted:
        def __init__(self, *_: object) -> None: ...

        def round(self, *what: object) -> None:
            ran.append(what)

        def lines(self) -> list[Line]:
            return [replace(HANDLED, who="sqlite", best=next(left)), replace(HANDLED, who="sqlite", scenario="both")]

    record.save(file, [replace(HANDLED, who="sqlite", best=0.6)], rounds=1, server=None)
    monkeypatch.setattr(run, "Rounds", Scripted)
    assert run.main(["handle", "both", "--broker", "sqlite", "--rounds", "2", "--gate", "--file", str(file)]) == code
    again = len(ran) - 2
    assert ran[2:] == [(["sqlite"], ["handle"], [])] * again
    assert again == (4 if code == 0 else 2 * run.RERUNS)


def test_the_gate_says_what_became_slower_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recorded.json"
    record.save(file, [replace(HANDLED, who="sqlite", ratio=1_000.0)], rounds=1, server=None)
    words = ["handle", "--broker", "sqlite", "--events", str(EVENTS), "--rounds", "1", "--file", str(file)]
    assert run.main([*words, "--gate"]) == 1
    assert "slower: sqlite handle: " in capsys.readouterr().err


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What traces the tests has its turn again; the in-flight limit is no other test's."""
    monkeypatch.setenv("MILLSTREAM_MAX_IN_FLIGHT", bytecodes.IN_FLIGHT)
    before = sys.gettrace()
    yield
    sys.settrace(before)


@pytest.mark.usefixtures("tracing")
def test_bytecodes_are_counted_where_they_are_run_and_are_the_same_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/counted.db"
    first, second = (bytecodes.counted("publish-many", f"{url}.{run}", 2_000) for run in range(2))
    assert sum(first.values()) == pytest.approx(sum(second.values()), rel=0.05)
    assert any("storing.py" in name for name in first)  # which is run by a thread
    assert not any("scenarios.py" in name and "made" in name for name in first)  # which is not timed


@pytest.mark.usefixtures("tracing")
def test_the_gate_of_bytecodes_closes_where_there_are_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bytecodes.json"
    words = ["handle", "--broker", "memory", "--events", "2000", "--file", str(file)]
    assert bytecodes.main([*words, "--record"]) == 0
    assert bytecodes.main([*words, "--gate"]) == 0
    recorded = json.loads(file.read_text())
    recorded["counts"]["memory handle"] /= 1.2
    file.write_text(json.dumps(recorded))
    assert bytecodes.main([*words, "--gate"]) == 1
    assert "more: memory handle: " in capsys.readouterr().err
    recorded["python"] = "3.99"
    assert bytecodes.complaints(recorded, {"memory handle": 1e6}) == []


@pytest.mark.usefixtures("tracing")
def test_without_a_record_the_functions_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert bytecodes.main(["handle", "--broker", "memory", "--events", "200"]) == 0
    assert "millstream/worker/lanes.py:" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["nonsense"], ["--peers", "nonsense"], ["--size", "10"], ["--record", "--gate"]])
def test_wrong_words_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(words)


@pytest.mark.parametrize("gate", [run.main, bytecodes.main])
def test_a_gate_without_a_record_says_what_to_do(gate: Callable[[list[str]], int], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run with --record first"):
        gate(["--gate", "--file", str(tmp_path / "none.json")])


def test_help_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run.main(["--help"])
    text = "".join(capsys.readouterr().out.split())
    assert all(name in text for name in SCENARIOS)


def test_every_scenario_has_a_function_and_the_gate_some_of_them() -> None:
    assert {scenario.measure for scenario in SCENARIOS.values()} == set(ours.MEASURES)
    assert set(CORE) < set(SCENARIOS)


@pytest.mark.parametrize("folder", sorted({peer.folder for peer in others.PEERS.values()}))
def test_a_peer_is_a_program_and_exact_pins(folder: str) -> None:
    here = others.PEERS_HERE / folder
    package = here / "package.json"
    if package.exists():
        pins = json.loads(package.read_text())["dependencies"].values()
        assert all(pin[0].isdigit() for pin in pins)
        assert (here / "bench.mjs").exists()
    else:
        assert all("==" in pin for pin in (here / "requirements.txt").read_text().splitlines())
        compile((here / "bench.py").read_text(), folder, "exec")


def test_a_peer_that_cannot_be_installed_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(others, "HOMES", tmp_path)
    with pytest.raises(limits.Missing, match="Node"):
        others.run("ioredis", "redis://unused", EVENTS, 200)


def test_a_tally_is_one_for_several_processes_and_knows_twice_from_once(tally: ModuleType) -> None:
    counted = tally.Tally.new(3)
    same = tally.Tally.open(str(counted.path))
    for number in range(3):
        assert not counted.complete
        same.handled(number)
    assert counted.complete
    same.handled(1)
    with pytest.raises(SystemExit, match="exactly once"):
        counted.rate()


def test_the_event_of_a_peer_has_the_size_that_is_asked_for(tally: ModuleType) -> None:
    assert [len(json.dumps(tally.event(number, 200), separators=(",", ":"))) for number in (0, 99_999)] == [200, 200]
