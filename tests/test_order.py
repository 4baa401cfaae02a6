"""Which samples make a batch: permutations, ranks, restarts, stand-ins."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline import Batch, Loader, barlow_twins, open_loader, open_store
from pipeline.order import epoch_order, replacements, step_positions, steps_per_epoch


def loader_of(photos: Path, batch_size: int, threads: int = 2, rank: int = 0, world: int = 1) -> Loader:
    store, recipe = open_store(photos), barlow_twins(24)
    return open_loader(store, recipe, batch_size=batch_size, threads=threads, seed=5, rank=rank, world=world)


def same(a: Batch, b: Batch) -> bool:
    """Equal to the bit."""
    return all(torch.equal(x, y) for x, y in zip((*a.views, *a[1:]), (*b.views, *b[1:]), strict=True))


def test_an_epoch_is_a_permutation_and_no_two_are_alike() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed in (0, 1, 1 << 32, -1) for epoch in (0, 1, 999)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    # Two unrelated permutations have one place in common on average; 12 or more happen once in 1e9.
    assert max((a == b).sum() for a, b in combinations(orders, 2)) < 12


def test_every_permutation_is_equally_likely() -> None:
    rank = {order: i for i, order in enumerate(permutations(range(5)))}
    drawn = [rank[tuple(epoch_order(5, 3, epoch).tolist())] for epoch in range(12_000)]
    assert stats.chisquare(np.bincount(drawn, minlength=120)).pvalue > 1e-4


def test_every_sample_is_equally_likely_at_every_place() -> None:
    n, epochs = 64, 1_500
    seen = np.zeros((n, n))
    for epoch in range(epochs):
        seen[np.arange(n), epoch_order(n, 8, epoch)] += 1
    statistic = (n - 1) / n * ((seen - epochs / n) ** 2 / (epochs / n)).sum()
    assert 1e-4 < stats.chi2((n - 1) ** 2).sf(statistic) < 1 - 1e-4


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_split_the_same_global_batch(world: int) -> None:
    steps = steps_per_epoch(100, 16)
    assert steps == 6
    taken = [[step_positions(step, 16 // world, rank, world) for rank in range(world)] for step in range(steps)]
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
def test_stand_ins_come_from_the_same_place_of_later_batches_then_from_beside(
    position: int, n: int, global_batch: int, expected: list[int]
) -> None:
    assert list(replacements(position, n, global_batch)) == expected


def test_every_position_outside_the_own_batch_is_a_stand_in_once() -> None:
    for n in range(1, 40):
        for global_batch in range(1, n + 1):
            for position in range(n):
                found = list(replacements(position, n, global_batch))
                assert len(set(found)) == len(found)
                assert set(found) == {p for p in range(n) if p // global_batch != position // global_batch}


def test_starting_at_any_step_equals_having_run_to_it(photos: Path) -> None:
    steps = len(loader_of(photos, 16))
    assert steps == 3
    run_through = list(loader_of(photos, 16).steps(0, 3 * steps))
    assert len(run_through) == 9
    for first in (1, 2, 3, 5, 8):  # 3 begins an epoch, 2 and 5 cross into the next
        resumed = list(loader_of(photos, 16).steps(first, 9))
        assert len(resumed) == 9 - first
        assert all(map(same, resumed, run_through[first:]))
    assert all(map(same, loader_of(photos, 16).epoch(1), run_through[3:6]))
    (last,) = loader_of(photos, 16).epoch(1, first_step=2)
    assert same(last, run_through[5])


def test_epochs_differ_in_order_and_in_distortions(photos: Path) -> None:
    loader = loader_of(photos, 60)
    (first,), (second,) = loader.epoch(0), loader.epoch(1)
    assert not torch.equal(first.samples, second.samples)
    assert torch.equal(first.samples.sort().values, second.samples.sort().values)
    again = first.views[0][first.samples.argsort()], second.views[0][second.samples.argsort()]
    assert all(not torch.equal(a, b) for a, b in zip(*again, strict=True))


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_batches_do_not_depend_on_the_number_of_threads(photos: Path, threads: int) -> None:
    for two, other in zip(loader_of(photos, 50).steps(0, 2), loader_of(photos, 50, threads).steps(0, 2), strict=True):
        assert same(two, other)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_make_the_batches_of_one(photos: Path, world: int) -> None:
    alone = loader_of(photos, 16).steps(0, 5)
    ranks = [loader_of(photos, 16 // world, rank=rank, world=world).steps(0, 5) for rank in range(world)]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert torch.equal(whole.samples, torch.cat([part.samples for part in parts]))
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
        for view, pieces in zip(whole.views, zip(*(part.views for part in parts), strict=True), strict=True):
            torch.testing.assert_close(torch.cat(pieces), view, rtol=0, atol=1e-5)
