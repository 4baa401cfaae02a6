"""Batches: their contents, and that they do not depend on how they are made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import (
    FOR_ANY_STORE,
    Batch,
    LoaderOptions,
    center_view,
    open_loader,
    open_store,
)
from pipeline.order import epoch_order
from tests.helpers.loaders import SEED, assert_same_batches, is_same_batch, loader_of


def test_batch_holds_two_views_and_the_labels_of_its_samples(photos: Path) -> None:
    store = open_store(photos)
    loader = loader_of(store, 16)
    assert len(loader) == 3
    batches = list(loader.epoch(0))
    assert len(batches) == 3
    for batch in batches:
        assert [view.shape for view in batch.views] == [(16, 3, 24, 24)] * 2
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
        assert batch.labels.dtype == batch.samples.dtype == torch.int64
        folders = [Path(store.name(sample)).parent.name for sample in batch.samples.tolist()]
        assert folders == [store.classes[label] for label in batch.labels.tolist()]
    samples = torch.cat([batch.samples for batch in batches])
    assert len(samples.unique()) == 48
    assert samples.tolist() == epoch_order(60, SEED, 0)[:48].tolist()
    assert loader.bad == {}


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_without_shuffle_samples_come_in_order_and_the_last_batch_is_short(
    photos: Path, decoder: str
) -> None:
    loader = loader_of(open_store(photos), 16, shuffle=False, decoder=decoder)
    assert len(loader) == 4
    batches = list(loader.epoch(3))
    assert [len(batch.samples) for batch in batches] == [16, 16, 16, 12]
    assert [len(batch.views[0]) for batch in batches] == [16, 16, 16, 12]
    assert torch.cat([batch.samples for batch in batches]).tolist() == list(range(60))


def test_images_without_classes_have_the_label_minus_one(photos: Path) -> None:
    (batch,) = loader_of(open_store(photos / "class0"), 20).epoch(0)
    assert batch.labels.tolist() == [-1] * 20


def test_views_have_the_requested_dtype(photos: Path) -> None:
    store = open_store(photos)
    (exact,) = loader_of(store, 60, dtype=torch.float32).epoch(0)
    (half,) = loader_of(store, 60, dtype=torch.bfloat16).epoch(0)
    for a, b in zip(exact.views, half.views, strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)
        assert b.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_loader_can_be_iterated_again_and_twice_at_once(photos: Path, decoder: str) -> None:
    loader = loader_of(open_store(photos), 20, decoder=decoder)
    once = list(loader.epoch(0))
    pairs = list(zip(loader.epoch(0), loader.epoch(0), strict=True))
    assert_same_batches([a for a, _ in pairs], once)
    assert_same_batches([b for _, b in pairs], once)


def test_loader_makes_test_views(photos: Path) -> None:
    loader = open_loader(
        open_store(photos), center_view(32), LoaderOptions(batch_size=25, threads=2, shuffle=False)
    )
    batches = list(loader.epoch(0))
    assert [[view.shape for view in batch.views] for batch in batches] == [
        [(25, 3, 32, 32)],
        [(25, 3, 32, 32)],
        [(10, 3, 32, 32)],
    ]
    assert_same_batches(list(loader.epoch(9)), batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size is 0: it must be at least 1"),
        (
            {"batch_size": 61},
            "60 images are fewer than one batch of 61: use a batch of 60 or less",
        ),
        (
            {"batch_size": 31, "world_size": 2},
            "60 images are fewer than one batch of 62: use a batch of 60 or less",
        ),
        ({"shuffle_block": 0}, "shuffle block is 0 samples: it must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank is 2: with 2 processes it must be between 0 and 1"),
        ({"decoder": "jpeg9000"}, "unknown decoder 'jpeg9000': choose auto or .*cpu"),
    ],
    ids=str,
)
def test_invalid_options_are_refused_with_the_remedy(
    photos: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loader_of(open_store(photos), **options)


# The same batches, however they are made


@pytest.mark.parametrize("block", [None, 2])
def test_starting_at_a_step_gives_the_batches_of_a_run_through(
    photos: Path, block: int | None
) -> None:
    loader = loader_of(open_store(photos), 16, shuffle_block=block)
    steps = len(loader)
    assert steps == 3
    run_through = list(loader.steps(0, 3 * steps))
    assert len(run_through) == 9
    for first in (1, 2, 3, 5, 8):  # 3 begins an epoch, 2 and 5 cross into the next
        resumed = list(loader_of(open_store(photos), 16, shuffle_block=block).steps(first, 9))
        assert len(resumed) == 9 - first
        assert all(map(is_same_batch, resumed, run_through[first:]))
    assert all(map(is_same_batch, loader.epoch(1), run_through[3:6]))
    (last,) = loader.epoch(1, first_step=2)
    assert is_same_batch(last, run_through[5])
    assert run_through[4].samples.tolist() == epoch_order(60, SEED, 1, block)[16:32].tolist()


def test_epochs_differ_in_order_and_in_distortions(photos: Path) -> None:
    loader = loader_of(open_store(photos), 60)
    (first,), (second,) = loader.epoch(0), loader.epoch(1)
    assert not torch.equal(first.samples, second.samples)
    assert torch.equal(first.samples.sort().values, second.samples.sort().values)
    first_view = first.views[0][first.samples.argsort()]
    second_view = second.views[0][second.samples.argsort()]
    assert all(not torch.equal(a, b) for a, b in zip(first_view, second_view, strict=True))


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_batches_do_not_depend_on_the_number_of_threads(photos: Path, threads: int) -> None:
    expected = loader_of(open_store(photos), 50, threads=2).steps(0, 2)
    batches = loader_of(open_store(photos), 50, threads=threads).steps(0, 2)
    assert_same_batches(list(batches), list(expected))


@pytest.mark.parametrize(("world", "block"), [(2, None), (4, None), (2, 2)])
def test_ranks_together_make_the_batches_of_one_rank(
    photos: Path, world: int, block: int | None
) -> None:
    def batches(rank: int, world: int) -> Iterator[Batch]:
        options = {"rank": rank, "world_size": world, "shuffle_block": block}
        return loader_of(open_store(photos), 16 // world, **options).steps(0, 5)

    one_rank = batches(0, 1)
    all_ranks = zip(*(batches(rank, world) for rank in range(world)), strict=True)
    for whole, parts in zip(one_rank, all_ranks, strict=True):
        assert torch.equal(whole.samples, torch.cat([part.samples for part in parts]))
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
        for v, view in enumerate(whole.views):
            pieces = [part.views[v] for part in parts]
            torch.testing.assert_close(torch.cat(pieces), view, rtol=0, atol=1e-5)
