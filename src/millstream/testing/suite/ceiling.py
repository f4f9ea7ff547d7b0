"""The ceiling of a stream: what does not fit is refused, or waits, until there is room again."""

# ruff: noqa: D103 - the name of a test is its sentence

from __future__ import annotations

import pytest

from millstream.brokers.base import Policy, StreamSpec
from millstream.errors import BrokerFull
from millstream.testing.suite.people import FAR_MS
from millstream.testing.suite.retention import FEW, MANY, create, filled, places, retains, shrunk, work_off
from millstream.testing.suite.streams import later_ms
from millstream.testing.suite.trial import Trial, where


@retains
async def test_a_stream_is_full_at_its_ceiling_and_takes_more_once_it_was_consumed(trial: Trial) -> None:
    stream = await filled(trial, Policy(events=FEW, ceiling_events=2 * MANY), count=MANY)
    tended = await trial.tended(stream, lambda found: found.fullness > 0)
    assert tended.fullness == pytest.approx(0.5)
    await trial.publish(MANY, stream=stream)
    tended = await trial.tended(stream, lambda found: found.fullness > 0.9)
    assert tended.fullness == pytest.approx(1) and (tended.pinned_by, tended.trimmed) == ("billing", 0)
    with pytest.raises(BrokerFull) as refusal:
        await trial.publish(stream=stream)
    assert all(word in str(refusal.value) for word in (stream.name, f"{2 * MANY:,}", "billing"))
    assert refusal.value.retryable and len(await places(trial, stream)) == 2 * MANY
    await work_off(trial, await trial.consumer(stream=stream), 2 * MANY)
    stayed = await shrunk(trial, stream, FEW)
    assert (await trial.broker.tend(stream.name)).fullness == pytest.approx(len(stayed) / (2 * MANY))
    await publishable(trial, stream)


@retains
async def test_a_stream_is_full_at_the_size_that_is_its_ceiling(trial: Trial) -> None:
    stream = await trial.declared(Policy(bytes=50_000, ceiling_bytes=200_000))
    await create(trial, stream)

    async def full() -> bool:
        try:
            for _ in range(10):
                await trial.broker.append(stream.name, [trial.record(b"x" * 1_000)])
        except BrokerFull as error:
            assert stream.name in str(error)
            return True
        await trial.broker.tend(stream.name)
        return False

    await trial.eventually(full, bool)
    count = len(await places(trial, stream))
    assert count >= 100
    await trial.tended(stream, lambda found: found.fullness > 0.9)
    await work_off(trial, await trial.consumer(stream=stream), count)
    await trial.tended(stream, lambda found: 0 < found.fullness < 0.9)
    await publishable(trial, stream)


@where(lambda traits: traits.retention and traits.delayed)
async def test_events_for_later_are_not_removed_and_wait_for_room(trial: Trial) -> None:
    stream = await trial.declared(Policy(events=1, ceiling_events=MANY))
    await create(trial, stream)
    at_ms = await later_ms(trial) + 100
    await trial.broker.append(stream.name, [trial.record(due_ms=due) for due in (at_ms, at_ms + FAR_MS)])
    await trial.publish(MANY, stream=stream)

    async def over() -> bool:
        return (await trial.broker.tend(stream.name)).published == 0 and trial.clock.now_ms() > at_ms + 200

    await trial.eventually(over, bool)
    about = await trial.about(stream)
    assert (about.events, about.delayed) == (MANY, 2)
    await work_off(trial, await trial.consumer(stream=stream), MANY)
    await trial.tended(stream, lambda found: found.published == 1)
    assert (await trial.about(stream)).delayed == 1


async def publishable(trial: Trial, stream: StreamSpec) -> None:
    """Wait until the stream takes events again."""

    async def taken() -> bool:
        try:
            await trial.publish(stream=stream)
        except BrokerFull:
            return False
        return True

    await trial.eventually(taken, bool)
