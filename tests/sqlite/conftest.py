"""Whatever statement any of these tests runs is explained by SQLite itself: none reads through what grows with the backlog.

A statement is looked at once, in the file where it ran first, so a new one is covered by the first test that comes by it.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from millstream.brokers.sqlite.file import File

GROWS = "event|pending|dead|parked|parked_key|note|remembered|delayed"
THROUGH = re.compile(rf"SCAN ({GROWS})\b")
VALUE = re.compile(r"[xX]?'(?:[^']|'')*'|\b\d+(?:\.\d+)?\b")
VERBS = ("SELECT", "INSERT", "UPDATE", "DELETE")
OURS = frozenset({"UPDATE event SET stored_ms = row & ?"})  # what a test itself does to a file
LONGEST_CHARS = 4_000  # with large values; the same statement comes with small ones too

_explained: set[str] = set(OURS)


@pytest.fixture(autouse=True)
def statements_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fresh: dict[str, str] = {}
    connect = File.connect

    def note(statement: str) -> None:
        if statement.startswith(VERBS) and len(statement) < LONGEST_CHARS:
            words = VALUE.sub("?", statement)
            if words not in _explained:
                fresh.setdefault(words, statement)

    def traced(file: File, *, reader: bool = False) -> sqlite3.Connection:
        connection = connect(file, reader=reader)
        connection.set_trace_callback(note)
        return connection

    monkeypatch.setattr(File, "connect", traced)
    yield
    monkeypatch.undo()
    if fresh:
        _explain(tmp_path / "plans.db", fresh)
        _explained.update(fresh)


def _explain(path: Path, statements: dict[str, str]) -> None:
    File(str(path), "normal").open()
    with closing(sqlite3.connect(path)) as connection:
        for words, statement in statements.items():
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
            assert not any(THROUGH.match(step) for step in plan), (words, plan)
