"""What all tests share: `async def test_…` runs on an event loop of its own, for at most a minute.

Fixtures are plain functions. What needs the loop is an `async with` inside of the test:

    async def test_an_open_broker_answers() -> None:
        async with opened(url) as broker:
            assert await broker.read("orders", 0, None, 10) == []
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import inspect
import signal
from collections.abc import Coroutine
from typing import Any

import pytest

pytest.register_assert_rewrite("millstream.testing.suite")  # before a test imports one of its files

TEST_S = 60.0

# Started in the background by a shell, we and all that we start would ignore Ctrl-C; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an asynchronous test; leave all others to pytest."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    run(pyfuncitem.obj(**{name: value for name, value in pyfuncitem.funcargs.items() if name in wanted}))
    return True


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on a fresh loop (uvloop where there is one) until it ends, or fail after `TEST_S`."""
    with asyncio.Runner(loop_factory=_loop_factory(), debug=False) as runner:
        runner.run(_bounded(test))
        gc.collect()  # a task or transport that was never awaited or closed warns here, in the test that left it


async def _bounded(test: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(TEST_S):
        await test


def _loop_factory() -> Any:
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop
