"""How records come into a stream, and what is known of each one afterwards.

Two ways. Of a stream that asks for nothing, the XADDs of a chunk are one transaction in one write: all of it is stored, or
nothing is, or the connection was lost and nothing is known. Where ids are remembered, a ceiling holds, or a record is for
later, `append.lua` stores, one call for each partition of a smaller chunk, and answers for each record up to the first that
it refuses. In both the next chunk leaves after the answer: no event of a key can be stored behind a refused one.

An event of 200 bytes takes us 0.8 µs: 0.45 to pack its XADD, 0.25 to read the answers, 0.1 for positions and checks.
The packing needs no server: `prepared` does it before, while another append is under way. The transaction costs us 0.1
of these and the server 0.35 of its 2.4 µs, since each XADD is answered twice; without it, a server that is full for one
moment could refuse an event and store the next one of its key. The script takes 5 µs of the server's time per event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
from hiredis import ReplyError
from msgspec import Struct

from millstream.brokers.base import Policy, Position, Slot, StreamSpec
from millstream.brokers.preparing import Posted
from millstream.brokers.redis.confirming import MEMORY, Level
from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.link import Answers, Argument, Link, broker_error, pack
from millstream.brokers.redis.scripts import scripts
from millstream.errors import BrokerDown, BrokerError, BrokerFull, BrokerRefused, Unconfirmed
from millstream.units import MAX_APPEND_BYTES, MAX_APPEND_RECORDS
from millstream.wire import entry
from millstream.wire.entry import Record

MAX_SCRIPT_RECORDS = 200  # in one call: with small events about 1 ms of the server's time
MAX_SCRIPT_BYTES = 1_048_576  # about 3 ms
MAX_LAYOUTS = 1_000  # types and sources whose bytes are kept prepared, per stream
FIRST_LARGEST_BYTES = 524_288  # assumed size of the largest event before the first page: 16 of them, then ever more
LEARN_S = 5.0  # so old may be what is known of a policy
RENEW_S = 2.0  # from then on it is asked for beside the next append, which does not wait for it
_OVERHEAD_BYTES = 256  # of a record beside its data and headers, about

_MULTI, _EXEC = pack("MULTI"), pack("EXEC")

Result = Position | BrokerError | None
"""What became of a record: stored there, refused, or unknown."""

Found = tuple[list[Result], BrokerError | None]
"""What became of the records of a chunk, and why not all of them are stored."""


class Known:
    """A stream whose declaration is known: its keys, its policy, and its commands, all but the values prepared."""

    def __init__(self, spec: StreamSpec, keys: Keys, policy: Policy, now: float, *, mine: bool) -> None:
        self.spec = spec
        self.keys = keys
        self.mine = mine
        """Declared by this process, which declares it again where it is missing."""
        self.sure = True
        """Compared with this life of the server."""
        self.pinned_by = ""
        """What keeps the oldest events, as the last round of housekeeping found."""
        self.largest_bytes = FIRST_LARGEST_BYTES
        self._layouts = _Layouts(self.log)
        self._ask = pack("HMGET", keys.stream_meta, "policy", "pinned_by")
        self._asking = False
        self._apply(policy, now)

    @property
    def counted(self) -> tuple[bytes, ...]:
        """The logs whose events count toward the ceiling: all of the stream, or none without one."""
        return self.keys.logs if self.policy.ceiling_events or self.policy.ceiling_bytes else ()

    def limits(self, logs: int) -> tuple[int, ...]:
        """The policy as `store.lua` takes it; `logs` is where `counted` begins among the keys."""
        policy = self.policy
        ceiling = policy.ceiling_events, int(policy.ceiling_bytes > 0)
        return policy.dedupe_ms, policy.dedupe_ids, *ceiling, logs, len(self.counted)

    def log(self, partition: int) -> bytes:
        """The events of a partition. Raises `BrokerRefused` when there is none of this number."""
        if not 0 <= partition < self.spec.partitions:
            raise BrokerRefused(
                f"stream {self.spec.name!r} has {self.spec.partitions} partitions, none with number {partition}"
            )
        return self.keys.log(partition)

    def is_fresh(self, now: float) -> bool:
        """True while nobody has to ask what holds for the stream."""
        return now - self._learnt_at < RENEW_S

    async def fresh(self, link: Link, now: float) -> None:
        """Learn what holds for the stream, when that was long ago: while it is in use, beside other commands."""
        if self.is_fresh(now):
            return
        if now - self._learnt_at >= LEARN_S:
            self._learn(await link.send(self._ask, 1), now)
        elif not self._asking:
            answers = await link.post(self._ask, 1)
            self._asking = True
            answers.then(lambda: self._hear(answers.got, now))

    def chunk(self, records: Sequence[Record], start: int) -> tuple[Sequence[Record], list[bytes]]:
        """The records from `start` on that may leave in one write, and their XADDs. The layout is that of `entry.write`.

        A general packer of commands needs 1.6 µs a record for this, one format string for all of it 0.5, and 0.4 without
        time and headers, which few records have.
        """
        layouts, room = self._layouts, MAX_APPEND_BYTES
        commands: list[bytes] = []
        records = records[start : start + MAX_APPEND_RECORDS]
        for record in records:
            bare, full = layouts[record.partition, record.type, record.source]
            name, data = record.id.encode(), record.data
            key = record.key.encode() if record.key else b""
            if record.time_ms or record.headers:
                time = b"%d" % record.time_ms if record.time_ms else b""
                headers = len(record.headers), record.headers
                command = full % (len(name), name, len(time), time, len(key), key, *headers, len(data), data)
            else:
                command = bare % (len(name), name, len(key), key, len(data), data)
            room -= len(command)
            if room < 0 and commands:
                break
            commands.append(command)
        return records[: len(commands)], commands

    def learn(self, policy: bytes | None, pinned_by: bytes | None, now: float) -> None:
        """Take in what stands with the stream. Raises `BrokerRefused` when nobody can read it."""
        self.pinned_by = (pinned_by or b"").decode()
        self._apply(read_policy(self.spec.name, policy) if policy else self.policy, now)

    def _hear(self, replies: list[list[bytes | None]], now: float) -> None:
        """As `_learn`; but nobody waits for this: what cannot be read is told to the append that has to."""
        with suppress(BrokerRefused):
            self._learn(replies, now)

    def _learn(self, replies: list[list[bytes | None]], now: float) -> None:
        self._asking = False
        if replies and isinstance(
            replies[0], list
        ):  # else the link was lost, or refused it: the next append asks again
            policy, pinned_by = replies[0]
            self.learn(policy, pinned_by, now)

    def _apply(self, policy: Policy, now: float) -> None:
        self.policy = policy
        self.plain = not (policy.dedupe_ms or policy.ceiling_events or policy.ceiling_bytes)
        """XADD will do: nothing has to be looked at before."""
        self._learnt_at = now


class _Layouts(dict[tuple[int, str, str], tuple[bytes, bytes]]):
    """By partition, type and source: the format of an XADD without time and headers, and of any. Raises as `Known.log`."""

    def __init__(self, log: Callable[[int], bytes]) -> None:
        super().__init__()
        self._log = log

    def __missing__(self, place: tuple[int, str, str]) -> tuple[bytes, bytes]:
        if len(self) >= MAX_LAYOUTS:
            self.clear()
        partition, type_, source = place
        words = [b"XADD", self._log(partition), b"*"]
        begin = b"*%d\r\n" % (len(words) + 2 * len(entry.FIELDS)) + b"".join(map(_bulk, words))
        fixed = {b"type": type_.encode(), b"source": source.encode()}
        bare = begin + _fields({b"time": b"", b"headers": b"", **fixed})
        self[place] = layouts = bare, begin + _fields(fixed)
        return layouts


class Packed(list[Record]):
    """The records of a chunk of a stream that asks for nothing, none of them for later, with what is sent for them."""

    def __init__(self, known: Known, records: Sequence[Record], packed: bytes) -> None:
        super().__init__(records)
        self.known = known
        self.packed = packed


def read_policy(stream: str, text: bytes | None) -> Policy:
    """A policy as it is recorded; unknown fields are those of a newer version, and passed over."""
    try:
        return msgspec.json.decode(text, type=Policy) if text else Policy()
    except msgspec.DecodeError as error:
        raise BrokerRefused(
            f"stream {stream!r}: its recorded policy is unreadable ({error}): `stream apply` it"
        ) from error


def write_policy(policy: Policy) -> bytes:
    """A policy as it is recorded."""
    return msgspec.json.encode(policy) if policy != Policy() else b"{}"


def prepared(known: Known, records: Sequence[Record]) -> Sequence[Record]:
    """The records, packed where they are one chunk: `append` needs 0.5 µs less for each, in which the server would wait."""
    if not _is_plain(known, records):
        return records
    try:
        chunk = _pack(known, records, 0)
    except BrokerRefused:  # `append` says so, when it is its turn
        return records
    return chunk if len(chunk) == len(records) else records


async def append(link: Link, known: Known, records: Sequence[Record], level: Level = MEMORY) -> list[Position]:
    """Store records in their order, chunk by chunk. After one that was refused or lost nothing more is sent."""
    ready = isinstance(records, Packed) and records.known is known and known.plain
    if not ready:
        for partition in {record.partition for record in records}:
            known.log(partition)  # before anything is sent, so that nothing of the call is stored
    store = _transact if ready or _is_plain(known, records) else _run
    results: list[Result] = []
    trouble: BrokerError | None = None
    while len(results) < len(records) and trouble is None:
        found, trouble = await store(link, known, records, len(results), level)
        results += found
    if trouble is None:
        return results  # type: ignore[return-value]  # without trouble there are only positions
    results += [trouble] * (len(records) - len(results))
    raise _verdict(known.spec.name, results, trouble)


def post(link: Link, known: Known, record: Record) -> Posted | None:
    """Send a record of a stream that asks for nothing, unless others are in line; see `Posting`."""
    if not known.plain or record.due_ms is not None:
        return None
    try:
        _, (command,) = known.chunk((record,), 0)
    except BrokerRefused:  # `append` says so
        return None
    answers = link.post_now(command, 1)
    return None if answers is None else _Posted(link, known, record, answers)


def _is_plain(known: Known, records: Iterable[Record]) -> bool:
    """Whether XADD will do for all of them."""
    return known.plain and {record.due_ms for record in records} <= {None}


async def append_slot(link: Link, known: Known, slot: Slot, record: Record | None) -> bool:
    """Store the event of one slot of a schedule, and that it was. Raises as `append`."""
    partition = 0 if record is None else record.partition
    known.log(partition)
    keys = known.keys.slots, *known.keys.store(partition), *known.counted
    args: list[Argument] = [slot.schedule, slot.at_ms, *known.limits(8)]
    if record is not None:
        args += _words(record)
    try:
        (result,) = await link.run(scripts["slot"], keys, args)
    except BrokerDown as error:
        raise Unconfirmed(
            f"slot {slot.at_ms} of {slot.schedule!r}: whether it is stored is not known ({error}); store it again",
            results=[None],
        ) from error
    if isinstance(result, ReplyError):
        raise refusal(known, partition, result, link.target.where)
    return bool(result)


def refusal(known: Known, partition: int, reply: Exception, where: str) -> BrokerError:
    """The error that means what `store.lua` answered for a record that it did not store."""
    name, policy, text = known.spec.name, known.policy, str(reply)
    if text.startswith("FULL ids"):
        return BrokerFull(
            f"stream {name!r} on {where}: partition {partition} remembers {policy.dedupe_ids:,} ids, as many as it may, and "
            "takes no more until some are old enough: raise Dedupe(ids=…) with `millstream stream apply`"
        )
    if text.startswith("FULL"):
        ceiling = f"{policy.ceiling_bytes:,} bytes" if text == "FULL bytes" else f"{policy.ceiling_events:,} events"
        pins = f", and is kept by {known.pinned_by}" if known.pinned_by else ""
        return BrokerFull(
            f"stream {name!r} on {where} is at its ceiling of {ceiling}{pins}: run the group that is behind, or forget it; "
            "replay or drop its dead letters; or raise the ceiling with `millstream stream apply`"
        )
    return broker_error(reply, f"append to {name} on {where}")


class _Answer(NamedTuple):
    """What came back for a chunk."""

    replies: list[Any]
    error: BrokerError | None = None
    """Why there are none."""
    sent: bool = True
    lacks: str = ""
    """What is missing to the level that was asked for."""

    def of(self, count: int) -> Found:
        """What became of so many records, without any reply."""
        return [None if self.sent else self.error] * count, self.error


async def _transact(link: Link, known: Known, records: Sequence[Record], start: int, level: Level) -> Found:
    chunk = records if isinstance(records, Packed) and records.known is known else _pack(known, records, start)
    alone = len(chunk) == 1
    answer = await _exchange(link, chunk.packed, 1 if alone else len(chunk) + 2, level)
    if answer.error is not None:
        return answer.of(len(chunk))
    stored = answer.replies if alone else _transacted(answer.replies)
    if not answer.lacks and set(map(type, stored)) == {bytes}:  # as nearly always, so this is what is asked first
        return list(map(Position, [record.partition for record in chunk], map(bytes.decode, stored))), None
    results: list[Result] = [
        link.failure(reply, "XADD") if isinstance(reply, ReplyError) else Position(record.partition, reply.decode())
        for record, reply in zip(chunk, stored, strict=True)
    ]
    return _judged(results, answer.lacks)


def _pack(known: Known, records: Sequence[Record], start: int) -> Packed:
    chunk, commands = known.chunk(records, start)
    if len(chunk) == 1:  # a transaction in itself
        return Packed(known, chunk, commands[0])
    return Packed(known, chunk, b"".join([_MULTI, *commands, _EXEC]))


def _transacted(replies: list[Any]) -> list[Any]:
    # The answer to each command between MULTI and EXEC.
    begun, *queued, executed = replies
    if isinstance(executed, list):
        return executed
    if isinstance(begun, ReplyError):  # MULTI itself is forbidden: each command ran by itself
        return queued
    refused = next((reply for reply in queued if isinstance(reply, ReplyError)), executed)
    return [refused] * len(queued)


async def _run(link: Link, known: Known, records: Sequence[Record], start: int, level: Level) -> Found:
    chunk = _portion(records, start)
    parts: dict[int, list[int]] = {}
    for index, record in enumerate(chunk):
        parts.setdefault(record.partition, []).append(index)
    calls: list[tuple[Argument, ...]] = []
    for partition, indexes in parts.items():
        keys = *known.keys.store(partition), *known.counted
        words = [word for index in indexes for word in _words(chunk[index])]
        calls.append((len(keys), *keys, *known.limits(7), *words))
    script = scripts["append"]
    answer = await _call(link, "EVALSHA", script.sha, calls, level)
    if answer.error is not None:
        return answer.of(len(chunk))
    replies, lacks = answer.replies, answer.lacks
    unknown = [
        place for place, reply in enumerate(replies) if isinstance(reply, ReplyError) and str(reply)[:8] == "NOSCRIPT"
    ]
    if unknown:
        answer = await _call(link, "EVAL", script.source, [calls[place] for place in unknown], level)
        again = answer.replies or answer.of(len(unknown))[0]
        for place, reply in zip(unknown, again, strict=True):
            replies[place] = reply
        lacks = answer.lacks
    results: list[Result] = [None] * len(chunk)
    for (partition, indexes), reply in zip(parts.items(), replies, strict=True):
        for index, result in zip(indexes, _results(link, known, partition, reply, len(indexes)), strict=True):
            results[index] = result
    return _judged(results, lacks, answer.error)


def _portion(records: Sequence[Record], start: int) -> Sequence[Record]:
    room, end = MAX_SCRIPT_BYTES, start
    for record in records[start : start + MAX_SCRIPT_RECORDS]:
        room -= len(record.data) + len(record.headers) + _OVERHEAD_BYTES
        if room < 0 and end > start:
            break
        end += 1
    return records[start:end]


def _words(record: Record) -> tuple[Argument, ...]:
    return "" if record.due_ms is None else record.due_ms, *entry.write(record)[1::2]


def _results(link: Link, known: Known, partition: int, reply: Any, count: int) -> list[Result]:
    if not isinstance(reply, list):
        return [link.failure(reply, "append") if isinstance(reply, ReplyError) else reply] * count
    results: list[Result] = [
        refusal(known, partition, item, link.target.where)
        if isinstance(item, ReplyError)
        else Position(partition, item.decode())
        for item in reply
    ]
    return results + results[-1:] * (count - len(results))  # behind a refused one nothing is stored


async def _call(
    link: Link, command: str, script: Argument, calls: Sequence[Sequence[Argument]], level: Level
) -> _Answer:
    return await _exchange(link, b"".join([pack(command, script, *call) for call in calls]), len(calls), level)


class _Posted(Struct):
    link: Link
    known: Known
    record: Record
    answers: Answers

    def then(self, call: Callable[[], object]) -> None:
        self.answers.then(call)

    def result(self) -> Position:
        try:
            (reply,) = self.answers.result()
        except BrokerDown as error:
            raise _verdict(self.known.spec.name, [None], error) from error
        if isinstance(reply, ReplyError):
            raise self.link.failure(reply, "XADD")
        return Position(self.record.partition, reply.decode())


async def _exchange(link: Link, packed: bytes, wanted: int, level: Level) -> _Answer:
    asks = bool(level.command)
    try:
        answers = await link.post(packed + level.command if asks else packed, wanted + asks, level.deadline_s)
    except BrokerDown as error:
        return _Answer([], error, sent=False)
    try:
        replies = await answers
    except BrokerDown as error:
        return _Answer([], error)
    return _Answer(replies, lacks=level.lacks(replies.pop()) if asks else "")


def _judged(results: list[Result], lacks: str, lost: BrokerError | None = None) -> Found:
    trouble = next((result for result in results if isinstance(result, BrokerError)), lost)
    if not lacks:
        return results, trouble
    # Stored, and where it lies is known; but whoever wants it confirmed has to publish it again.
    doubted: list[Result] = [result if isinstance(result, BrokerError) else None for result in results]
    return doubted, trouble or BrokerDown(f"what is in doubt is stored, and not confirmed: {lacks}")


def _verdict(stream: str, results: Sequence[Result], trouble: BrokerError) -> BrokerError | Unconfirmed:
    refused = sum(isinstance(result, BrokerError) for result in results)
    if refused == len(results):
        return trouble
    doubted = sum(result is None for result in results)
    return Unconfirmed(
        f"of {len(results)} events for {stream!r} {len(results) - refused - doubted} are stored, {refused} are not, "
        f"{doubted} are in doubt: {trouble}",
        results=results,
    )


def _fields(fixed: Mapping[bytes, bytes]) -> bytes:
    return b"".join(_bulk(name) + (_bulk(fixed[name]) if name in fixed else b"$%d\r\n%b\r\n") for name in entry.FIELDS)


def _bulk(word: bytes) -> bytes:
    return (b"$%d\r\n%b\r\n" % (len(word), word)).replace(b"%", b"%%")
