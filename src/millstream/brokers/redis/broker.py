"""Events on a Redis server: streams are declared and read here; `appending.py` stores, `consumer.py` works in groups.

Connections, each a `Link`, made when first used and made again after a loss:

    publish   all appends of the process, pipelined     read   pages of events       control   rare commands
              (one for each level of confirmation)
    wait      one for each waiting reader, pooled       and those that consumers ask for with `connect`
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping, MutableMapping, Sequence

import msgspec
from hiredis import ReplyError

from millstream.brokers.base import (
    Admin,
    Confirm,
    Consumer,
    OtherOrder,
    Policy,
    Slot,
    Start,
    Stored,
    StreamSpec,
    Subscription,
    Tended,
    Traits,
    check_declared,
)
from millstream.brokers.budget import Budget
from millstream.brokers.ordered import OrderedConsumer
from millstream.brokers.preparing import Posted
from millstream.brokers.redis import appending, control
from millstream.brokers.redis.admin import RedisAdmin
from millstream.brokers.redis.appending import Known, read_policy, write_policy
from millstream.brokers.redis.confirming import MEMORY, Level, check_confirm, confirms, level
from millstream.brokers.redis.consumer import RedisConsumer
from millstream.brokers.redis.joining import create
from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.ledger import Lives
from millstream.brokers.redis.link import BLOCK_MARGIN_S, BLOCK_S, Argument, Link
from millstream.brokers.redis.members import Place
from millstream.brokers.redis.tending import Tending
from millstream.brokers.switching import subscribed
from millstream.clock import Clock
from millstream.errors import BadStream, BrokerError, BrokerRefused, NotSupported, WireError
from millstream.settings import Settings
from millstream.stream import Position
from millstream.telemetry import Telemetry
from millstream.units import check_name
from millstream.wire import entry
from millstream.wire.entry import Record

MAX_WAITING = 128  # connections of waiting readers; further readers look every now and then instead
MAX_IDLE = 16  # connections kept for the next waiting reader
MAX_PAGE_BYTES = 8_388_608  # what one read should bring at most, by the sizes of the page before
POLL_S = 0.25  # how often a reader without connection looks
WIRE_VERSION = b"1"  # of keys and entries, as recorded with each stream

_TRAITS = Traits(order=True, delayed=True, dedupe=True, retention=True, slots=True, packs=True, dictionaries=True)
_RECORDED = ("v", "partitions", "key", "codec", "policy")
_LAST_SEQUENCE = 18_446_744_073_709_551_615


class RedisBroker:
    """A Redis server, from 6.2 on, alone or with replicas."""

    def __init__(self, url: str, settings: Settings, clock: Clock, telemetry: Telemetry) -> None:
        self.settings = settings
        self.clock = clock
        self.telemetry = telemetry
        self.target = control.target(url, settings)
        self.url = self.target.url
        """Where it is, without the password."""
        self._traits = msgspec.structs.replace(_TRAITS, atomic_outputs=not self.target.outputs_before)
        self._warned = False
        self._admin = RedisAdmin(self)
        self.budget = Budget()
        """What those who consume in the order of keys share."""
        self._tending = Tending(self)
        self._open = False
        self._run_id = ""
        self._streams: dict[str, Known] = {}
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()
        self._control = _SharedLink(self, "control")
        self._publish = _SharedLink(self, "publish")
        self._confirmed: dict[Confirm, _SharedLink] = {
            "memory": self._publish,
            "fsync": _SharedLink(self, "fsync"),
            "replicated": _SharedLink(self, "replicated"),
        }
        self._levels: MutableMapping[Link, dict[Confirm, Level]] = weakref.WeakKeyDictionary()
        self._read = _SharedLink(self, "read")
        self._idle: list[Link] = []
        self._waiting = 0

    @property
    def traits(self) -> Traits:
        """What Redis can do for us; what it can confirm is known once the broker is open."""
        return self._traits

    @property
    def admin(self) -> Admin:
        """What people and monitoring look through."""
        return self._admin

    async def open(self) -> None:
        """Connect, and look whether the server is fit. Once open, it does nothing."""
        if self._open:
            return
        self._open = True
        try:
            link = await self.control()
            await control.check(link)
            self._traits = msgspec.structs.replace(self._traits, confirms=await confirms(link))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Give up all connections; who still waits for an answer gets `BrokerDown`."""
        self._open = False
        for link in list(self._links):
            link.close()
        self._idle.clear()
        await self.clock.sleep(0)  # the event loop needs a turn to let go of the sockets

    async def connect(self, name: str) -> Link:
        """A connection for the caller alone, who closes it. `name` is for people who read CLIENT LIST."""
        if self._open:
            link = await Link.connect(self.target, self.clock, name=name)
            if self._open:
                self._meet(link)
                return link
            link.close()
        raise BrokerError(f"the broker {self.url} is not open")

    async def control(self) -> Link:
        """The shared connection for rare commands that never block."""
        return await self._control.get()

    def keys(self, stream: str) -> Keys:
        """The keys of a stream whose declaration is known: declared here, or looked up with `spec`."""
        try:
            return self._streams[stream].keys
        except KeyError:
            raise BadStream(f"stream {stream!r} is not declared yet") from None

    async def spec(self, stream: str) -> StreamSpec:
        """How a stream was declared, here or by somebody else. Raises `BadStream` when nobody has."""
        known = await self._find(stream, await self.control())
        if known is None:
            raise BadStream(self._unknown(stream))
        return known.spec

    async def known(self, stream: str, link: Link) -> Known:
        """A declared stream, asked for on the link that will be used. Raises `BrokerRefused` for another."""
        known = await self._find(stream, link)
        if known is None:
            raise BrokerRefused(self._unknown(stream))
        return known

    async def declare(self, stream: StreamSpec, policy: Policy | None = None) -> Policy:
        """Create the stream, or compare it with what is recorded. Needs no room on the server when it is recorded."""
        await self._warn()
        return (await self._declare(stream, policy or Policy(), await self.control())).policy

    async def append(self, stream: str, records: Sequence[Record], confirm: Confirm = "memory") -> list[Position]:
        """Store records in their order. Calls run beside each other on one connection."""
        check_confirm(confirm, self._traits.confirms, self.url)
        link = await self._confirmed[confirm].get()  # first: another server may not know the stream
        known = await self.known(stream, link)
        await known.fresh(link, self.clock.monotonic())
        return await appending.append(link, known, records, await self._level(link, confirm))

    def prepared(self, stream: str, records: Sequence[Record]) -> Sequence[Record]:
        """The records with what `append` sends for them, if the stream is known and asks for nothing."""
        known = self._streams.get(stream)
        return records if known is None else appending.prepared(known, records)

    def post(self, stream: str, record: Record) -> Posted | None:
        """Send a record now, where all that `append` would look up is at hand and the link has room."""
        link, known = self._publish.link, self._streams.get(stream)
        if link is None or known is None or not (known.sure and known.is_fresh(self.clock.monotonic())):
            return None
        return appending.post(link, known, record)

    async def append_slot(self, stream: str, slot: Slot, record: Record | None) -> bool:
        """Store the event of one slot of a schedule, and that it was, in one step."""
        link = await self._publish.get()
        known = await self.known(stream, link)
        await known.fresh(link, self.clock.monotonic())
        return await appending.append_slot(link, known, slot, record)

    async def tend(self, stream: str) -> Tended:
        """One round of housekeeping."""
        return await self._tending.tend(stream)

    def discarded(self, stream: str) -> None:
        """Forget how a stream was declared: it is no more."""
        self._streams.pop(stream, None)

    async def read(self, stream: str, partition: int, after: Position | None, limit: int) -> list[Stored]:
        """Up to `limit` events behind a position, fewer when they are large."""
        if limit < 1:
            return []
        link = await self._read.get()
        known = await self.known(stream, link)
        start = "-" if after is None else f"({after.offset}"
        count = max(1, min(limit, MAX_PAGE_BYTES // known.largest_bytes))
        found = await link.call("XRANGE", known.log(partition), start, "+", "COUNT", count)
        if found:
            largest_bytes = max(sum(map(len, fields)) for _, fields in found)
            known.largest_bytes = max(largest_bytes, known.largest_bytes // 8, 1)
        return [_stored(partition, offset.decode(), fields) for offset, fields in found]

    async def locate(self, stream: str, start: Start) -> Mapping[int, Position | None]:
        """For each partition, the position behind which `read` begins: None for the beginning."""
        link = await self._read.get()
        known = await self.known(stream, link)
        partitions = range(known.spec.partitions)
        if start == "now":
            replies = await link.calls([("XINFO", "STREAM", log) for log in known.keys.logs])
            return {p: self._last(link, p, reply) for p, reply in zip(partitions, replies, strict=True)}
        if start == "beginning" or start <= 0:
            return dict.fromkeys(partitions)
        return {p: Position(p, f"{start - 1}-{_LAST_SEQUENCE}") for p in partitions}

    async def policy(self, stream: str) -> Policy:
        """What holds for a declared stream. A dictionary that is gone, as after a flush, is not named."""
        link = await self._publish.get()
        known = await self.known(stream, link)
        await known.fresh(link, self.clock.monotonic())
        policy = known.policy
        if policy.dictionary and not await link.call("HEXISTS", known.keys.dictionaries, policy.dictionary):
            policy = msgspec.structs.replace(policy, dictionary=0)
        return policy

    async def dictionary(self, stream: str, number: int) -> bytes | None:
        """A dictionary of a stream, or None."""
        link = await self._read.get()
        found: bytes | None = await link.call("HGET", (await self.known(stream, link)).keys.dictionaries, number)
        return found

    async def wait(self, stream: str, after: Mapping[int, Position | None], wait_s: float) -> None:
        """Return when there may be an event behind one of these positions, or the time is up."""
        known = await self.known(stream, await self.control())
        if self._waiting >= MAX_WAITING or not after:
            return await self.clock.sleep(min(wait_s, POLL_S))
        logs = [known.log(partition) for partition in after]
        offsets = ["0-0" if position is None else position.offset for position in after.values()]
        self._waiting += 1
        link = None
        try:
            link = self._idle_link() or await self.connect("millstream-wait")
            await self._wait(link, [*logs, *offsets], wait_s)
        except BaseException:  # cancelled too: the server is still waiting on this connection
            if link is not None:
                link.close()
            raise
        finally:
            self._waiting -= 1
        self._give_back(link)

    async def create(self, subscription: Subscription) -> None:
        """Make a group, if it is new, without joining it."""
        await self.declare(subscription.stream)
        await create(await self.control(), Place(self.keys(subscription.stream.name), subscription), subscription)

    async def subscribe(self, subscription: Subscription) -> Consumer:
        """Join a group, which is made if it is new."""
        return await subscribed(self._member, subscription, self.clock)

    async def _member(self, subscription: Subscription) -> Consumer:
        if not subscription.order:
            return await RedisConsumer.join(self, subscription)
        await self.declare(subscription.stream)
        consumer = OrderedConsumer(Lives(self, subscription), subscription, self.clock, self.telemetry, self.budget)
        try:
            await consumer.enter()
        except OtherOrder:  # it was switched back as we came: nobody is to wait for us
            await consumer.close()
            raise
        return consumer

    async def _warn(self) -> None:
        if not self._warned:  # those who only look are not bothered
            self._warned = True
            await control.warn(await self.control())

    def _meet(self, link: Link) -> None:
        self._links.add(link)
        if not link.run_id or link.run_id != self._run_id:  # another server: it may know none of our streams
            self._run_id = link.run_id
            for known in self._streams.values():
                known.sure = False

    def _keys_of(self, stream: StreamSpec) -> Keys:
        return Keys(self.target.namespace, check_name("stream", stream.name), stream.partitions)

    async def _level(self, link: Link, confirm: Confirm) -> Level:
        if confirm == "memory":
            return MEMORY
        levels = self._levels.setdefault(link, {})
        if confirm not in levels:
            levels[confirm] = await level(link, confirm)
        return levels[confirm]

    async def _declare(self, stream: StreamSpec, policy: Policy, link: Link) -> Known:
        keys = self._keys_of(stream)
        recorded = await self._recorded(link, stream.name) or await self._record(link, stream, policy)
        check_declared(recorded[0], stream, self.url)
        replies = await link.calls([("TYPE", log) for log in keys.logs])
        for log, kind in zip(keys.logs, replies, strict=True):
            if not isinstance(kind, ReplyError) and kind not in (b"stream", b"none"):
                raise BrokerRefused(
                    f"stream {stream.name!r}: the key {log.decode()!r} on {self.url} holds a {kind.decode()} already; use "
                    "another name, or a namespace"
                )
        return self._learnt(*recorded, mine=True)

    def _unknown(self, stream: str) -> str:
        return f"stream {stream!r} is not declared on {self.url}: no app that uses it has run there"

    async def _find(self, stream: str, link: Link) -> Known | None:
        # Asked on the link that will be used: during a failover two links may end at two servers.
        known = self._streams.get(stream)
        if known is not None and known.sure:
            return known
        if known is not None and known.mine:
            return await self._declare(known.spec, known.policy, link)
        recorded = await self._recorded(link, check_name("stream", stream))
        if recorded is None:
            self._streams.pop(stream, None)
            return None
        return self._learnt(*recorded, mine=False)

    def _learnt(self, spec: StreamSpec, policy: Policy, *, mine: bool) -> Known:
        known = Known(spec, self._keys_of(spec), policy, self.clock.monotonic(), mine=mine)
        self._streams[spec.name] = known
        return known

    async def _recorded(self, link: Link, stream: str) -> tuple[StreamSpec, Policy] | None:
        meta = Keys(self.target.namespace, stream, 1).stream_meta
        return self._spec_of(stream, await link.call("HMGET", meta, *_RECORDED))

    async def _record(self, link: Link, stream: StreamSpec, policy: Policy) -> tuple[StreamSpec, Policy]:
        keys = self._keys_of(stream)
        fresh = msgspec.structs.replace(policy, dictionary=0)  # gone with a flush, until somebody stores it again
        values = WIRE_VERSION, stream.partitions, stream.key, stream.codec, write_policy(fresh)
        fields: list[tuple[str, Argument]] = list(zip(_RECORDED, values, strict=True))
        commands: list[Sequence[Argument]] = [("HSETNX", keys.stream_meta, name, value) for name, value in fields]
        commands += [("SADD", keys.streams, stream.name), ("HMGET", keys.stream_meta, *_RECORDED)]
        replies = await link.calls([("MULTI",), *commands, ("EXEC",)])  # whoever comes first decides all fields
        done = replies[-1] if isinstance(replies[-1], list) else replies
        for reply in done:
            if isinstance(reply, ReplyError):
                raise link.failure(reply, f"declare {stream.name}")
        return self._spec_of(stream.name, done[-1]) or (stream, fresh)

    def _spec_of(self, stream: str, values: Sequence[bytes | None]) -> tuple[StreamSpec, Policy] | None:
        version, partitions, key, codec, policy = values
        if partitions is None:
            return None
        if version != WIRE_VERSION:
            raise NotSupported(f"stream {stream!r} on {self.url} was written by a newer Millstream: upgrade this one")
        spec = StreamSpec(stream, int(partitions), (key or b"").decode(), (codec or b"json").decode())
        return spec, read_policy(stream, policy)

    def _last(self, link: Link, partition: int, reply: list[object] | ReplyError) -> Position | None:
        if isinstance(reply, ReplyError):
            if str(reply) == "ERR no such key":
                return None
            raise link.failure(reply, "XINFO STREAM")
        last = dict(zip(reply[::2], reply[1::2], strict=True))[b"last-generated-id"]
        assert isinstance(last, bytes)
        return None if last == b"0-0" else Position(partition, last.decode())

    async def _wait(self, link: Link, streams: Sequence[Argument], wait_s: float) -> None:
        until = self.clock.monotonic() + wait_s
        while (left_s := until - self.clock.monotonic()) > 0:
            block_s = min(left_s, BLOCK_S)
            command = ("XREAD", "COUNT", 1, "BLOCK", max(1, int(block_s * 1000)), "STREAMS", *streams)
            if await link.call(*command, deadline_s=block_s + BLOCK_MARGIN_S):
                return

    def _idle_link(self) -> Link | None:
        while self._idle:
            if not (link := self._idle.pop()).closed:
                return link
        return None

    def _give_back(self, link: Link) -> None:
        if not link.closed and len(self._idle) < MAX_IDLE:
            self._idle.append(link)
        else:
            link.close()


class _SharedLink:
    """One link that many use, made when first asked for and again after it was lost."""

    def __init__(self, broker: RedisBroker, name: str) -> None:
        self._broker = broker
        self._name = f"millstream-{name}"
        self._link: Link | None = None
        self._turn = asyncio.Lock()
        self._failures = 0
        self._error: BrokerError | None = None

    @property
    def link(self) -> Link | None:
        """The link, while there is one."""
        return None if self._link is None or self._link.closed else self._link

    async def get(self) -> Link:
        if self._link is not None and not self._link.closed:
            return self._link
        failures = self._failures
        async with self._turn:
            if self._link is not None and not self._link.closed:
                return self._link
            if self._error is not None and self._failures > failures:  # an attempt failed while we waited: a thousand
                raise type(self._error)(str(self._error)) from self._error  # callers must not each wait for their own
            try:
                self._link = await self._broker.connect(self._name)
            except BrokerError as error:
                self._failures += 1
                self._error = error
                raise
            return self._link


def _stored(partition: int, offset: str, fields: Sequence[bytes]) -> Stored:
    stored_ms = int(offset.partition("-")[0])
    try:
        record = entry.read(fields, partition=partition, offset=offset, stored_ms=stored_ms)
    except WireError:
        record = Record(partition, f"{partition}@{offset}", "", entry.preview(fields).encode(), None, stored_ms)
    return Stored(Position(partition, offset), record)
