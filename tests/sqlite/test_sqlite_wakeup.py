"""The tool that measures how soon another process handles what was published finds something to measure."""

from __future__ import annotations

from pathlib import Path

from benchmarks import wakeup


def test_each_event_reaches_the_handler_of_another_process(tmp_path: Path) -> None:
    found = wakeup.measured(f"sqlite:///{tmp_path}/shop.db", events=3, every_s=0, idle_s=0.01)
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert found["stored_p50_ms"] > 0
    assert found["idle_percent"] >= 0
