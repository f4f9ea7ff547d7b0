"""What people do with groups: they let parked keys go on or drop them, give events again, move a group, or delete it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from millstream.brokers import window
from millstream.brokers.base import ParkedKey, PendingInfo, Position, Start, Stored, Subscription
from millstream.brokers.ledger import HELD_MS
from millstream.brokers.letters import waiting
from millstream.brokers.redis import parked
from millstream.brokers.redis.link import ReplyError
from millstream.brokers.redis.members import MAX_ITEMS, Place, behind
from millstream.brokers.redis.scripts import scripts
from millstream.errors import BadStream, BrokerDown
from millstream.wire.packs import part_of

if TYPE_CHECKING:
    from millstream.brokers.redis.broker import RedisBroker

MAX_PIECE_BYTES = 1_048_576  # of events in one call of a script
MAX_TURNS = 100  # members come and go while all keys of a group are gathered


class People:
    """The verbs of `brokers.base.Admin` for parked keys and for whole groups."""

    def __init__(self, broker: RedisBroker) -> None:
        self._broker = broker

    async def place(self, stream: str, group: str) -> Place | None:
        """Where a group consumes; None for an unknown stream."""
        try:
            spec = await self._broker.spec(stream)
        except BadStream:
            return None
        return Place(self._broker.keys(stream), Subscription(spec, group, ""))

    async def modes(self, place: Place) -> list[bytes | None]:
        """Per partition how the group consumes: `queue`, `log`, or None where it is not known."""
        field = f"mode:{place.group}"
        return await self._ask([("HGET", at.meta, field) for at in place.at])

    # Parked keys.

    async def keys(self, stream: str, group: str, limit: int) -> list[ParkedKey]:
        """The keys that wait, those that were parked first first."""
        place = await self.place(stream, group)
        if place is None:
            return []
        found = [
            (int(info.split(b" ", 3)[2]), partition, field[1:].decode(), info)
            for partition, infos in enumerate(await self._ask([("HGETALL", at.parkinfo) for at in place.at]))
            for field, info in zip(infos[::2], infos[1::2], strict=True)
            if field.startswith(b"=")
        ]
        found.sort(key=lambda row: row[0])
        rows = found[:limit]
        asked: list[tuple[Any, ...]] = []
        for _, partition, key, _ in rows:
            list_ = place.park(partition, key)
            asked += [("LLEN", list_), ("LINDEX", list_, 0), ("ZSCORE", place.at[partition].parked, key)]
        replies = await self._ask(asked)
        looked = zip(rows, replies[::3], replies[1::3], replies[2::3], strict=True)
        return [
            _parked_key(place, partition, key, info, events, head, due)
            for (_, partition, key, info), events, head, due in looked
            if head is not None and due is not None
        ]

    async def parked(self, key: ParkedKey, limit: int) -> list[Stored]:
        """The events that wait of a key, in order."""
        place = await self.place(key.stream, key.group)
        if place is None or limit < 1:
            return []
        link = await self._broker.control()
        events = await link.call("LRANGE", place.park(key.partition, key.key), 0, limit - 1)
        return list(islice(waiting(parked.waiting(key.partition, event) for event in events), limit))

    async def pending(self, place: Place, limit: int) -> list[PendingInfo]:
        """The oldest parked events of each partition."""
        infos: list[PendingInfo] = []
        for partition, at in enumerate(place.at):
            scores = await self._scores(at.parked)
            lists = await self._ask([("LRANGE", place.park(partition, key), 0, limit - 1) for key in scores])
            attempts = await self._ask([("HGET", at.parkinfo, f"={key}") for key in scores])
            found = [
                (event, 0 if index else int((info or b"0").split(b" ")[0]), due_ms)
                for due_ms, events, info in zip(scores.values(), lists, attempts, strict=True)
                for index, event in enumerate(events)
            ]
            found.sort(key=lambda row: _order(row[0]))
            for event, attempt, due_ms in islice(found, limit):
                position = Position(partition, event.partition(b" ")[0].decode())
                infos.append(PendingInfo(position, "", attempt, due_ms))
        return infos

    async def release_keys(self, keys: Sequence[ParkedKey]) -> list[bool]:
        """Let keys be tried at once, attempts counted anew."""
        return [await self._of_key("free", key) == 1 for key in keys]

    async def drop_keys(self, keys: Sequence[ParkedKey]) -> list[int]:
        """Discard all that is parked of these keys."""
        return [await self._of_key("discard", key) for key in keys]

    async def replay(self, place: Place, ref: Position, stored: Stored) -> bool:
        """Park the event of a dead letter at the end of its key."""
        partition = stored.position.partition
        at, key = place.at[partition], _key(stored)
        keys = at.dead, at.parked, at.parkinfo, place.park(partition, key), at.stats
        link = await self._broker.control()
        return bool(await link.run(scripts["park"], keys, (ref.offset, key, parked.encode(stored))) == 1)

    # Groups.

    async def give(self, place: Place, events: Sequence[Stored]) -> int:
        """Let a group handle events once more, piece by piece."""
        modes, link = await self.modes(place), await self._broker.control()
        partitions: dict[int, list[Stored]] = {}
        for stored in events:
            partitions.setdefault(stored.position.partition, []).append(stored)
        count = 0
        for partition, those in partitions.items():
            make, script = (_repark, "repark") if modes[partition] == b"log" else (_give, "give")
            for piece in _pieces(those):
                count += await link.run(scripts[script], *make(place, partition, piece))
        return count

    async def seek(self, place: Place, start: Start, done: Sequence[tuple[int | None, int]]) -> None:
        """Move a group. `done` says per partition what a group without order has done so far, and given up."""
        modes = await self.modes(place)
        if b"log" not in modes:
            return await self._reset(place, behind(start), done)
        link = await self._broker.control()
        for partition, at in enumerate(place.at):
            for _ in range(MAX_TURNS):
                waiting = list(await self._scores(at.parked))
                lists = [place.park(partition, key) for key in waiting]
                keys = at.log, at.lease, at.parked, at.parkinfo, at.note, *lists
                if await link.run(scripts["seek"], keys, (place.group, behind(start), *waiting)) == b"OK":
                    break
            else:
                raise _too_busy(place)

    async def forget(self, place: Place) -> None:
        """Delete a group."""
        link = await self._broker.control()
        for _ in range(MAX_TURNS):
            names = await link.call("ZRANGE", place.live, 0, -1)
            fences = [place.fence(name.decode()) for name in names]
            parts = [
                key
                for at in place.at
                for key in (at.log, at.due, at.note, at.dead, at.stats, at.lease, at.parked, at.parkinfo, at.meta)
            ]
            lists = [place.park(p, key) for p, at in enumerate(place.at) for key in await self._scores(at.parked)]
            keys = place.live, place.tick, *fences, *parts, *lists
            args = place.group, len(names), *names, len(place.at)
            if await link.run(scripts["forget"], keys, args) == b"OK":
                return
        raise _too_busy(place)

    async def _reset(self, place: Place, start: str, done: Sequence[tuple[int | None, int]]) -> None:
        link = await self._broker.control()
        counts = ["" if count is None else count for pair in done for count in pair]
        parts = [key for at in place.at for key in (at.log, at.due, at.note, at.stats, at.meta)]
        for _ in range(MAX_TURNS):
            names = await link.call("ZRANGE", place.live, 0, -1)
            keys = place.live, *(place.fence(name.decode()) for name in names), *parts
            if await link.run(scripts["reset"], keys, (place.group, start, len(names), *names, *counts)) == b"OK":
                return
        raise _too_busy(place)

    async def _of_key(self, script: str, key: ParkedKey) -> int:
        place = await self.place(key.stream, key.group)
        if place is None:
            return 0
        at, link = place.at[key.partition], await self._broker.control()
        keys = at.parked, at.parkinfo, at.note, place.park(key.partition, key.key)
        count: int = await link.run(scripts[script], keys, (key.key,))
        return count

    async def _scores(self, set_: bytes) -> Mapping[str, int | None]:
        link = await self._broker.control()
        found = await link.call("ZRANGE", set_, 0, -1, "WITHSCORES")
        return {key.decode(): _due_ms(due) for key, due in zip(found[::2], found[1::2], strict=True)}

    async def _ask(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        link = await self._broker.control()
        replies = await link.calls(commands) if commands else []
        for reply in replies:
            if isinstance(reply, ReplyError):
                raise link.failure(reply, "admin")
        return replies


def _pieces(events: Iterable[Stored]) -> Iterator[list[Stored]]:
    """As many as one call of a script may take: it holds up everybody else."""
    piece: list[Stored] = []
    left_bytes = MAX_PIECE_BYTES
    for stored in events:
        left_bytes -= len(stored.record.data) + len(stored.record.headers)
        if piece and (left_bytes < 0 or len(piece) == MAX_ITEMS):
            yield piece
            piece, left_bytes = [], MAX_PIECE_BYTES - len(stored.record.data) - len(stored.record.headers)
        piece.append(stored)
    if piece:
        yield piece


def _give(place: Place, partition: int, events: Sequence[Stored]) -> tuple[Sequence[bytes], Sequence[Any]]:
    """Keys and arguments of `give.lua`."""
    at = place.at[partition]
    return (at.log, at.due, at.stats, at.note), (place.group, *(stored.position.offset for stored in events))


def _repark(place: Place, partition: int, events: Sequence[Stored]) -> tuple[Sequence[bytes], Sequence[Any]]:
    """Keys and arguments of `repark.lua`."""
    at = place.at[partition]
    names = [_key(stored) for stored in events]
    lists = [place.park(partition, name) for name in names]
    words = [word for name, stored in zip(names, events, strict=True) for word in (name, parked.encode(stored))]
    return (at.log, at.lease, at.parked, at.parkinfo, *lists), (place.group, *words)


def _order(event: bytes) -> tuple[tuple[int, ...], int]:
    offset, part = part_of(event.partition(b" ")[0].decode())
    return window.place(offset), -1 if part is None else part


def _key(stored: Stored) -> str:
    return stored.record.key or window.keyless(stored.position.offset)


def _parked_key(place: Place, partition: int, key: str, info: bytes, events: int, head: bytes, due: bytes) -> ParkedKey:
    attempts, _, since_ms, error = info.split(b" ", 3)
    first = Position(partition, head.partition(b" ")[0].decode())
    figures = int(attempts), _due_ms(due), error.decode(errors="replace"), int(since_ms)
    return ParkedKey(place.stream, place.group, partition, key, events, first, *figures)


def _due_ms(score: bytes) -> int | None:
    return None if float(score) >= HELD_MS else int(float(score))


def _too_busy(place: Place) -> BrokerDown:
    return BrokerDown(f"members or parked keys of group {place.group!r} changed all the time: try again")
