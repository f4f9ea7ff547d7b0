"""The suite that every broker passes. A broker of your own does when this module of yours passes:

    import pytest
    from millstream.brokers.base import Traits
    from millstream.testing.conformance import Conformance, Place

    class TestMyBroker(Conformance):
        traits = Traits(atomic_outputs=True)

        @pytest.fixture
        def place(self, tmp_path):
            return Place(url=f"mine://{tmp_path}/events")     # empty, and this test's own

The traits that you write down decide which tests there are: a power that is absent has no test, and no test is skipped.
The tests themselves are plain functions in `millstream.testing.suite`, one file per subject; each gets a `Trial`. They
need no plugin, take about a minute on a broker in real time, and never wait for a fixed time.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ClassVar, TypeAlias

import pytest

from millstream.brokers.base import Traits
from millstream.clock import Clock

pytest.register_assert_rewrite("millstream.testing.suite")  # before they are imported, or failures would not say why

from millstream.testing.suite import (  # noqa: E402
    ceiling,
    claims,
    dead,
    dedupe,
    delayed,
    dictionaries,
    giving,
    liveness,
    losses,
    order,
    outputs,
    packs,
    people,
    policies,
    retention,
    slots,
    streams,
    switch,
)
from millstream.testing.suite.trial import CONDITIONS, Place, Trial, trial  # noqa: E402

__all__ = ["Conformance", "Place", "Trial"]

SUBJECTS = (
    *(streams, policies, dedupe, delayed, slots, retention, losses, ceiling),
    *(claims, outputs, dead, liveness, order, switch, people, giving, packs, dictionaries),
)
TEST_S = 60.0  # a test takes a few seconds; what hangs must not hold up the others

Test: TypeAlias = Callable[[Trial], Awaitable[None]]


class Conformance:
    """The base of a broker's test class: fill in `traits`, and a fixture `place`."""

    traits: ClassVar[Traits]

    def __init_subclass__(cls) -> None:
        """Give the class the tests that its powers ask for."""
        super().__init_subclass__()
        if not isinstance(getattr(cls, "traits", None), Traits):
            raise TypeError(f"{cls.__name__} tells no traits: write traits = Traits(…)")
        tests = {name: test for subject in SUBJECTS for name, test in vars(subject).items() if name.startswith("test_")}
        for name, test in tests.items():
            if test not in CONDITIONS or CONDITIONS[test](cls.traits):
                setattr(cls, name, _method(name, test))


def _method(name: str, test: Test) -> Callable[[Conformance, Place], None]:
    def method(self: Conformance, place: Place) -> None:
        _run(_tried(test, place, self.traits))

    method.__name__, method.__doc__ = name, test.__doc__
    return method


async def _tried(test: Test, place: Place, traits: Traits) -> None:
    async with Clock().timeout(TEST_S), trial(place, traits) as hands:
        await test(hands)


def _run(test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            runner.run(test)
        except BaseExceptionGroup as group:
            if len(group.exceptions) > 1:
                raise
            raise group.exceptions[0] from None  # the assertion that failed; the group is ours, not the reader's


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
