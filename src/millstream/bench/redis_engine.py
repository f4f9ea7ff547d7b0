"""Redis as an engine: the same entries and the same commands, from bytes that were prepared before.

Publishing is measured with `redis-benchmark`, a program in C that comes with Redis, where that is installed and can log
in; everything else on a bare connection of our own, which parses answers in C and does no more with them than it must:

- `handle`: XREADGROUP, then in one write the XACK of what was read and the next XREADGROUP; one is always ahead;
- `both`: the same with as many XADD before it;
- `latency`: XADD on one connection, while another one is blocked in XREADGROUP.

No fence, no attempts, no decoding: what Millstream does beyond this is the difference that the ratio shows.
"""

from __future__ import annotations

import asyncio
import csv
import shutil
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from millstream.bench.engine import Limit, Waits
from millstream.bench.scenarios import LATENCY_RATE, WARM_UP, Load, percentile
from millstream.bench.wire import Address, Wire, pack
from millstream.clock import Clock
from millstream.errors import BrokerRefused
from millstream.units import MAX_APPEND_RECORDS
from millstream.wire import entry
from millstream.wire.entry import Record

ADDED_AT_ONCE = MAX_APPEND_RECORDS  # as Millstream does: where every write is synced, fewer at once would be slower
READ_AT_ONCE = 500
ENTRY_BYTES = 150  # of an entry, beside its data
MAX_SHARE = 0.8  # of the memory that it may use
BUSY = 100  # commands a second of others: somebody works there
WATCHED_S = 0.2  # for so long they are counted
TRIES = 50  # for a median
BLOCK_MS = 1_000
OWN = "our own connection, prepared bytes"
PROGRAM = "redis-benchmark"

Info = dict[str, str]


class RedisEngine:
    """A Redis server. All that it writes is under one key, which is removed afterwards."""

    def __init__(self, url: str, wire: Wire, namespace: str) -> None:
        self._url = url
        self._wire = wire
        self._clock = Clock()
        self._key = key_of(namespace)

    @classmethod
    @asynccontextmanager
    async def opened(cls, url: str, namespace: str) -> AsyncIterator[RedisEngine]:
        """Connected. Raises `BrokerDown`, `BrokerRefused`."""
        async with Wire.opened(url) as wire:
            yield cls(url, wire, namespace)

    async def objections(self, events: int, size_bytes: int) -> list[str]:
        """Memory, keys of others, and others at work."""
        info = await self._info()
        if not info:
            return ["it does not let us ask how full it is and who uses it (INFO)"]
        return [
            *_memory_objection(info, events * (size_bytes + ENTRY_BYTES)),
            *_key_objection(info),
            *await self._load_objection(),
        ]

    async def limit(self, load: Load, events: int, data: bytes) -> Limit | None:
        """See above."""
        words = _words(data)
        try:
            if load == "publish":
                letters = _words(b"x" * len(data))  # redis-benchmark prints the command into its table, quotes and all
                return await self._program(events, letters) or Limit(OWN, await self._publish(events, words))
            await self._wire.call("XGROUP", "CREATE", self._key, "bench", "0", "MKSTREAM")
            if load == "latency":
                return await self._latency(events, words)
            if load == "handle":
                await self._publish(events, words)
            return Limit(OWN, await self._handle(events, words if load == "both" else ()))
        finally:
            await self._wire.call("UNLINK", self._key)

    async def waits(self) -> Waits:
        """A PING, an event alone, and whether the server syncs each write."""
        try:
            trip_ms = await self._median_ms(lambda: self._wire.call("PING"))
            words = _words(b"{}")
            store_ms = await self._median_ms(lambda: self._wire.call("XADD", self._key, "*", *words))
        finally:
            await self._wire.call("UNLINK", self._key)
        return Waits(trip_ms, store_ms, syncs=await self._syncs())

    async def cpu_s(self) -> float | None:
        """What the server has used, in its own and in the kernel's code."""
        info = await self._info()
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"]) if "used_cpu_user" in info else None

    async def _publish(self, events: int, words: tuple[bytes, ...]) -> float:
        """Entries a second; two writes are on their way."""
        command = pack("XADD", self._key, "*", *words)
        ahead: deque[Awaitable[list[Any]]] = deque()
        began_s = self._clock.monotonic()
        for first in range(0, events, ADDED_AT_ONCE):
            count = min(ADDED_AT_ONCE, events - first)
            ahead.append(self._wire.write(command * count, count))
            if len(ahead) > 1:
                await ahead.popleft()
        await ahead.popleft()
        return events / (self._clock.monotonic() - began_s)

    async def _handle(self, events: int, words: tuple[bytes, ...]) -> float:
        """Entries a second, read and acknowledged; with `words`, published too."""
        read = pack("XREADGROUP", "GROUP", "bench", "one", "COUNT", READ_AT_ONCE, "STREAMS", self._key, ">")
        add, added, taken = pack("XADD", self._key, "*", *words) if words else b"", 0 if words else events, 0
        began_s = self._clock.monotonic()
        ahead = deque([self._wire.write(read, 1), self._wire.write(read, 1)])
        while taken < events:
            *_, found = await ahead.popleft()
            ids = [id_ for id_, fields in found[0][1] if fields] if found else []
            taken += len(ids)
            count = min(READ_AT_ONCE, events - added)
            added += count
            acks = pack("XACK", self._key, "bench", *ids) if ids else b""
            ahead.append(self._wire.write(add * count + acks + read, count + bool(ids) + 1))
        for answers in ahead:
            await answers
        return events / (self._clock.monotonic() - began_s)

    async def _latency(self, events: int, words: tuple[bytes, ...]) -> Limit:
        """From the write of an event to the wake-up of the connection that waits for it."""
        command, called_s, delays_ms = pack("XADD", self._key, "*", *words), deque[float](), list[float]()
        read = pack(
            *(
                "XREADGROUP",
                "GROUP",
                "bench",
                "one",
                "COUNT",
                100,
                "BLOCK",
                BLOCK_MS,
                "NOACK",
                "STREAMS",
                self._key,
                ">",
            )
        )

        async def wait(wire: Wire) -> None:
            while len(delays_ms) < events:
                (found,) = await wire.write(read, 1)
                now_s = self._clock.monotonic()
                delays_ms.extend((now_s - called_s.popleft()) * 1_000 for _ in (found[0][1] if found else ()))

        async with Wire.opened(self._url) as other, asyncio.TaskGroup() as tasks:
            tasks.create_task(wait(other))
            began_s = self._clock.monotonic()
            for number in range(events):
                await self._clock.sleep(max(0.0, began_s + number / LATENCY_RATE - self._clock.monotonic()))
                called_s.append(self._clock.monotonic())
                await self._wire.write(command, 1)
        ascending = sorted(delays_ms[min(WARM_UP, events // 2) :])
        return Limit(OWN, None, percentile(ascending, 0.5), percentile(ascending, 0.99))

    async def _program(self, events: int, words: tuple[bytes, ...]) -> Limit | None:
        """What redis-benchmark finds; None without it, or where it would show a password to everybody here."""
        program, address = shutil.which(PROGRAM), Address.parse(self._url)
        if program is None or address.login:
            return None
        where = ("-s", address.path) if address.path else ("-h", address.host, "-p", str(address.port))
        options = (*where, "--dbnum", str(address.db), "-n", str(events), "-c", "1", "-P", str(ADDED_AT_ONCE), "--csv")
        process = await asyncio.create_subprocess_exec(
            *(program, *options, "XADD", self._key, "*", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            printed, _ = await process.communicate()
        finally:
            with suppress(ProcessLookupError):  # it has ended, as it should
                process.kill()
            await process.wait()
        rows = list(csv.reader(printed.decode(errors="replace").splitlines()))
        if process.returncode or not rows:
            return None
        return Limit(f"{PROGRAM}, 1 connection, {ADDED_AT_ONCE:,} in flight", float(rows[-1][1]))

    async def _load_objection(self) -> list[str]:
        # Counted here: the server's own rate is a mean that still holds what we ourselves did a second ago.
        before = int((await self._info()).get("total_commands_processed", 0))
        await self._clock.sleep(WATCHED_S)
        after = int((await self._info()).get("total_commands_processed", 0))
        rate = (after - before - 1) / WATCHED_S
        return [f"others send it {rate:,.0f} commands a second"] if rate > BUSY else []

    async def _median_ms(self, call: Callable[[], Awaitable[Any]]) -> float:
        found = []
        for _ in range(TRIES):
            began_s = self._clock.monotonic()
            await call()
            found.append((self._clock.monotonic() - began_s) * 1_000)
        return sorted(found)[TRIES // 2]

    async def _syncs(self) -> str:
        try:
            asked = [await self._wire.call("CONFIG", "GET", name) for name in ("appendonly", "appendfsync")]
        except BrokerRefused:  # we may not ask
            return ""
        on = [answer[1] for answer in asked if answer] == [b"yes", b"always"]
        return "appendfsync always" if on else ""

    async def _info(self) -> Info:
        try:
            text: bytes = await self._wire.call("INFO", "everything")
        except BrokerRefused:  # we may not ask
            return {}
        return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)


def key_of(namespace: str) -> str:
    """The one key that a measurement of the engine has."""
    return f"{namespace}:engine"


async def remove(url: str, namespace: str) -> None:
    """Remove what a measurement that was killed has left."""
    async with Wire.opened(url) as wire:
        await wire.call("UNLINK", key_of(namespace))


def _words(data: bytes) -> tuple[bytes, ...]:
    """The fields of an event as Millstream writes it."""
    return entry.write(Record(0, "0" * 21, "bench.sale", data, source="bench"))


def _memory_objection(info: Info, needed: int) -> list[str]:
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    most, name = (most, "maxmemory") if most else (int(info.get("total_system_memory", 0)), "its machine's memory")
    if not most or used + needed <= MAX_SHARE * most:
        return []
    return [f"the events take about {needed:,} bytes, and it uses {used:,} of {most:,} ({name}) already"]


def _key_objection(info: Info) -> list[str]:
    counts = [value.partition("keys=")[2].partition(",")[0] for name, value in info.items() if name[:2] == "db"]
    keys = sum(int(count) for count in counts if count.isdecimal())
    return [f"it holds keys of others ({keys:,})"] if keys else []
