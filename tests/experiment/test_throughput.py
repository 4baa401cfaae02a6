"""How fast images come, and how long a run waits for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from experiment import ThroughputMeter


class Clock:
    """Stands in for `time.monotonic`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def slow_batches(clock: Clock, seconds: float) -> Iterator[int]:
    for i in range(10):
        clock.now += seconds
        yield i


def test_rates_are_those_since_the_last_reading_and_in_total(clock: Clock) -> None:
    meter = ThroughputMeter(batch_size=8)
    batches = meter.timed(slow_batches(clock, seconds=1))
    next(batches)
    clock.now += 3  # the step
    assert meter.read() == {"images_per_s": 2.0, "data_wait_fraction": 0.25}
    next(batches)
    clock.now += 1
    assert meter.read() == {"images_per_s": 4.0, "data_wait_fraction": 0.5}
    assert meter.total() == pytest.approx({"images_per_s": 16 / 6, "data_wait_fraction": 2 / 6})


def test_the_batches_are_those_of_the_loader(clock: Clock) -> None:
    meter = ThroughputMeter(batch_size=8)
    assert list(meter.timed(slow_batches(clock, seconds=1))) == list(range(10))
    assert meter.state() == {"images": 80, "wait_s": 10.0, "elapsed_s": 10.0}


def test_a_resumed_run_continues_the_totals(clock: Clock) -> None:
    before = {"images": 100, "wait_s": 2.0, "elapsed_s": 10.0}
    meter = ThroughputMeter(batch_size=20, before=before)
    next(meter.timed(slow_batches(clock, seconds=2)))
    assert meter.total() == {"images_per_s": 10.0, "data_wait_fraction": pytest.approx(4 / 12)}
    assert meter.read() == {"images_per_s": 10.0, "data_wait_fraction": 1.0}


def test_a_pause_does_not_count(clock: Clock) -> None:
    meter = ThroughputMeter(batch_size=8)
    next(meter.timed(slow_batches(clock, seconds=1)))
    with meter.paused():
        clock.now += 100
    clock.now += 1
    assert meter.read() == {"images_per_s": 4.0, "data_wait_fraction": 0.5}
    assert meter.total() == {"images_per_s": 4.0, "data_wait_fraction": 0.5}
