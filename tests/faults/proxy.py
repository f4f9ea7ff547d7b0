"""A proxy between clients and a server, which cuts connections: by chance, or in place of passing an answer on.

One thread passes all bytes. What it has cut is told by `cuts`; the server has always got what was passed on before.
"""

from __future__ import annotations

import random
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Self

from tests.servers import free_port

CHUNK = 65_536
LOOK_S = 0.05


class Wire:
    """One side of a connection."""

    def __init__(self, here: socket.socket, *, client: bool) -> None:
        self.socket = here
        self.client = client
        self.other: Wire = self
        self.doomed = False
        """The next answer to this client is not passed on, and all is over."""


class Proxy:
    """Listens on a port of its own, inside the block."""

    def __init__(self, port: int, seed: int = 0) -> None:
        self.cuts = 0
        self.every_s = 0.0
        """How often a connection is cut, about, with half of what it is about to pass on, either way; 0: never."""
        self.dooms: Callable[[bytes], bool] = lambda request: False
        """Asked about each request: whether its answer is to be lost."""
        self.stalled = False
        """What the server says stays here, and is gone with us."""
        self.port = free_port()
        self._server_port = port
        self._chance = random.Random(seed)
        self._next_s = 0.0
        self._stopping = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        """The server's address, by this way."""
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=100)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            for key, _ in self._selector.select(LOOK_S):
                wire: Wire | None = key.data
                if wire is None:
                    self._accept()
                elif wire.socket.fileno() >= 0:  # not cut a moment ago
                    self._serve(wire)

    def _accept(self) -> None:
        here, _ = self._listener.accept()
        try:
            there = socket.create_connection(("127.0.0.1", self._server_port))
        except OSError:
            here.close()
            return
        wires = Wire(here, client=True), Wire(there, client=False)
        for wire, other in (wires, wires[::-1]):
            wire.other = other
            wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(wire.socket, selectors.EVENT_READ, wire)

    def _serve(self, wire: Wire) -> None:
        if self.stalled and not wire.client:
            time.sleep(0.001)
            return
        try:
            data = wire.socket.recv(CHUNK)
            if data and not self._cuts(wire, data):
                wire.other.socket.sendall(data)
                return
        except OSError:
            pass
        self._close(wire)

    def _cuts(self, wire: Wire, data: bytes) -> bool:
        """Whether this is the end of the connection."""
        if wire.client:
            wire.doomed = wire.doomed or self.dooms(data)
        elif wire.other.doomed:
            self.cuts += 1
            return True
        now_s = time.monotonic()
        if not self.every_s or now_s < self._next_s:
            return False
        self._next_s = now_s + self._chance.expovariate(1 / self.every_s)
        self.cuts += 1
        wire.other.socket.sendall(data[: self._chance.randint(0, len(data))])
        return True

    def _close(self, wire: Wire) -> None:
        for each in (wire, wire.other):
            self._selector.unregister(each.socket)
            each.socket.close()
