"""`BufferPool`: memory for the batches, allocated once and used again."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch


class BufferPool:
    """Memory for CPU tensors, used again once the last tensor in it has been freed.

    The system clears newly allocated memory page by page, which costs a twelfth of the time of
    making views on a CPU (bench/NOTES.md). It is safe to use from several threads.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []  # uint8, one-dimensional

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised, contiguous CPU tensor."""
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        buffer = self._take_buffer(size)

        # The returned tensor, and all tensors and arrays that share its memory, keep this array
        # alive. When it is freed, so that nobody uses the memory any more, the buffer comes back.
        loan = buffer.numpy()[:size]
        finalizer = weakref.finalize(loan, self._free.append, buffer)
        finalizer.atexit = False
        return torch.from_numpy(loan).view(dtype).view(*shape)

    def _take_buffer(self, size: int) -> torch.Tensor:
        """A free buffer of at least `size` bytes, or a new one.

        Free buffers that are too small are dropped, so batches of many sizes do not each keep one.
        """
        while True:
            try:
                buffer = self._free.pop()
            except IndexError:  # no test beforehand: another thread could take the last one
                return torch.empty(size, dtype=torch.uint8)
            if len(buffer) >= size:
                return buffer
