"""PostgreSQL servers for tests: each on a port of its own, in a folder of its own, ended with the test.

PostgreSQL refuses to run as root: there it runs as the user `postgres`, else `nobody`. It is told to leave out fsync, since
what is killed here is the server, never the machine.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

from tests.servers import MissingServer, _give_up, free_port, wait_until

START_S = 30.0
STOP_S = 20.0

_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "shared_buffers": "16MB",
    "max_connections": "40",
    "autovacuum": "off",
    "log_min_messages": "fatal",
}

# Becomes another user where that is asked for, asks Linux (prctl, PR_SET_PDEATHSIG) to be ended when its parent dies, and
# becomes the program. In this order: the wish is forgotten when the user changes.
_LAUNCH = """
import ctypes, os, signal, sys
user, group = int(sys.argv[1]), int(sys.argv[2])
if user:
    os.setgroups([]), os.setgid(group), os.setuid(user)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGQUIT)
os.execv(sys.argv[3], sys.argv[3:])
"""


class PostgresServer:
    """A server of ours, from `start` to the end of its block. What it stored survives `kill` and `restart`."""

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._binaries = binaries
        self._directory = directory
        self._user = _user()
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)
        self.port = free_port()

    @classmethod
    def start(cls) -> Self:
        """Make a cluster and start it; it answers when this returns. A missing binary skips the test, or fails it in CI."""
        binaries = find_or_skip()
        directory = Path(tempfile.mkdtemp(prefix="ms-postgres-"))
        server = cls(binaries, directory)
        try:
            os.chown(directory, *server._user) if server._user[0] else None
            initdb = server._command("initdb", "-D", str(directory / "data"), "-U", "postgres", "-A", "trust")
            subprocess.run(
                [*initdb, "-E", "UTF8", "--locale=C", "--no-sync"],
                check=True,
                capture_output=True,
                cwd=directory,
                timeout=START_S,
            )
            server._spawn()
        except BaseException:
            server.stop()
            raise
        return server

    def database(self) -> str:
        """A new, empty database: `postgresql://…`."""
        import psycopg

        name = f"test{next(self._numbers)}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self._url(name)

    def kill(self) -> None:
        """End the server and all its processes at once (SIGKILL)."""
        process, self._process = self._process, None
        assert process is not None, "the server has ended"
        process.send_signal(signal.SIGSTOP)  # or it would see its children die, and clean up
        children = _children(process.pid)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        wait_until(lambda: not any(_alive(pid) for pid in children), STOP_S, "its processes do not end")

    def restart(self) -> None:
        """A new process with the same address and data; it answers when this returns."""
        if self._process is not None:
            self.kill()
        self._spawn()

    def stop(self) -> None:
        """End it, and remove its folder."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)  # "fast": connections are cut
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self) -> None:
        (self._directory / "data" / "postmaster.pid").unlink(missing_ok=True)  # left by one that was killed
        options = _OPTIONS | {"port": str(self.port), "unix_socket_directories": str(self._directory)}
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command("postgres", "-D", str(self._directory / "data"), *words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                start_new_session=True,
            )
        wait_until(self._answers, START_S, f"PostgreSQL on port {self.port} does not answer")

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"PostgreSQL ended: {(self._directory / 'log').read_text(errors='replace')[-2_000:]}")
        return _ready(self.port)

    def _command(self, name: str, *words: str) -> list[str]:
        user, group = self._user
        return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(user), str(group), str(self._binaries / name), *words]

    def _url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"


def find() -> Path:
    """The folder of the server's programs, the newest where there are several. Raises `MissingServer`."""
    on_path = shutil.which("postgres")
    folders = [Path(on_path).resolve().parent] if on_path else []
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    folders += sorted(debian, key=lambda folder: int(folder.parent.name), reverse=True)
    for folder in folders:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    raise MissingServer("no PostgreSQL on this machine: install the package postgresql, or run `make test` as root")


def find_or_skip() -> Path:
    """As `find`; a missing server skips the test that asks, but where CI=true it is a failure."""
    try:
        return find()
    except MissingServer as missing:
        _give_up(str(missing))


def _user() -> tuple[int, int]:
    """Whom it runs as: zeros for ourselves."""
    if os.getuid():
        return 0, 0
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise MissingServer("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")


def _ready(port: int) -> bool:
    """True when it takes connections: it asks who we are, instead of saying that it is starting."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            body = (196_608).to_bytes(4, "big") + b"user\0postgres\0database\0postgres\0\0"
            connection.sendall((len(body) + 4).to_bytes(4, "big") + body)
            return connection.recv(1) == b"R"  # "authentication"; it is "E" while it starts
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _words(path)[1:2] == [str(pid)]]


def _alive(pid: int) -> bool:
    return _words(Path(f"/proc/{pid}/stat"))[:1] not in ([], ["Z"], ["X"])


def _words(path: Path) -> list[str]:
    """What the kernel says of a process, behind its name: its state, its parent; empty when it is gone."""
    with contextlib.suppress(OSError):
        return path.read_text().rpartition(")")[2].split()
    return []
