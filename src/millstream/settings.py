"""Settings: the knobs of operation, and their precedence."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from millstream.errors import BadSetting
from millstream.units import MAX_CONCURRENCY, MAX_PARKED, Duration, Size, check_name, seconds, size_bytes

PREFIX = "MILLSTREAM_"
MAX_BUFFERED_BYTES = 68_719_476_736  # more is a slip of the pen, not a buffer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The knobs of operation. What is not given here is read from `MILLSTREAM_<NAME>`, else the default holds."""

    lease: Duration = "10s"
    """How long a silent consumer, and what it holds, stays untouched."""
    grace: Duration = "25s"
    """How long running handlers may take to finish after a stop signal; below the 30 s of orchestrators."""
    concurrency: int = 64
    """Handlers of one group that may run at once in a process."""
    threads: int = 16
    """Handlers that are plain functions run in this many threads, per group and process."""
    max_in_flight: int | None = None
    """Events of one group that a process may hold, fetched and not settled. Default: 2 x concurrency x batch size, or what
    was settled lately in 5 ms where that is more, up to 2,000."""
    max_parked: int = MAX_PARKED
    """Events of one ordered group that may wait with their keys; past it, their partitions wait too."""
    publish_patience: Duration = "2s"
    """How long publishing goes on trying when nothing was stored, or when the stream tells a repeat; 0: it tries once."""
    max_buffered: int = 100_000
    """Events of one stream that may wait to be written; past it, publishing waits its turn."""
    max_buffered_size: Size = "64MB"
    """The same in bytes of these events."""
    namespace: str = ""
    """Put before every key or table entry, so that several deployments share a server."""

    def __post_init__(self) -> None:
        if not 0.5 <= seconds(self.lease) <= 3_600:
            raise BadSetting(f"lease={self.lease!r}: from 0.5s to 1h")
        if not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise BadSetting(f"concurrency={self.concurrency!r}: from 1 to {MAX_CONCURRENCY:,}")
        if not 1 <= self.threads <= 1_000:
            raise BadSetting(f"threads={self.threads!r}: from 1 to 1,000")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise BadSetting(f"max_in_flight={self.max_in_flight!r}: at least 1")
        if not 1 <= self.max_parked <= 100 * MAX_PARKED:
            raise BadSetting(f"max_parked={self.max_parked!r}: from 1 to {100 * MAX_PARKED:,}")
        seconds(self.grace)
        if self.namespace:
            check_name("namespace", self.namespace)
        self._check_publishing()

    @property
    def lease_s(self) -> float:
        """The lease, in seconds."""
        return seconds(self.lease)

    @property
    def grace_s(self) -> float:
        """The grace, in seconds."""
        return seconds(self.grace)

    @property
    def publish_patience_s(self) -> float:
        """The patience of publishing, in seconds."""
        return seconds(self.publish_patience)

    @property
    def max_buffered_bytes(self) -> int:
        """What may wait to be written, in bytes."""
        return size_bytes(self.max_buffered_size)

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None, **given: Any) -> Settings:
        """Settings from arguments, then the environment, then the defaults; `None` means "not given".

        Raises `BadSetting` naming the variable.
        """
        environment = os.environ if environment is None else environment
        values = {name: value for name, value in given.items() if value is not None}
        for field in dataclasses.fields(cls):
            variable = PREFIX + field.name.upper()
            text = environment.get(variable)
            if text is None or field.name in values:
                continue
            try:
                values[field.name] = int(text) if "int" in str(field.type) else text
                cls(**{field.name: values[field.name]})
            except ValueError:
                raise BadSetting(f"{variable}={text!r} is not a whole number") from None
            except BadSetting as error:
                raise BadSetting(f"{variable}: {error}") from None
        return cls(**values)

    def _check_publishing(self) -> None:
        if not seconds(self.publish_patience) <= 3_600:
            raise BadSetting(f"publish_patience={self.publish_patience!r}: from 0 to 1h")
        if not 1 <= self.max_buffered <= 100_000_000:
            raise BadSetting(f"max_buffered={self.max_buffered!r}: from 1 to 100,000,000")
        if not 1 <= self.max_buffered_bytes <= MAX_BUFFERED_BYTES:
            raise BadSetting(f"max_buffered_size={self.max_buffered_size!r}: from 1B to 64GB")
