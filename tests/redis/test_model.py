"""The protocol under random interleavings: small workers run our scripts, and are paused, cut off, wrongly taken for dead.

Each step is one exchange with the server, so the order of all steps is the seed's, and a failing seed fails again. While a
worker is between two of its own exchanges the others go on: that is where the races are. A worker that is silent for three
looks of another counts as dead, whether it is or not. At the end nothing may be lost, nothing left over, no worker may ever
have settled what another held, and each output is there once, if its outcome was stored, and else not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from random import Random
from typing import Any

import pytest

from millstream.brokers.redis.keys import Keys
from millstream.brokers.redis.scripts import scripts
from tests.redis import brokers
from tests.redis.raw import DUE, GROUP, LIVE, LOG, NOTE, Out, Raw, fence
from tests.servers import RedisServer

started = brokers.started
server = brokers.server

SEEDS = 40  # per version of Redis
WORKERS = 4
STEPS = 700
PUBLISHING_STEPS = 400
MAX_LAST_STEPS = 6_000  # to finish what is left; about 500 are needed
LOOKS = 3  # after so many looks without a beat somebody is taken for dead
MAX_DEPTH = 2

ACTIONS = {
    "acknowledge": 15,
    "read": 15,
    "handle": 40,
    "beat": 15,
    "take": 8,
    "resend": 12,
    "sweep": 1,
    "pause": 2,
    "crash": 1,
}
OUTCOMES = {"done": 60, "output": 10, "retry": 15, "postpone": 5, "release": 7, "dead": 8}  # output: done, with one
LAST_ACTIONS = ("acknowledge", "read", "handle", "handle", "beat", "take", "sweep")

# What a mistake in a script would do, and what the model must say about it.
MUTANTS = {
    "a takeover leaves the fence": ("evict", b"redis.call('DEL', fence)\n", " acked "),
    "the delivery count is not compared": ("settle", b" and pending[4] == tonumber(count)", "settled twice"),
    "a consumer is deleted with what it holds": (
        "evict",
        b"if #pending == tonumber(limit) then return {'more', moved} end\n",
        "events lost",
    ),
    "outputs are stored for whoever asks": ("settle", b"  if not held(id, count) then return 0 end\n", "outputs of"),
}
MUTANT_SEEDS = 10

MAILS = Keys("", "mails", 1)


class World:
    """A server, some workers, and what is known from outside."""

    def __init__(self, server: RedisServer, seed: int, sources: Mapping[str, bytes] | None = None) -> None:
        self.port = server.port
        self.random = Random(seed)
        self.sources = sources
        self.outside = Raw(self.port)
        self.outside.do("FLUSHALL")
        self.outside.join()
        self.names = 0
        self.busy: list[Worker] = []
        self.published: set[bytes] = set()
        self.handled: set[bytes] = set()
        self.outputs: set[bytes] = set()
        self.wrong: list[str] = []
        self.seen: Counter[str] = Counter()
        self.workers = [Worker(self) for _ in range(WORKERS)]

    def live(self) -> None:
        for number in range(STEPS):
            if number < PUBLISHING_STEPS and self.random.random() < 0.5:
                self.publish()
            self.step()
        for number in range(MAX_LAST_STEPS):
            if number % 50 == 0 and self.finished():
                break
            worker = self.random.choice(self.workers)
            worker.paused = 0
            worker.act(self.random.choice(LAST_ACTIONS))

    def publish(self) -> None:
        # Ids by number, not by the clock: due entries come in the order of their ids, and a seed shall repeat.
        self.published.add(
            self.outside.do("XADD", LOG, f"{1_000_000 + len(self.published)}-1", "type", "t", "data", "{}")
        )

    def step(self) -> None:
        worker = self.random.choice([worker for worker in self.workers if worker not in self.busy])
        if worker.paused:
            worker.paused -= 1
        else:
            worker.act(self.random.choices(list(ACTIONS), list(ACTIONS.values()))[0])

    def meanwhile(self) -> None:
        """The others go on."""
        while len(self.busy) <= MAX_DEPTH and self.random.random() < 0.3:
            self.step()

    def often(self, chance: float) -> bool:
        return self.random.random() < chance

    def owner(self, id_: bytes) -> str | None:
        rows = self.outside.do("XPENDING", LOG, GROUP, id_, id_, 1)
        return rows[0][1].decode() if rows else None

    def finished(self) -> bool:
        group = self.outside.group()
        (last, _), *_ = self.outside.do("XREVRANGE", LOG, "+", "-", "COUNT", 1)
        return not group[b"pending"] and group[b"last-delivered-id"] == last

    def problems(self) -> list[str]:
        found = list(self.wrong)
        if lost := self.published - self.handled:
            found.append(f"{len(lost)} events lost")
        if pending := self.outside.pending():
            found.append(f"{len(pending)} left pending: {pending[:3]}")
        if left := [key for key in (DUE, NOTE) if self.outside.do("EXISTS", key)]:
            found.append(f"left over: {left}")
        stored = Counter(fields[1] for _, fields in self.outside.do("XRANGE", MAILS.log(0), "-", "+"))
        if stored != Counter(self.outputs):
            found.append(f"{stored.total()} outputs of {len(self.outputs)} events are stored")
        return found

    def close(self) -> None:
        for worker in self.workers:
            worker.redis.close()
        self.outside.close()


class Worker:
    def __init__(self, world: World) -> None:
        self.world = world
        self.paused = 0
        self.begin()

    def begin(self) -> None:
        """A new life."""
        self.world.names += 1
        self.name = f"ms.{self.world.names}"
        self.nonce = f"n-{self.name}".encode()
        self.redis = Raw(self.world.port, self.world.sources)
        self.held: dict[bytes, tuple[int, bytes, bool]] = {}  # id: delivery count, note, is anything noted
        self.unsure: list[tuple[Any, ...]] = []  # settlements to be sent again
        self.done: list[bytes] = []  # handled, of those held
        self.beats: dict[bytes, tuple[bytes, int]] = {}  # member: its last score, and how often it was seen
        assert self.redis.enter(self.name)[0] == b"OK"
        assert self.arm()

    def act(self, action: str) -> None:
        self.world.busy.append(self)
        try:
            getattr(self, action)()
        finally:
            self.world.busy.remove(self)

    def arm(self) -> bool:
        armed: bool = self.redis.calls(("WATCH", fence(self.name)), ("GET", fence(self.name)))[1] == self.nonce
        return armed

    def fenced(self) -> None:
        self.world.seen["fenced"] += 1
        self.redis.close()
        former = self.name
        self.begin()
        if self.world.often(0.5):  # the other half leaves it to the sweep
            self.evict(former, self.redis.score(former), crashed=0)

    def reconnect(self) -> None:
        """An answer was lost: a new connection under the same name; what was delivered and not seen is recalled."""
        self.redis.close()
        self.redis = Raw(self.world.port, self.world.sources)
        if not self.arm():
            return self.fenced()
        missing = [id_ for id_, _, _ in self.redis.pending(self.name) if id_ not in self.held]
        if missing:
            self.hold(self.redis.recall(self.name, *missing))
            self.world.seen["recalled"] += len(missing)

    def hold(self, answer: list[Any]) -> None:
        if answer == [b"FENCED"]:
            return self.fenced()
        for id_, count, note, postponed, _ in answer[3:]:
            self.held[id_] = count, note, bool(note) or postponed != b"0"

    # Actions

    def acknowledge(self) -> None:
        ids = self.done
        if not ids:
            return
        self.redis.calls(("MULTI",), ("XACK", LOG, GROUP, *ids))
        self.world.meanwhile()
        owners = {id_: self.world.owner(id_) for id_ in ids}
        done, _, nonce = self.redis.calls(("EXEC",), ("WATCH", fence(self.name)), ("GET", fence(self.name)))
        if done is not None:
            self.world.wrong += [
                f"{self.name} acked {id_!r} of {o}" for id_, o in owners.items() if o not in (None, self.name)
            ]
        elif nonce == self.nonce:
            self.world.wrong.append(f"{self.name} was refused without a reason")
        if self.world.often(0.05):
            self.world.seen["lost answers of EXEC"] += 1
            return self.reconnect()
        if done is not None:
            for id_ in ids:
                del self.held[id_]
            self.done = []
        if nonce != self.nonce:
            self.fenced()

    def read(self) -> None:
        self.world.meanwhile()
        count = self.world.random.randint(1, 8)
        found, nonce = self.redis.calls(
            ("XREADGROUP", "GROUP", GROUP, self.name, "COUNT", count, "STREAMS", LOG, ">"), ("GET", fence(self.name))
        )
        if self.world.often(0.03):
            self.world.seen["lost reads"] += 1
            return self.reconnect()
        if nonce != self.nonce:
            return self.fenced()
        for id_, _ in found[0][1] if found else ():
            self.held[id_] = 1, b"", False

    def handle(self) -> None:
        waiting = [id_ for id_ in self.held if id_ not in self.done]
        if not waiting:
            return
        id_ = self.world.random.choice(waiting)
        count, note, noted = self.held[id_]
        if note and not note.endswith(b"s"):
            if self.redis.mark(self.name, id_) != b"OK":
                return self.fenced()
            self.held[id_] = count, note + b"s", noted
        outcome = self.world.random.choices(list(OUTCOMES), list(OUTCOMES.values()))[0]
        if outcome == "done" and not noted:
            self.world.handled.add(id_)
            self.done.append(id_)
        else:
            self.settle(id_, outcome, "failed" if outcome == "dead" else 0)

    def settle(self, id_: bytes, verdict: str, *details: Any) -> None:
        count, _, _ = self.held.pop(id_)
        owner = self.world.owner(id_)
        answer = self.send((verdict, id_, count, *details))
        if answer == [b"FENCED"]:
            return self.fenced()
        if answer == [b"OK", 1]:
            self.world.seen[verdict] += 1
            if owner != self.name:
                self.world.wrong.append(f"{self.name} settled {id_!r} of {owner}")
            if verdict in ("done", "output", "dead"):
                self.world.handled.add(id_)
            if verdict == "output":
                self.world.outputs.add(id_)
        if verdict in ("done", "output", "retry", "dead") and self.world.often(0.5):
            self.unsure.append((verdict, id_, count, *details))

    def send(self, item: tuple[Any, ...]) -> Any:
        verdict, id_, *rest = item
        if verdict != "output":
            return self.redis.settle(self.name, item, max_dead=10_000)
        output = Out(MAILS.store(0), (id_.decode(), "t", "", "", "", "", "{}"))
        return self.redis.settle(self.name, ("done", id_, *rest), outputs={1: [output]})

    def resend(self) -> None:
        """An answer seemed lost, so the same is sent once more, long after it was answered."""
        if not self.unsure:
            return
        item = self.unsure.pop(0)
        again = self.send(item)
        self.world.seen["resent"] += 1
        if again == [b"OK", 1]:
            self.world.wrong.append(f"{item} was settled twice")

    def beat(self) -> None:
        if self.redis.beat(self.name) == [b"FENCED"]:
            return self.fenced()
        members = self.redis.do("ZRANGE", LIVE, 0, -1, "WITHSCORES")
        scores = dict(zip(members[::2], members[1::2], strict=True))
        for name, score in scores.items():
            known, looks = self.beats.get(name, (b"", 0))
            self.beats[name] = score, looks + 1 if score == known else 0
        self.beats = {name: beats for name, beats in self.beats.items() if name in scores}
        for name, (score, looks) in list(self.beats.items()):
            if looks >= LOOKS and name.decode() != self.name:
                self.world.seen["taken for dead"] += 1
                self.evict(name.decode(), score, crashed=1)

    def evict(self, name: str, score: bytes, *, crashed: int) -> None:
        for _ in range(50):
            answer = self.redis.evict(name, score, 3, crashed=crashed)
            self.world.meanwhile()
            if answer[0] != b"more":
                break
            if self.world.often(0.2):
                return  # died halfway: somebody else finds it
        if answer[0] == b"done":
            self.redis.bury(name, score)

    def take(self) -> None:
        answer = self.redis.take(self.name, self.world.random.randint(1, 5))
        if self.world.often(0.05):
            self.world.seen["lost takes"] += 1
            return self.reconnect()
        self.hold(answer)

    def sweep(self) -> None:
        state, _, _, lost, *names = self.redis.sweep()
        assert (state, lost) == (b"OK", 0)
        for name in names:
            if not self.redis.do("EXISTS", fence(name.decode())):
                self.world.seen["swept"] += 1
                score = self.redis.score(name.decode())
                self.evict(name.decode(), score, crashed=int(bool(score)))

    def pause(self) -> None:
        self.paused = self.world.random.randint(5, 60)

    def crash(self) -> None:
        self.world.seen["crashes"] += 1
        self.redis.close()
        self.begin()


def test_nothing_is_lost_and_nobody_settles_what_another_holds(server: RedisServer) -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        world = World(server, seed)
        world.live()
        assert not world.problems(), f"seed {seed}: {world.problems()}"
        seen += world.seen
        seen["events"] += len(world.published)
        world.close()
    assert seen["events"] > 100 * SEEDS
    for event in (
        "fenced",
        "crashes",
        "taken for dead",
        "recalled",
        "lost answers of EXEC",
        "lost takes",
        "resent",
        "output",
    ):
        assert seen[event] >= 5, f"the model did not see enough: {seen}"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_model_finds_mistakes(server: RedisServer, mutant: str) -> None:
    name, text, complaint = MUTANTS[mutant]
    source = scripts[name].source
    assert source.count(text) == 1
    found = 0
    for seed in range(MUTANT_SEEDS):
        world = World(server, seed, {name: source.replace(text, b"")})
        world.live()
        found += any(complaint in problem for problem in world.problems())
        world.close()
    assert found >= 3, f"found in {found} of {MUTANT_SEEDS} seeds only"
