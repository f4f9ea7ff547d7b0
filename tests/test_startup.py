"""Start-up by what is loaded: a count of modules is the same on every machine, a time is not.

`tests/cli/test_startup.py` says the same of the commands on SQLite.
"""

from __future__ import annotations

import subprocess
import sys

from tests.servers import RedisServer

BROKERS = {"redis", "hiredis", "sqlite3"}
TERMINAL = {"click", "rich"}
HEAVY = {"uvloop", "pydantic", "sqlalchemy", "cronsim", "zstandard", "lz4", "multiprocessing", "importlib.metadata"}


def loaded(program: str, *words: str) -> set[str]:
    """The modules that a program has loaded at its end."""
    last_line = "\nimport sys; print(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program + last_line, *words], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name.startswith("millstream.")}


def test_importing_the_package_loads_the_one_module_whose_name_is_also_a_function() -> None:
    modules = loaded("import millstream")
    assert ours(modules) == {"millstream.event", "millstream.errors", "millstream.units"}
    assert not modules & (BROKERS | TERMINAL | HEAVY | {"asyncio"})


def test_declaring_an_app_loads_no_broker_and_nothing_of_a_terminal() -> None:
    modules = loaded("from millstream import App, Event, Stream\nApp('shop', broker='redis://nowhere')")
    assert not modules & (BROKERS | TERMINAL | HEAVY)
    brokers = tuple(f"millstream.brokers.{name}." for name in ("memory", "redis", "sqlite"))
    assert not {name for name in ours(modules) if name.startswith((*brokers, "millstream.cli"))}


def test_a_command_on_redis_loads_neither_redis_py_nor_another_broker() -> None:
    command = "from millstream.cli.main import main\ntry: main()\nexcept SystemExit: pass"
    with RedisServer.start() as server:
        modules = loaded(command, "stream", "ls", "-o", "json", "--broker", server.url)
    assert "millstream.brokers.redis.broker" in modules
    assert not modules & {"redis", "rich", "sqlite3", *HEAVY}
