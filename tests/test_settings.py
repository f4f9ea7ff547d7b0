"""Settings: arguments before the environment before the defaults."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from millstream.errors import BadSetting
from millstream.settings import Settings


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(BadSetting, match="MILLSTREAM_LEASE: 'soon' is not a duration"):
        Settings.load({"MILLSTREAM_LEASE": "soon"})


def test_without_anything_the_defaults_hold() -> None:
    settings = Settings.load({})
    assert settings == Settings()
    assert (settings.lease_s, settings.grace_s, settings.concurrency, settings.threads) == (10, 25, 64, 16)
    assert (settings.max_in_flight, settings.namespace) == (None, "")
    assert (settings.publish_patience_s, settings.max_buffered) == (2, 100_000)
    assert settings.max_buffered_bytes == 67_108_864


def test_the_environment_comes_before_the_defaults() -> None:
    environment = {
        "MILLSTREAM_LEASE": "2s",
        "MILLSTREAM_CONCURRENCY": "8",
        "MILLSTREAM_MAX_IN_FLIGHT": "100",
        "MILLSTREAM_MAX_PARKED": "50",
        "MILLSTREAM_PUBLISH_PATIENCE": "5s",
        "MILLSTREAM_MAX_BUFFERED": "500",
        "MILLSTREAM_MAX_BUFFERED_SIZE": "2MB",
        "MILLSTREAM_NAMESPACE": "prod",
        "MILLSTREAM_SOMETHING_ELSE": "ignored",
        "CONCURRENCY": "9",
    }
    expected = Settings(
        lease="2s",
        concurrency=8,
        max_in_flight=100,
        max_parked=50,
        publish_patience="5s",
        max_buffered=500,
        max_buffered_size="2MB",
        namespace="prod",
    )
    assert Settings.load(environment) == expected


def test_an_argument_comes_before_the_environment_and_none_means_not_given() -> None:
    environment = {"MILLSTREAM_CONCURRENCY": "8", "MILLSTREAM_THREADS": "4"}
    settings = Settings.load(environment, concurrency=2, threads=None)
    assert (settings.concurrency, settings.threads) == (2, 4)


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_THREADS", "3")
    assert Settings.load().threads == 3


def test_an_argument_hides_a_broken_variable() -> None:
    assert Settings.load({"MILLSTREAM_THREADS": "many"}, threads=1).threads == 1


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(BadSetting, match="MILLSTREAM_CONCURRENCY='many'"):
        Settings.load({"MILLSTREAM_CONCURRENCY": "many"})


@pytest.mark.parametrize(
    "options",
    [
        {"lease": "0.4s"},
        {"lease": "2h"},
        {"lease": "soon"},
        {"grace": -1},
        {"concurrency": 0},
        {"concurrency": 10_001},
        {"threads": 0},
        {"threads": 1_001},
        {"max_in_flight": 0},
        {"max_parked": 0},
        {"publish_patience": -1},
        {"publish_patience": "2h"},
        {"max_buffered": 0},
        {"max_buffered_size": 0},
        {"max_buffered_size": "65GB"},
        {"max_buffered_size": "much"},
        {"namespace": "a:b"},
    ],
)
def test_a_value_out_of_its_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        Settings(**options)


def test_durations_may_be_given_in_every_form() -> None:
    assert Settings(lease=timedelta(minutes=1), grace=0).lease_s == 60
