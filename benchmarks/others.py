"""Other frameworks at the same work, each in a virtual environment of its own that is made when it is asked for.

A peer is a folder in `peers/`: pins in `requirements.txt` (or `package.json`), and a `bench.py` (or `bench.mjs`) that
prints one JSON object; `peers/tally.py` says which. Settings are fast ones that still handle at least once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.limits import Missing

PEERS_HERE = Path(__file__).parent / "peers"
HOMES = Path(__file__).parent.parent / "build" / "peers"
WITHIN_S = 600
MAX_REASON_CHARS = 300


class Peer(NamedTuple):
    """A folder, a way of several, and the share of all events that takes it some seconds."""

    folder: str
    way: str = ""
    share: float = 1


PEERS = {
    "faststream": Peer("faststream", share=0.05),
    "faststream, batch": Peer("faststream", "batch", share=0.2),
    "redis-py": Peer("redis-py", share=0.5),
    "ioredis": Peer("ioredis", share=0.5),
    "taskiq-redis": Peer("taskiq", share=0.04),
    "arq": Peer("arq", share=0.015),
    "dramatiq": Peer("dramatiq", share=0.04),
    "celery": Peer("celery", share=0.015),
}


def run(name: str, url: str, events: int, size_bytes: int) -> dict[str, Any]:
    """What a peer printed, after its installation where it is new here. Raises `Missing` with the reason."""
    peer = PEERS[name]
    home = install(peer.folder)
    words = [url, str(max(100, int(events * peer.share))), str(size_bytes), *([peer.way] if peer.way else [])]
    environment = os.environ | {"PYTHONPATH": str(PEERS_HERE), "PEER_HOME": str(home)}
    try:
        ran = subprocess.run(
            [*_program(home, peer.folder), *words], env=environment, capture_output=True, text=True, timeout=WITHIN_S
        )
    except subprocess.TimeoutExpired:
        raise Missing(f"not done within {WITHIN_S} s") from None
    if ran.returncode:
        raise Missing(ran.stderr.strip()[-MAX_REASON_CHARS:])
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def install(folder: str) -> Path:
    """The peer's home, with what its pins name. Raises `Missing` where that cannot be installed."""
    home, pins = HOMES / folder, _pins(folder)
    stamp = home / ".installed"
    if stamp.exists() and stamp.read_text() == pins.read_text():
        return home
    for command in _node(home, pins) if pins.suffix == ".json" else _virtualenv(home, pins):
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise Missing(f"cannot be installed: {ran.stderr.strip()[-MAX_REASON_CHARS:]}")
    stamp.write_text(pins.read_text())
    return home


def _pins(folder: str) -> Path:
    package = PEERS_HERE / folder / "package.json"
    return package if package.exists() else package.with_name("requirements.txt")


def _virtualenv(home: Path, pins: Path) -> list[list[str]]:
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return [[sys.executable, "-m", "venv", "--clear", str(home)], [*pip, "-r", str(pins)]]


def _node(home: Path, pins: Path) -> list[list[str]]:
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise Missing("needs Node and npm, which are not installed")
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(pins, home)
    return [["npm", "install", "--no-audit", "--no-fund", "--prefix", str(home)]]


def _program(home: Path, folder: str) -> list[str]:
    script = PEERS_HERE / folder / "bench.mjs"
    if script.exists():
        return ["node", str(script)]
    return [str(home / "bin" / "python"), str(script.with_suffix(".py"))]
