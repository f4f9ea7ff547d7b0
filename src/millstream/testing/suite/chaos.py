"""Members of an ordered group that publish, handle, fail, crash, come, leave and wake up too late, by chance; and people who
release keys that wait, and send the group back to its beginning. Some events travel in packs, which may end in part.

What must hold at the end: of every key the events were handled in their order, each at least once. What must hold at every
step: an outcome is accepted only while nobody else has been given the event.
"""

from __future__ import annotations

import random  # noqa: TID251 - a plan that a seed repeats
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

from msgspec.structs import replace

from millstream.brokers.base import Claim, Consumer, Done, Kept, Later, Position, Record, Settlement, Stored
from millstream.errors import LeaseLost
from millstream.testing.suite.packs import events_of, new_pack
from millstream.testing.suite.trial import PARTED, Trial
from millstream.wire.packs import part_of

GROUP = "billing"
KEYS = "abcde"
MEMBERS = range(1, 5)


class Chaos:
    """One run."""

    def __init__(self, trial: Trial, seed: int) -> None:
        self.trial = trial
        self.chance = random.Random(seed)  # noqa: S311
        self.published: dict[str, list[Position]] = defaultdict(list)
        """By partition and key."""
        self.first_done: dict[str, list[Position]] = defaultdict(list)
        """In the order in which they were finished for the first time."""
        self._tokens: dict[Position, int] = defaultdict(int)
        self._actors: list[Actor] = []
        self._zombies: list[Actor] = []

    async def run(self, steps: int) -> None:
        """So many things happen."""
        kinds: dict[Callable[[], Awaitable[None]], float] = {
            self._publish: 30,
            self._join: 1,
            self._crash: 1,
            self._leave: 1,
            self._wait: 3,
            self._wake: 4,
            self._release: 1,
            self._seek: 0.3,
            self._work: 60,
        }
        await self._join()
        for _ in range(steps):
            (happen,) = self.chance.choices(list(kinds), list(kinds.values()))
            await happen()

    async def calm_down(self) -> None:
        """Handle what is left, without any faults."""

        async def at_rest() -> bool:
            for actor in self._actors:
                await actor.step(calm=True)
            return all(len(self.first_done[key]) == len(events) for key, events in self.published.items())

        await self.trial.eventually(at_rest, bool, within_s=60)

    def given(self, claim: Claim) -> None:
        """The broker gave an event to somebody."""
        position = claim.position
        self._tokens[position] = max(claim.token, self._tokens[position])

    def accepted(self, claim: Claim) -> None:
        """The broker accepted an outcome."""
        newest = self._tokens[claim.position]
        assert claim.token >= newest, f"{claim} was settled although somebody else has it with token {newest}"

    def finish(self, key: str, events: Sequence[Position]) -> None:
        """A handler came to its end with each of these."""
        self.first_done[key] += [position for position in events if position not in self.first_done[key]]

    async def _publish(self) -> None:
        keys, partition = self.chance.choices(KEYS, k=self.chance.randint(1, 8)), self.chance.randrange(3)
        records = [self._record(partition, key) for key in keys]
        positions = await self.trial.broker.append(PARTED.name, records)
        for key, record, position in zip(keys, records, positions, strict=True):
            self.published[f"{partition}{key}"] += events_of(Claim.of(Stored(position, record), 1))

    def _record(self, partition: int, key: str) -> Record:
        if self.trial.broker.traits.packs and self.chance.random() < 0.3:
            return replace(new_pack(self.trial, key), partition=partition)
        return self.trial.record(partition=partition, key=key)

    async def _join(self) -> None:
        if len(self._actors) + 1 in MEMBERS:
            broker = await self.trial.another()
            self._actors.append(Actor(self, await self.trial.consumer(stream=PARTED, order=True, broker=broker)))

    async def _crash(self) -> None:
        if actor := self._one_of_many():
            self.trial.silence(actor.consumer)
            self._zombies.append(actor)

    async def _leave(self) -> None:
        if actor := self._one_of_many():
            self.trial.silence(actor.consumer)
            await actor.consumer.close()

    def _one_of_many(self) -> Actor | None:
        many = len(self._actors) - 1 in MEMBERS
        return self._actors.pop(self.chance.randrange(len(self._actors))) if many else None

    async def _wait(self) -> None:
        await self.trial.clock.sleep(self.trial.place.lease_s * self.chance.random() / 2)

    async def _wake(self) -> None:
        if self._zombies:
            await self.chance.choice(self._zombies).wake()

    async def _release(self) -> None:
        admin = self.trial.broker.admin
        keys = await admin.keys(PARTED.name, GROUP)
        await admin.release_keys(self.chance.sample(keys, len(keys) // 2))

    async def _seek(self) -> None:
        await self.trial.broker.admin.seek(PARTED.name, GROUP, "beginning", live=True)

    async def _work(self) -> None:
        await self.chance.choice(self._actors).step()


class Actor:
    """A worker in short: one event of a key at a time; when one must wait, those behind it are put back."""

    def __init__(self, chaos: Chaos, consumer: Consumer) -> None:
        self.consumer = consumer
        self._chaos = chaos
        self._trial = chaos.trial
        self._chance = chaos.chance
        self._queues: dict[str, list[Claim]] = {}

    async def step(self, *, calm: bool = False) -> None:
        """Look after what was lost and asked for; fetch; handle one event of some keys."""
        await self._obey(self._trial.heard(self.consumer))
        await self._fetch(0.01 if calm else 0)
        self._queues = {key: queue for key, queue in self._queues.items() if queue}
        if self._queues:
            count = len(self._queues) if calm else self._chance.randint(1, len(self._queues))
            await self._handle(self._chance.sample(sorted(self._queues), count), calm=calm)

    async def wake(self) -> None:
        """Come to an end long after falling silent: it counts only where the broker still accepts it."""
        for key, queue in self._queues.items():
            if queue and await self._settle([(queue[0], Done())]) == [True]:
                self._chaos.finish(key, events_of(queue.pop(0)))

    async def _handle(self, keys: Sequence[str], *, calm: bool) -> None:
        ends: list[tuple[Claim, Done | Later]] = []
        put_back: list[tuple[Claim, Done | Later]] = []
        for key in keys:
            queue = self._queues[key]
            claim = queue.pop(0)
            if claim.suspect and not await self._begin(claim):
                continue
            events = events_of(claim)
            if not calm and self._chance.random() < 0.15:
                failed = self._chance.randrange(len(events))
                self._chaos.finish(key, events[:failed])
                at_ms = self._trial.clock.now_ms() + self._chance.randint(0, 50)
                ends.append((claim, Later(at_ms, "busy", left=numbers(events[failed:]))))
                put_back += [(behind, Later(0, "", counted=False)) for behind in queue]
                queue.clear()
            else:
                self._chaos.finish(key, events)  # the handler has run, whatever the broker answers
                ends.append((claim, Done()))
        if self._chance.random() < 0.5:
            await self._settle(ends + put_back)
        else:  # in two calls, between which the log is read on, parked keys are tried, and progress is stored
            await self._settle(ends)
            await self._fetch(0)
            kept = await self.consumer.keep()
            await self._obey(kept)
            await self._settle([end for end in put_back if end[0].stored.position not in kept.lost])

    async def _obey(self, kept: Kept) -> None:
        """Forget what was lost, and give away what is asked for."""
        for key, queue in self._queues.items():
            left = [claim for claim in queue if claim.position not in kept.lost]
            self._queues[key] = [claim for claim in left if claim.position.partition not in kept.drain]
        if kept.drain:
            await self.consumer.release(kept.drain)

    async def _begin(self, claim: Claim) -> bool:
        try:
            await self.consumer.begin([claim.position])
        except LeaseLost:
            return False
        return True

    async def _settle(self, ends: Sequence[tuple[Claim, Done | Later]]) -> list[bool]:
        answers = await self.consumer.settle([Settlement(claim.position, outcome) for claim, outcome in ends])
        for (claim, _), answer in zip(ends, answers, strict=True):
            if answer:
                self._chaos.accepted(claim)
        return answers

    async def _fetch(self, wait_s: float) -> None:
        for claim in await self.consumer.fetch(self._chance.randint(1, 20), wait_s):
            self._chaos.given(claim)
            stored = claim.stored
            self._queues.setdefault(f"{stored.position.partition}{stored.record.key}", []).append(claim)


def numbers(events: Sequence[Position]) -> list[int]:
    """Which events of their pack these are; nothing for one that came alone."""
    parts = (part_of(position.offset)[1] for position in events)
    return [part for part in parts if part is not None]
