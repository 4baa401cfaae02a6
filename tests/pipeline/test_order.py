"""The order of the samples: permutations, blocks, the ranks' parts and replacements."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from scipy import stats

from pipeline.order import (
    BLOCKS_MIXED,
    block_order,
    epoch_order,
    replacements,
    step_positions,
    steps_per_epoch,
)


def test_epochs_are_different_permutations() -> None:
    orders = [
        epoch_order(1000, seed, epoch) for seed in (0, 1, 1 << 32, -1) for epoch in (0, 1, 999)
    ]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    # Two unrelated permutations have one place in common on average; 12 or more happen once in 1e9.
    assert max((a == b).sum() for a, b in combinations(orders, 2)) < 12


def test_every_permutation_is_equally_likely() -> None:
    rank = {order: i for i, order in enumerate(permutations(range(5)))}
    drawn = [rank[tuple(epoch_order(5, 3, epoch).tolist())] for epoch in range(12_000)]
    assert stats.chisquare(np.bincount(drawn, minlength=120)).pvalue > 1e-4


def test_every_sample_is_equally_likely_at_every_position() -> None:
    n, epochs = 64, 1_500
    seen = np.zeros((n, n))
    for epoch in range(epochs):
        seen[np.arange(n), epoch_order(n, 8, epoch)] += 1
    statistic = (n - 1) / n * ((seen - epochs / n) ** 2 / (epochs / n)).sum()
    assert 1e-4 < stats.chi2((n - 1) ** 2).sf(statistic) < 1 - 1e-4


# Blocks


def test_orders_do_not_change_between_versions() -> None:
    """A resumed run continues with the order that it began with."""
    assert epoch_order(12, 7, 3).tolist() == [0, 7, 3, 11, 9, 4, 2, 10, 1, 8, 5, 6]
    # The end, with the last two of 18 blocks.
    assert epoch_order(36, 7, 3, block=2)[-6:].tolist() == [6, 13, 19, 18, 3, 2]


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 1000, 4099])
@pytest.mark.parametrize("block", [1, 2, 7, 64, 5000])
def test_block_order_holds_every_sample_once_within_its_window(n: int, block: int) -> None:
    orders = [
        epoch_order(n, seed, epoch, block) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert np.array_equal(orders[0], orders[3])
    for order in orders:
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(n))
        first = np.full(n // block + 1, n)  # positions of each block
        last = np.full(n // block + 1, -1)
        np.minimum.at(first, order // block, np.arange(n))
        np.maximum.at(last, order // block, np.arange(n))
        at_once = [((first <= position) & (position <= last)).sum() for position in range(0, n, 13)]
        assert max(at_once) <= BLOCKS_MIXED
    if n >= 1000 and block <= 7:
        assert not any(np.array_equal(a, b) for a, b in combinations(orders[:3], 2))


def test_windows_take_the_blocks_in_the_order_of_block_order() -> None:
    """Prefetching relies on it."""
    order = epoch_order(1003, 4, 2, 5)
    blocks = block_order(1003, 4, 2, 5)
    assert sorted(blocks) == list(range(201))
    for first in range(0, 201, BLOCKS_MIXED):
        window = blocks[first : first + BLOCKS_MIXED]
        where = np.flatnonzero(np.isin(order // 5, window))
        assert np.array_equal(where, np.arange(where[0], where[0] + len(where)))
        assert 5 * first - 2 <= where[0] <= 5 * first  # one block is two short


def test_one_window_of_all_blocks_is_a_full_shuffle() -> None:
    for block in (1000, 63, 10**15):
        assert np.array_equal(epoch_order(1000, 6, 9, block), epoch_order(1000, 6, 9))
    assert not np.array_equal(epoch_order(1000, 6, 9, 62), epoch_order(1000, 6, 9))


def test_in_blocks_every_sample_and_every_neighbour_is_equally_likely() -> None:
    block, blocks, epochs = 3, 4 * BLOCKS_MIXED, 3000
    orders = np.array([epoch_order(block * blocks, 2, epoch, block) for epoch in range(epochs)])
    for place in (0, 1, 47, 48, 100, 191):
        assert (
            stats.chisquare(np.bincount(orders[:, place], minlength=block * blocks)).pvalue > 1e-4
        )
    # The next sample is of the same block as often as any other of the window would be.
    alike = int((orders[:, 10] // block == orders[:, 11] // block).sum())
    assert stats.binomtest(alike, epochs, (block - 1) / (BLOCKS_MIXED * block - 1)).pvalue > 1e-4


def test_blocks_share_windows_with_other_blocks_in_each_epoch() -> None:
    """Two blocks share a window by chance, whether they did so in the epoch before or not."""
    block, blocks, epochs = 4, 8 * BLOCKS_MIXED, 60
    together = []
    for epoch in range(epochs):
        windows = epoch_order(block * blocks, 3, epoch, block).reshape(8, BLOCKS_MIXED * block)
        number = np.empty(block * blocks, dtype=int)
        number[windows] = np.arange(8)[:, None]
        of_block = number[::block]
        assert np.array_equal(number, np.repeat(of_block, block))
        together.append(of_block[:, None] == of_block)
    again = [(a & b).sum(1).mean() - 1 for a, b in pairwise(together)]
    chance = (BLOCKS_MIXED - 1) ** 2 / (blocks - 1)
    assert abs(np.mean(again) - chance) < 5 * np.std(again) / len(again) ** 0.5
    assert chance < 2  # of 15 other blocks


# Steps and replacements


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_split_the_same_global_batch(world: int) -> None:
    steps = steps_per_epoch(100, 16)
    assert steps == 6
    taken = [
        [step_positions(step, 16 // world, rank, world) for rank in range(world)]
        for step in range(steps)
    ]
    assert {len(positions) for step in taken for positions in step} == {16 // world}
    assert np.array_equal(np.concatenate([np.concatenate(step) for step in taken]), np.arange(96))


@pytest.mark.parametrize(
    ("position", "n", "global_batch", "expected"),
    [
        (1, 12, 4, [5, 9, 6, 10, 7, 11, 4, 8]),
        (1, 10, 4, [5, 9, 7, 6, 4, 8]),  # 3 is in its own batch, and after 7 comes 1 itself
        (6, 10, 4, [0, 8, 2, 1, 9, 3]),  # 4 is in its own batch
        (8, 10, 4, [2, 6, 0, 4, 3, 7, 1, 5]),
        (2, 4, 1, [3, 0, 1]),
        (3, 5, 5, []),
    ],
)
def test_replacements_come_from_the_same_place_of_later_batches_then_beside(
    position: int, n: int, global_batch: int, expected: list[int]
) -> None:
    assert list(replacements(position, n, global_batch)) == expected


def test_every_position_outside_the_own_batch_is_a_replacement_once() -> None:
    for n in range(1, 40):
        for global_batch in range(1, n + 1):
            for position in range(n):
                candidates = list(replacements(position, n, global_batch))
                assert len(set(candidates)) == len(candidates)
                assert set(candidates) == {
                    p for p in range(n) if p // global_batch != position // global_batch
                }
