"""Our side: every event handled exactly once on every broker, or no result."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream.app import App
from millstream.bench import scenarios
from millstream.bench.meter import Meter
from millstream.bench.prose import MAX_CHARS, VARIANTS, texts
from millstream.bench.scenarios import LEAST_BYTES, SCENARIOS, Miscounted, Run, Sale, Scenario, percentile, sale
from millstream.errors import BadSetting
from millstream.wire import codec
from tests.servers import RedisServer

EVENTS = 1_200


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer.start("7") as server:
        yield server


@pytest.mark.parametrize("broker", ["memory", "sqlite", "redis"])
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "latency"])
async def test_every_scenario_handles_every_event_exactly_once(
    name: str, broker: str, server: RedisServer, tmp_path: Path
) -> None:
    url = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/own.db", "redis": server.url}[broker]
    told: list[int] = []
    result = await SCENARIOS[name].run(url, f"{name}.{broker}", EVENTS, 200, tell=told.append)
    assert result.scenario == name and result.events == EVENTS
    assert result.rate == pytest.approx(EVENTS / result.cost.seconds)
    assert result.cost.seconds > 0 and result.cost.server_cpu_s is None
    assert result.p50_ms is None and result.p99_ms is None
    least, most = (10, 150) if name.startswith("pack") else (200, 600)
    assert result.bytes_per_event is not None and least <= result.bytes_per_event < most
    assert told == sorted(told) and all(done <= EVENTS for done in told)


def test_texts_differ_and_have_the_length_that_was_asked_for() -> None:
    made = texts(115)
    assert {len(text) for text in made} == {115} and len(set(made)) == len(made) and made == texts(115)
    assert {len(text) for text in texts(3_000)} == {3_000} and set(texts(0)) == {""}


def test_large_texts_are_few_since_they_take_memory() -> None:
    assert len(texts(200)) == VARIANTS
    made = texts(1_000_000)
    assert 1 < len(set(made)) == len(made) and sum(map(len, made)) <= MAX_CHARS + 1_000_000


async def test_latency_is_that_of_each_event_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "WARM_UP", 10)
    result = await SCENARIOS["latency"].run("memory://", "", 60, 200)
    assert result.p50_ms is not None and result.p99_ms is not None
    assert 0 < result.p50_ms <= result.p99_ms
    assert result.rate <= scenarios.LATENCY_RATE * 1.02


def test_latency_takes_a_few_seconds_however_many_events_are_asked_for() -> None:
    assert SCENARIOS["latency"].limited(100_000) == scenarios.LATENCY_EVENTS
    assert SCENARIOS["latency"].limited(7) == 7 and SCENARIOS["handle"].limited(100_000) == 100_000


@pytest.mark.parametrize("size", [LEAST_BYTES, 200, 65_536])
def test_all_events_have_the_size_that_was_asked_for(size: int) -> None:
    encode = codec.encoder(Sale)
    for number in (0, 1, 99_999_999):
        assert len(encode(sale(number, "-" * (size - LEAST_BYTES)))) == size


@pytest.mark.parametrize(("events", "size"), [(0, 200), (10, LEAST_BYTES - 1), (10, 2_000_000)])
async def test_a_run_that_cannot_be_made_is_refused(events: int, size: int) -> None:
    with pytest.raises(BadSetting):
        await SCENARIOS["handle"].run("memory://", "", events, size)


async def test_an_event_that_is_handled_twice_gives_no_result() -> None:
    def twice(run: Run) -> None:
        count = run.counted("bench")

        @run.app.subscriber(run.stream, "bench")
        async def handle(event: Sale) -> None:
            count.handled(event)
            if event.id % 10 == 5:
                count.times[event.id % 1_000] += 1

    with pytest.raises(Miscounted, match=r"handled: \[90, 100\], and 100 each were expected: no figures"):
        await changed("handle", twice).run("memory://", "", 100, 200)


async def test_an_event_that_is_lost_gives_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = App.publish_many

    async def without_the_last(app: App, events: list[Sale], **options: object) -> object:
        return await publish(app, events[:-1], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(App, "publish_many", without_the_last)
    with pytest.raises(Miscounted, match="published"):
        await SCENARIOS["publish-many"].run("memory://", "", 100, 200)


async def test_a_run_without_progress_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(run: Run) -> None:
        run.counted("bench")

        @run.app.subscriber(run.stream, "bench")
        async def handle(event: Sale) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(scenarios, "STALL_S", 0.05)
    monkeypatch.setattr(scenarios, "TELL_S", 0.01)
    monkeypatch.setenv("MILLSTREAM_GRACE", "0s")
    with pytest.raises(Exception, match=r"nothing was handled for 0\.05 s, and 100 events are left"):
        await changed("handle", stuck).run("memory://", "", 100, 200)


async def test_a_meter_adds_up_its_blocks() -> None:
    used = iter((1.0, 1.5, 4.0, 4.25))

    async def server_cpu_s() -> float:
        return next(used)

    meter = Meter(server_cpu_s)
    for _ in range(2):
        async with meter.running():
            sum(range(100_000))
    assert meter.cost.server_cpu_s == 0.75 and meter.cost.seconds > 0


def test_a_percentile_is_a_value_that_was_found() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([float(number) for number in range(101)], 0.99) == 99.0


def changed(name: str, subscribe: object) -> Scenario:
    return Scenario(name, "handle", SCENARIOS[name].work, subscribe)  # type: ignore[arg-type]
