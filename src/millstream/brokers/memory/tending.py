"""Housekeeping of the memory broker: what a stream's policy lets go is removed, and what groups lose by that is counted.

All partitions are cut in one step: lists lose their beginnings in no time. Each may keep its share of the events and the
bytes that were asked for. What a group has before it, works on, or lets wait pins all that came later; dead letters and
what is parked are whole copies, and pin nothing.

A group in which nobody is seen is announced when half of the time is over after which it is forgotten, and the other half
begins then at the earliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from millstream.brokers.base import Tended
from millstream.brokers.shares import level

if TYPE_CHECKING:
    from millstream.brokers.memory.group import Group
    from millstream.brokers.memory.log import Log
    from millstream.brokers.memory.ordered import OrderedGroup
    from millstream.clock import Clock


def tend(log: Log, clock: Clock) -> Tended:
    """One round."""
    now_ms, policy = clock.now_ms(), log.policy
    published = log.ripen(now_ms)
    groups = list(log.groups.values())
    ends_ms = _ends_ms(log, groups, clock)
    forgotten = frozenset(name for name, at_ms in ends_ms.items() if at_ms <= now_ms)
    fading = {name: at_ms for name, at_ms in ends_ms.items() if name not in forgotten}
    pinning = [group for group in groups if policy.keep and group.name not in forgotten]
    may_go = _pinned(log, pinning, _may_go(log, now_ms))
    trimmed = sum([log.trim(partition, count) for partition, count in enumerate(may_go)])
    for group in groups:
        group.trimmed()
    lost = {group.name: count for group in groups if (count := group.newly_lost())}
    found = published, log.next_due_ms(), trimmed, lost, fading, forgotten
    return Tended(*found, log.fullness(), log.pinned_by)


def seen_ms(group: Group | OrderedGroup, clock: Clock) -> int:
    """When a member of a group lived last: now, if one does."""
    now_s = clock.monotonic()
    return clock.now_ms() - (0 if group.living(now_s) else _span_ms(group.seen_s, now_s))


def _ends_ms(log: Log, groups: Sequence[Group | OrderedGroup], clock: Clock) -> dict[str, int]:
    """When each group is forgotten that is announced and keeps events; which may be past."""
    policy, ends_ms = log.policy, {}
    forget_ms = policy.forget_ms if policy.keep and (policy.age_ms or policy.events or policy.bytes) else 0
    for group in groups:
        ends = _announce(group, forget_ms, clock)
        if ends is not None and any(count < log.end(partition) for partition, count in enumerate(group.settled())):
            ends_ms[group.name] = ends
    return ends_ms


def _announce(group: Group | OrderedGroup, forget_ms: int, clock: Clock) -> int | None:
    """Note that half of a group's time is over, if it is; when it is forgotten then."""
    seen = seen_ms(group, clock)
    if not forget_ms or 2 * (clock.now_ms() - seen) < forget_ms:
        group.announced_s = None
        return None
    # What was noted in an earlier silence does not count.
    if group.announced_s is None or 2 * _span_ms(group.seen_s, group.announced_s) < forget_ms:
        group.announced_s = clock.monotonic()
    return seen + max(forget_ms, _span_ms(group.seen_s, group.announced_s) + forget_ms // 2)


def _span_ms(begin_s: float, end_s: float) -> int:
    return int((end_s - begin_s) * 1000)


def _may_go(log: Log, now_ms: int) -> list[int]:
    """For each partition, how many of the events that there ever were the policy lets go."""
    policy, parts = log.policy, range(log.spec.partitions)
    may_go = log.find(now_ms - policy.age_ms) if policy.age_ms else list(log.gone)
    counts = [log.end(n) - log.gone[n] for n in parts]
    if 0 < policy.events < sum(counts):
        most = level(counts, policy.events)
        may_go = [max(may_go[n], log.end(n) - most) for n in parts]
    sizes = [log.size(n) for n in parts]
    if 0 < policy.bytes < sum(sizes):
        most_bytes = level(sizes, policy.bytes)
        may_go = [max(may_go[n], log.beyond(n, most_bytes)) for n in parts]
    return may_go


def _pinned(log: Log, groups: Sequence[Group | OrderedGroup], may_go: Sequence[int]) -> list[int]:
    """What may go without anything that a group needs; who keeps most of it is noted."""
    settled = {group.name: group.settled() for group in groups}
    kept = {
        name: sum(max(0, count - max(low, gone)) for count, low, gone in zip(may_go, lows, log.gone, strict=True))
        for name, lows in settled.items()
    }
    most = max(kept, key=lambda name: kept[name], default="")
    log.pinned_by = most if kept.get(most) else ""
    return [min(counts) for counts in zip(may_go, *settled.values(), strict=True)]
