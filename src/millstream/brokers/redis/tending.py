"""Housekeeping of a stream: what fell due is published, what may go is removed, what is gone is counted.

Any process does so, at any time. Each step of one partition is one script, which looks at the groups and removes in the same
moment, so several at once do no harm. Beforehand only that is found out which may be a little old: how many events the other
partitions have, how large events are, when somebody was last seen in a group, and what the dead letters need.

Mostly there is nothing to do, and that one write tells: what is due next, and how long each log is. One process does so for
all: it leaves with the stream when it looked last, and while that is fresh, the others ask for that alone. When it looks no
more, whoever comes next takes its place; what is known to be due is published in time all the same, since each process knows
it. Fifty idle workers with 256 partitions took 16 % of the server's core when each looked, and take 5 %.

A round costs the server about 0.1 ms a partition; so that many processes do not add up, who comes right after another tells
what that one has found, and only publishes what is due. A stream that asks for nothing has a round every few seconds, and
one when its log is shorter than it was: then somebody else has trimmed it.

Redis removes whole nodes of a log, of up to a hundred events: so many may stay beyond what was asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from hiredis import ReplyError
from msgspec import Struct
from msgspec.structs import replace

from millstream.brokers.base import Policy, Tended
from millstream.brokers.redis.appending import Known
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
PLAIN_S = 5.0  # how often a stream that asks for nothing has a round
FRESH_MS = 750  # so long after a look nobody else looks: more than what lies between two looks of one process
RENEW_MS = 450  # so long after a look it is time to say that one was there again: less than that
YIELD_MS = 100  # so much later than the one that looks do the others see to what is due
AT_ONCE = 8  # partitions in one write, or the server would do nothing else meanwhile
NODE_EVENTS = 100  # `stream-node-max-entries`
GROUP_FIELDS = ("entered:", "told:", "announced:")  # what housekeeping notes of a group
BLANK_BYTES = 4_736  # of a log with one small event: its node is made as large as it may become


class Part(NamedTuple):
    """A partition as it was at the beginning of a round."""

    events: int
    size_bytes: int
    first: str
    """The id of its first event."""
    entry_bytes: int
    """The size of its first and its last event, on average."""
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
    """Who looks at the stream; the others need not, while that is fresh."""
    looked_ms: int = 0
    due_ms: int | None = None
    """When the next event for later was due then."""
    at_ms: int = 0
    until_ms: int = 0
    plain: bool = False
    """The policy asked for nothing."""
    fading: Mapping[str, int] = {}
    forgotten: frozenset[str] = frozenset()
    fullness: float = 0.0
    pinned_by: str = ""


class Glance(NamedTuple):
    """What one write tells about a stream."""

    now_ms: int
    policy: Policy
    declared: bool
    found: Found
    due_ms: int | None
    """When the next event for later is due, as far as was asked."""
    lengths: Sequence[int] | None
    """How many events each partition has; None: that was not asked."""


class Tending:
    """The housekeeping of one process."""

    def __init__(self, broker: RedisBroker) -> None:
        self._broker = broker
        self._name = broker.clock.nonce()
        self._sources: dict[bytes, Sources] = {}
        self._lengths: dict[str, Sequence[int]] = {}

    async def tend(self, stream: str) -> Tended:
        """One round."""
        link = await self._broker.control()
        known = await self._broker.known(stream, link)
        before = self._lengths.pop(stream, None)  # None: it was somebody else who looked last
        glance = await self._glance(link, known, closely=before is not None)
        if self._is_seen_to(glance):
            return self._told(known, glance.found, Tended(due_ms=_later(glance.found.due_ms)))
        if glance.lengths is None:
            glance = await self._glance(link, known, closely=True)
        lengths = self._lengths[stream] = glance.lengths or ()
        todo = self._todo(glance, any(now < then for now, then in zip(lengths, before or (), strict=False)))
        published, due_ms, found, tended = 0, glance.due_ms, glance.found, Tended()
        if todo or (due_ms is not None and due_ms <= glance.now_ms):
            published, due_ms = await ripen(self._broker, known)
        if todo:
            tended, found = await self._kept(link, known, glance)
        await self._leave(link, known, glance, replace(found, due_ms=due_ms))
        return self._told(known, found, replace(tended, published=published, due_ms=due_ms))

    def _told(self, known: Known, found: Found, tended: Tended) -> Tended:
        known.pinned_by = found.pinned_by
        return replace(
            tended, **{name: getattr(found, name) for name in ("fading", "forgotten", "fullness", "pinned_by")}
        )

    async def _glance(self, link: Link, known: Known, *, closely: bool) -> Glance:
        keys, partitions = known.keys, range(known.spec.partitions if closely else 0)
        fields = "policy", "pinned_by", "partitions", "tended"
        asked: list[tuple[Any, ...]] = [("TIME",), ("HMGET", keys.stream_meta, *fields)]
        asked += [("ZRANGE", keys.later(p), 0, 0, "WITHSCORES") for p in partitions]
        asked += [("XLEN", keys.log(p)) for p in partitions]
        time, (policy, pinned_by, declared, left), *rest = await link.calls(asked)
        first, lengths = _good(link, rest[: len(partitions)]), rest[len(partitions) :]
        known.learn(policy, pinned_by, self._broker.clock.monotonic())
        due_ms = [int(float(found[1])) for found in first if found]
        return Glance(
            _ms(time),
            known.policy,
            bool(declared),
            _found(left),
            min(due_ms, default=None),
            [0 if isinstance(length, ReplyError) else length for length in lengths] if closely else None,
        )

    def _is_seen_to(self, glance: Glance) -> bool:
        """Somebody else looks at the stream, and has not left anything undone."""
        found, now_ms = glance.found, glance.now_ms
        if found.by == self._name or found.plain != _plain(glance.policy):
            return False
        until_ms = min(found.looked_ms + FRESH_MS, _later(found.due_ms) or now_ms + 1)
        return found.looked_ms <= now_ms < until_ms  # a clock may go back

    def _todo(self, glance: Glance, shrunk: bool) -> bool:
        found, plain = glance.found, _plain(glance.policy)
        if found.plain != plain or not found.at_ms <= glance.now_ms < found.until_ms:
            return True
        return shrunk if plain else found.by == self._name

    async def _kept(self, link: Link, known: Known, glance: Glance) -> tuple[Tended, Found]:
        begun = self._broker.clock.monotonic()
        tended, fullness = await self._round(link, known, glance.policy, glance.now_ms)
        plain = _plain(glance.policy)
        rest_s = PLAIN_S if plain else (self._broker.clock.monotonic() - begun) * (1 + REST)
        return tended, Found(
            at_ms=glance.now_ms,
            until_ms=glance.now_ms + int(rest_s * 1000),
            plain=plain,
            fading=tended.fading,
            forgotten=tended.forgotten,
            fullness=fullness,
            pinned_by=tended.pinned_by,
        )

    async def _leave(self, link: Link, known: Known, glance: Glance, found: Found) -> None:
        """Tell the others what was found, and that this process looks; it need not say the same again and again."""
        if found == glance.found and found.by == self._name and glance.now_ms - found.looked_ms < RENEW_MS:
            return
        if glance.declared:  # else it was discarded meanwhile
            text = msgspec.json.encode(replace(found, by=self._name, looked_ms=glance.now_ms))
            told = "pinned_by", found.pinned_by, "tended", text
            await link.calls([("HSET", known.keys.stream_meta, *told)])  # may be refused at maxmemory: all is done

    async def _round(self, link: Link, known: Known, policy: Policy, now_ms: int) -> tuple[Tended, float]:
        parts: dict[int, Part] = {}
        for some in _batches(range(known.spec.partitions)):
            parts |= await _look(link, known, some)
        await _clear(link, known, parts)
        seen = await self._seen(link, known, parts, now_ms) if policy.keep else {}
        stay = {partition: _may_stay(policy, parts, partition) for partition in parts}
        full_at = _full_at(policy, parts.values())
        steps: dict[int, list[Step]] = {}
        for some in _batches(list(parts)):
            steps |= await self._trim(link, known, policy, {p: parts[p] for p in some}, stay, full_at, seen)
        left = {partition: some[-1].events for partition, some in steps.items() if some}
        return _tended([step for some in steps.values() for step in some]), _fullness(policy, parts, left)

    async def _trim(
        self,
        link: Link,
        known: Known,
        policy: Policy,
        parts: dict[int, Part],
        stay: Mapping[int, int | str],
        full_at: int | str,
        seen: Mapping[str, int],
    ) -> dict[int, list[Step]]:
        steps: dict[int, list[Step]] = {partition: [] for partition in parts}
        todo = list(parts)
        for _ in range(MAX_STEPS):
            calls = [await self._call(link, known, policy, p, parts[p], stay[p], full_at, seen) for p in todo]
            answers = dict(zip(todo, _good(link, await link.run_each(scripts["trim"], calls)), strict=True))
            again = [partition for partition, (state, *_) in answers.items() if state == b"AGAIN"]
            for partition, (state, *answer) in answers.items():
                if state == b"OK":
                    steps[partition].append(_step(answer))
            anew = await _look(link, known, again) if again else {}
            parts |= anew
            todo = [p for p in todo if p in anew or (answers[p][0] == b"OK" and steps[p][-1].removed)]
            if not todo:
                break
        return steps

    async def _call(
        self,
        link: Link,
        known: Known,
        policy: Policy,
        partition: int,
        part: Part,
        stay: int | str,
        full_at: int | str,
        seen: Mapping[str, int],
    ) -> tuple[list[bytes], list[Any]]:
        # Keys and arguments of `trim.lua`.
        keys = known.keys
        names, words = [keys.log(partition), keys.meta(partition)], list[Any]()
        for group in part.groups:
            dead = keys.dead(partition, group)
            names += [keys.due(partition, group), keys.note(partition, group), dead]
            names += [keys.stats(partition, group), keys.lease(partition, group)]
            words += [group, seen.get(group, 0), *await self._needs(link, policy, part, group, dead)]
        most = max(NODE_EVENTS, min(MAX_REMOVED, MAX_REMOVED_BYTES // part.each_bytes))
        bodies = max(1, min(NODE_EVENTS, MAX_BODIES_BYTES // part.each_bytes))
        forget_ms = policy.forget_ms if _keeps(policy) else 0
        limits = policy.age_ms, stay, int(policy.keep), forget_ms, most, bodies
        return names, [*limits, full_at, *words]

    async def _needs(self, link: Link, policy: Policy, part: Part, group: str, dead: bytes) -> tuple[str, str]:
        # Of the dead letters of a group the last one looked at, and the first event that one of them needs.
        if not _keeps(policy) or part.ordered(group):
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


async def _look(link: Link, known: Known, partitions: Sequence[int]) -> dict[int, Part]:
    """Those of these partitions that have a log."""
    asked: list[tuple[Any, ...]] = []
    for partition in partitions:
        log = known.keys.log(partition)
        asked += [("XINFO", "STREAM", log), ("XINFO", "GROUPS", log)]
        asked += [("HGETALL", known.keys.meta(partition)), ("MEMORY", "USAGE", log)]
    replies = await link.calls(asked)
    parts: dict[int, Part] = {}
    for index, partition in enumerate(partitions):
        info, groups, fields, size = replies[4 * index : 4 * index + 4]
        if isinstance(fields, ReplyError):
            raise link.failure(fields, "tend")
        if not isinstance(info, ReplyError) and not isinstance(groups, ReplyError):
            parts[partition] = _part(info, groups, fields, 0 if isinstance(size, ReplyError) else size or 0)
    return parts


def _part(info: Sequence[Any], groups: Sequence[Any], fields: Sequence[bytes], size_bytes: int) -> Part:
    stream = dict(zip(info[::2], info[1::2], strict=True))
    meta = {name.decode(): value for name, value in zip(fields[::2], fields[1::2], strict=True)}
    there = {group[1].decode() for group in groups}
    vanished = {name.partition(":")[2] for name in meta if name.startswith("mode:")} - there
    first = stream[b"first-entry"][0].decode() if stream[b"first-entry"] else ""
    ends = [entry[1] for entry in (stream[b"first-entry"], stream[b"last-entry"]) if entry]
    entry_bytes = sum(len(word) for fields in ends for word in fields) // max(1, len(ends))
    return Part(stream[b"length"], size_bytes, first, entry_bytes, sorted(there | vanished), meta)


async def _clear(link: Link, known: Known, parts: Mapping[int, Part]) -> None:
    # What was remembered of groups of other clients that are no more: the next one of this name is another.
    keys, forgotten = known.keys, list[tuple[Any, ...]]()
    for partition, part in parts.items():
        named = {name.partition(":")[2] for name in part.meta if name.startswith(GROUP_FIELDS)}
        for group in named.difference(part.groups):
            forgotten.append(("HDEL", keys.meta(partition), *(name + group for name in GROUP_FIELDS)))
            forgotten.append(("DEL", keys.stats(partition, group)))
    if forgotten:
        await link.calls(forgotten)


def _batches(partitions: Sequence[int]) -> list[Sequence[int]]:
    return [partitions[first : first + AT_ONCE] for first in range(0, len(partitions), AT_ONCE)]


def _later(due_ms: int | None) -> int | None:
    """When those who do not look see to what is due: the one that does is faster, if it lives."""
    return None if due_ms is None else due_ms + YIELD_MS


def _plain(policy: Policy) -> bool:
    return not (policy.age_ms or policy.events or policy.bytes or policy.ceiling_events or policy.ceiling_bytes)


def _keeps(policy: Policy) -> bool:
    """True when groups keep what the policy lets go."""
    return policy.keep and bool(policy.age_ms or policy.events or policy.bytes)


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


def _full_at(policy: Policy, parts: Collection[Part]) -> int | str:
    """With how many events the stream has reached a ceiling that is a size; empty without one."""
    events, size_bytes = sum(part.events for part in parts), sum(part.size_bytes for part in parts)
    if not policy.ceiling_bytes or not size_bytes:
        return ""
    # An almost empty log says little of what an event weighs: with the node counted in, one alone seems ten times heavier.
    entry_bytes = sum(part.entry_bytes * part.events for part in parts) // max(1, events)
    each_bytes = max(1, entry_bytes, (size_bytes - BLANK_BYTES * len(parts)) // max(1, events))
    return max(1, events + (policy.ceiling_bytes - size_bytes) // each_bytes)


def _fullness(policy: Policy, parts: Mapping[int, Part], left: Mapping[int, int]) -> float:
    """How near the ceiling a stream is, with so many events left in its partitions."""
    by_events = sum(left.values()) / policy.ceiling_events if policy.ceiling_events else 0.0
    size_bytes = sum(parts[partition].each_bytes * events for partition, events in left.items())
    return max(by_events, size_bytes / policy.ceiling_bytes if policy.ceiling_bytes else 0.0)


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
        for group, at_ms in step.fading.items():  # where a partition came later, its events stay longer
            fading[group] = min(at_ms, fading.get(group, at_ms))
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
