"""The record of earlier figures, and the gate: what is now below 85 % of a recorded ratio has become slower.

Ratios to the limit of the same run are compared, not rates: they carry from day to day, though not from one machine to
quite another. Only what both the record and the run have is compared, but for a figure that has gone missing: that
fails too.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.figures import Line, as_json

RECORD = Path(__file__).parent / "recorded.json"
LEAST = 0.85
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


def complaints(recorded: dict[str, Any], lines: Sequence[Line]) -> list[str]:
    """What became slower than the record allows, or is missing, one sentence each."""
    ratios = {(line["who"], line["scenario"]): line["ratio"] for line in recorded["lines"] if "ratio" in line}
    return [complaint for line in lines for complaint in _complaint(line, ratios.get((line.who, line.scenario)))]


def _complaint(line: Line, recorded: float | None) -> list[str]:
    name = f"{line.who} {line.scenario}"
    if recorded is None:
        return []
    if line.ratio is None:
        return [f"{name}: no ratio, recorded {recorded:.3f}: {line.missing or 'the limit is missing'}"]
    if line.ratio < LEAST * recorded:
        lost = 1 - line.ratio / recorded
        return [f"{name}: {line.ratio:.3f} of the limit, {lost:.0%} below the recorded {recorded:.3f}"]
    return []


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
