"""Memory that is used again: never while anybody still looks at it."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from pipeline import LoaderOptions, barlow_twins, open_loader, open_store
from pipeline.machine import BufferPool, single_threaded_workers


def test_memory_comes_back_when_its_tensor_is_gone_and_only_then() -> None:
    memory = BufferPool()
    first = memory.empty((4, 5, 3), torch.float32)
    where = first.data_ptr()
    assert (first.shape, first.dtype, first.is_contiguous()) == ((4, 5, 3), torch.float32, True)
    assert memory.empty((4, 5, 3), torch.float32).data_ptr() != where
    row = first.permute(2, 0, 1)[1:]  # another tensor in the same memory
    del first
    gc.collect()
    assert memory.empty((4, 5, 3), torch.float32).data_ptr() != where
    array = row.numpy()
    del row
    gc.collect()
    assert memory.empty((4, 5, 3), torch.float32).data_ptr() != where
    del array
    gc.collect()
    again = [
        memory.empty((60,), torch.float32) for _ in range(3)
    ]  # as many bytes, of another shape
    assert where in [tensor.data_ptr() for tensor in again]
    assert len({tensor.data_ptr() for tensor in again}) == 3


def test_memory_outlives_its_reservoir() -> None:
    memory = BufferPool()
    kept = memory.empty((1000,), torch.int64)
    kept[:] = 7
    del memory
    gc.collect()
    assert kept.eq(7).all()


def test_batches_of_many_sizes_do_not_each_keep_memory() -> None:
    memory = BufferPool()
    for rows in (*range(1, 60), *range(59, 0, -1)):
        lent = [memory.empty((rows, 7), torch.float64) for _ in range(2)]
        assert [tensor.shape for tensor in lent] == [(rows, 7)] * 2
        lent[0][:], lent[1][:] = 1, 2
        assert lent[0].eq(1).all()
        del lent
    gc.collect()
    assert sum(map(len, memory._free)) <= 2 * 59 * 7 * 8
    assert memory.empty((0, 7), torch.float64).shape == (0, 7)


def test_where_threads_are_short_those_that_started_end(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def two_start(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", two_start)
    with pytest.raises(RuntimeError, match="start new thread"):
        single_threaded_workers(4, "few")
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


def test_batches_that_are_kept_do_not_change(photos: Path) -> None:
    """Also those of which only a part, or an array, is kept."""
    loader = open_loader(
        open_store(photos), barlow_twins(32), LoaderOptions(batch_size=10, threads=2)
    )
    kept, copies = [], []
    for batch in loader.steps(0, 18):
        kept.append((batch.views[0], batch.views[1][3:5].numpy()))
        copies.append((batch.views[0].clone(), batch.views[1][3:5].clone().numpy()))
    for (view, part), (view_then, part_then) in zip(kept, copies, strict=True):
        assert torch.equal(view, view_then)
        assert (part == part_then).all()


def test_batches_that_are_let_go_share_memory(photos: Path) -> None:
    loader = open_loader(
        open_store(photos), barlow_twins(32), LoaderOptions(batch_size=10, threads=2)
    )
    places = {batch.views[0].data_ptr() for batch in loader.steps(0, 30)}
    assert len(places) < 15
