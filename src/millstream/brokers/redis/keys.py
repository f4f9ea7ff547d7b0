"""Every key name on a Redis server, and nothing else. `docs/wire-format.md` lists the same.

A *log* is the stream of one partition, under a plain name, so that any client finds it. All else that belongs to a
partition carries the log's name in braces: on a server with slots it lies where its log lies. What belongs to all
partitions of a stream, the *unit* that one fence and one heartbeat cover, carries the stream's name in braces.

Names of streams, groups and consumers have no colon and no brace, so no two of these names can be the same. With one
partition the log is the stream: then the stream's `meta` and the partition's are one hash, whose fields differ.
"""

from __future__ import annotations

from hashlib import sha256

MAX_KEY_PART_BYTES = 256  # of an event key that becomes part of a name; a longer one appears as its SHA-256


class Keys:
    """The keys of one stream in a namespace."""

    __slots__ = ("_unit", "dictionaries", "logs", "probe", "slots", "stream_meta", "streams")

    def __init__(self, namespace: str, stream: str, partitions: int) -> None:
        front = namespace + ":" if namespace else ""
        name = front + stream
        self._unit = f"{{{name}}}:"
        self.streams = f"{front}millstream:streams".encode()
        """Set: the names of all declared streams."""
        self.stream_meta = f"{self._unit}meta".encode()
        """Hash `v partitions key codec policy pinned_by`: how the stream was declared, and what holds for it."""
        self.slots = f"{self._unit}slots".encode()
        """Hash: each schedule that publishes to the stream, and the last moment that it has published (milliseconds)."""
        self.dictionaries = f"{self._unit}dictionaries".encode()
        """Hash: the dictionaries with which events of the stream were written, by their numbers."""
        self.probe = f"{self._unit}probe".encode()
        """Stream, for a moment: what a server does is tried on it."""
        self.logs = (
            (name.encode(),)
            if partitions == 1
            else tuple(f"{name}:{partition}".encode() for partition in range(partitions))
        )
        """Streams: the events of each partition."""

    def log(self, partition: int) -> bytes:
        """Stream: the events of a partition."""
        return self.logs[partition]

    def tick(self, group: str) -> bytes:
        """Integer: how many beats there were so far."""
        return f"{self._unit}tick:{group}".encode()

    def live(self, group: str) -> bytes:
        """Sorted set: each living consumer, and the tick of its last beat."""
        return f"{self._unit}live:{group}".encode()

    def fence(self, group: str, consumer: str) -> bytes:
        """String: the consumer's nonce; while it exists, the consumer may settle."""
        return f"{self._unit}fence:{group}:{consumer}".encode()

    def due(self, partition: int, group: str) -> bytes:
        """Sorted set: waiting entries, and when their next attempt is due (milliseconds; 0: at once)."""
        return self._beside(partition, f"due:{group}")

    def note(self, partition: int, group: str) -> bytes:
        """Hash: entries that a crash left behind, and how often they had been started. `+<id>`: how often one was put off;
        `*<id>`: of a pack that was tried before, which of its events are left."""
        return self._beside(partition, f"note:{group}")

    def dead(self, partition: int, group: str) -> bytes:
        """Stream: dead letters."""
        return self._beside(partition, f"dead:{group}")

    def stats(self, partition: int, group: str) -> bytes:
        """Hash: durable counters `retried dead replayed dropped lost`."""
        return self._beside(partition, f"stats:{group}")

    def meta(self, partition: int) -> bytes:
        """Hash: what must be remembered about the groups of a partition; `repeats put_aside trimmed full_at` of itself."""
        return self._beside(partition, "meta")

    def later(self, partition: int) -> bytes:
        """Sorted set: events that are kept aside, each whole, and when they are due (milliseconds)."""
        return self._beside(partition, "later")

    def ids(self, partition: int) -> tuple[bytes, bytes, bytes]:
        """Hashes, used in turn: ids that are remembered, and the offset of the first event of each."""
        return self._beside(partition, "ids:0"), self._beside(partition, "ids:1"), self._beside(partition, "ids:2")

    def store(self, partition: int) -> tuple[bytes, ...]:
        """What `lua/lib/store.lua` needs to put a record into a partition, in its order."""
        return self.log(partition), self.later(partition), *self.ids(partition), self.meta(partition)

    def lease(self, partition: int, group: str) -> bytes:
        """Hash `owner epoch seq w wn h open clean was want next done retried gaps`: who may work on it; how far it is."""
        return self._beside(partition, f"lease:{group}")

    def parked(self, partition: int, group: str) -> bytes:
        """Sorted set: event keys that wait, and when their first event is due (milliseconds; 0: at once)."""
        return self._beside(partition, f"parked:{group}")

    def parkinfo(self, partition: int, group: str) -> bytes:
        """Hash: `#n` events parked in all; `=<event key>`: `attempts postponed since error` of its first event."""
        return self._beside(partition, f"parkinfo:{group}")

    def park(self, partition: int, group: str, key: str) -> bytes:
        """List: the parked events of an event key, oldest first, each whole."""
        part = key.encode()
        if len(part) > MAX_KEY_PART_BYTES:
            part = sha256(part).hexdigest().encode()
        return self._beside(partition, f"park:{group}:") + part

    def _beside(self, partition: int, name: str) -> bytes:
        return b"{%b}:%b" % (self.logs[partition], name.encode())
