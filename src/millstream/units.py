"""Durations, sizes, and every limit of Millstream with its reason."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TypeAlias

from millstream.errors import BadSetting

Duration: TypeAlias = str | float | timedelta
"""`"250ms"`, `"2s"`, `"5m"`, `"1h"`, `"7d"`, a number of seconds, or a `timedelta`."""

Size: TypeAlias = str | int
"""`"64KB"`, `"1MB"`, `"2GB"` (powers of 1,024), or a number of bytes."""

MAX_EVENT_BYTES = 1_048_576  # one slow 1 MiB event must not stall a batch of a hundred small ones
MAX_HEADERS_BYTES = 16_384  # headers are read by every hop; what is larger belongs into the event
MAX_KEY_BYTES = 1_024  # the key is stored with every event and names lists of waiting events
MAX_ID_CHARS = 64  # holds a UUID and most providers' idempotency keys
MAX_TYPE_CHARS = 128  # a type name is compared for every event
MAX_NAME_CHARS = 64  # streams, groups, apps, namespaces: they become parts of keys
MAX_PARTITIONS = 1_024  # a consumer reads all of them in one command
MAX_CONCURRENCY = 10_000  # a lane is a task of about 2 KB
MAX_BATCH = 10_000  # a batch is held in memory and settled in pieces of 1,000
MAX_POSTPONED = 1_000  # `RetryLater` uses no attempt, so something else must end a loop
MAX_DEAD = 100_000  # dead letters of one group and partition; past it, events wait instead of piling up
MAX_PARKED = 100_000  # events of one group that wait behind a failed one of their key; past it, their partition waits
DEAD_FULL_S = 300.0  # how long such an event waits before it is tried again: never a loop, and never lost
MAX_APPEND_RECORDS = 1_000  # records in one write: more gains nothing, and a lost reply puts them all in doubt
MAX_APPEND_BYTES = 4_194_304  # bytes in one write, for the same reason
MAX_PACK_EVENTS = 4_096  # events in one entry: a crash may repeat all of them, and past 512 little is gained
MAX_PACK_BYTES = 4_194_304  # of its events before compression: what each reader holds in memory for one entry
MAX_DICTIONARIES = 16  # of a stream, each kept as long as it: 2 MB beside it, and in who reads it
MAX_DICTIONARY_BYTES = 112_640  # zstd's own default; past 16 KiB small events gain next to nothing
MAX_TIME_MS = 253_402_300_799_999  # the last millisecond of the year 9999, which a datetime can still hold
MAX_DEDUPE_S = (
    86_400.0  # an id costs about 120 bytes for so long; what is to last longer belongs into the user's database
)
MAX_DEDUPE_IDS = 10_000_000  # of one partition: more than a gigabyte
MAX_DELAY_S = 366 * 86_400.0  # what lies further ahead is a plan, which belongs into a database where it can be changed
FORGET_MS = 7 * 86_400_000  # a group that nobody has served for a week keeps no events any more
MAX_ERROR_CHARS = 4_000  # an error's text that is kept with a dead letter

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
_BYTES = {"B": 1, "KB": 1_024, "MB": 1_048_576, "GB": 1_073_741_824}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)")
_SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?)\s*(B|KB|MB|GB)", re.IGNORECASE)
_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_NAME_CHARS}}}")


def seconds(duration: Duration) -> float:
    """A duration as seconds, zero or more. Raises `BadSetting`."""
    if isinstance(duration, timedelta):
        value = duration.total_seconds()
    elif isinstance(duration, str):
        match = _DURATION.fullmatch(duration.strip())
        if match is None:
            raise BadSetting(f"{duration!r} is not a duration: write '250ms', '2s', '5m', '1h' or '7d'")
        value = float(match[1]) * _SECONDS[match[2]]
    elif isinstance(duration, int | float) and not isinstance(duration, bool):
        value = float(duration) if duration < 1e18 else float("inf")
    else:
        raise BadSetting(f"{duration!r} is not a duration: write '5m', a number of seconds, or a timedelta")
    if not 0 <= value < float("inf"):
        raise BadSetting(f"{duration!r} is not a duration: it must be zero or more")
    return value


def size_bytes(size: Size) -> int:
    """A size as bytes. Raises `BadSetting`."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None:
        raise BadSetting(f"{size!r} is not a size: write '64KB', '1MB' or a number of bytes")
    return int(float(match[1]) * _BYTES[match[2].upper()])


def check_name(kind: str, name: str) -> str:
    """The name, when it may be part of a key. Raises `BadSetting` naming the kind (`stream`, `group`, …)."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        article = "an" if kind[0] in "aeiou" else "a"
        raise BadSetting(
            f"{name!r} cannot name {article} {kind}: use 1 to {MAX_NAME_CHARS} of the characters A-Z a-z 0-9 . _ -"
        )
    return name
