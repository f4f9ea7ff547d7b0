"""What a broker can have beside `Broker`, while only our publisher asks for it. No part of the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from millstream.stream import Position
from millstream.wire.entry import Record


@runtime_checkable
class Preparing(Protocol):
    """A broker that does before `append` what of it needs no server, so that a server need not wait for it."""

    def prepared(self, stream: str, records: Sequence[Record]) -> Sequence[Record]:
        """The same records, to be given to `append`, with what it would have to make of them. Asks nobody."""
        ...


class Posted(Protocol):
    """A record that has left."""

    def then(self, call: Callable[[], object]) -> None:
        """Call back, from the event loop, when its answer has come, or is known to be lost."""
        ...

    def result(self) -> Position:
        """What became of it, once that is known. Raises as `Broker.append`."""
        ...


@runtime_checkable
class Posting(Protocol):
    """A broker that can send a record in the step that asks for it, before any other task runs."""

    def post(self, stream: str, record: Record) -> Posted | None:
        """As `append` with "memory", without waiting: the record has left. None where it would wait: nothing has."""
        ...
