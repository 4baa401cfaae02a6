"""Reading ahead for a block-wise shuffle."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline.order
import pipeline.prefetch
from bench.stages import bytes_read_from_disk
from pipeline import FOR_ANY_STORE, Store, Subset, open_store
from pipeline.formats.index import ROW
from pipeline.formats.record_store import RecordStore
from pipeline.order import Samples, block_order, epoch_order, step_positions
from pipeline.prefetch import PrefetchPlan
from tests.helpers.loaders import SEED, assert_same_batches, loader_of
from tests.helpers.stores import as_records


class RecordingStore(Subset):
    """A store that records what is prefetched, and what is read without having been prefetched."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, np.arange(len(store)))
        self.fetched: list[int] = []
        self.not_fetched: list[int] = []

    def prefetch(self, first: int, last: int) -> None:
        assert 0 <= first < last <= len(self)
        self.fetched += range(first, last)

    def read_batch(self, samples: Samples) -> list[bytes]:
        self.not_fetched += set(samples.tolist()) - set(self.fetched)
        return super().read_batch(samples)


class ImmediateExecutor:
    """An executor that runs everything at once, in the calling thread."""

    def __init__(self, workers: int, name: str) -> None: ...

    def submit(self, function: Callable[..., None], *arguments: int) -> None:
        function(*arguments)

    def shutdown(self, cancel_futures: bool) -> None: ...


@pytest.fixture
def two_blocks_per_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few images have many windows."""
    monkeypatch.setattr(pipeline.order, "BLOCKS_MIXED", 2)
    monkeypatch.setattr(pipeline.prefetch, "BLOCKS_MIXED", 2)


@pytest.mark.usefixtures("two_blocks_per_window")
@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
@pytest.mark.parametrize(("world", "block"), [(1, 7), (2, 7), (1, 1), (1, 60)])
def test_each_window_is_fetched_once_per_epoch_and_before_it_is_read(
    photos: Path, decoder: str, world: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.prefetch, "ThreadPoolExecutor", ImmediateExecutor)
    monkeypatch.setattr(pipeline.prefetch, "_SAMPLES_PER_REQUEST", 5)
    for rank in range(world):
        store = RecordingStore(open_store(photos))
        loader = loader_of(
            store, 6 // world, shuffle_block=block, decoder=decoder, rank=rank, world_size=world
        )
        for epoch in range(3):
            store.fetched.clear()
            list(loader.epoch(epoch))
            assert store.not_fetched == []
            assert sorted(store.fetched) == list(range(60))
        store.fetched.clear()
        list(loader.epoch(0, 5))  # as after a resume, in the middle of the order
        assert store.not_fetched == []
        assert len(store.fetched) == len(set(store.fetched))
        already_used = epoch_order(60, SEED, 0, block)[: 30 - 2 * block].tolist()
        assert set(store.fetched).isdisjoint(already_used)


@pytest.mark.usefixtures("two_blocks_per_window")
def test_only_one_window_is_fetched_ahead() -> None:
    """Windows of 10 and batches of 6, so the second batch reaches into the second window."""
    plan = PrefetchPlan(n=60, seed=SEED, block=5)
    planned = 0
    planned_by_step = []
    for step in range(10):
        ranges = plan.ranges(epoch=0, positions=step_positions(step, 6, rank=0, world=1))
        planned += sum(last - first for first, last in ranges)
        planned_by_step.append(planned)
    assert planned_by_step == [20, 30, 30, 40, 40, 50, 60, 60, 60, 60]


@pytest.mark.usefixtures("two_blocks_per_window")
def test_ranges_are_the_blocks_in_the_order_of_the_epoch() -> None:
    """Of 13 samples in blocks of 5, the last one has only 3."""
    plan = PrefetchPlan(n=13, seed=SEED, block=5)
    for epoch in range(5):
        ranges = plan.ranges(epoch, positions=np.arange(4))
        blocks = {first // 5: (first, last) for first, last in ranges}
        assert list(blocks) == block_order(13, SEED, epoch, 5).tolist()
        assert [blocks[block] for block in range(3)] == [(0, 5), (5, 10), (10, 13)]


def test_batches_of_records_in_blocks_are_those_of_the_folder_in_blocks(
    photos: Path, tmp_path: Path
) -> None:
    folder = open_store(photos)
    records = as_records(folder, tmp_path)
    expected = list(loader_of(folder, shuffle_block=1).epoch(2))
    assert torch.cat([b.samples for b in expected]).tolist() == epoch_order(60, SEED, 2, 1).tolist()
    assert_same_batches(list(loader_of(records, shuffle_block=1).epoch(2)), expected)
    assert len(list(loader_of(Subset(records, np.arange(3, 50)), shuffle_block=1).epoch(0))) == 7
    assert len(list(loader_of(records, shuffle_block=1, shuffle=False).epoch(0))) == 10


def test_slow_and_failing_prefetch_changes_nothing(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: RecordingStore, first: int, last: int) -> None:
        threading.Event().wait(0.05)
        raise OSError("the disk is on fire")

    expected = list(loader_of(open_store(photos), shuffle_block=1).epoch(0))
    monkeypatch.setattr(RecordingStore, "prefetch", fail)
    loader = loader_of(RecordingStore(open_store(photos)), shuffle_block=1)
    before = set(threading.enumerate())
    assert_same_batches(list(loader.epoch(0)), expected)
    batches = loader.epoch(0)
    next(batches)
    batches.close()
    assert set(threading.enumerate()) == before


def test_prefetch_of_a_subset_includes_the_samples_between_its_own(photos: Path) -> None:
    store = RecordingStore(open_store(photos))
    Subset(store, np.array([3, 5, 8, 20])).prefetch(1, 3)
    assert store.fetched == [5, 6, 7, 8]
    Subset(open_store(photos), np.arange(4)).prefetch(0, 4)  # a folder has no prefetch


def test_prefetch_reads_everything_from_the_disk(tmp_path: Path) -> None:
    """More than Linux reads for one request: at most what the disk takes at once, such as 8 MiB."""
    image = bytes(100_000)
    path = tmp_path / "a.records"
    path.write_bytes(bytes(50_000) + 400 * image)
    rows = np.zeros(400, ROW)
    rows["bytes"] = len(image)
    rows["offset"] = 50_000 + len(image) * np.arange(400)
    store = RecordStore(path, [path], rows, [])

    def read(work: Callable[[], object]) -> int:
        """Bytes that are read from the disk during `work`."""
        os.sync()
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            before = bytes_read_from_disk()
            work()
            return (bytes_read_from_disk() or 0) - (before or 0)

    if not read(path.read_bytes):
        pytest.skip("the temporary folder is not on a disk whose reads are counted")
    assert 38e6 < read(lambda: store.prefetch(10, 390)) < 39e6
