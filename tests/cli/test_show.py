"""What is shown: numbers, times, progress where there is no terminal."""

from __future__ import annotations

import pytest

from millstream.cli import show
from millstream.clock import Clock


class SteppingClock(Clock):
    """A second passes at each look."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def monotonic(self) -> float:
        self.now_s += 1
        return self.now_s


def test_without_a_terminal_progress_is_a_line_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with show.Progress("publishing", "event", SteppingClock(), total=2_000) as progress:
        for done in range(100, 1_000, 100):
            progress.show(done)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "publishing 300 events  100/s  15%  17s left",
        "publishing 600 events  100/s  30%  14s left",
        "publishing 900 events  100/s  45%  11s left",
    ]


def test_where_the_end_is_unknown_no_time_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    with show.Progress("publishing", "event", SteppingClock()) as progress:
        for done in range(3):
            progress.show(done)
    assert capsys.readouterr().err == "publishing 2 events  1/s\n"


def test_numbers_and_times_are_written_for_people() -> None:
    assert [show.count(n) for n in (None, 0, 1_234_567)] == ["?", "0", "1,234,567"]
    assert [show.size(n) for n in (None, 0, 1_023, 1_536, 5 * 1_024**3)] == ["?", "0 B", "1,023 B", "1.5 KB", "5.0 GB"]
    assert [show.span(s) for s in (8, 185, 7_800)] == ["8s", "3m 05s", "2h 10m"]
    assert [show.many(n, "event") for n in (0, 1, 2_000)] == ["0 events", "1 event", "2,000 events"]
    assert show.iso(1_693_000_000_123) == "2023-08-25T21:46:40.123Z"


def test_what_could_steer_a_terminal_is_taken_out() -> None:
    assert show.text("a\x1b[2Jb\x9bc\nd\u202ee") == "a [2Jb c d e"
    assert show.text(None) == show.text("") == "-"
