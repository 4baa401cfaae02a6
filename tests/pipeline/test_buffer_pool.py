"""Memory that is used again, but never while anybody uses it."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from pipeline import LoaderOptions, barlow_twins, open_loader, open_store
from pipeline.buffer_pool import BufferPool


def test_memory_is_used_again_once_all_its_tensors_are_freed() -> None:
    memory = BufferPool()
    first = memory.empty((4, 5, 3), torch.float32)
    address = first.data_ptr()
    assert (first.shape, first.dtype, first.is_contiguous()) == ((4, 5, 3), torch.float32, True)
    assert memory.empty((4, 5, 3), torch.float32).data_ptr() != address
    row = first.permute(2, 0, 1)[1:]  # another tensor in the same memory
    del first
    gc.collect()
    assert memory.empty((4, 5, 3), torch.float32).data_ptr() != address
    array = row.numpy()
    del row
    gc.collect()
    assert memory.empty((4, 5, 3), torch.float32).data_ptr() != address
    del array
    gc.collect()
    # As many bytes, in another shape.
    again = [memory.empty((60,), torch.float32) for _ in range(3)]
    assert address in [tensor.data_ptr() for tensor in again]
    assert len({tensor.data_ptr() for tensor in again}) == 3


def test_tensors_outlive_their_pool() -> None:
    memory = BufferPool()
    kept = memory.empty((1000,), torch.int64)
    kept[:] = 7
    del memory
    gc.collect()
    assert kept.eq(7).all()


def test_buffers_that_are_too_small_are_dropped() -> None:
    memory = BufferPool()
    for rows in (*range(1, 60), *range(59, 0, -1)):
        lent = [memory.empty((rows, 7), torch.float64) for _ in range(2)]
        assert [tensor.shape for tensor in lent] == [(rows, 7)] * 2
        lent[0][:] = 1
        lent[1][:] = 2
        assert lent[0].eq(1).all()
        del lent
    gc.collect()
    assert sum(map(len, memory._free)) <= 2 * 59 * 7 * 8
    assert memory.empty((0, 7), torch.float64).shape == (0, 7)


def test_batches_that_are_kept_do_not_change(photos: Path) -> None:
    """Even if only a part of a view is kept, or an array of it."""
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


def test_batches_that_are_dropped_share_memory(photos: Path) -> None:
    loader = open_loader(
        open_store(photos), barlow_twins(32), LoaderOptions(batch_size=10, threads=2)
    )
    addresses = {batch.views[0].data_ptr() for batch in loader.steps(0, 30)}
    assert len(addresses) < 15
