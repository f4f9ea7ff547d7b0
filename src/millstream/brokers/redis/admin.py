"""What people and monitoring look through on a Redis server; what they do to keys and whole groups lies in `people.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from millstream.brokers.base import (
    DeadLetter,
    GroupInfo,
    ParkedKey,
    PendingInfo,
    Policy,
    Position,
    Record,
    Start,
    Stored,
    StreamInfo,
)
from millstream.brokers.dictionaries import refused
from millstream.brokers.redis.appending import read_policy
from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.link import Link, ReplyError
from millstream.brokers.redis.members import WAITING, Place
from millstream.brokers.redis.people import People
from millstream.brokers.redis.scripts import scripts
from millstream.errors import BadStream, BrokerDown, BrokerRefused, WireError
from millstream.units import MAX_DICTIONARIES
from millstream.wire import compression, entry

if TYPE_CHECKING:
    from millstream.brokers.redis.broker import RedisBroker

MAX_TURNS = 100  # groups come while a stream is discarded
MAX_COUNTED = 10_000  # events that are counted one by one where the server lost count
_PAGE = 1_000
_OURS = ("reason", "error", "attempts", "position", "group", "died")  # of a dead letter, before the entry's own fields

_COUNTS = ("retried", "replayed", "dropped", "lost", "done", "given")

Fields = dict[str, Any]


class RedisAdmin:
    """See `brokers.base.Admin`."""

    def __init__(self, broker: RedisBroker) -> None:
        self._broker = broker
        self._people = People(broker)

    async def streams(self) -> list[StreamInfo]:
        """All declared streams, by name."""
        link = await self._broker.control()
        names = await link.call("SMEMBERS", Keys(self._broker.target.namespace, "", 1).streams)
        return [await self._stream(link, name.decode()) for name in sorted(names)]

    async def groups(self, stream: str) -> list[GroupInfo]:
        """All groups of a stream, by name: those of other clients too, their owner is empty."""
        parts = await self._parts(stream)
        return [await self._group(stream, group, parts[group]) for group in sorted(parts)]

    async def pending(self, stream: str, group: str, limit: int) -> list[PendingInfo]:
        """The oldest pending events of each partition."""
        keys, place = await self._keys(stream), await self._people.place(stream, group)
        if keys is None or place is None:
            return []
        if b"log" in await self._people.modes(place):
            return await self._people.pending(place, limit)
        link = await self._broker.control()
        replies = await link.calls([("XPENDING", log, group, "-", "+", limit) for log in keys.logs])
        found: list[PendingInfo] = []
        for partition, reply in enumerate(replies):
            rows = _answer(link, reply, ())
            waiting = [id_ for id_, consumer, _, _ in rows if consumer == WAITING]
            due = await link.call("ZMSCORE", keys.due(partition, group), *waiting) if waiting else []
            due_ms = dict(zip(waiting, due, strict=True))
            for id_, consumer, _, count in rows:
                name = "" if consumer == WAITING else consumer.decode()
                when = int(float(due_ms.get(id_) or 0)) if not name else None
                found.append(PendingInfo(Position(partition, id_.decode()), name, count, when))
        return found

    async def dead(self, stream: str, group: str, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Dead letters by partition, oldest first, behind the reference `after`."""
        keys = await self._keys(stream)
        if keys is None:
            return []
        link = await self._broker.control()
        begin = Position.parse(after) if after else None
        letters: list[DeadLetter] = []
        for partition in range(begin.partition if begin else 0, len(keys.logs)):
            start = f"({begin.offset}" if begin and begin.partition == partition else "-"
            count = limit - len(letters)
            if count <= 0:
                break
            found = await link.call("XRANGE", keys.dead(partition, group), start, "+", "COUNT", count)
            letters += [_letter(stream, group, partition, id_.decode(), fields) for id_, fields in found]
        return letters

    async def replay(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Give dead letters back to their own group, attempts counted anew; False where the letter or its event is gone."""
        link = await self._broker.control()
        done: list[bool] = []
        for letter, keys, ref in await self._found(letters):
            at, group = letter.stored.position, letter.group
            if keys is None or ref.partition != at.partition:
                done.append(False)
                continue
            p = at.partition
            if await link.call("HGET", keys.meta(p), f"mode:{group}") == b"log":
                place = await self._people.place(letter.stream, group)
                done.append(place is not None and await self._people.replay(place, ref, letter.stored))
                continue
            where = keys.log(p), keys.due(p, group), keys.dead(p, group), keys.stats(p, group), keys.note(p, group)
            done.append(await link.run(scripts["replay"], where, (group, ref.offset, at.offset)) == 1)
        return done

    async def give(self, stream: str, group: str, events: Sequence[Stored]) -> int:
        """Let a group handle events once more, those that it has settled; how many."""
        place = await self._people.place(stream, group)
        if place is None or group not in await self._parts(stream):
            raise BrokerRefused(f"stream {stream!r} on {self._broker.url} has no group {group!r}")
        return await self._people.give(place, events)

    async def drop(self, letters: Sequence[DeadLetter]) -> list[bool]:
        """Discard dead letters for ever; False where the letter is gone."""
        link = await self._broker.control()
        done: list[bool] = []
        for letter, keys, ref in await self._found(letters):
            if keys is None:
                done.append(False)
                continue
            where = keys.dead(ref.partition, letter.group), keys.stats(ref.partition, letter.group)
            done.append(await link.run(scripts["drop"], where, (ref.offset,)) == 1)
        return done

    async def adopt(self, stream: str, group: str, owner: str) -> None:
        """Make another app the owner of a group; it keeps its place. Members of the former owner stay until they leave."""
        await self._info(stream, group)
        link, keys = await self._broker.control(), self._broker.keys(stream)
        seconds, micros = await link.call("TIME")
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        for partition in range(len(keys.logs)):
            # The new owner is not here yet: what was known of the former one is no reason to trim the group's events away.
            fields = f"owner:{group}", owner, f"entered:{group}", now_ms
            await link.call("HSET", keys.meta(partition), *fields)

    async def keys(self, stream: str, group: str, limit: int = 100) -> list[ParkedKey]:
        """The keys that wait, those that were parked first first."""
        return await self._people.keys(stream, group, limit)

    async def parked(self, key: ParkedKey, limit: int = 100) -> list[Stored]:
        """The events that wait of a key, in order."""
        return await self._people.parked(key, limit)

    async def release_keys(self, keys: Sequence[ParkedKey]) -> list[bool]:
        """Let keys be tried at once, attempts counted anew; False where nothing is parked any more."""
        return await self._people.release_keys(keys)

    async def drop_keys(self, keys: Sequence[ParkedKey]) -> list[int]:
        """Discard all that is parked of these keys, for ever; how many events each."""
        return await self._people.drop_keys(keys)

    async def seek(self, stream: str, group: str, start: Start, *, live: bool = False) -> None:
        """Move a group to another place. Of a group without order, all partitions move in one step."""
        place = await self._at_rest(stream, group, live=live)
        await self._people.seek(place, start, await self._counted(stream, group))

    async def forget(self, stream: str, group: str) -> None:
        """Delete a group with all that it has, in one step."""
        await self._people.forget(await self._at_rest(stream, group))

    async def apply(self, stream: str, policy: Policy) -> None:
        """Change what holds for a stream. Publishers learn it within seconds, housekeeping with its next round."""
        link = await self._broker.control()
        meta = (await self._broker.known(stream, link)).keys.stream_meta
        if not await link.call("HEXISTS", meta, "partitions"):
            raise BrokerRefused(f"stream {stream!r} is not declared on {self._broker.url} any more")
        await link.call("HSET", meta, "policy", msgspec.json.encode(policy))

    async def train(self, stream: str, number: int, content: bytes = b"") -> None:
        """Store a dictionary, and have publishers use it from now on."""
        compression.check_size(content)
        link = await self._broker.control()
        keys = (await self._broker.known(stream, link)).keys
        answer = b"AGAIN"
        while answer == b"AGAIN":  # each time somebody else has changed the policy
            partitions, text = await link.call("HMGET", keys.stream_meta, "partitions", "policy")
            if partitions is None:
                raise BrokerRefused(f"stream {stream!r} is not declared on {self._broker.url} any more")
            policy = msgspec.structs.replace(read_policy(stream, text), dictionary=number)
            words = number, content, MAX_DICTIONARIES, text or b"", msgspec.json.encode(policy)
            answer = await link.run(scripts["train"], (keys.dictionaries, keys.stream_meta), words)
        if answer != b"OK":
            raise refused(stream, number, answer.decode())

    async def discard(self, stream: str) -> None:
        """Delete a stream with all that it has: its groups one by one, then all the rest in one step."""
        link = await self._broker.control()
        keys = (await self._broker.known(stream, link)).keys
        for info in await self.groups(stream):
            await self._at_rest(stream, info.group)
        for _ in range(MAX_TURNS):
            for group in await self._remembered(link, keys):
                place = await self._people.place(stream, group)
                assert place is not None
                await self._people.forget(place)
            own = keys.streams, keys.stream_meta, keys.slots, keys.dictionaries
            parts = [key for partition in range(len(keys.logs)) for key in keys.store(partition)]
            if await link.run(scripts["erase"], (*own, *parts), (stream,)) == b"OK":
                return self._broker.discarded(stream)
        raise BrokerDown(f"groups of stream {stream!r} are made all the time: stop what uses it")

    async def slots(self, stream: str) -> Mapping[str, int]:
        """The schedules that have published to a stream, and the last slot of each."""
        keys, link = await self._keys(stream), await self._broker.control()
        found = await link.call("HGETALL", keys.slots) if keys is not None else []
        return {name.decode(): int(at_ms) for name, at_ms in zip(found[::2], found[1::2], strict=True)}

    async def _remembered(self, link: Link, keys: Keys) -> set[str]:
        # All groups: those at the logs, and those that vanished from there.
        names: set[str] = set()
        partitions = range(len(keys.logs))
        replies = await link.calls([("HKEYS", keys.meta(partition)) for partition in partitions])
        for reply in replies:
            fields = [field.decode().partition(":") for field in _answer(link, reply, ())]
            names |= {group for name, _, group in fields if name == "mode"}
        for reply in await link.calls([("XINFO", "GROUPS", log) for log in keys.logs]):
            names |= {_named(info)["name"].decode() for info in _answer(link, reply, ())}
        return names

    async def _info(self, stream: str, group: str) -> GroupInfo:
        for info in await self.groups(stream):
            if info.group == group:
                return info
        raise BrokerRefused(f"stream {stream!r} on {self._broker.url} has no group {group!r}")

    async def _at_rest(self, stream: str, group: str, *, live: bool = False) -> Place:
        info = await self._info(stream, group)
        place = await self._people.place(stream, group)
        assert place is not None
        if info.consumers and not live:
            raise BrokerRefused(f"group {group!r} of stream {stream!r} has {info.consumers} members: stop them")
        return place

    async def _keys(self, stream: str) -> Keys | None:
        try:
            await self._broker.spec(stream)
        except BadStream:
            return None
        return self._broker.keys(stream)

    async def _stream(self, link: Link, stream: str) -> StreamInfo:
        spec, keys = await self._broker.spec(stream), self._broker.keys(stream)
        logs, partitions = keys.logs, range(spec.partitions)
        replies = await link.calls([("XINFO", "STREAM", log) for log in logs])
        infos = [_named(info) for reply in replies if (info := _answer(link, reply, None)) is not None]
        sizes = [_answer(link, reply, None) for reply in await link.calls([("MEMORY", "USAGE", log) for log in logs])]
        asked = [("HMGET", keys.meta(partition), "repeats", "trimmed") for partition in partitions]
        counts = [_answer(link, reply, None) for reply in await link.calls(asked)]
        later = [_answer(link, reply, 0) for reply in await link.calls([("ZCARD", keys.later(p)) for p in partitions])]
        first = [_ms(info["first-entry"][0]) for info in infos if info.get("first-entry")]
        last = [_ms(info["last-entry"][0]) for info in infos if info.get("last-entry")]
        return StreamInfo(
            spec,
            events=sum(info["length"] for info in infos),
            added=_sum(info.get("entries-added") for info in infos),
            bytes=sum(size or 0 for size in sizes),
            first_ms=min(first, default=None),
            last_ms=max(last, default=None),
            policy=read_policy(stream, await link.call("HGET", keys.stream_meta, "policy")),
            delayed=sum(later),
            repeats=sum(int(repeats or 0) for repeats, _ in counts),
            trimmed=sum(int(trimmed or 0) for _, trimmed in counts),
        )

    async def _parts(self, stream: str) -> dict[str, dict[int, Fields]]:
        # What `XINFO GROUPS` says, by group and partition.
        keys = await self._keys(stream)
        parts: dict[str, dict[int, Fields]] = {}
        if keys is None:
            return parts
        link = await self._broker.control()
        replies = await link.calls([("XINFO", "GROUPS", log) for log in keys.logs])
        for partition, reply in enumerate(replies):
            for info in _answer(link, reply, ()):
                fields = _named(info)
                parts.setdefault(fields["name"].decode(), {})[partition] = fields
        return parts

    async def _group(self, stream: str, group: str, parts: Mapping[int, Fields]) -> GroupInfo:
        keys, link = self._broker.keys(stream), await self._broker.control()
        found = [await self._part(link, keys, group, partition, fields) for partition, fields in parts.items()]
        lags = [await self._lag(link, keys.log(partition), fields) for partition, fields in parts.items()]
        return GroupInfo(
            stream,
            group,
            next((part.owner for part in found if part.owner), ""),
            await self._consumers(link, keys, group),
            _sum(lags),
            sum(part.pending for part in found),
            sum(part.scheduled for part in found),
            sum(part.dead for part in found),
            _sum(part.done for part in found),
            retried=sum(part.counts["retried"] for part in found),
            replayed=sum(part.counts["replayed"] for part in found),
            dropped=sum(part.counts["dropped"] for part in found),
            lost=sum(part.counts["lost"] for part in found),
            seen_ms=max(part.seen_ms for part in found) or None,
        )

    async def _part(self, link: Link, keys: Keys, group: str, partition: int, fields: Fields) -> _Part:
        asked: list[tuple[Any, ...]] = [
            ("ZCARD", keys.due(partition, group)),
            ("XLEN", keys.dead(partition, group)),
            ("HMGET", keys.stats(partition, group), *_COUNTS),
            (
                "HMGET",
                keys.meta(partition),
                *(f"{name}:{group}" for name in ("owner", "start", "mode", "seen", "entered")),
            ),
            ("HMGET", keys.lease(partition, group), "done", "retried"),
            ("HGET", keys.parkinfo(partition, group), "#n"),
        ]
        replies = [_answer(link, reply, None) for reply in await link.calls(asked)]
        waiting, dead, stats, (owner, start, mode, *moments), (handled, retried), parked = replies
        counts = dict(zip(_COUNTS, (int(value or 0) for value in stats), strict=True))
        given_up = dead + counts["dropped"] + counts["lost"]
        pending, done = fields["pending"], _done(fields, start, given_up - counts["given"], counts["done"])
        if mode == b"log":
            pending = waiting = int(parked or 0)
            done = int(handled or 0)
        counts["retried"] += int(retried or 0)
        seen_ms = (
            max(int(moment or 0) for moment in moments)
            if owner
            else await self._active_ms(link, keys.log(partition), group)
        )
        return _Part((owner or b"").decode(), pending, waiting, dead, done, given_up, counts, seen_ms)

    async def _active_ms(self, link: Link, log: bytes, group: str) -> int:
        # When a consumer of another client last did something.
        time, consumers = (
            _answer(link, reply, ()) for reply in await link.calls([("TIME",), ("XINFO", "CONSUMERS", log, group)])
        )
        idle_ms = min((_named(consumer)["idle"] for consumer in consumers), default=None)
        return 0 if idle_ms is None else int(time[0]) * 1000 + int(time[1]) // 1000 - idle_ms

    async def _counted(self, stream: str, group: str) -> list[tuple[int | None, int]]:
        link, keys = await self._broker.control(), self._broker.keys(stream)
        fields = (await self._parts(stream)).get(group, {})
        unknown: Fields = {"pending": 0, "last-delivered-id": b""}
        parts = [await self._part(link, keys, group, p, fields.get(p, unknown)) for p in range(len(keys.logs))]
        return [(part.done, part.given_up) for part in parts]

    async def _lag(self, link: Link, log: bytes, fields: Fields) -> int | None:
        if "lag" not in fields or fields["lag"] is not None:
            return fields.get("lag")
        start, counted = b"(" + fields["last-delivered-id"], 0
        while counted < MAX_COUNTED:
            page = await link.call("XRANGE", log, start, "+", "COUNT", _PAGE)
            counted += len(page)
            if len(page) < _PAGE:
                return counted
            start = b"(" + page[-1][0]
        return None

    async def _consumers(self, link: Link, keys: Keys, group: str) -> int:
        # A beat is a tick, not a time, so one look cannot tell a silent member. But as long as anybody lives, the silent
        # are thrown out; and when nobody does, nobody has swept for a lease. (OBJECT IDLETIME would lie: small integers are
        # shared objects, as old as the server, and nothing is touched while it writes a snapshot.)
        questions = ("ZCARD", keys.live(group)), ("HMGET", keys.meta(0), f"seen:{group}", f"entered:{group}"), ("TIME",)
        members, seen, now = (_answer(link, reply, None) for reply in await link.calls(questions))
        lease_ms = self._broker.settings.lease_s * 1000
        seen_ms = int(seen[0] or seen[1] or 0)
        silent = seen_ms and now and int(now[0]) * 1000 + int(now[1]) // 1000 - seen_ms > lease_ms + 1000
        return 0 if silent else int(members or 0)

    async def _found(self, letters: Sequence[DeadLetter]) -> list[tuple[DeadLetter, Keys | None, Position]]:
        return [(letter, await self._keys(letter.stream), Position.parse(letter.ref)) for letter in letters]


class _Part(NamedTuple):
    """One partition's share of a group."""

    owner: str
    pending: int
    scheduled: int
    dead: int
    done: int | None
    given_up: int
    counts: Mapping[str, int]
    seen_ms: int


def _done(fields: Fields, start: bytes | None, given_up: int, before: int) -> int | None:
    # Read since the group's birth, and neither pending nor given up. None where the server lost count.
    at, _, ordinal = (start or b"0-0 0").partition(b" ")
    if not ordinal:
        return None
    read = fields.get("entries-read")
    if read is None:
        if fields["last-delivered-id"] != at or "entries-read" not in fields:
            return None
        read = int(ordinal)
    return before + max(0, int(read - int(ordinal) - fields["pending"] - given_up))


def _letter(stream: str, group: str, partition: int, id_: str, fields: Sequence[bytes]) -> DeadLetter:
    ours = dict(zip((name.decode(errors="replace") for name in fields[0:12:2]), fields[1:12:2], strict=False))
    if tuple(ours) != _OURS:  # somebody else put it here
        ours, fields = {}, [b""] * 12 + list(fields)
    text = {name: value.decode(errors="replace") for name, value in ours.items()}
    try:
        position = Position.parse(text.get("position", ""))
    except ValueError:
        position = Position(partition, id_)
    return DeadLetter(
        stream,
        group,
        Stored(position, _record(position, fields[12:])),
        text.get("reason", "unknown"),
        text.get("error", ""),
        int(text.get("attempts", 0)),
        int(text.get("died", _ms(id_.encode()))),
        f"{partition}@{id_}",
    )


def _record(position: Position, fields: Sequence[bytes]) -> Record:
    stored_ms = _ms(position.offset.encode())
    try:
        return entry.read(fields, partition=position.partition, offset=position.offset, stored_ms=stored_ms)
    except WireError:
        return Record(position.partition, str(position), "", entry.preview(fields).encode(), None, stored_ms)


def _answer(link: Link, reply: Any, missing: Any) -> Any:
    # The reply, or `missing` where there is no such key or group; any other error is raised.
    if not isinstance(reply, ReplyError):
        return reply
    if str(reply).startswith(("ERR no such key", "NOGROUP")):
        return missing
    raise link.failure(reply, "admin")


def _named(pairs: Sequence[Any]) -> Fields:
    return {name.decode(): value for name, value in zip(pairs[::2], pairs[1::2], strict=True)}


def _sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _ms(id_: bytes) -> int:
    return int(id_.split(b"-")[0])
