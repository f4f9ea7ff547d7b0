"""Housekeeping of a stream: what fell due is published, what may go is removed, what is gone is counted.

Any process does so, at any time. Each step of one partition is one script, which looks at the groups and removes in the same
moment, so several at once do no harm. Beforehand only that is found out which may be a little old: how many events the other
partitions have, how large events are, when somebody was last seen in a group, and what the dead letters need. A round costs
the server about 0.1 ms a partition; so that many processes do not add up, who comes right after another tells what that
one has found, and only publishes what is due.

Redis removes whole nodes of a log, of up to a hundred events: so many may stay beyond what was asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from hiredis import ReplyError
from msgspec import Struct
from msgspec.structs import replace

from millstream.brokers.base import Policy, Tended
from millstream.brokers.redis.appending import Known, read_policy
from millstream.brokers.redis.joining import SILENCE_MS
from millstream.brokers.redis.later import ripen
from millstream.brokers.redis.link import Link
from millstream.brokers.redis.scripts import scripts
from millstream.brokers.redis.sources import Sources
from millstream.brokers.shares import level
from millstream.brokers.window import place

if TYPE_CHECKING:
    from millstream.brokers.redis.broker import RedisBroker

MAX_STEPS = 20  # of a partition in one round, 200,000 small events; the next round goes on
MAX_REMOVED = 10_000  # events in one step: about 1 ms of the server's time
MAX_REMOVED_BYTES = 67_108_864  # to free large ones takes longer
MAX_BODIES_BYTES = 1_048_576  # of events that a step looks at to tell whether they are needed
REST = 10  # times as long as a round took nobody else begins one: all processes together cost as much as one
NODE_EVENTS = 100  # `stream-node-max-entries`


class Part(NamedTuple):
    """A partition as it was at the beginning of a round."""

    events: int
    size_bytes: int
    first: str
    """The id of its first event."""
    groups: Sequence[str]
    meta: Mapping[str, bytes]

    @property
    def each_bytes(self) -> int:
        """The size of an event, about."""
        return max(1, self.size_bytes // max(1, self.events))

    def ordered(self, group: str) -> bool:
        """True of a group that consumes in the order of keys."""
        return self.meta.get(f"mode:{group}") == b"log"

    def seen_ms(self, group: str) -> int:
        """When a member of a group was last seen here, or it was made; 0 where nobody was."""
        return max(int(self.meta.get(f"{name}:{group}", 0)) for name in ("seen", "entered"))


class Step(NamedTuple):
    """What `trim.lua` answered."""

    removed: int
    events: int
    pin: str
    pinned_by: str
    lost: Mapping[str, int]
    fading: Mapping[str, int]
    forgotten: Sequence[str]


class Found(Struct, frozen=True):
    """What a round has found, kept with the stream: others need not look again at once."""

    by: str = ""
    until_ms: int = 0
    fading: Mapping[str, int] = {}
    forgotten: frozenset[str] = frozenset()
    fullness: float = 0.0
    pinned_by: str = ""


class Tending:
    """The housekeeping of one process."""

    def __init__(self, broker: RedisBroker) -> None:
        self._broker = broker
        self._name = broker.clock.nonce()
        self._sources: dict[bytes, Sources] = {}

    async def tend(self, stream: str) -> Tended:
        """One round."""
        link = await self._broker.control()
        known = await self._broker.known(stream, link)
        published, due_ms = await ripen(self._broker, known)
        meta = known.keys.stream_meta
        time, (text, left) = _good(link, await link.calls([("TIME",), ("HMGET", meta, "policy", "tended")]))
        now_ms, begun = _ms(time), self._broker.clock.monotonic()
        found = _found(left)
        if found.by in ("", self._name) or found.until_ms <= now_ms:
            tended, fullness = await self._round(link, known, read_policy(stream, text), now_ms)
            until_ms = now_ms + int((self._broker.clock.monotonic() - begun) * 1000 * (1 + REST))
            found = Found(self._name, until_ms, tended.fading, tended.forgotten, fullness, tended.pinned_by)
            told = "pinned_by", found.pinned_by, "tended", msgspec.json.encode(found)
            await link.calls([("HSET", meta, *told)])  # may be refused at maxmemory: what had to be done is done
        else:
            tended = Tended()
        known.pinned_by = found.pinned_by
        state = {name: getattr(found, name) for name in ("fading", "forgotten", "fullness", "pinned_by")}
        return replace(tended, published=published, due_ms=due_ms, **state)

    async def _round(self, link: Link, known: Known, policy: Policy, now_ms: int) -> tuple[Tended, float]:
        partitions = range(known.spec.partitions)
        parts = {partition: part for partition in partitions if (part := await _look(link, known, partition))}
        for partition, part in parts.items():
            await _clear(link, known, partition, part)
        seen = await self._seen(link, known, parts, now_ms) if policy.keep else {}
        steps = {partition: await self._trim(link, known, policy, parts, partition, seen) for partition in tuple(parts)}
        full = [
            _fullness(policy, known, parts[partition], some[-1].events) for partition, some in steps.items() if some
        ]
        return _tended([step for some in steps.values() for step in some]), max(full, default=0.0)

    async def _trim(
        self,
        link: Link,
        known: Known,
        policy: Policy,
        parts: dict[int, Part],
        partition: int,
        seen: Mapping[str, int],
    ) -> list[Step]:
        stay, steps = _may_stay(policy, parts, partition), list[Step]()
        keys = known.keys
        for _ in range(MAX_STEPS):
            part = parts[partition]
            names = [keys.log(partition), keys.meta(partition)]
            words: list[Any] = []
            for group in part.groups:
                dead = keys.dead(partition, group)
                names += [keys.due(partition, group), keys.note(partition, group), dead]
                names += [keys.stats(partition, group), keys.lease(partition, group)]
                words += [group, seen.get(group, 0), *await self._needs(link, policy, part, group, dead)]
            most = max(NODE_EVENTS, min(MAX_REMOVED, MAX_REMOVED_BYTES // part.each_bytes))
            bodies = max(1, min(NODE_EVENTS, MAX_BODIES_BYTES // part.each_bytes))
            limits = policy.age_ms, stay, int(policy.keep), policy.forget_ms, most, bodies
            args = *limits, _full_at(policy, known, part), *words
            state, *answer = await link.run(scripts["trim"], names, args)
            if state == b"OK":
                steps.append(_step(answer))
            if state == b"NONE" or (steps and not steps[-1].removed):
                break
            if state == b"AGAIN" and (anew := await _look(link, known, partition)):
                parts[partition] = anew
        return steps

    async def _needs(self, link: Link, policy: Policy, part: Part, group: str, dead: bytes) -> tuple[str, str]:
        # Of the dead letters of a group the last one looked at, and the first event that one of them needs.
        if not (policy.keep and (policy.age_ms or policy.events or policy.bytes)) or part.ordered(group):
            return "", ""
        return await self._sources.setdefault(dead, Sources(dead)).look(link, part.first)

    async def _seen(self, link: Link, known: Known, parts: Mapping[int, Part], now_ms: int) -> dict[str, int]:
        # When a member of each group was last seen; later than now, while one lives.
        groups = sorted({group for part in parts.values() for group in part.groups})
        members = (
            _good(link, await link.calls([("ZCARD", known.keys.live(group)) for group in groups])) if groups else []
        )
        lease_ms = int(self._broker.settings.lease_s * 1000)
        seen: dict[str, int] = {}
        for group, count in zip(groups, members, strict=True):
            seen[group] = max((part.seen_ms(group) for part in parts.values()), default=0)
            if count and now_ms - seen[group] <= lease_ms + SILENCE_MS:
                seen[group] = now_ms + lease_ms
        return seen


async def _look(link: Link, known: Known, partition: int) -> Part | None:
    log = known.keys.log(partition)
    asked = (
        ("XINFO", "STREAM", log),
        ("XINFO", "GROUPS", log),
        ("HGETALL", known.keys.meta(partition)),
        ("MEMORY", "USAGE", log),
    )
    info, groups, fields, size = await link.calls(asked)
    if isinstance(fields, ReplyError):
        raise link.failure(fields, "tend")
    if isinstance(info, ReplyError) or isinstance(groups, ReplyError):  # no such log yet
        return None
    stream = dict(zip(info[::2], info[1::2], strict=True))
    meta = {name.decode(): value for name, value in zip(fields[::2], fields[1::2], strict=True)}
    there = {group[1].decode() for group in groups}
    vanished = {name.partition(":")[2] for name in meta if name.startswith("mode:")} - there
    first = stream[b"first-entry"][0].decode() if stream[b"first-entry"] else ""
    weight = 0 if isinstance(size, ReplyError) else size or 0
    return Part(stream[b"length"], weight, first, sorted(there | vanished), meta)


async def _clear(link: Link, known: Known, partition: int, part: Part) -> None:
    # What was remembered of groups of other clients that are no more: the next one of this name is another.
    keys = known.keys
    named = {name.partition(":")[2] for name in part.meta if name.startswith(("entered:", "told:"))}
    for group in named.difference(part.groups):
        forgotten = "HDEL", keys.meta(partition), f"entered:{group}", f"told:{group}"
        await link.calls([forgotten, ("DEL", keys.stats(partition, group))])


def _may_stay(policy: Policy, parts: Mapping[int, Part], partition: int) -> int | str:
    """How many events of the partition may stay; empty for all of them."""
    part = parts[partition]
    stay = part.events
    if policy.events:
        stay = min(stay, level([other.events for other in parts.values()], policy.events))
    if policy.bytes and part.size_bytes:
        most_bytes = level([other.size_bytes for other in parts.values()], policy.bytes)
        stay = min(stay, part.events * most_bytes // part.size_bytes)
    return stay if stay < part.events else ""


def _full_at(policy: Policy, known: Known, part: Part) -> int | str:
    """With how many events the partition has reached its share of a ceiling that is a size; empty without one."""
    if not policy.ceiling_bytes or not part.size_bytes:
        return ""
    return max(1, -(-policy.ceiling_bytes // known.spec.partitions) * part.events // part.size_bytes)


def _fullness(policy: Policy, known: Known, part: Part, events: int) -> float:
    ceiling, count = policy.ceiling_events, known.spec.partitions
    by_events = events / -(-ceiling // count) if ceiling else 0.0
    by_bytes = events * part.each_bytes / -(-policy.ceiling_bytes // count) if policy.ceiling_bytes else 0.0
    return max(by_events, by_bytes)


def _step(answer: Sequence[Any]) -> Step:
    removed, events, pin, pinned_by, lost, fading, forgotten = answer
    return Step(
        removed,
        events,
        pin.decode(),
        pinned_by.decode(),
        {group.decode(): count for group, count in zip(lost[::2], lost[1::2], strict=True)},
        {group.decode(): int(at_ms) for group, at_ms in zip(fading[::2], fading[1::2], strict=True)},
        [group.decode() for group in forgotten],
    )


def _tended(steps: Sequence[Step]) -> Tended:
    lost: Counter[str] = Counter()
    fading: dict[str, int] = {}
    for step in steps:
        lost.update(step.lost)
        fading |= step.fading
    pinned = min((step for step in steps if step.pin), key=lambda step: place(step.pin), default=None)
    return Tended(
        trimmed=sum(step.removed for step in steps),
        lost=dict(lost),
        fading=fading,
        forgotten=frozenset(group for step in steps for group in step.forgotten),
        pinned_by=pinned.pinned_by if pinned else "",
    )


def _found(text: bytes | None) -> Found:
    try:
        return msgspec.json.decode(text, type=Found) if text else Found()
    except msgspec.DecodeError:  # of another version: look for ourselves
        return Found()


def _good(link: Link, replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, ReplyError):
            raise link.failure(reply, "tend")
    return replies


def _ms(time: Sequence[bytes]) -> int:
    return int(time[0]) * 1000 + int(time[1]) // 1000
