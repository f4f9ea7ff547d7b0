"""The worker: one group's events, fetched, handled, settled. This is the loop; all else here serves it.

                  fetch                  a lane takes it            the handler ends
    broker ───────────────► queued ───────────────────► running ───────────────────► settling ───► done, due again, dead
                              │                            │                             │
                              │ stop, lost                 │ lost, cut                   │ refused: somebody else has it
                              ▼                            ▼                             ▼
                          handed back               dropped, handed back              forgotten

What is queued, running or settling is *in flight*: fetched and not settled. A crash repeats at most that much; `ahead.py`
says how much it is. The next fetch is made when a page of it is free: reading is done in large pieces while lanes work.

Leaving goes from the front to the back, each stage only after the one before has ended: stop fetching, let running handlers
end, settle their outcomes, stop the heartbeat, hand back the rest. So nothing that was finished is ever done again, and our
events stay ours until the last one is settled.
"""

from __future__ import annotations

import asyncio

from millstream.brokers.base import Broker, Consumer, Kept, Subscription
from millstream.clock import Clock
from millstream.errors import BrokerError
from millstream.handlers.subscriber import Group
from millstream.settings import Settings
from millstream.telemetry import LOST, Telemetry
from millstream.worker.ahead import ReadAhead, concurrency
from millstream.worker.backoff import Backoff
from millstream.worker.batches import BatchLanes
from millstream.worker.call import Route
from millstream.worker.gate import Gate
from millstream.worker.keeper import Keeper
from millstream.worker.lanes import Lanes
from millstream.worker.runs import Runs
from millstream.worker.settler import Settler

_WAIT_S = 5.0  # how long one fetch waits for the first event


class Worker:
    """Consumes for one group in this process."""

    def __init__(
        self,
        group: Group,
        routes: dict[str, Route],
        subscription: Subscription,
        *,
        broker: Broker,
        gate: Gate,
        settings: Settings,
        clock: Clock,
        telemetry: Telemetry,
        groups: int,
    ) -> None:
        self.group = group
        self._routes = routes
        self._subscription = subscription
        self._broker = broker
        self._gate = gate
        self._clock = clock
        self._telemetry = telemetry
        self._concurrency = concurrency(group, settings)
        batch_size = group.batch.size if group.batch is not None else 1
        running = self._concurrency * batch_size
        self._ahead = ReadAhead(running, batch_size, settings.max_in_flight, clock, groups=groups)
        self._lanes: Lanes | None = None
        self._runs = Runs(group, self._ahead, clock, telemetry, self._left)
        self._room = asyncio.Event()
        self._asked: set[int] = set()
        self._ask = asyncio.Event()
        self._stopping = asyncio.Event()
        self.joined = asyncio.Event()
        """Set when the group exists and we are a member of it."""
        self.cut_off = False
        """True after `cut` had to cancel a running handler."""

    @property
    def in_flight(self) -> int:
        """Events fetched and not settled."""
        return self._ahead.held

    @property
    def queued(self) -> int:
        """Events fetched and not begun."""
        return self._lanes.queued if self._lanes is not None else 0

    async def run(self) -> None:
        """Consume until `stop`. Raises what cannot be mended by trying again."""
        consumer = await self._broker.subscribe(self._subscription)
        self.joined.set()
        common = self._clock, self._telemetry
        try:
            keeper = Keeper(consumer, self.group.name, self._subscription.lease_s, *common, self._kept)
            settler = Settler(consumer, self.group.name, *common, self._left, self._runs.gathered)
            self._runs.begin(settler.add, self._broker)
            lanes = Lanes if self.group.batch is None else BatchLanes
            self._lanes = lanes(
                self.group,
                self._routes,
                consumer,
                keeper,
                self._gate,
                *common,
                settler=settler,
                dropped=self._left,
                turn=self._ahead.turn,
                runs=self._runs,
                concurrency=self._concurrency,
            )
            async with asyncio.TaskGroup() as keeping:
                beating = keeping.create_task(keeper.run())
                async with asyncio.TaskGroup() as settling:
                    settling.create_task(settler.run())
                    async with asyncio.TaskGroup() as working:
                        working.create_task(self._lanes.run())
                        fetching = working.create_task(self._fetch(consumer, self._lanes))
                        handing = working.create_task(self._hand_over(consumer, self._lanes, settler))
                        await self._stopping.wait()
                        fetching.cancel()
                        handing.cancel()
                        self._lanes.stop()
                    self._runs.close()
                    settler.stop()
                beating.cancel()
        finally:
            await consumer.close()

    def stop(self) -> None:
        """Fetch nothing more; `run` ends when the running handlers have ended and all is settled."""
        self._stopping.set()

    def cut(self) -> None:
        """Do not wait for the running handlers any longer: cancel them, hand their events back."""
        self.stop()
        if self._lanes is not None and self._lanes.cut():
            self.cut_off = True

    async def _fetch(self, consumer: Consumer, lanes: Lanes) -> None:
        """Keep the queue filled. Ends by cancellation, which `fetch` survives: nothing that it claimed is lost."""
        backoff = Backoff("fetch", self.group.name, self._clock, self._telemetry)
        ahead = self._ahead
        while True:
            while not (wanted := ahead.wanted()):
                self._room.clear()
                await self._room.wait()
            try:
                claims = await consumer.fetch(wanted, _WAIT_S)
            except BrokerError as error:
                await backoff.pause(error)
                continue
            backoff.reset()
            if claims:
                ahead.came(claims)
                await self._runs.readable(claims)
                lanes.put(claims)

    async def _hand_over(self, consumer: Consumer, lanes: Lanes, settler: Settler) -> None:
        """Give partitions to those who ask for them. Ends by cancellation: closing gives all of them back."""
        async with asyncio.TaskGroup() as giving:
            while True:
                await self._ask.wait()
                self._ask.clear()
                partitions, self._asked = frozenset(self._asked), set()
                giving.create_task(self._give(partitions, consumer, lanes, settler))

    async def _give(self, partitions: frozenset[int], consumer: Consumer, lanes: Lanes, settler: Settler) -> None:
        """Finish what runs of these partitions and give them up. One that cannot be given now goes with a later beat."""
        backoff = Backoff("hand over partitions", self.group.name, self._clock, self._telemetry)
        async with lanes.drained(partitions):
            self._runs.close(partitions)
            while True:
                await settler.caught_up()
                try:
                    await consumer.release(partitions)
                except BrokerError as error:
                    await backoff.pause(error)
                else:
                    return

    def _left(self, events: int) -> None:
        """Events have left our hands: settled, or lost."""
        self._ahead.left(events)
        self._room.set()

    def _kept(self, kept: Kept) -> None:
        if kept.lost and self._lanes is not None:
            self._telemetry.emit(LOST, group=self.group.name, positions=kept.lost)
            self._lanes.discard(self._runs.lose(kept.lost))
        if kept.drain:
            self._asked |= kept.drain
            self._ask.set()
