"""Which samples make step k of epoch e on rank r: pure functions, so a step number is the whole state of a loader."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import numpy as np
from numpy.typing import NDArray

from .philox import philox

Samples = NDArray[np.int64]

# Blocks whose samples are mixed. For one size of window, more of them change a sample's company more (the neighbours of
# its own block are a 16th of it) and cost more seeks: 64 MiB on end, of a window of 1 GiB, are 40 seeks of 10 ms long
# on a disk of 160 MB/s.
BLOCKS_MIXED = 16

_STREAM = 0x6F72  # keeps these random numbers apart from those of `recipe.draw`


def epoch_order(n: int, seed: int, epoch: int, block: int | None = None) -> Samples:
    """A permutation of range(n), int64 [n]: the same on every rank and for every batch size.

    With `block`, for data larger than the memory or on a disk that seeks, one that can be read in long stretches: the
    samples are cut into blocks of so many neighbours (the last may be shorter), and each window of BLOCKS_MIXED blocks
    in a random order (`block_order`) is shuffled by itself. Batches are as random as those of a whole permutation only
    where neighbours have nothing in common: in records, which are written in a random order, not in a sorted folder.
    Where one window holds all blocks, the order is the one without.
    """
    keys = _keys(n, seed, epoch, 0)
    if block is not None:
        window = np.argsort(block_order(n, seed, epoch, block)).astype(np.uint64) // np.uint64(
            BLOCKS_MIXED
        )  # of each
        bits = int(window.max()).bit_length()
        keys = window[np.arange(n) // block] << np.uint64(64 - bits) | keys >> np.uint64(bits)
    return np.argsort(keys, kind="stable")


def block_order(n: int, seed: int, epoch: int, block: int) -> Samples:
    """The blocks of `epoch_order` in the order in which they are taken, int64 [blocks]: BLOCKS_MIXED make a window."""
    return np.argsort(_keys(-(-n // block), seed, epoch, 1), kind="stable")


def _keys(n: int, seed: int, epoch: int, what: int) -> NDArray[np.uint64]:
    words = philox(seed, np.arange(n), epoch, what, _STREAM << 16)
    return words[0] << np.uint64(32) | words[1]


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
