"""All stores and decoders, in every pair, give the same samples, labels and crops."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import (
    DECODERS,
    FOR_ANY_STORE,
    FORMATS,
    ConversionOptions,
    LoaderOptions,
    Store,
    barlow_twins,
    hold_out,
    open_loader,
    open_store,
    write_store,
)
from tests.helpers.images import encoded, mean_difference, picture, write_photos
from tests.helpers.libraries import import_or_skip
from tests.helpers.stores import decoder_of

STORES = ("folder", *FORMATS)
PAIRS = [
    (store, decoder)
    for store in STORES
    for decoder in (DECODERS if store == "beton" else FOR_ANY_STORE)
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """The same 40 images and labels in every format.

    The names of the folder's files are the positions of the samples in the other stores.
    """
    root = tmp_path_factory.mktemp("stores")
    source = write_photos(root / "source", 37)
    (source / "class0" / "grey.jpg").write_bytes(encoded(picture(60, 44, mode="L"), quality=80))
    (source / "class1" / "progressive.jpg").write_bytes(
        encoded(picture(61, 44), progressive=True, quality=80)
    )
    (source / "class2" / "cmyk.jpg").write_bytes(encoded(picture(62, 44, mode="CMYK"), quality=80))
    stores: dict[str, Store] = {}
    for format in FORMATS:
        target = root / format / ("x.beton" if format == "beton" else "x")
        write_store(source, target, ConversionOptions(format=format, shards=3))
        stores[format] = open_store(target)
    beton = stores["beton"]
    images = zip(beton.index["label"], beton.read_batch(np.arange(40)), strict=True)
    for sample, (label, data) in enumerate(images):
        path = root / "folder" / beton.classes[label] / f"{sample:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    stores["folder"] = open_store(root / "folder")
    return stores


def positions_in_records(format: str, store: Store) -> np.ndarray[Any, Any]:
    """The position of each sample in the record stores; a folder is sorted by class."""
    if format != "folder":
        return np.arange(len(store))
    return np.array([int(Path(store.name(i)).stem) for i in range(len(store))])


def test_all_formats_hold_the_same(stores: dict[str, Store]) -> None:
    beton = stores["beton"]
    assert beton.classes == ["class0", "class1", "class2"]
    for format in FORMATS:
        store = stores[format]
        assert store.classes == beton.classes
        for field in ("label", "height", "width"):
            assert np.array_equal(store.index[field], beton.index[field])
        assert store.read_batch(np.arange(40)) == beton.read_batch(np.arange(40))


@pytest.mark.parametrize(("format", "decoder"), PAIRS)
def test_every_decoder_gives_the_crops_of_the_cpu_decoder_for_every_store(
    stores: dict[str, Store], format: str, decoder: str
) -> None:
    if decoder == "ffcv":
        import_or_skip("ffcv")
    store = stores[format]
    recipe = barlow_twins(48)
    sample_at = np.argsort(positions_in_records(format, store))
    rng = np.random.default_rng(0)
    plan, reference_plan = [], []
    for _ in range(3):
        chosen = rng.permutation(40)[:16]
        rows = stores["beton"].index[chosen]
        size = np.stack([rows["width"], rows["height"]], axis=1)
        corner = rng.uniform(0, 0.4, (2, 16, 2)) * size
        side = rng.uniform(0.3, 0.6, (2, 16, 2)) * size
        boxes = np.concatenate([corner, corner + side], axis=2).astype(int).astype(np.float32)
        plan.append((sample_at[chosen], boxes))
        reference_plan.append((chosen, boxes))
    bound = 0.5 if decoder == "dali" else 0
    ours = list(decoder_of(decoder, store, recipe).stream(iter(plan)))
    reference = list(decoder_of("cpu", stores["beton"], recipe).stream(iter(reference_plan)))
    for (crops, good), (expected, _) in zip(ours, reference, strict=True):
        assert good.all()
        assert crops.shape == expected.shape
        for view in range(2):
            for i in range(16):
                assert mean_difference(crops[view, i], expected[view, i].numpy()) <= bound


@pytest.mark.parametrize(("format", "decoder"), [pair for pair in PAIRS if pair[0] != "folder"])
def test_every_decoder_and_format_gives_the_same_batches(
    stores: dict[str, Store], format: str, decoder: str
) -> None:
    """Over two epochs of a training set without its held-out images."""
    if decoder == "ffcv":
        import_or_skip("ffcv")
    batches = []
    for name, decoder_name in (("tfrecord", "cpu"), (format, decoder)):
        part, _ = hold_out(stores[name], 0.2, seed=3)
        loader = open_loader(
            part,
            barlow_twins(32),
            LoaderOptions(
                batch_size=8, decoder=decoder_name, threads=2, seed=5, shuffle_block=None
            ),
        )
        with closing(loader.steps(1, 7)) as steps:
            batches.append(list(steps))
    for expected, ours in zip(*batches, strict=True):
        assert np.array_equal(expected.samples, ours.samples)
        assert np.array_equal(expected.labels, ours.labels)
        for expected_view, view in zip(expected.views, ours.views, strict=True):
            difference = (expected_view - view).abs().mean().item()
            if decoder == "dali":
                assert difference < 0.03
            else:
                assert difference == 0


def test_a_forgotten_tar_beside_class_folders_is_ignored(tmp_path: Path) -> None:
    write_photos(tmp_path / "data", 6)
    (tmp_path / "data" / "class0.tar").write_bytes(bytes(1024))
    assert len(open_store(tmp_path / "data")) == 6
