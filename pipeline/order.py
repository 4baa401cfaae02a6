"""Which samples make step k of epoch e on rank r: pure functions, so a step number is the whole state of a loader."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import numpy as np
from numpy.typing import NDArray

from .philox import philox

Samples = NDArray[np.int64]

_STREAM = 0x6F72  # keeps these random numbers apart from those of `recipe.draw`


def epoch_order(n: int, seed: int, epoch: int) -> Samples:
    """A permutation of range(n), int64 [n]: the same on every rank and for every batch size."""
    words = philox(seed, np.arange(n), epoch, 0, _STREAM << 16)
    return np.argsort(words[0] << np.uint64(32) | words[1], kind="stable")


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Whole batches in an epoch; the rest is dropped: a short batch would change the loss (docs/method.md)."""
    return n // global_batch


def step_positions(step: int, batch_size: int, rank: int, world: int) -> Samples:
    """Positions in the epoch's order that rank `rank` of `world` takes at `step`, int64 [batch_size].

    The ranks' slices of a step lie side by side: together they are the global batch, whatever their number is.
    """
    first = (step * world + rank) * batch_size
    return np.arange(first, first + batch_size, dtype=np.int64)


def replacements(position: int, n: int, global_batch: int) -> Iterator[int]:
    """Positions to try, in turn, where the sample at `position` is bad: the same place in each later batch.

    They wrap around at the end of the order, then go through the places beside, and leave out the batch of `position`
    itself, so that no batch holds a sample twice. After a resume the same sample stands in: nothing else decides.
    """
    batch = position // global_batch
    common = gcd(n, global_batch)  # walking by global_batch meets one in `common` positions
    for beside in range(common):
        for jump in range(n // common):
            candidate = (position + beside + jump * global_batch) % n
            if candidate // global_batch != batch:
                yield candidate
