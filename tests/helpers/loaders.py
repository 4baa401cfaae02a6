"""Loaders for tests, and comparisons of their batches."""

from __future__ import annotations

from typing import Any

import torch

from pipeline import Batch, Loader, LoaderOptions, Store, barlow_twins, open_loader

SEED = 7
BATCH = 6
RECIPE = barlow_twins(24)


def loader_of(store: Store, batch_size: int = BATCH, **options: Any) -> Loader:
    """A loader of small views. The options are those of LoaderOptions."""
    settings = {"threads": 2, "seed": SEED, **options}
    return open_loader(store, RECIPE, LoaderOptions(batch_size=batch_size, **settings))


def assert_same_batches(a: list[Batch], b: list[Batch]) -> None:
    """Equal to the bit."""
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert is_same_batch(left, right)


def is_same_batch(a: Batch, b: Batch) -> bool:
    """Whether two batches are equal to the bit."""
    tensors = zip((*a.views, a.labels, a.samples), (*b.views, b.labels, b.samples), strict=True)
    return all(torch.equal(x, y) for x, y in tensors)
