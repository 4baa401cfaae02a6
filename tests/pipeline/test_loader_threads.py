"""The threads of a loader: they end with its iterator, and pass errors on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import (
    FOR_ANY_STORE,
    Batch,
    Loader,
    Store,
    Subset,
    open_store,
)
from pipeline.order import Samples, epoch_order
from tests.helpers.loaders import SEED, loader_of


class FailsOnceStore(Subset):
    """A store whose disk fails the first time it reads a certain sample."""

    def __init__(self, store: Store, fails_at: int) -> None:
        super().__init__(store, np.arange(len(store)))
        self.fails_at = fails_at

    def read_batch(self, samples: Samples) -> list[bytes]:
        if self.fails_at in samples:
            self.fails_at = -1
            raise RuntimeError("the disk is on fire")
        return super().read_batch(samples)


def break_out(loader: Loader) -> None:
    for _ in loader.epoch(0):
        break


def close(loader: Loader) -> None:
    batches = loader.epoch(0)
    next(batches)
    batches.close()


def drop(loader: Loader) -> None:
    batches = loader.epoch(0)
    next(batches)
    next(batches)
    del batches


def never_begin(loader: Loader) -> None:
    loader.epoch(0)
    loader.epoch(0).close()


def run_out(loader: Loader) -> None:
    assert len(list(loader.epoch(0))) == len(loader)


def fail_in_the_consumer(loader: Loader) -> None:
    def consume() -> None:
        for _ in loader.epoch(0):
            raise KeyError("in the training step")

    with pytest.raises(KeyError):
        consume()


@pytest.mark.parametrize(
    "leave", [break_out, close, drop, never_begin, run_out, fail_in_the_consumer]
)
@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_no_thread_outlives_its_iterator(
    photos: Path, decoder: str, leave: Callable[[Loader], None]
) -> None:
    loader = loader_of(open_store(photos), decoder=decoder)
    before = set(threading.enumerate())
    for _ in range(20):
        leave(loader)
        assert set(threading.enumerate()) == before


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_read_error_reaches_the_consumer_and_leaves_no_thread(photos: Path, decoder: str) -> None:
    order = epoch_order(60, SEED, 0)
    before = set(threading.enumerate())
    for _ in range(20):
        loader = loader_of(
            FailsOnceStore(open_store(photos), fails_at=int(order[31])), decoder=decoder
        )  # in batch 5
        seen: list[Batch] = []
        with pytest.raises(RuntimeError, match="the disk is on fire"):
            seen.extend(loader.epoch(0))
        assert len(seen) <= 5
        assert set(threading.enumerate()) == before
        assert loader.bad == {}


def test_iterator_with_a_full_queue_can_be_closed(photos: Path) -> None:
    """Its thread waits for room in the queue."""
    loader = loader_of(open_store(photos))
    before = set(threading.enumerate())
    batches = loader.steps(0, 1000)
    next(batches)
    threading.Event().wait(0.5)
    batches.close()
    assert set(threading.enumerate()) == before
