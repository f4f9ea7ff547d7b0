"""One life of a consumer: two links, a name that is used once, and what is held under it.

    enter ─► armed ─MULTI XACK EXEC─► sent ─the answer shows our nonce─► armed
                                        └─ no answer ─► repair: new link, the old one killed ─► arm, recover ─► armed
    ended: fenced, another life of the server (run_id), or closed; what was held is lost, or was handed back

**Settling** may only be done while the fence stands; `acks.py` says how that costs nothing.

**Reading** may block, so it has a link of its own: an ack behind a blocked read would wait for it. A GET of the fence
follows each read; what a fenced consumer still read is not run: it lies under a name without fence, which the sweep finds.
A read is never cut: whoever is cancelled while it waits leaves the answer for the next one.

**What was delivered and never seen** (a lost reply) is pending under a living name, and nobody would ever take it away. So
until an answer has come it counts as lost: `recover` compares the pending list with what is in memory, after each repair,
and every minute. It runs only while no answer is under way.

The hot path, claim and ack of a fresh event of 200 bytes, costs this process 2.0 µs, system calls included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from millstream.brokers.base import Claim, Letter, OtherOrder, Output, Position, Settlement, Subscription
from millstream.brokers.redis.acks import MAX_ACKS, Acks
from millstream.brokers.redis.claims import again
from millstream.brokers.redis.joining import confirm, join
from millstream.brokers.redis.letters import given_up
from millstream.brokers.redis.link import BLOCK_MARGIN_S, BLOCK_S, Answers, Link, ReplyError, pack, vanished
from millstream.brokers.redis.members import MAX_ITEMS, Members, Place
from millstream.brokers.redis.outputs import Staged, Targets
from millstream.brokers.redis.passed import Passed
from millstream.brokers.redis.scripts import scripts
from millstream.brokers.redis.sizes import Sizes
from millstream.errors import BrokerDown, BrokerError, BrokerRefused
from millstream.units import MAX_DEAD
from millstream.wire.entry import read_page

if TYPE_CHECKING:
    from millstream.brokers.redis.broker import RedisBroker

MAX_WAITING = 100_000  # waiting entries of a partition; above, nothing new is read, or an outage would pile all up here
MAX_DUE_LOOKS = 64  # partitions whose first due time is asked for in one watch
AUDIT_S = 60.0
TRUST = 0.75  # of the lease: what was claimed is handed out while the last beat is younger

_PING = pack("PING")
_NEVER = float("inf")
_WAIT = frozenset({"retry", "postpone", "release"})


class Item(NamedTuple):
    """One delivery as `settle.lua` takes it."""

    verdict: str
    offset: str
    attempt: int
    detail: str | int = 0
    more: str = ""
    """The error of a dead letter; of a pack that is to be tried again, what is left of it."""
    outputs: Sequence[Output] = ()
    """What is stored with it, in the same step."""
    letters: Sequence[Letter] = ()
    """Of a pack, the events that are given up, in the same step too."""


class Incarnation:
    """A member of a group, from `enter` to its end. Methods raise `LeaseLost` when it has ended on the server."""

    def __init__(self, broker: RedisBroker, place: Place, subscription: Subscription, name: str) -> None:
        clock = broker.clock
        self.place = place
        self.name = name
        self.members = Members(place, clock, subscription.lease_s, name)
        self.held: list[dict[str, int]] = [{} for _ in place.partitions]
        """Per partition what is held, and its delivery count; negative where a note must be cleared with it."""
        self.surplus: list[Claim] = []
        """Held, and not handed out yet: all that is claimed comes here first, so that no error or cancelling loses it."""
        self.due_ms = [_NEVER] * len(place.partitions)
        """When the first waiting entry of each partition is due, in the server's time."""
        self.doubted: set[Position] = set()
        """Those whose ack was not answered. It is not sent again as it was: who is asked then may not hold it any more."""
        self.full: list[int] = []
        """Partitions that had as many events as the last read asked of each, so they may have more."""
        self._broker = broker
        self._clock = clock
        self._subscription = subscription
        self._nonce = clock.nonce().encode()
        self._fence = place.fence(name)
        self._partition_of = {at.log: partition for partition, at in enumerate(place.at)}
        self._reader: Link | None = None
        self._writer: Link | None = None
        self._passed = Passed(place)
        self._acks = Acks(place, name, self._nonce, lambda: self.writer)
        self._returned: dict[Position, Claim] = {}
        self._reading: Answers | None = None
        self._blocked_until_ms = 0.0
        self._waiting = [0] * len(place.partitions)
        self._sizes = Sizes()
        self._asked = 0
        self._next_look = 0
        self._watch_at = self._beat_at = self._asked_at = self._recover_at = self._doubt_until = 0.0
        self._unseen = False
        self._server_ms = 0.0

    # Its life.

    @property
    def fenced(self) -> bool:
        """True when it has ended on the server, as far as we know."""
        return self._acks.fenced

    @property
    def connected(self) -> bool:
        """True while both links are usable."""
        return not (self._reader is None or self._writer is None or self._reader.closed or self._writer.closed)

    async def enter(self, start: str) -> None:
        """Connect, make sure that the group exists, and begin to live. Raises `GroupOwned`."""
        self._writer = await self._broker.connect(f"{self.name}-writer")
        self._reader = await self._broker.connect(f"{self.name}-reader")
        if self._reader.run_id != self._writer.run_id:
            raise BrokerDown("two connections reached two servers: a failover is under way")
        await self.join(start)
        await self._passed.begin(self._writer)
        sent_at = self._clock.monotonic()
        keys = self._fence, self.place.live, self.place.tick
        state, *answer = await self._writer.run(scripts["enter"], keys, (self.name, self._nonce))
        if state != b"OK":
            raise BrokerDown(f"the name {self.name!r} was used before: try again")
        self._set_time(sent_at, answer[1])
        self._recover_at = self._beat_at + AUDIT_S
        try:
            await confirm(self._writer, self.place)
        except OtherOrder:
            await self.leave()
            raise
        await self._acks.arm()

    async def join(self, start: str) -> None:
        """Make sure that the group exists on all partitions. Raises `GroupOwned`, `NotSupported`."""
        await join(self.writer, self.place, self._subscription.owner, start, self._subscription.lease_s)

    async def repair(self) -> None:
        """Replace the links that were lost. Raises `LeaseLost` when the server, or our place in it, is another."""
        if self.reader.closed:
            self._reader, self._reading = await self._replaced(self.reader, "reader"), None
        if self.writer.closed:
            self._writer = await self._replaced(self.writer, "writer")
            await self._acks.arm()

    async def leave(self, writer: Link | None = None) -> set[int]:
        """Hand back what is still pending under this name, and forget it; by another life's writer where ours is lost."""
        link = writer or self.writer
        for old in self._reader, self._writer:
            if old is None or old is link:
                continue
            old.close()
            if old.run_id and old.run_id == link.run_id:  # else the number may be another client's
                await link.calls([("CLIENT", "KILL", "ID", old.client_id)])  # a read might still be served
        score = await self.members.score(link, self.name)
        return await self.members.evict(link, self.name, score, crashed=False)

    def close(self) -> None:
        """Give up the links."""
        for link in self._reader, self._writer:
            if link is not None:
                link.close()

    def holds(self, position: Position) -> bool:
        """True while it is ours, as far as we know."""
        return position.offset in self.held[position.partition]

    def drop_all(self) -> list[Position]:
        """Forget what is held: somebody else has it, or will."""
        positions = [Position(partition, offset) for partition, held in enumerate(self.held) for offset in held]
        for held in self.held:
            held.clear()
        self.surplus.clear()
        self.doubted.clear()
        self._returned.clear()
        return positions

    def let_go(self, partition: int) -> None:
        """Forget what was not handed out yet of a partition: it was handed back."""
        self.surplus = [claim for claim in self.surplus if claim.position.partition != partition]
        self._returned = {at: claim for at, claim in self._returned.items() if at.partition != partition}

    def stored(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Which of these are known to be stored: the answer was lost, and the event came to us once more since."""
        return [settlement.position in self._returned for settlement in settlements]

    @property
    def in_doubt(self) -> bool:
        """True while something may be sent again, or waits for that."""
        return bool(self.doubted or self._returned)

    def answered(self, positions: Iterable[Position]) -> None:
        """Nothing of these will be sent again: what came once more since is handed out."""
        for position in positions:
            self.doubted.discard(position)
            if (claim := self._returned.pop(position, None)) is not None:
                self.held[position.partition].setdefault(position.offset, -claim.attempt)
                self.surplus.append(claim)

    # Time.

    @property
    def now_ms(self) -> float:
        """The server's time now, as far as the last beat told."""
        return self._server_ms + (self._clock.monotonic() - self._asked_at) * 1000

    async def beat(self) -> None:
        """Say that we live."""
        sent_at = self._clock.monotonic()
        keys = self._fence, self.place.live, self.place.tick, *(at.due for at in self.place.at)
        try:
            state, *answer = await self.writer.run(scripts["beat"], keys, (self.name, self._nonce))
        except BrokerError:
            self.members.forget()
            raise
        if state != b"OK":
            raise self._acks.lost()
        self._set_time(sent_at, answer[1])
        for partition, first in enumerate(answer[2::2]):
            self.due_ms[partition] = float(first) if first else _NEVER
        self._waiting = answer[3::2]

    async def trust(self) -> None:
        """Beat when the last beat is so old that we may have been taken for dead."""
        if self._clock.monotonic() - self._beat_at > TRUST * self._subscription.lease_s:
            await self.beat()

    async def watch(self) -> None:
        """Look after the other members, and for what is due, now and then."""
        now = self._clock.monotonic()
        if now < self._watch_at:
            return
        self._watch_at = now + self.members.watch_s
        self.set_free(await self.members.watch(self.writer))
        count = len(self.due_ms)
        looked = [(self._next_look + step) % count for step in range(min(count, MAX_DUE_LOOKS))]
        self._next_look = (looked[-1] + 1) % count
        first = [("ZRANGE", self.place.at[partition].due, 0, 0, "WITHSCORES") for partition in looked]
        replies = await self.writer.calls(first)
        for partition, reply in zip(looked, replies, strict=True):
            if isinstance(reply, ReplyError):
                raise self.writer.failure(reply, "ZRANGE")
            self.due_ms[partition] = float(reply[1]) if reply else _NEVER

    def set_free(self, partitions: Iterable[int]) -> None:
        """Something in these partitions can be taken now."""
        for partition in partitions:
            self.due_ms[partition] = 0.0

    def wait_ms(self) -> float:
        """How long nothing is due and nobody needs to be watched."""
        watch_ms = (self._watch_at - self._clock.monotonic()) * 1000
        return min(min(self.due_ms) - self.now_ms, watch_ms, BLOCK_S * 1000)

    # Claiming.

    async def take(self, limit: int) -> None:
        """Claim up to `limit` entries that are due, into `surplus`."""
        for partition, due_ms in enumerate(self.due_ms):
            if due_ms > self.now_ms or limit <= 0:
                continue
            at = self.place.at[partition]
            keys = at.log, self._fence, at.due, at.note, at.stats
            taken, first = await self._hand_out("take", partition, keys, (min(limit, MAX_ITEMS),))
            limit -= taken
            # Nothing yet: the server's clock is a little behind our idea of it, so look again in a moment, not at once.
            self.due_ms[partition] = first if taken else max(first, self.now_ms + 1)

    async def read(self, limit: int, block_ms: int, partitions: Sequence[int] = ()) -> None:
        """Claim new events, about `limit`, into `surplus`; or see the answer of an earlier read that was cancelled."""
        self.full = []
        if self._reading is None:
            partitions = partitions or self._open_partitions()
            command = self._read_command(limit, block_ms, partitions)
            if not command:
                return await self._clock.sleep(block_ms / 1000)
            self._blocked_until_ms = self.now_ms + block_ms
            looks = self._passed.look(partitions)
            packed = b"".join([*looks, command])
            self._reading = await self.reader.post(packed, len(looks) + 2, block_ms / 1000 + BLOCK_MARGIN_S)
            replies = await self._answer(self._reading, block_ms)  # cancelled: it stays, and so does its answer
        else:
            replies = await self._cut(self._reading)
        self._reading, self._blocked_until_ms = None, 0.0
        *looked, found, nonce = replies
        if isinstance(found, ReplyError):
            raise self.reader.failure(vanished(found), "XREADGROUP")
        passages = self._passed.passages(looked, found or ())
        if nonce == self._nonce:
            self._claim(found or ())
        await self._passed.count(self.writer, passages)
        if nonce != self._nonce:
            raise self._acks.lost()  # what came with it is not ours: it lies under a name without fence

    async def recover(self) -> None:
        """Find what was delivered to us and never seen: into `surplus`. Only while no answer is under way."""
        if self._reading is not None or not (self._unseen or self._clock.monotonic() >= self._recover_at):
            return
        # A repair may begin meanwhile; and when this fails, it is due again.
        self._unseen, self._recover_at = False, 0.0
        for partition, at in enumerate(self.place.at):
            start = "-"
            while start:
                page = await self.writer.call("XPENDING", at.log, self.place.group, start, "+", MAX_ACKS, self.name)
                missing = [id_ for id_, *_ in page if id_.decode() not in self.held[partition]]
                for begin in range(0, len(missing), MAX_ITEMS):
                    await self._recall(partition, missing[begin : begin + MAX_ITEMS])
                start = f"({page[-1][0].decode()}" if len(page) == MAX_ACKS else ""
        now = self._clock.monotonic()
        self._recover_at = self._doubt_until if now < self._doubt_until else now + AUDIT_S

    async def see(self) -> None:
        """See what was delivered and not seen yet, so that it can be handed back."""
        if self._reading is not None:
            await self.read(0, 0)
        await self.recover()

    # Settling.

    async def acknowledge(self, acks: Sequence[tuple[int, Sequence[str]]]) -> None:
        """Finish held deliveries, per partition; all of them, or none when it raises.

        One write, one transaction: costs the server no more than XACK alone. But XACK asks nothing: what is sent again,
        and may have been given back since, has to be compared with owner and count.
        """
        try:
            self._miss(await self._acks.send(acks))
        except BaseException:
            for partition, offsets in acks:
                held = self.held[partition]
                held.update((offset, -abs(held[offset])) for offset in offsets if offset in held)
                self.doubted.update(Position(partition, offset) for offset in offsets)
            raise

    async def finish(self, partition: int, items: Sequence[Item], targets: Targets) -> list[Any]:
        """Up to `MAX_ITEMS` verdicts of any kind; the answer to each as in `settle.lua`."""
        at = self.place.at[partition]
        keys = at.log, self._fence, at.due, at.note, at.dead, at.stats
        blobs: list[bytes] = []
        staged = Staged(targets, len(keys), blobs)
        words = [word for item in items for word in item[:5]]
        outputs = {
            n: [staged.add(output) for output in item.outputs] for n, item in enumerate(items, 1) if item.outputs
        }
        letters = {
            n: [given_up(letter, blobs) for letter in item.letters] for n, item in enumerate(items, 1) if item.letters
        }
        who = self.place.group, self.name, self._nonce, partition, MAX_DEAD
        packed = b"".join(map(msgspec.msgpack.encode, (outputs, letters))) if outputs or letters else b""
        args = (*who, len(items), packed, *words, *blobs)
        state, *results = await self.writer.run(scripts["settle"], (*keys, *staged.keys), args)
        if state == b"FENCED":
            raise self._acks.lost()
        if state == b"TYPE":
            raise BrokerRefused(f"the key {results[0].decode()!r} holds something that is not Millstream's")
        self._miss(results.count(0))
        return list(results)

    async def schedule(self, partition: int, items: Sequence[Item]) -> None:
        """Remember when these are due, and end a read that would block longer."""
        at_ms = min((int(item.detail) for item in items if item.verdict in _WAIT), default=_NEVER)
        self.due_ms[partition] = min(self.due_ms[partition], at_ms)
        if at_ms < self._blocked_until_ms:
            await self.writer.calls([("CLIENT", "UNBLOCK", self.reader.client_id)])

    async def mark(self, partition: int, offsets: Sequence[str]) -> None:
        """Note that the handlers of these suspects start now."""
        keys = self.place.at[partition].note, self._fence
        for begin in range(0, len(offsets), MAX_ACKS):
            if await self.writer.run(scripts["mark"], keys, (self._nonce, *offsets[begin : begin + MAX_ACKS])) != b"OK":
                raise self._acks.lost()

    # Below: how.

    @property
    def writer(self) -> Link:
        """The link that never blocks."""
        if self._writer is None:
            raise BrokerDown("not connected")
        return self._writer

    @property
    def reader(self) -> Link:
        """The link that may block."""
        if self._reader is None:
            raise BrokerDown("not connected")
        return self._reader

    def _set_time(self, sent_at: float, server_ms: int) -> None:
        self._beat_at, self._server_ms = sent_at, server_ms
        # The best guess: the answer took as long as the question.
        self._asked_at = (sent_at + self._clock.monotonic()) / 2

    async def _replaced(self, old: Link, name: str) -> Link:
        link = await self._broker.connect(f"{self.name}-{name}")
        try:
            if not link.run_id or link.run_id != old.run_id:
                raise self._acks.lost()
            (killed,) = await link.calls([("CLIENT", "KILL", "ID", old.client_id)])
        except BaseException:
            link.close()
            raise
        if not old.client_id or str(killed).startswith("NOPERM"):
            # It may still be served: look again when it has ended.
            self._doubt_until = self._clock.monotonic() + BLOCK_S + 1
        self._unseen = True
        return link

    def _miss(self, outcomes: int) -> None:
        # A group that was made again delivers what we hold anew, which counts as a repeat. Where the outcome came to the
        # server before that, and its answer to us after it, that delivery is nobody's: look for it.
        self._unseen |= outcomes > 0

    async def _answer(self, reading: Answers, block_ms: int) -> list[Any]:
        # The server ends blocked reads every 100 ms only, so what falls due meanwhile would be late: we end them.
        if block_ms <= 0:
            return await reading
        timer = self._clock.call_later(block_ms / 1000, reading.leave)
        try:
            await reading
        finally:
            timer.cancel()
        return await self._cut(reading)

    async def _cut(self, reading: Answers) -> list[Any]:
        # The answer of a read whose awaiter is gone. It may be empty; it is never lost.
        if len(reading.got) < reading.wanted:
            await self.writer.calls([("CLIENT", "UNBLOCK", self.reader.client_id)])
            await self.reader.send(_PING, 1, BLOCK_S + BLOCK_MARGIN_S)  # is answered behind it
        return reading.got

    def _open_partitions(self) -> Sequence[int]:
        most = MAX_WAITING * self._subscription.fresh
        return [partition for partition, waiting in enumerate(self._waiting) if waiting < most]

    def _read_command(self, limit: int, block_ms: int, partitions: Sequence[int]) -> bytes:
        if not partitions:
            return b""
        self._asked = max(1, min(limit, self._sizes.most) // len(partitions))
        block = ("BLOCK", block_ms) if block_ms > 0 else ()
        logs = [self.place.at[partition].log for partition in partitions]
        count = ("COUNT", self._asked, *block, "STREAMS", *logs, *[">"] * len(logs))
        return pack("XREADGROUP", "GROUP", self.place.group, self.name, *count) + pack("GET", self._fence)

    def _claim(self, found: Sequence[Any]) -> None:
        largest_bytes = 0
        for log, entries in found:
            partition = self._partition_of[log]
            if len(entries) == self._asked:
                self.full.append(partition)
            add, held = self.surplus.append, self.held[partition]
            for offset, record, why in read_page(partition, entries):
                if len(record.data) > largest_bytes:
                    largest_bytes = len(record.data)
                if offset in held:  # the group was made again under us, and begins to count anew
                    held[offset] = 1 if held[offset] > 0 else -1
                else:
                    held[offset] = 1
                    add(Claim(Position(partition, offset), record, 1, 0, 0, why))
        if found:
            self._sizes.seen(largest_bytes)

    async def _recall(self, partition: int, ids: Sequence[bytes]) -> None:
        at = self.place.at[partition]
        await self._hand_out("recall", partition, (at.log, self._fence, at.note, at.stats), ids)

    async def _hand_out(
        self, script: str, partition: int, keys: Sequence[bytes], args: Sequence[Any]
    ) -> tuple[int, float]:
        # How many entries a script handed out, and when the next one is due.
        try:
            who = self.place.group, self.name, self._nonce
            state, *answer = await self.writer.run(scripts[script], keys, (*who, *args))
        except BaseException:
            self._unseen = True  # it may have handed them out, and we do not know
            raise
        if state != b"OK":
            raise self._acks.lost()
        first, _, *rows = answer
        held = self.held[partition]
        for id_, count, note, postponed, fields, *left in rows:
            offset = id_.decode()
            claim = again(partition, offset, count, note, postponed, fields, *left)
            if offset in held:  # what is sent again of its former outcome must not become that of this claim
                self._returned[claim.position] = claim
            else:
                self.surplus.append(claim)
            held[offset] = -count if note or left or postponed != b"0" else count
        return len(rows), float(first) if first else _NEVER
