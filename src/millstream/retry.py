"""Retry and Batch: what happens after a failure, and how many events a handler gets at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from millstream.errors import BadSetting
from millstream.units import MAX_BATCH, Duration, seconds


@dataclass(frozen=True)
class Retry:
    """How often a failed event is tried, and how long it waits in between.

    The wait before attempt n+1 is `first * factor ** (n - 1)`, at most `max`, less up to a random quarter, so that
    events that failed together do not come back together. The defaults try for about two hours, which outlives a deployment.
    """

    attempts: int = 10
    first: Duration = "1s"
    factor: float = 3
    max: Duration = "1h"
    never: Sequence[type[Exception]] = ()
    """Errors that are not worth a second try: such an event is given up at once."""
    then: Literal["skip", "hold"] = "skip"
    """What giving up means: the event becomes a dead letter and its key goes on; or, where a group keeps the order of keys,
    the key waits with all its later events until a person releases or drops it."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise BadSetting(f"Retry(attempts={self.attempts}): at least 1")
        if not self.factor >= 1:
            raise BadSetting(f"Retry(factor={self.factor}): at least 1, or retries would come ever faster")
        if isinstance(self.never, type) or not all(_is_error(e) for e in self.never):
            raise BadSetting(f"Retry(never={self.never!r}): a list of exception classes")
        if self.then not in ("skip", "hold"):
            raise BadSetting(f"Retry(then={self.then!r}): 'skip' or 'hold'")
        seconds(self.first), seconds(self.max)

    def delay_s(self, attempt: int, chance: float) -> float:
        """Seconds to wait after this attempt failed. `chance` in [0, 1) is the jitter."""
        longest = seconds(self.max)
        try:
            nominal = min(seconds(self.first) * self.factor ** (attempt - 1), longest)
        except OverflowError:
            nominal = longest
        return nominal * (1 - chance / 4)


@dataclass(frozen=True)
class Batch:
    """Up to `size` events in one call, gathered for at most `within` after the first of them arrived."""

    size: int = 100
    within: Duration = 0

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_BATCH:
            raise BadSetting(f"Batch(size={self.size}): from 1 to {MAX_BATCH:,}")
        seconds(self.within)


def _is_error(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, BaseException)
