"""How many images a second a run trains on, and what fraction of the time it waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class ThroughputMeter:
    """Counts batches and the time spent waiting for them, over the whole run and since the last
    reading.

    Args:
        batch_size: Images per batch, on all ranks together.
        before: `state()` of the run that this one resumes.
    """

    def __init__(self, batch_size: int, before: dict[str, float] | None = None) -> None:
        before = before or {"images": 0, "wait_s": 0.0, "elapsed_s": 0.0}
        self._batch_size = batch_size
        self._images = before["images"]
        self._wait_s = before["wait_s"]
        self._last_read_at = time.monotonic()
        self._started_at = self._last_read_at - before["elapsed_s"]
        self._images_at_last_reading = self._images
        self._wait_s_at_last_reading = self._wait_s

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; each is counted, with the time that the consumer waited for it."""
        while True:
            asked_at = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._wait_s += time.monotonic() - asked_at
            self._images += self._batch_size
            yield batch

    def read(self) -> dict[str, float]:
        """`images_per_s` and `data_wait_fraction` since the last reading."""
        now = time.monotonic()
        rates = _rates(
            self._images - self._images_at_last_reading,
            self._wait_s - self._wait_s_at_last_reading,
            now - self._last_read_at,
        )
        self._last_read_at = now
        self._images_at_last_reading = self._images
        self._wait_s_at_last_reading = self._wait_s
        return rates

    def total(self) -> dict[str, float]:
        """`images_per_s` and `data_wait_fraction` since the run began."""
        return _rates(self._images, self._wait_s, time.monotonic() - self._started_at)

    def state(self) -> dict[str, float]:
        """What a resumed run needs to continue the totals."""
        elapsed_s = time.monotonic() - self._started_at
        return {"images": self._images, "wait_s": self._wait_s, "elapsed_s": elapsed_s}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of all rates."""
        began = time.monotonic()
        yield
        elapsed_s = time.monotonic() - began
        self._started_at += elapsed_s
        self._last_read_at += elapsed_s


def _rates(images: float, wait_s: float, elapsed_s: float) -> dict[str, float]:
    return {"images_per_s": images / elapsed_s, "data_wait_fraction": wait_s / elapsed_s}
