"""The record of earlier figures, and the gate: what is now below 85 % of a recorded ratio has become slower.

Ratios to the limit of the same run are compared, not rates: they carry from day to day, though not from one machine to
quite another. They are those of the best run of each side, since what else the machine does makes a run slower and never
faster: of unchanged code the medians of three rounds were seen at 0.49 and at 0.34. What is slower all the same is run
again before it counts, see `run.py`; and where the limit itself was not steady, the complaint says so.

Only what both the record and the run have is compared, but for a figure that has gone missing: that fails too.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.figures import Line, as_json

RECORD = Path(__file__).parent / "recorded.json"
LEAST = 0.85
RESTLESS = 1.3  # times: where the limit's own runs differ by more, the machine has other work
PACKAGES = ("millstream", "msgspec", "hiredis", "redis", "uvloop")


def save(path: Path, lines: Iterable[Line], rounds: int, server: str | None) -> None:
    """Write the record anew: the machine, the versions, the day, and every line."""
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(server),
        "rounds": rounds,
        "lines": as_json(lines),
    }
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> dict[str, Any]:
    """What was recorded."""
    if not path.exists():
        raise SystemExit(f"{path} is not there yet: run with --record first")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def complaints(recorded: dict[str, Any], lines: Iterable[Line]) -> list[str]:
    """What became slower than the record allows, or is missing, one sentence each."""
    return [_complaint(line, *_ratios(recorded, line)) for line in slower(recorded, lines)]


def slower(recorded: dict[str, Any], lines: Iterable[Line]) -> list[Line]:
    """What became slower than the record allows, or is missing."""
    compared = [(line, *_ratios(recorded, line)) for line in lines]
    return [line for line, now, then in compared if then and (now is None or now < LEAST * then)]


def _ratios(recorded: dict[str, Any], line: Line) -> tuple[float | None, float | None]:
    # Those of now and then: the best of both, or the medians, with a record that has nothing else.
    for found in recorded["lines"]:
        if (found["who"], found["scenario"]) == (line.who, line.scenario):
            return (line.best, found["best"]) if "best" in found else (line.ratio, found.get("ratio"))
    return line.ratio, None


def _complaint(line: Line, now: float | None, then: float | None) -> str:
    name = f"{line.who} {line.scenario}"
    assert then is not None
    if now is None:
        return f"{name}: no ratio, recorded {then:.3f}: {line.missing or 'the limit is missing'}"
    swing = line.limit_swing or 1.0
    noise = f"; noise? the limit swings {swing:.1f} times" if swing > RESTLESS else ""
    return f"{name}: {now:.3f} of the limit, {1 - now / then:.0%} below the recorded {then:.3f}{noise}"


def machine() -> dict[str, Any]:
    """What the figures depend on and nobody could guess."""
    return {"cpu": _cpu(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.release()}"}


def versions(server: str | None) -> dict[str, str]:
    """Of what takes part in the figures; `server` is the path of the Redis server."""
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    if server is not None:
        said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout
        found["redis-server"] = said.partition("v=")[2].partition(" ")[0]
    return found | {name: version(name) for name in PACKAGES}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
