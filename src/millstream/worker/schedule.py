"""Schedules: events at times that are known beforehand. All processes keep one timetable; the broker says who was first.

A schedule is a publisher, not a second kind of handler: retries, dead letters and groups are those of any event.

    last slot stored ──► slots that are due ──► late? ask the broker what others have stored ──► store one by one, in order

A slot is a moment at which an event falls due. Storing its event and "this schedule has come so far" are one step, and only
a slot behind the last one is taken. So it does not matter how many processes try, nor where one of them dies: there is no
leader, no lease, and no message between them. What a process does not know (its slot was stored, the reply got lost) it asks
again, and is told that it was there already.

A slot is *missed* when it is more than ten seconds old before anybody comes to it, since no process ran, or a clock jumped.
A slot that a process has come to in time is not: it is stored when the broker takes it, however long that is. Those that
fall due until then are.

The clocks of the processes are believed. One that is fast publishes early, for all of them: the earliest clock decides.
One that is set back waits until it is past the last slot again, so nothing comes twice.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, tzinfo
from hashlib import blake2b
from itertools import islice, takewhile
from typing import Any, Literal, Protocol, TypeAlias, TypeVar
from zoneinfo import ZoneInfo

from millstream.errors import BadSetting, BrokerDown, BrokerError, NotSupported, Unconfirmed
from millstream.event import field_names, type_of
from millstream.handlers.router import Part, Runtime
from millstream.handlers.subscriber import Subscriber
from millstream.stream import Stream
from millstream.telemetry import SLOT_FAILED, SLOT_PUBLISHED, SLOTS_MISSED, logger
from millstream.units import MAX_DELAY_S, Duration, check_name, seconds
from millstream.worker.backoff import Backoff

E = TypeVar("E")

Missed: TypeAlias = Literal["skip", "last", "all"]
"""What becomes of slots that nobody was there for: none is published, the latest one, or up to 1,000 of them."""

LATE_MS = 10_000  # a restart takes so long, and a process that is busy; more means that nobody was there
MAX_CAUGHT_UP = 1_000  # a schedule of seconds after a week's holiday must not flood its groups
LEAST_INTERVAL_MS = 100  # each process asks the broker at each slot
AHEAD_MS = 60_000  # no clock is fast by so much without somebody having to look at it
LOOK_S = 30.0  # how soon a clock that was set is noticed
_EXAMPLE = "write five fields, minute hour day-of-month month day-of-week, as in '*/5 * * * *' or '0 9 * * MON-FRI'"


class Timetable(Protocol):
    """When the slots are, in milliseconds since the epoch."""

    line: str
    """As it was written."""
    zone: tzinfo

    def slots(self, after_ms: int) -> Iterator[int]:
        """Those behind a moment, in their order."""
        ...

    def back(self, until_ms: int) -> Iterator[int]:
        """Those up to a moment, the latest first."""
        ...


class Schedule:
    """A part that publishes an event at each slot of a timetable, once, whichever processes run and crash."""

    def __init__(
        self,
        timetable: Timetable,
        make: Callable[..., Any],
        *,
        to: Stream[Any],
        name: str | None,
        missed: Missed,
    ) -> None:
        if missed not in ("skip", "last", "all"):
            raise BadSetting(f"missed={missed!r}: 'skip', 'last' or 'all'")
        self.timetable = timetable
        self.stream = to
        self.missed = missed
        self._make, kind = _maker(make, to, named=name is not None)
        self.name = check_name("schedule", name) if name is not None else _name(kind, timetable, to)

    def __repr__(self) -> str:
        return f"<schedule {self.name!r}: {self.timetable.line} to {self.stream.name!r}>"

    def event(self, at_ms: int) -> Any:
        """The event of a slot. Raises what its maker raises."""
        return self._make(datetime.fromtimestamp(at_ms / 1000, self.timetable.zone))

    def subscribers(self) -> Iterable[Subscriber]:
        """None."""
        return ()

    def streams(self) -> Iterable[Stream[Any]]:
        """The one that it publishes to."""
        return (self.stream,)

    @asynccontextmanager
    async def running(self, runtime: Runtime) -> AsyncIterator[None]:
        """Publishes inside the block."""
        if not runtime.broker.traits.slots:
            raise NotSupported(f"{runtime.broker.url} cannot publish on a schedule: it does not keep slots")
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(_Keeping(self, runtime).run(), name=f"schedule {self.name}")
            try:
                yield
            finally:
                keeping.cancel()


def schedule(
    line: str,
    make: type[E] | Callable[[datetime], E],
    *,
    to: Stream[E],
    tz: str = "UTC",
    name: str | None = None,
    missed: Missed = "last",
) -> Part:
    """Publish an event at the times of a cron line, as in `"*/5 * * * *"`: once for each, whichever processes run.

    The five fields and their signs are those of Debian's cron; `L` is the last day of a month, `MON#2` its second Monday.
    `make` is an event class without required fields, or a function of the slot's time. When clocks go forward in `tz`, what
    falls into the missing hour comes right after it; when they go back, what has fixed hours comes once, and what repeats
    all day long (`*/30 * * * *`) goes on as ever.

    The name is durable: under it, the broker remembers the last slot. Left out, it is made of the stream, the type and the
    line, so that a changed line is a new schedule, which begins with its next slot. Two apps with one name on one stream
    keep the same schedule. Slots that nobody was there for are told, and then: `missed="last"` publishes the latest one,
    `"all"` up to 1,000, `"skip"` none. Needs `millstream[cron]`. Raises `BadSetting`.
    """
    return Schedule(_Cron(line, tz), make, to=to, name=name, missed=missed)


def every(
    interval: Duration,
    make: type[E] | Callable[[datetime], E],
    *,
    to: Stream[E],
    name: str | None = None,
    missed: Missed = "last",
) -> Part:
    """Publish an event in equal intervals, at multiples of the interval since 1970 in UTC; otherwise as `schedule`."""
    return Schedule(_Every(interval), make, to=to, name=name, missed=missed)


def schedules(parts: Iterable[Part]) -> list[Schedule]:
    """The schedules among these parts. Raises `BadSetting` where two have one name on one stream."""
    found: dict[tuple[str, str], Schedule] = {}
    for part in parts:
        if isinstance(part, Schedule):
            other = found.setdefault((part.stream.name, part.name), part)
            if other is not part:
                raise BadSetting(
                    f"two schedules of this app are named {part.name!r} on stream {part.stream.name!r}, "
                    f"{other.timetable.line!r} and {part.timetable.line!r}: give one of them another name="
                )
    return list(found.values())


class _Keeping:
    """A schedule in this process. Ends by cancellation, or with an error that trying again cannot mend."""

    def __init__(self, schedule: Schedule, runtime: Runtime) -> None:
        self._schedule = schedule
        self._runtime = runtime
        self._clock = runtime.clock
        self._backoff = Backoff("publish", f"(schedule {schedule.name})", runtime.clock, runtime.telemetry)
        self._last_ms = 0

    async def run(self) -> None:
        await self._begin()
        while True:
            next_ms = next(self._schedule.timetable.slots(self._last_ms))
            while (left_ms := next_ms - self._clock.now_ms()) > 0:
                await self._clock.sleep(min(left_ms / 1000, LOOK_S))
            await self._catch_up(self._clock.now_ms())

    async def _begin(self) -> None:
        """Find out how far it has come. At its very first start, note that: else nobody would know what is missed later."""
        schedule, now_ms = self._schedule, self._clock.now_ms()  # before we ask: what falls due meanwhile is to come
        self._last_ms = await self._stored_ms()
        if not self._last_ms:
            await self._store(_latest(schedule.timetable, now_ms), None)
        elif self._last_ms > now_ms + AHEAD_MS:
            logger.warning(
                "schedule %s has come to %s already, which lies ahead: a clock was fast. Nothing is published before then; "
                "to go on at once, give it another name=",
                schedule.name,
                _words(schedule, self._last_ms),
            )

    def _due(self, now_ms: int) -> list[int]:
        """The slots that are due, in their order; of more than can be caught up, the latest ones and one more."""
        timetable, most = self._schedule.timetable, MAX_CAUGHT_UP + 1
        due = list(islice(takewhile(lambda at_ms: at_ms <= now_ms, timetable.slots(self._last_ms)), most))
        if len(due) == most:
            due = sorted(islice(timetable.back(now_ms), most))
        return due

    async def _catch_up(self, now_ms: int) -> None:
        due = self._due(now_ms)
        if due and (len(due) > 1 or now_ms - due[-1] > LATE_MS):
            self._last_ms = max(self._last_ms, await self._stored_ms())  # others may have been there
            due = self._due(now_ms)
        if due:
            await self._publish(due, now_ms)

    async def _publish(self, due: Sequence[int], now_ms: int) -> None:
        fresh = [at_ms for at_ms in due if now_ms - at_ms <= LATE_MS]
        match self._schedule.missed:
            case "all":
                chosen = due[-MAX_CAUGHT_UP:]
            case "last":
                chosen = fresh or due[-1:]
            case "skip":
                chosen = fresh
        passed = due[: len(due) - len(chosen)]
        ours = await self._publish_slot(chosen[0]) if chosen else await self._store(passed[-1], None)
        if ours and len(due) > len(fresh):
            self._tell_missed(due[: len(due) - len(fresh)], len(passed), more=len(due) > MAX_CAUGHT_UP)
        for at_ms in chosen[1:]:
            await self._publish_slot(at_ms)

    async def _publish_slot(self, at_ms: int) -> bool:
        """Store the event of a slot, unless somebody has. False when it was there, or cannot be made."""
        schedule = self._schedule
        try:
            event = schedule.event(at_ms)
            ours = await self._store(at_ms, event)
        except BrokerError:
            raise
        except Exception as error:  # the user's function, or an event that the stream does not take
            self._last_ms = at_ms
            logger.exception("schedule %s has no event for %s: passed over", schedule.name, _words(schedule, at_ms))
            self._tell(SLOT_FAILED, at_ms=at_ms, exception=error)
            return False
        if ours:
            self._tell(SLOT_PUBLISHED, at_ms=at_ms)
        return ours

    async def _store(self, at_ms: int, event: Any) -> bool:
        """Store a slot, however long the broker takes; False when somebody else has, as far as anybody can tell."""
        doubtful = False
        while True:
            try:
                stored = await self._runtime.publish_slot(
                    event, to=self._schedule.stream, schedule=self._schedule.name, at_ms=at_ms
                )
            except (BrokerError, Unconfirmed) as error:
                doubtful = True
                await self._pause(error)
                continue
            self._backoff.reset()
            self._last_ms = max(self._last_ms, at_ms)
            return stored or doubtful

    async def _stored_ms(self) -> int:
        """The last slot that is stored; 0 for none."""
        while True:
            try:
                slots = await self._runtime.broker.admin.slots(self._schedule.stream.name)
            except BrokerError as error:
                await self._pause(error)
                continue
            self._backoff.reset()
            return slots.get(self._schedule.name, 0)

    async def _pause(self, error: BrokerError | Unconfirmed) -> None:
        await self._backoff.pause(error if isinstance(error, BrokerError) else BrokerDown(str(error)))

    def _tell_missed(self, missed: Sequence[int], passed: int, *, more: bool) -> None:
        schedule = self._schedule
        logger.warning(
            "schedule %s missed %s slots, the last one at %s: %d of them are published now, as missed=%r says",
            schedule.name,
            f"more than {MAX_CAUGHT_UP:,}" if more else f"{len(missed):,}",
            _words(schedule, missed[-1]),
            len(missed) - passed,
            schedule.missed,
        )
        self._tell(SLOTS_MISSED, count=len(missed), passed=passed, first_ms=missed[0], last_ms=missed[-1])

    def _tell(self, name: str, **measurements: Any) -> None:
        schedule = self._schedule
        self._runtime.telemetry.emit(name, schedule=schedule.name, stream=schedule.stream.name, **measurements)


def _latest(timetable: Timetable, now_ms: int) -> int:
    """The latest slot that is due: none behind it is."""
    at_ms = next(timetable.back(now_ms), now_ms)
    # Within an hour that comes twice, going back misses the slots of its first time.
    return max(takewhile(lambda later_ms: later_ms <= now_ms, timetable.slots(at_ms)), default=at_ms)


class _Cron:
    """The times of a cron line."""

    def __init__(self, line: str, zone: str) -> None:
        try:
            from cronsim import CronSim, CronSimError
        except ImportError:
            raise BadSetting(
                f"schedule({line!r}) needs a library for cron lines: pip install 'millstream[cron]'; every() needs none"
            ) from None
        if not isinstance(line, str) or len(line.split()) != 5:
            raise BadSetting(f"{line!r} is not a cron line: {_EXAMPLE}")
        self.line = " ".join(line.split())
        self.zone = _zone(zone)
        self._simulate = CronSim
        try:
            if next(self.slots(0), None) is None:
                raise BadSetting(f"{line!r} never falls due: there is no such day")
        except CronSimError as error:
            raise BadSetting(f"{line!r} is not a cron line, {str(error).lower()}: {_EXAMPLE}") from None

    def slots(self, after_ms: int) -> Iterator[int]:
        """Those behind a moment."""
        for moment in self._simulate(self.line, datetime.fromtimestamp(after_ms // 1000, self.zone)):
            at_ms = int(moment.timestamp()) * 1000
            if (
                at_ms > after_ms
            ):  # an hour that comes twice is counted once: it may lie before a moment in its repetition
                after_ms = at_ms
                yield at_ms

    def back(self, until_ms: int) -> Iterator[int]:
        """Those up to a moment."""
        until_ms += 1
        for moment in self._simulate(self.line, datetime.fromtimestamp(until_ms // 1000 + 1, self.zone), reverse=True):
            at_ms = int(moment.timestamp()) * 1000
            if at_ms < until_ms:
                until_ms = at_ms
                yield at_ms


class _Every:
    """Multiples of an interval since the epoch."""

    zone: tzinfo = UTC

    def __init__(self, interval: Duration) -> None:
        every_ms = round(seconds(interval) * 1000)
        if not LEAST_INTERVAL_MS <= every_ms <= MAX_DELAY_S * 1000:
            raise BadSetting(f"every({interval!r}): from {LEAST_INTERVAL_MS} ms to {MAX_DELAY_S / 86_400:.0f} days")
        self.line = f"every {_interval(every_ms)}"
        self._every_ms = every_ms

    def slots(self, after_ms: int) -> Iterator[int]:
        """Those behind a moment."""
        at_ms = after_ms - after_ms % self._every_ms
        while True:
            at_ms += self._every_ms
            yield at_ms

    def back(self, until_ms: int) -> Iterator[int]:
        """Those up to a moment."""
        yield from range(until_ms - until_ms % self._every_ms, 0, -self._every_ms)


def _maker(make: Any, to: Stream[Any], *, named: bool) -> tuple[Callable[[datetime], Any], str]:
    """How the event of a slot is made, and the wire name of its type, as far as that is known."""
    if not isinstance(to, Stream):
        raise BadSetting(f"to={to!r} is not a stream; write ticks = Stream('ticks', Tick) and give that")
    if isinstance(make, type):
        return _made_by_class(make, to)
    if not callable(make) or inspect.iscoroutinefunction(make):
        raise BadSetting(f"{make!r} makes no events: give an event class, or a function (not async) of the slot's time")
    if len(to.types) > 1 and not named:
        raise BadSetting(
            f"stream {to.name!r} has {len(to.types)} types, and a function could make any: name the schedule with name="
        )
    return make, next(iter(to.types))


def _made_by_class(cls: type, to: Stream[Any]) -> tuple[Callable[[datetime], Any], str]:
    mark = type_of(cls)
    if mark is None or to.types.get(mark.wire) is not cls:
        carried = ", ".join(other.__name__ for other in to.types.values())
        raise BadSetting(f"stream {to.name!r} does not carry {cls.__name__}; it carries {carried}")
    try:
        cls()
    except Exception as error:
        raise BadSetting(
            f"{cls.__name__} cannot be made of nothing ({' '.join(str(error).split())}): give a function of the slot's "
            f"time, as in lambda at: {cls.__name__}({', '.join(f'{name}=…' for name in field_names(cls) or ())})"
        ) from None
    return lambda _: cls(), mark.wire


def _name(kind: str, timetable: Timetable, to: Stream[Any]) -> str:
    """What it is called for ever: readable, and another one wherever stream, type, line or zone are others."""
    words = "\0".join((to.name, kind, timetable.line, str(timetable.zone)))
    stem = "".join(char if char.isalnum() or char in "._-" else "-" for char in kind[:40])
    return f"{stem}-{blake2b(words.encode(), digest_size=4).hexdigest()}"


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError):
        raise BadSetting(
            f"tz={name!r} is not a time zone: write one as in 'Europe/Berlin'; where none is known, "
            "pip install 'millstream[cron]' brings them"
        ) from None


def _interval(interval_ms: int) -> str:
    for unit, unit_ms in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)):
        if interval_ms % unit_ms == 0:
            return f"{interval_ms // unit_ms}{unit}"
    return f"{interval_ms}ms"


def _words(schedule: Schedule, at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, schedule.timetable.zone).isoformat(timespec="seconds")
