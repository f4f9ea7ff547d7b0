"""A member of a group that consumes in the order of keys: the same for every broker, over that broker's ledger.

    FREE ──acquire──► OURS(epoch) ──somebody asks──► DRAINING: nothing is handed out, what runs ends ──release──► FREE(heir)
                        │ silent for a lease, or found so by others
                        └► LOST: the window is dropped, `settle` answers False, `keep` tells it once, then acquire again

A partition is read by its owner alone, so nothing has to be claimed: reading costs the server nothing but the reading, and
progress is one small commit for as many events as were settled meanwhile. `window.py` holds the rules of the order,
`windows.py` those of taking turns, `share.py` who has which partition.

While one round of commits is under way outcomes gather, and leave with the next: a lone event is committed at once.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from millstream.brokers.base import Claim, Kept, Position, Settlement, Subscription
from millstream.brokers.budget import Budget
from millstream.brokers.ledger import Cursor, Grant, Lease, Ledger, State, View
from millstream.brokers.refused import Refused
from millstream.brokers.share import Sharing, look_s
from millstream.brokers.window import Window
from millstream.brokers.windows import Windows
from millstream.clock import Clock
from millstream.errors import BrokerDown, BrokerError, BrokerFull, LeaseLost, LogRegressed
from millstream.telemetry import ACQUIRED, BROKER_ERROR, RELEASED, Telemetry, logger
from millstream.units import DEAD_FULL_S

MAX_HEADS = 32  # of a partition, begun in one step
MAX_READ = 1_000  # events in one answer
TRUST = 0.75  # of the lease: past it, others may have taken over, and what is handed out may be settled already
FULL_TOLD_S = 1.0  # a partition that waits since too much is parked says so this often, at most
LEAST_WAIT_S = 0.001  # due times are whole milliseconds


class OrderedConsumer:
    """One running member of a group; see `brokers.base.Consumer` for its promises."""

    def __init__(
        self,
        ledger: Callable[[], Ledger],
        subscription: Subscription,
        clock: Clock,
        telemetry: Telemetry,
        budget: Budget | None = None,
    ) -> None:
        self._make = ledger
        self._ledger: Ledger | None = None
        self._subscription = subscription
        self._clock = clock
        self._telemetry = telemetry
        self._budget = budget or Budget()
        self._budget.join(self)
        self._windows = Windows(max_parked=-(-subscription.max_parked // subscription.stream.partitions))
        self._asked: set[int] = set()
        self._sharing = Sharing(subscription.lease_s)
        self._look_at = 0.0
        self._changed = asyncio.Event()
        self._begun: list[Claim] = []
        self._full_told_s = -FULL_TOLD_S
        self._waits_until_ms = 0.0
        self._entering = asyncio.Lock()
        self._committing = asyncio.Lock()
        self._closed = False
        self._beat_s = 0.0

    async def enter(self) -> None:
        """Become a member; what is free is taken with the first heartbeat."""
        ledger = await self._living()
        try:
            await self._share()
        except LeaseLost as error:
            self._end(ledger, error)

    async def fetch(self, limit: int, wait_s: float) -> list[Claim]:
        """Up to `limit` events, of each partition in order; waits up to `wait_s` for the first one."""
        until = self._clock.monotonic() + wait_s
        while True:
            changed = self._changed
            ledger = await self._living()
            try:
                await self._begin_heads(ledger, limit)
                await self._trust(ledger)
                claims = self._take_begun(limit)
                claims += self._windows.hand_out(limit - len(claims), self._tell_full)
                left_s = until - self._clock.monotonic()
                if not claims:
                    due_s = max(LEAST_WAIT_S, (self._windows.due_ms() - ledger.now_ms) / 1000)
                    wait_s = max(0.0, min(left_s, due_s))
                    self._waits_until_ms = ledger.now_ms + wait_s * 1000
                    try:
                        await self._read(ledger, limit, wait_s, changed)
                    finally:
                        self._waits_until_ms = 0.0
                    await self._trust(ledger)
                    claims = self._windows.hand_out(limit, self._tell_full)
            except LeaseLost as error:
                self._end(ledger, error)
                claims = []
            if claims or self._clock.monotonic() >= until:
                return claims

    async def begin(self, positions: Sequence[Position]) -> None:
        """Note that the handlers of these suspects start now. Raises `LeaseLost` when they are not ours."""
        ledger = await self._living()
        suspects: dict[Window, list[str]] = defaultdict(list)
        for position in positions:
            window = self._windows.get(position.partition)
            if window is None or not window.holds(position.offset):
                raise LeaseLost(f"{ledger.name} does not hold {position} any more")
            suspects[window].append(position.offset)
        for window, offsets in suspects.items():
            # It may have been lost, and even acquired anew, while the ledger was asked about another one.
            if not self._windows.has(window) or not await ledger.begin(window.partition, window.epoch, offsets):
                self._lose(window)
                raise LeaseLost(f"{ledger.name} does not hold partition {window.partition} any more")

    async def finish(self, positions: Sequence[Position]) -> list[bool]:
        """`settle` for events that are done, and with which nothing is stored."""
        offsets = defaultdict[int, list[str]](list)
        for position in positions:
            offsets[position.partition].append(position.offset)
        refused = set[Position]()
        for partition, some in offsets.items():
            window = self._windows.get(partition)
            not_ours = some if window is None else window.finish(some)
            refused.update(Position(partition, offset) for offset in not_ours)
        lost = await self._store(offsets)
        if not (refused or lost):
            return [True] * len(positions)
        return [position not in refused and position.partition not in lost for position in positions]

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Take in outcomes and commit what they are, partition by partition; False where an event was not ours any more."""
        windows, known = self._windows, list[tuple[int, bool]]()
        for settlement in settlements:
            partition = settlement.position.partition
            window = windows.get(partition)
            known.append((partition, window is not None and window.settle(settlement)))
        lost = await self._store({partition for partition, ours in known if ours})
        return [ours and partition not in lost for partition, ours in known]

    async def keep(self) -> Kept:
        """Beat; take, ask for and give partitions; tell what was lost, and what others ask for."""
        ledger = await self._living()
        try:
            await self._beat(ledger)
            with suppress(BrokerFull):  # which `settle` tells
                await self._commit(list(self._windows.values()))
            if self._clock.monotonic() >= self._look_at:
                await self._share()
        except LeaseLost as error:
            self._end(ledger, error)
        lost, self._windows.lost = frozenset(self._windows.lost), set()
        asked, self._asked = frozenset(self._asked), set()
        if lost:
            self._look_at = 0.0  # those partitions may be acquired again from now on
        return Kept(lost, asked)

    async def release(self, partitions: frozenset[int]) -> None:
        """Hand back what is held of these partitions, store their progress, and give them to whoever asked for them."""
        await self._release([window for window in self._windows.values() if window.partition in partitions])

    async def close(self) -> None:
        """Store all progress, hand back all that is held, and leave the group."""
        if self._closed:
            return
        self._closed = True
        self._budget.leave(self)
        ledger = self._ledger
        try:
            try:
                await self._release(list(self._windows.values()))
            finally:
                if ledger is not None:
                    await ledger.leave()
        except BrokerError as error:
            name = self._subscription.group
            logger.info("group %s was left without saying so, others take over what was held: %s", name, error)
        self._windows.clear()
        self._wake()
        self._ledger = None

    # Lives.

    async def _living(self) -> Ledger:
        if self._ledger is not None:
            return self._ledger
        async with self._entering:
            if self._closed:
                raise BrokerError("this consumer is closed")
            if self._ledger is None:
                ledger = self._make()
                try:
                    self._beat_s = self._clock.monotonic()
                    await ledger.enter()
                except LeaseLost as error:
                    raise BrokerDown(f"{ledger.name} was thrown out before it had begun: {error}") from error
                self._ledger, self._look_at = ledger, 0.0
            return self._ledger

    async def _trust(self, ledger: Ledger) -> None:
        # Before anything is handed out, and not after: what is out, and on its way to nobody, would never be settled.
        if self._silent():
            await self._beat(ledger)

    async def _beat(self, ledger: Ledger) -> None:
        sent_s, silent = self._clock.monotonic(), self._silent()
        try:
            await ledger.beat()
            if silent:  # a member may have lost its partitions, and be one still
                self._compare(ledger, await ledger.look())
        except BrokerDown as error:
            if self._ledger is ledger:
                raise
            raise LeaseLost(f"{ledger.name} has come to its end meanwhile") from error
        self._beat_s = sent_s

    def _silent(self) -> bool:
        return self._clock.monotonic() - self._beat_s > TRUST * self._subscription.lease_s

    def _end(self, ledger: Ledger, error: LeaseLost) -> None:
        if self._ledger is not ledger:
            return  # that life is over already, and another one has begun
        self._complain(error)
        self._ledger = None
        for window in list(self._windows.values()):
            self._lose(window)

    def _lose(self, window: Window) -> None:
        if self._windows.lose(window):
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        if self._ledger is not None:
            self._ledger.wake()

    def _emit(self, name: str, window: Window, **more: object) -> None:
        group, stream = self._subscription.group, self._subscription.stream.name
        self._telemetry.emit(name, group=group, stream=stream, partition=window.partition, token=window.epoch, **more)

    def _complain(self, error: BrokerError) -> None:
        group, stream = self._subscription.group, self._subscription.stream.name
        self._telemetry.emit(BROKER_ERROR, group=group, error=error)
        self._telemetry.complain(group, self._clock.monotonic(), "group %s of %s: %s", group, stream, error)

    # Partitions.

    async def _share(self) -> None:
        """Look who has what; then take, ask and give."""
        ledger, now = await self._living(), self._clock.monotonic()
        self._look_at = now + look_s(self._subscription.lease_s)
        view = await ledger.look()
        self._compare(ledger, view)
        barred = {position.partition for position in self._windows.lost}
        steps = self._sharing.steps(ledger.name, view, barred, now)
        unseen = [lease for lease in view.leases if lease.owner == ledger.name and lease.partition not in self._windows]
        wanted = [*unseen, *steps.take]  # unseen: acquired by a call whose answer never came
        await self._acquire(ledger, [lease for lease in wanted if lease.partition not in barred])
        for lease in steps.ask:
            await ledger.ask(lease)
        for lease in steps.give:
            self._drain(lease.partition)
        await self._release([window for window in self._windows.values() if window.draining and window.at_rest()])

    def _compare(self, ledger: Ledger, view: View) -> None:
        """Find out which of our partitions are ours no more, and what people have released of the others."""
        for lease in view.leases:
            window = self._windows.get(lease.partition)
            if window is not None and (lease.owner, lease.epoch) != (ledger.name, window.epoch):
                self._lose(window)
            elif window is not None:
                window.due_ms = min(window.due_ms, lease.due_ms)

    def _drain(self, partition: int) -> None:
        window = self._windows.get(partition)
        if window is not None and not window.draining:
            window.draining = True
            self._asked.add(partition)

    async def _acquire(self, ledger: Ledger, leases: Sequence[Lease]) -> None:
        async with asyncio.TaskGroup() as tasks:  # all at once: of 256 a server answers most while we wait for one
            asked = [tasks.create_task(_grant(ledger, lease)) for lease in leases]
        answers = [task.result() for task in asked]
        for grant in answers:
            if isinstance(grant, Grant):
                await self._begin(ledger, grant)
        for error in answers:
            if isinstance(error, BrokerError):
                raise error

    async def _begin(self, ledger: Ledger, grant: Grant) -> None:
        self._tell(grant)
        window = Window(grant)
        while window.catching_up:
            cursor = Cursor(window.cursor.after, MAX_READ, window.epoch)
            claims = await ledger.read({grant.partition: cursor}, MAX_READ, 0)
            window.put(claims)
            if not claims:
                window.caught_up()
        self._windows.begin(window)
        self._emit(ACQUIRED, window, clean=grant.clean)
        self._wake()

    def _tell(self, grant: Grant) -> None:
        stream, group = self._subscription.stream.name, self._subscription.group
        if grant.regressed:
            regressed = LogRegressed(
                f"partition {grant.partition} ends before what was settled: the server came back with less. It begins anew "
                "from its first event, and handlers see again what is still there"
            )
            self._telemetry.emit(BROKER_ERROR, group=group, error=regressed)
            logger.error("group %s of %s: %s", group, stream, regressed)
        if grant.lost:
            logger.error(
                "group %s of %s: %d events of partition %d are gone that were never settled: somebody trimmed the stream",
                *(group, stream, grant.lost, grant.partition),
            )

    async def _release(self, windows: Sequence[Window]) -> None:
        """Store the progress of each of these windows, and give it to whoever asked for it when the first one was given."""
        view: View | None = None
        for window in windows:
            if not self._windows.has(window):
                continue
            ledger = await self._living()
            window.draining = True
            window.give_back()
            with suppress(BrokerFull):  # what could not be stored is handled again, by whoever has the partition next
                await self._commit([window])
            if not self._windows.has(window):
                continue
            view = view or await ledger.look()
            heir = view.leases[window.partition].want
            await ledger.release(window.partition, window.epoch, heir)
            self._windows.end(window)  # unless it was lost meanwhile, and may even have been acquired anew
            self._emit(RELEASED, window, heir=heir)
            self._look_at = 0.0
            self._wake()

    # Claiming.

    def _take_begun(self, limit: int) -> list[Claim]:
        ours = [claim for claim in self._begun if self._windows.holds(claim)]
        self._begun = ours[limit:]
        return ours[:limit]

    def _tell_full(self, window: Window) -> None:
        now = self._clock.monotonic()
        if now < self._full_told_s + FULL_TOLD_S:
            return
        self._full_told_s = now
        self._complain(
            BrokerFull(
                f"partition {window.partition} waits: {window.events_parked:,} of its events are parked. Mend what fails, "
                "then `millstream key release`, or `millstream key drop`"
            )
        )

    async def _begin_heads(self, ledger: Ledger, limit: int) -> None:
        now_ms = ledger.now_ms
        for window in [window for window in self._windows.values() if window.due_ms <= now_ms]:
            if window.draining or len(self._begun) >= limit:
                continue
            window.due_ms = float("inf")  # what becomes due while we ask is noted again
            count = min(limit - len(self._begun), MAX_HEADS)
            try:
                found = await ledger.heads(window.partition, window.epoch, window.busy(), count)
            except BaseException:
                window.due_ms = 0.0
                raise
            if found is None:
                self._lose(window)
            elif self._windows.has(window) and not window.draining:
                window.due_ms = min(window.due_ms, found.due_ms)
                self._begun += window.begin(found.heads)

    async def _read(self, ledger: Ledger, limit: int, wait_s: float, changed: asyncio.Event) -> None:
        cursors = self._windows.cursors(self._budget) if self._subscription.fresh else {}
        if not cursors:
            await self._clock.wait(changed, wait_s)
            return
        claims = await ledger.read(cursors, max(limit, MAX_READ), wait_s)
        for partition, page in _pages(claims):
            window = self._windows.get(partition)
            if window is not None and window.epoch == cursors[partition].epoch:
                self._windows.put(window, page)

    # Committing.

    async def _store(self, partitions: Iterable[int]) -> set[int]:
        """Commit what was settled of these; those that were lost meanwhile."""
        touched = [window for partition in partitions if (window := self._windows.get(partition)) is not None]
        await self._commit(touched)
        return {window.partition for window in touched if not self._windows.has(window)}

    async def _commit(self, windows: Iterable[Window]) -> None:
        """Store what there is to store of these windows; raises `BrokerFull` after all that needs no room was stored."""
        async with self._committing:
            refused = Refused()
            todo = [window for window in windows if self._windows.has(window)]
            while todo:
                todo = await self._commit_once(todo, refused)
            if refused.full:
                why = next(filter(None, refused.full.values()), "the broker takes no more")
                raise BrokerFull(f"no room for outputs or dead letters of group {self._subscription.group!r}: {why}")

    def _rouse(self, windows: Iterable[Window]) -> None:
        """Wake a fetch that waits for what is there now: an event, a head, or room to read more."""
        if self._waits_until_ms and self._windows.offer(windows, self._budget, self._waits_until_ms):
            self._wake()

    async def _commit_once(self, windows: Sequence[Window], refused: Refused) -> list[Window]:
        ledger = await self._living()
        made = [(window, refused.commit(window)) for window in windows]
        commits = [(window, commit) for window, commit in made if commit is not None]
        if not commits:
            self._rouse(windows)
            return []
        try:
            answers = await ledger.commit([commit for _, commit in commits])
        except LeaseLost as error:
            self._end(ledger, error)
            return []
        again: list[Window] = []
        for (window, commit), answer in zip(commits, answers, strict=True):
            if answer.state is State.LOST:
                self._lose(window)
                continue
            window.answered(answer)
            if answer.state is State.DEAD_FULL:
                self._complain(
                    BrokerFull(f"no room for more dead letters of {self._subscription.group!r}: their keys wait")
                )
                window.bury_later(int(ledger.now_ms + DEAD_FULL_S * 1000))
            if answer.state is not State.FULL or refused.add(window, commit, answer.why):
                again.append(window)
        return [window for window in again if self._windows.has(window)]


async def _grant(ledger: Ledger, lease: Lease) -> Grant | BrokerError | None:
    try:
        return await ledger.acquire(lease)
    except BrokerError as error:
        return error


def _pages(claims: Sequence[Claim]) -> Iterator[tuple[int, Sequence[Claim]]]:
    """The claims of each partition, which lie together: found by halving, since a look at each event would be dear."""
    begin = 0
    while begin < len(claims):
        partition = claims[begin].position.partition
        end = bisect_left(claims, True, begin, key=lambda claim: claim.position.partition != partition)
        yield partition, claims[begin:end]
        begin = end
