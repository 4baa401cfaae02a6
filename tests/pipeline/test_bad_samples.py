"""Images that do not decode: replaced in training, left out in evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import FOR_ANY_STORE, Store, open_store
from pipeline.order import epoch_order
from tests.helpers.images import write_photos
from tests.helpers.loaders import BATCH, SEED, assert_same_batches, loader_of


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    """26 images that a test may damage: four whole batches of six, and two."""
    return write_photos(tmp_path, 26)


def damage(store: Store, samples: list[int]) -> None:
    """Truncate, remove, or replace by an image of another size: in turn."""
    for i, sample in enumerate(samples):
        path = Path(store.name(sample))
        if i % 3 == 0:
            path.write_bytes(path.read_bytes()[:-60])
        elif i % 3 == 1:
            path.unlink()
        else:
            path.write_bytes(Path(store.name((sample + 1) % len(store))).read_bytes())


REASONS = ("truncated", "cannot be read, or is empty", "when it was indexed")


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
@pytest.mark.parametrize(
    ("damaged", "replaced_by"),
    [  # Positions in the order of epoch 0. p is replaced by p + 6, p + 12, ... modulo 26.
        ([8], {8: 14}),
        ([7, 8, 11], {7: 13, 8: 14, 11: 17}),
        ([1, 7], {1: 13, 7: 13}),  # the first possible replacement is bad as well
        ([20, 23], {20: 0, 23: 3}),
        ([2, 8, 14, 20], {2: 6, 8: 0, 14: 0, 20: 0}),  # for 2 not 0, which is in its own batch
        # For 2 not 6, which replaces 0 already.
        ([0, 2, 8, 14, 20], {0: 6, 2: 12, 8: 12, 14: 6, 20: 6}),
    ],
    ids=str,
)
def test_bad_images_are_replaced_from_the_same_place_of_later_batches(
    own_photos: Path, damaged: list[int], replaced_by: dict[int, int], decoder: str
) -> None:
    store = open_store(own_photos)
    order = epoch_order(26, SEED, 0)
    good = list(loader_of(store, decoder=decoder).epoch(0))
    damage(store, order[damaged].tolist())
    loader = loader_of(store, decoder=decoder)
    batches = list(loader.epoch(0))

    expected = order[:24].copy()
    expected[list(replaced_by)] = order[list(replaced_by.values())]
    assert torch.cat([batch.samples for batch in batches]).tolist() == expected.tolist()
    for batch, before in zip(batches, good, strict=True):
        assert len(batch.samples.unique()) == BATCH
        assert batch.labels.tolist() == store.index["label"][batch.samples].tolist()
        kept = batch.samples == before.samples
        for a, b in zip(batch.views, before.views, strict=True):
            torch.testing.assert_close(a[kept], b[kept], rtol=0, atol=1e-5)
            assert all(not torch.equal(a[i], b[i]) for i in np.flatnonzero(~kept))
    assert sorted(loader.bad) == sorted(order[damaged].tolist())
    for i, position in enumerate(damaged):
        assert REASONS[i % 3] in loader.bad[int(order[position])]

    assert_same_batches(list(loader.epoch(0)), batches)  # all bad ones are known now
    for first in range(1, 4):  # as after a resume, where none is
        assert_same_batches(
            list(loader_of(store, decoder=decoder).epoch(0, first)), batches[first:]
        )


def test_ranks_replace_bad_images_as_one_rank_does(own_photos: Path) -> None:
    store = open_store(own_photos)
    damage(store, epoch_order(26, SEED, 0)[[1, 7, 9, 22]].tolist())
    whole = loader_of(store).epoch(0)
    ranks = [loader_of(store, BATCH // 2, rank=rank, world_size=2).epoch(0) for rank in range(2)]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert torch.equal(batch.samples, torch.cat([part.samples for part in parts]))


def test_replacement_has_the_views_of_its_own_sample(own_photos: Path) -> None:
    store = open_store(own_photos)
    order = epoch_order(26, SEED, 0)
    good = list(loader_of(store).epoch(0))
    damage(store, [int(order[3])])
    batches = list(loader_of(store).epoch(0))
    for a, b in zip(
        batches[0].views, good[1].views, strict=True
    ):  # 3 + 6 = 9: place 3 of the next batch
        torch.testing.assert_close(a[3], b[3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("known", [False, True], ids=["found out", "known before"])
@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_without_shuffle_bad_images_are_left_out(
    own_photos: Path, decoder: str, known: bool
) -> None:
    store = open_store(own_photos)
    good = list(loader_of(store, shuffle=False, decoder=decoder).epoch(0))
    damage(store, [1, 4, *range(12, 18), 25])
    loader = loader_of(store, shuffle=False, decoder=decoder)
    if known:
        list(loader.epoch(0))
    batches = list(loader.epoch(0))
    left = [[0, 2, 3, 5], [6, 7, 8, 9, 10, 11], [18, 19, 20, 21, 22, 23], [24]]
    assert [batch.samples.tolist() for batch in batches] == left
    assert sorted(loader.bad) == [1, 4, *range(12, 18), 25]
    for batch, before in zip(batches, [good[0], good[1], good[3], good[4]], strict=True):
        kept = torch.isin(before.samples, batch.samples)
        assert torch.equal(batch.labels, before.labels[kept])
        for a, b in zip(batch.views, before.views, strict=True):
            torch.testing.assert_close(a, b[kept], rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_error_names_files_if_no_image_decodes(own_photos: Path, decoder: str) -> None:
    store = open_store(own_photos)
    for i in range(26):
        Path(store.name(i)).unlink()
    with pytest.raises(
        ValueError, match=r"(?s)cannot be decoded.*class\d/00\d\d\.jpg: it cannot be read"
    ):
        list(loader_of(store, decoder=decoder).epoch(0))
