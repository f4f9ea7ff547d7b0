"""Gate: what all handlers of a process pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Handlers pass it side by side, or one suspect with nothing beside it."""

    def __init__(self) -> None:
        self.running = 0
        self.passed = 0
        """Grows when handlers end; once for those of a pack that end without suspending."""
        self.closed = False
        self._changed = asyncio.Event()
        self._alone = asyncio.Lock()

    def leave(self) -> None:
        """A handler has ended."""
        self.running -= 1
        self.passed += 1
        if self.closed:
            self._changed.set()

    async def opened(self) -> None:
        """Wait until handlers may run side by side again."""
        async with self._alone:
            pass

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Close the gate, wait for the running handlers, and open it again at the end."""
        async with self._alone:
            self.closed = True
            try:
                while self.running:
                    self._changed.clear()
                    await self._changed.wait()
                yield
            finally:
                self.closed = False
