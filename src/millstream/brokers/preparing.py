"""Preparing: what a broker can have beside `Broker`, while only our publisher asks for it. No part of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from millstream.wire.entry import Record


@runtime_checkable
class Preparing(Protocol):
    """A broker that does before `append` what of it needs no server, so that a server need not wait for it."""

    def prepared(self, stream: str, records: Sequence[Record]) -> Sequence[Record]:
        """The same records, to be given to `append`, with what it would have to make of them. Asks nobody."""
        ...
