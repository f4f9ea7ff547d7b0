"""A URL becomes a broker, and its password stays secret."""

from __future__ import annotations

from typing import Any

import pytest

from millstream.brokers.memory.broker import MemoryBroker
from millstream.brokers.urls import ENTRY_POINTS, broker_for, mask
from millstream.clock import Clock
from millstream.errors import BadSetting
from millstream.settings import Settings
from millstream.telemetry import Telemetry


def broker(url: str) -> Any:
    return broker_for(url, Settings(), Clock(), Telemetry())


def test_the_scheme_decides() -> None:
    assert isinstance(broker("memory://"), MemoryBroker)


@pytest.mark.parametrize("url", ["", "shop.db", "redis:localhost", "/tmp/events.db"])
def test_what_is_no_url_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(BadSetting, match=r"write sqlite:///shop\.db or redis://"):
        broker(url)


def test_an_unknown_scheme_is_refused_without_telling_the_password() -> None:
    with pytest.raises(BadSetting, match="kafkaesque") as refused:
        broker("kafkaesque://joe:hunter2@host:1/0")
    assert "hunter2" not in str(refused.value)


def test_another_package_can_add_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        @staticmethod
        def load() -> Any:
            return MemoryBroker

    def entry_points(*, group: str, name: str) -> list[Any]:
        return [Found] if (group, name) == (ENTRY_POINTS, "mine") else []

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    assert broker("mine://there").url == "mine://there"
    with pytest.raises(BadSetting, match="other"):
        broker("other://there")


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://joe:hunter2@host:6379/0", "redis://joe:***@host:6379/0"),
        ("redis://:hunter2@host", "redis://:***@host"),
        ("rediss://joe:h%40n:ter2@host/1?x=y", "rediss://joe:***@host/1?x=y"),
        ("unix://joe:hunter2@/run/redis.sock", "unix://joe:***@/run/redis.sock"),
        ("cannot reach redis://:a@b, nor redis://:c@d", "cannot reach redis://:***@b, nor redis://:***@d"),
        ("redis+unix:///run/redis.sock?password=hunter2&db=1", "redis+unix:///run/redis.sock?password=***&db=1"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("sqlite:///a:b@c.db", "sqlite:///a:b@c.db"),
        ("redis://host/0?to=a:b@c", "redis://host/0?to=a:b@c"),
    ],
)
def test_passwords_are_masked_wherever_a_url_stands(url: str, masked: str) -> None:
    assert mask(url) == masked
