"""What a `Stream` asks of the broker: what is recorded of it, what the broker must be able to do, and what differs."""

from __future__ import annotations

from typing import Any, get_args

from msgspec.structs import replace

from millstream.brokers.base import Broker, Confirm, Policy, StreamSpec
from millstream.errors import BadSetting, NotSupported
from millstream.stream import NEVER, Stream
from millstream.telemetry import logger
from millstream.units import seconds, size_bytes
from millstream.wire import compression

_CONFIRMS = get_args(Confirm)
_NEEDS = {
    "fsync": "a disk that is written before the answer (Redis: appendonly yes, from 7.2 on; SQLite: a file)",
    "replicated": "a server with a replica that is connected",
}
NOTHING = "-"
"""A setting that says nothing, for people."""
_SPANS_MS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_SIZES = {"GB": 1_073_741_824, "MB": 1_048_576, "KB": 1_024, "B": 1}


def spec_of(stream: Stream[Any]) -> StreamSpec:
    """What decides where its events lie."""
    return StreamSpec(stream.name, stream.partitions, stream.key_name, stream.codec)


def policy_of(stream: Stream[Any]) -> Policy:
    """What its declaration asks to hold for all who use it."""
    dedupe, retention = stream.dedupe, stream.retention
    policy = Policy()
    if dedupe is not None:
        policy = replace(policy, dedupe_ms=int(seconds(dedupe.window) * 1000), dedupe_ids=dedupe.ids)
    if retention is None:
        return policy
    return replace(
        policy,
        age_ms=int(seconds(retention.age) * 1000) if retention.age is not None else 0,
        events=retention.events or 0,
        bytes=size_bytes(retention.bytes) if retention.bytes is not None else 0,
        keep=retention.unread == "keep",
        forget_ms=retention.forget_ms,
        ceiling_events=retention.ceiling_events,
        ceiling_bytes=retention.ceiling_bytes,
    )


async def declare(broker: Broker, stream: Stream[Any]) -> Policy:
    """Declare a stream, and return what is recorded for it: that holds. Raises `NotSupported`, `StreamMismatch`."""
    check_confirm(broker, stream.confirm, f"stream {stream.name!r}")
    if stream.pack is not None:
        compression.check(stream.pack.codec)
    lacking = [
        option for option in ("dedupe", "retention") if getattr(stream, option) and not getattr(broker.traits, option)
    ]
    if lacking:
        raise NotSupported(
            f"{broker.url} cannot do what stream {stream.name!r} asks for with {lacking[0]}=: leave it out, or use "
            "another broker"
        )
    recorded = await broker.declare(spec_of(stream), policy_of(stream))
    _compare(stream, recorded, broker.url)
    return recorded


def wanted(stream: Stream[Any], recorded: Policy, *, exact: bool = False) -> Policy:
    """What shall hold: the declaration, and where it says nothing, what is recorded, or, if exact, nothing.

    A dictionary is never declared, so the one that is recorded stays.
    """
    silent = {
        name: getattr(recorded, name)
        for name in Policy.__struct_fields__
        if (stream.dedupe if name.startswith("dedupe_") else stream.retention) is None and not exact
    }
    return replace(policy_of(stream), **silent | {"dictionary": recorded.dictionary})


def check_confirm(broker: Broker, confirm: Confirm, about: str) -> None:
    """Raise `NotSupported` where the broker cannot confirm at this level."""
    if confirm not in _CONFIRMS:
        raise BadSetting(f"{about}: confirm={confirm!r} must be 'memory', 'fsync' or 'replicated'")
    if confirm not in broker.traits.confirms:
        possible = " or ".join(repr(level) for level in _CONFIRMS if level in broker.traits.confirms)
        raise NotSupported(
            f"{about}: {broker.url} cannot confirm {confirm!r}, which needs {_NEEDS.get(confirm, 'more')}: set that up, "
            f"or write confirm={possible}"
        )


def in_words(policy: Policy) -> str:
    """What holds for a stream, for people."""
    return f"{_dedupe(policy)}, {_retention(policy)}"


def settings(policy: Policy) -> dict[str, str]:
    """Each setting by the name under which it is declared, for people; `NOTHING` where it says nothing."""
    ceiling = f"{policy.ceiling_events:,} events" if policy.ceiling_events else _size(policy.ceiling_bytes)
    return {
        "dedupe": f"{_span(policy.dedupe_ms)}, {policy.dedupe_ids:,} ids" if policy.dedupe_ms else NOTHING,
        "age": _span(policy.age_ms) if policy.age_ms else NOTHING,
        "events": f"{policy.events:,}" if policy.events else NOTHING,
        "bytes": _size(policy.bytes),
        "ceiling": ceiling,
        "unread": "keep" if policy.keep else "drop",
        "forget": _span(policy.forget_ms) if policy.forget_ms else NEVER,
    }


def differences(recorded: Policy, asked: Policy) -> dict[str, tuple[str, str]]:
    """The settings in which they differ, with the value of each."""
    after = settings(asked)
    return {name: (value, after[name]) for name, value in settings(recorded).items() if value != after[name]}


def _compare(stream: Stream[Any], recorded: Policy, url: str) -> None:
    """Say what else is recorded than was asked for. What the declaration is silent about may be anything."""
    found = differences(recorded, wanted(stream, recorded))
    if found:
        logger.warning(
            "stream %r on %s is recorded with %s; here it is declared with %s. What is recorded holds; "
            "`millstream stream apply %s` changes it",
            stream.name,
            url,
            ", ".join(_setting(name, before) for name, (before, _) in found.items()),
            ", ".join(_setting(name, after) for name, (_, after) in found.items()),
            stream.name,
        )


def _setting(name: str, value: str) -> str:
    return f"no {name}" if value == NOTHING else f"{name} {value}"


def _dedupe(policy: Policy) -> str:
    if not policy.dedupe_ms:
        return "no dedupe"
    return f"dedupe {_span(policy.dedupe_ms)} (up to {policy.dedupe_ids:,} ids per partition)"


def _retention(policy: Policy) -> str:
    said = [
        f"age {_span(policy.age_ms)}" if policy.age_ms else "",
        f"{policy.events:,} events" if policy.events else "",
        _size(policy.bytes) if policy.bytes else "",
        f"a ceiling of {policy.ceiling_events:,} events" if policy.ceiling_events else "",
        f"a ceiling of {_size(policy.ceiling_bytes)}" if policy.ceiling_bytes else "",
    ]
    if not any(said):
        return "no retention"
    forget = f"groups forgotten after {_span(policy.forget_ms)}" if policy.forget_ms else "groups never forgotten"
    return f"retention {', '.join(filter(None, said))}, " + (
        f"unread kept, {forget}" if policy.keep else "unread dropped"
    )


def _span(ms: int) -> str:
    unit = next(unit for unit, length in _SPANS_MS.items() if ms % length == 0)
    return f"{ms // _SPANS_MS[unit]}{unit}"


def _size(bytes_: int) -> str:
    if not bytes_:
        return NOTHING
    unit = next(unit for unit, length in _SIZES.items() if bytes_ % length == 0)
    return f"{bytes_ // _SIZES[unit]:,}{unit}"
