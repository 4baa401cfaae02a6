"""Reading ahead for a block-wise shuffle: while one window is used, the disk fetches the next.

A window is BLOCKS_MIXED blocks of the order that `epoch_order(..., block)` describes. Two windows
have to fit into the system's file cache.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .order import BLOCKS_MIXED, Samples, block_order

_SAMPLES_PER_REQUEST = 256  # closing a loader waits for one request at most


class PrefetchPlan:
    """Which samples to fetch before each step, so that each window is fetched once per epoch."""

    def __init__(self, n: int, seed: int, block: int) -> None:
        self._n = n
        self._seed = seed
        self._block = block
        self._epoch = -1
        self._blocks: Samples = np.empty(0, dtype=np.int64)  # in the order of that epoch
        self._planned = 0  # blocks of that order which have been planned so far

    def ranges(self, epoch: int, positions: Samples) -> list[tuple[int, int]]:
        """Ranges (first, last) of samples, first <= sample < last, to fetch before a step.

        Args:
            epoch: The epoch of the step. Steps come in ascending order.
            positions: The step's positions in the order of the epoch, ascending, [B].
        """
        first_window = int(positions[0]) // (BLOCKS_MIXED * self._block)
        last_window = int(positions[-1]) // (BLOCKS_MIXED * self._block)
        if epoch != self._epoch:
            self._epoch = epoch
            self._blocks = block_order(self._n, self._seed, epoch, self._block)
            self._planned = first_window * BLOCKS_MIXED

        # This window and the next. (After the short block, windows begin a little earlier than is
        # computed here, so the step may already reach into the next window.)
        until = (last_window + 2) * BLOCKS_MIXED
        blocks = self._blocks[self._planned : until].tolist()
        self._planned = until
        return [(block * self._block, min((block + 1) * self._block, self._n)) for block in blocks]


class Prefetcher:
    """Asks a store to fetch samples, in a thread, because the request waits for a busy disk.

    Errors are ignored: reading the samples later meets them again.
    """

    def __init__(self, prefetch: Callable[[int, int], None], plan: PrefetchPlan) -> None:
        self._prefetch = prefetch
        self._plan = plan
        self._pool = ThreadPoolExecutor(1, "prefetch")

    def start(self, epoch: int, positions: Samples) -> None:
        """Start to fetch the samples that the plan has for this step."""
        for first, last in self._plan.ranges(epoch, positions):
            for sample in range(first, last, _SAMPLES_PER_REQUEST):
                end = min(sample + _SAMPLES_PER_REQUEST, last)
                self._pool.submit(self._prefetch, sample, end)

    def close(self) -> None:
        """Drop the requests that have not begun, and wait for the one that has."""
        self._pool.shutdown(cancel_futures=True)
