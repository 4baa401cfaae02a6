"""Which samples each step takes: pure functions of the seed, the epoch, the step and the rank.

Because nothing else decides the order, a step number is the whole state of a loader.
The distortions of those samples are drawn in `recipe.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import numpy as np
from numpy.typing import NDArray

from .philox import philox

Samples = NDArray[np.int64]

# Blocks that are shuffled together, as one window. For a given window size, more and smaller blocks
# change a sample's neighbours more from epoch to epoch (the samples of its own block are 1/16 of
# them) but cost more seeks: a window of 1 GiB is 16 stretches of 64 MiB, and on a hard disk of
# 160 MB/s each stretch takes as long as 40 seeks of 10 ms.
BLOCKS_MIXED = 16

_STREAM = 0x6F72  # separates these random numbers from those of `draw`
_SAMPLE_KEYS = 0
_BLOCK_KEYS = 1


def epoch_order(n: int, seed: int, epoch: int, block: int | None = None) -> Samples:
    """A permutation of range(n), int64 [n]: the same on every rank and for every batch size.

    With `block`, the order can be read in long contiguous stretches, for data on a hard disk or
    larger than the memory. The samples are cut into blocks of `block` neighbours (the last one may
    be shorter), the blocks are put into a random order (`block_order`), and each window of
    BLOCKS_MIXED consecutive blocks is shuffled by itself. If one window holds all blocks, the
    order is that of a full shuffle.

    Such batches are as random as those of a full shuffle only if neighbours have nothing in
    common. That is true of record files, which are written in a random order, but not of a folder
    sorted by class.
    """
    keys = _random_keys(n, seed, epoch, _SAMPLE_KEYS)
    if block is not None:
        place_of_block = np.argsort(block_order(n, seed, epoch, block)).astype(np.uint64)
        window_of_block = place_of_block // np.uint64(BLOCKS_MIXED)
        window = window_of_block[np.arange(n) // block]

        # With the window in its leading bits, sorting the keys sorts by window first.
        bits = int(window_of_block.max()).bit_length()
        keys = window << np.uint64(64 - bits) | keys >> np.uint64(bits)
    return np.argsort(keys, kind="stable")


def block_order(n: int, seed: int, epoch: int, block: int) -> Samples:
    """The order in which `epoch_order` takes the blocks, int64 [blocks].

    Each BLOCKS_MIXED consecutive ones are a window.
    """
    blocks = -(-n // block)
    return np.argsort(_random_keys(blocks, seed, epoch, _BLOCK_KEYS), kind="stable")


def _random_keys(n: int, seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    """64 random bits for each of n items, uint64 [n]."""
    words = philox(seed, np.arange(n), epoch, purpose, _STREAM << 16)
    return words[0] << np.uint64(32) | words[1]


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Whole batches in an epoch. The rest is dropped: a short batch would change the loss.

    See docs/method.md.
    """
    return n // global_batch


def step_positions(step: int, batch_size: int, rank: int, world: int) -> Samples:
    """The positions in the epoch's order that `rank` takes at `step`, int64 [batch_size].

    The positions of the ranks are adjacent, so together they are the same global batch for any
    number of ranks.
    """
    first = (step * world + rank) * batch_size
    return np.arange(first, first + batch_size, dtype=np.int64)


def replacements(position: int, n: int, global_batch: int) -> Iterator[int]:
    """Positions to try in turn if the sample at `position` is bad: its place in each later batch.

    They wrap around at the end of the order and continue with the neighbouring places. Positions
    of the same global batch are left out, so no batch holds a sample twice. Nothing else decides,
    so after a resume the same sample is the replacement.
    """
    batch = position // global_batch
    common = gcd(n, global_batch)  # steps of `global_batch` modulo n reach n / common positions
    for offset in range(common):
        for jump in range(n // common):
            candidate = (position + offset + jump * global_batch) % n
            if candidate // global_batch != batch:
                yield candidate
