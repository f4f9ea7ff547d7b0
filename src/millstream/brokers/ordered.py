"""A member of a group that consumes in the order of keys: the same for every broker, over that broker's ledger.

    FREE ──acquire──► OURS(epoch) ──somebody asks──► DRAINING: nothing is handed out, what runs ends ──release──► FREE(heir)
                        │ silent for a lease, or found so by others
                        └► LOST: the window is dropped, `settle` answers False, `keep` tells it once, then acquire again

A partition is read by its owner alone, so nothing has to be claimed: reading costs the server nothing but the reading, and
progress is one small commit for as many events as were settled meanwhile. `window.py` holds the rules of the order.

While one round of commits is under way outcomes gather, and leave with the next: a lone event is committed at once. A commit
costs as much as ten events, so fetches take what there is of one partition, rather than a little from each.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from operator import attrgetter

from millstream.brokers.base import Claim, Kept, Position, Settlement, Subscription
from millstream.brokers.budget import Budget
from millstream.brokers.ledger import Cursor, Grant, Lease, Ledger, State, View
from millstream.brokers.refused import Refused
from millstream.brokers.share import share
from millstream.brokers.window import Window
from millstream.clock import Clock
from millstream.errors import BrokerDown, BrokerError, BrokerFull, LeaseLost, LogRegressed
from millstream.telemetry import ACQUIRED, BROKER_ERROR, RELEASED, Telemetry, logger
from millstream.units import DEAD_FULL_S

LOOK_S = 0.5  # how often the others are looked at, at most: a takeover follows within a second of the lease
MAX_HEADS = 32  # of a partition, begun in one step
MAX_READ = 1_000  # events in one answer
MAX_CALLS = 4  # take the rest of what was read of one partition before another one has its turn
LEAST_OF_A_KEY = 8  # events are handed out at once, and more only if a fetch asks for more: see `_hand_out`
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
        self._max_parked = -(-subscription.max_parked // subscription.stream.partitions)
        self._windows: dict[int, Window] = {}
        self._lost: set[Position] = set()
        self._asked: set[int] = set()
        self._promised: dict[tuple[int, int], float] = {}
        self._ownerless: dict[tuple[int, int], float] = {}
        self._look_at = 0.0
        self._changed = asyncio.Event()
        self._begun: list[Claim] = []
        self._left_out: set[int] = set()
        self._full_told_s = -FULL_TOLD_S
        self._waits_until_ms = 0.0
        self._entering = asyncio.Lock()
        self._committing = asyncio.Lock()
        self._turn = 0
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
                claims += self._hand_out(limit - len(claims))
                left_s = until - self._clock.monotonic()
                if not claims:
                    wait_s = max(0.0, min(left_s, self._due_s(ledger)))
                    self._waits_until_ms = ledger.now_ms + wait_s * 1000
                    try:
                        await self._read(ledger, limit, wait_s, changed)
                    finally:
                        self._waits_until_ms = 0.0
                    await self._trust(ledger)
                    claims = self._hand_out(limit)
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
            if not self._has(window) or not await ledger.begin(window.partition, window.epoch, offsets):
                self._lose(window)
                raise LeaseLost(f"{ledger.name} does not hold partition {window.partition} any more")

    async def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Take in outcomes and commit what they are, partition by partition; False where an event was not ours any more."""
        windows, touched = self._windows, dict[int, Window]()
        known: list[bool] = []
        for settlement in settlements:
            partition = settlement.position.partition
            window = windows.get(partition)
            if window is not None and window.settle(settlement):
                touched[partition] = window
                known.append(True)
            else:
                known.append(False)
        await self._commit(touched.values())
        lost = {partition for partition, window in touched.items() if not self._has(window)}
        if lost:
            answers = zip(known, settlements, strict=True)
            return [ours and settlement.position.partition not in lost for ours, settlement in answers]
        return known

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
        lost, self._lost = frozenset(self._lost), set()
        asked, self._asked = frozenset(self._asked), set()
        if lost:
            self._look_at = 0.0  # those partitions may be acquired again from now on
        return Kept(lost, asked)

    async def release(self, partitions: frozenset[int]) -> None:
        """Hand back what is held of these partitions, store their progress, and give them to whoever asked for them."""
        for window in [window for window in self._windows.values() if window.partition in partitions]:
            await self._release(window)

    async def close(self) -> None:
        """Store all progress, hand back all that is held, and leave the group."""
        if self._closed:
            return
        self._closed = True
        self._budget.leave(self)
        ledger = self._ledger
        try:
            try:
                for window in list(self._windows.values()):
                    await self._release(window)
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

    def _has(self, window: Window) -> bool:
        return self._windows.get(window.partition) is window

    def _lose(self, window: Window) -> None:
        if self._has(window):
            del self._windows[window.partition]
            self._lost.update(window.held())
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
        self._look_at = now + min(LOOK_S, self._subscription.lease_s / 4)
        view = await ledger.look()
        self._compare(ledger, view)
        barred = {position.partition for position in self._lost}
        steps = share(ledger.name, view, self._reserved(view, now), barred, self._overdue(view, now))
        unseen = [lease for lease in view.leases if lease.owner == ledger.name and lease.partition not in self._windows]
        for lease in (*unseen, *steps.take):  # unseen: acquired by a call whose answer never came
            if lease.partition not in barred:
                await self._acquire(ledger, lease)
        for lease in steps.ask:
            await ledger.ask(lease)
        for lease in steps.give:
            self._drain(lease.partition)
        for window in [window for window in self._windows.values() if window.draining and window.at_rest()]:
            await self._release(window, view)

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

    def _reserved(self, view: View, now: float) -> set[int]:
        """Partitions that were released to somebody else a moment ago."""
        promised = {
            (lease.partition, lease.epoch): now
            for lease in view.leases
            if not lease.owner and lease.next in view.members
        }
        self._promised = promised | {key: since for key, since in self._promised.items() if key in promised}
        patience_s = self._subscription.lease_s / 2
        return {partition for (partition, _), since in self._promised.items() if now - since < patience_s}

    def _overdue(self, view: View, now: float) -> set[int]:
        """Partitions that have been nobody's since an earlier look: those who might have taken them have not."""
        owners = [(lease.partition, lease.epoch) for lease in view.leases if lease.owner not in view.members]
        self._ownerless = {owner: self._ownerless.get(owner, now) for owner in owners}
        patience_s = min(LOOK_S, self._subscription.lease_s / 4)
        return {partition for (partition, _), since in self._ownerless.items() if now - since >= patience_s}

    async def _acquire(self, ledger: Ledger, lease: Lease) -> None:
        grant = await ledger.acquire(lease)
        if grant is None:
            return
        self._tell(grant)
        window = Window(grant)
        while window.catching_up:
            cursor = Cursor(window.cursor.after, MAX_READ, window.epoch)
            claims = await ledger.read({grant.partition: cursor}, MAX_READ, 0)
            window.put(claims)
            if not claims:
                window.caught_up()
        self._windows[grant.partition] = window
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

    async def _release(self, window: Window, view: View | None = None) -> None:
        if not self._has(window):
            return
        ledger = await self._living()
        window.draining = True
        window.give_back()
        with suppress(BrokerFull):  # what could not be stored is handled again, by whoever has the partition next
            await self._commit([window])
        if not self._has(window):
            return
        heir = (view or await ledger.look()).leases[window.partition].want
        await ledger.release(window.partition, window.epoch, heir)
        if self._has(window):  # else it was lost meanwhile, and may even have been acquired anew
            del self._windows[window.partition]
        self._emit(RELEASED, window, heir=heir)
        self._look_at = 0.0
        self._wake()

    # Claiming.

    def _hand_out(self, limit: int) -> list[Claim]:
        # A call goes on with the partition of the last one, if a few calls take what is left there: so a commit covers more.
        # Else it begins one further, or a busy first one would starve the others. A worker asks for half of what it has room
        # for: as many of one key at most, and a slow key leaves the other half to others.
        claims: list[Claim] = []
        windows = deque(self._windows.values())
        windows.rotate(-self._turn)
        if windows and not 0 < windows[0].left <= MAX_CALLS * limit:
            windows.rotate(-1)
            self._turn += 1
        for step, window in enumerate(windows):
            if len(claims) >= limit:
                self._turn += step - 1
                break
            if window.events_parked >= self._max_parked:
                self._tell_full(window)
            elif window.ready:
                claims += window.hand_out(limit - len(claims), max(limit, LEAST_OF_A_KEY))
        return claims

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

    def _take_begun(self, limit: int) -> list[Claim]:
        ours = [claim for claim in self._begun if self._is_held(claim)]
        self._begun = ours[limit:]
        return ours[:limit]

    def _is_held(self, claim: Claim) -> bool:
        position = claim.stored.position
        window = self._windows.get(position.partition)
        return window is not None and window.epoch == claim.token and window.holds(position.offset)

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
            elif self._has(window) and not window.draining:
                window.due_ms = min(window.due_ms, found.due_ms)
                self._begun += window.begin(found.heads)

    async def _read(self, ledger: Ledger, limit: int, wait_s: float, changed: asyncio.Event) -> None:
        windows = self._windows if self._subscription.fresh else {}
        share_bytes = self._budget.share_bytes(len(self._windows))
        cursors = {
            partition: cursor
            for partition, window in windows.items()
            if window.events_parked < self._max_parked and (cursor := window.cursor_within(share_bytes)).room > 0
        }
        self._left_out = self._windows.keys() - cursors.keys()
        if not cursors:
            await self._clock.wait(changed, wait_s)
            return
        claims = await ledger.read(cursors, max(limit, MAX_READ), wait_s)
        for partition, page in groupby(claims, attrgetter("stored.position.partition")):
            window = self._windows.get(partition)
            if window is not None and window.epoch == cursors[partition].epoch:
                window.put(page)

    def _due_s(self, ledger: Ledger) -> float:
        """How long nothing that is parked is due."""
        due_ms = min([window.due_ms for window in self._windows.values() if not window.draining], default=float("inf"))
        return max(LEAST_WAIT_S, (due_ms - ledger.now_ms) / 1000)

    # Committing.

    async def _commit(self, windows: Iterable[Window]) -> None:
        """Store what there is to store of these windows; raises `BrokerFull` after all that needs no room was stored."""
        async with self._committing:
            refused = Refused()
            todo = [window for window in windows if self._has(window)]
            while todo:
                todo = await self._commit_once(todo, refused)
            if refused.full:
                why = next(filter(None, refused.full.values()), "the broker takes no more")
                raise BrokerFull(f"no room for outputs or dead letters of group {self._subscription.group!r}: {why}")

    def _rouse(self, windows: Iterable[Window]) -> None:
        """Wake a fetch that waits for what is there now: an event, a head, or room to read more."""
        if not self._waits_until_ms:
            return
        share_bytes = self._budget.share_bytes(len(self._windows))
        for window in windows:
            room = window.partition in self._left_out and window.cursor_within(share_bytes).room > 0
            if window.ready or room or window.due_ms < self._waits_until_ms:
                self._wake()
                return

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
        return [window for window in again if self._has(window)]
