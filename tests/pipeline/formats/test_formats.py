"""The contract of stores and decoders, over every pair: the same samples, labels and parameters, and like pixels."""

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
from tests.helpers.images import encoded, picture, write_photos
from tests.helpers.libraries import needed
from tests.helpers.stores import decoder_of
from tests.pipeline.test_images import difference

STORES = ("folder", *FORMATS)
PAIRS = [
    (store, decoder)
    for store in STORES
    for decoder in (DECODERS if store == "beton" else FOR_ANY_STORE)
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """The same 40 images, labels and numbers in every format; the folder's names are in the order of the others."""
    root = tmp_path_factory.mktemp("stores")
    source = write_photos(root / "source", 37)
    (source / "class0" / "grey.jpg").write_bytes(encoded(picture(60, 44, mode="L"), quality=80))
    (source / "class1" / "progressive.jpg").write_bytes(
        encoded(picture(61, 44), progressive=True, quality=80)
    )
    (source / "class2" / "cmyk.jpg").write_bytes(encoded(picture(62, 44, mode="CMYK"), quality=80))
    found: dict[str, Store] = {}
    for format in FORMATS:
        target = root / format / ("x.beton" if format == "beton" else "x")
        write_store(source, target, ConversionOptions(format=format, shards=3))
        found[format] = open_store(target)
    first = found["beton"]
    for sample, (label, data) in enumerate(
        zip(first.index["label"], first.read_batch(np.arange(40)), strict=True)
    ):
        path = root / "folder" / first.classes[label] / f"{sample:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return found | {"folder": open_store(root / "folder")}


def numbers_of(format: str, store: Store) -> np.ndarray[Any, Any]:
    """What each sample of a store is called in the others: a folder has them in the order of its classes."""
    samples = range(len(store))
    return np.array([int(Path(store.name(i)).stem) if format == "folder" else i for i in samples])


def test_all_hold_the_same(stores: dict[str, Store]) -> None:
    first = stores["beton"]
    assert first.classes == ["class0", "class1", "class2"]
    for format in FORMATS:
        store = stores[format]
        assert store.classes == first.classes
        for field in ("label", "height", "width"):
            assert np.array_equal(store.index[field], first.index[field])
        assert store.read_batch(np.arange(40)) == first.read_batch(np.arange(40))


@pytest.mark.parametrize(("format", "decoder"), PAIRS)
def test_every_decoder_makes_like_crops_of_every_store(
    stores: dict[str, Store], format: str, decoder: str
) -> None:
    if decoder == "ffcv":
        needed("ffcv")
    store, recipe = stores[format], barlow_twins(48)
    sample_of = np.argsort(numbers_of(format, store))
    rng = np.random.default_rng(0)
    plan, reference_plan = [], []
    for _ in range(3):
        chosen = rng.permutation(40)[:16]
        rows = stores["beton"].index[chosen]
        corner = rng.uniform(0, 0.4, (2, 16, 2)) * np.stack([rows["width"], rows["height"]], axis=1)
        side = rng.uniform(0.3, 0.6, (2, 16, 2)) * np.stack([rows["width"], rows["height"]], axis=1)
        boxes = np.concatenate([corner, corner + side], axis=2).astype(int).astype(np.float32)
        plan.append((sample_of[chosen], boxes))
        reference_plan.append((chosen, boxes))
    ours = list(decoder_of(decoder, store, recipe).stream(iter(plan)))
    reference = list(
        decoder_of("torchvision", stores["beton"], recipe).stream(iter(reference_plan))
    )
    for (crops, good), (expected, _) in zip(ours, reference, strict=True):
        assert good.all()
        assert crops.shape == expected.shape
        for view in range(2):
            for i in range(16):
                assert difference(crops[view, i], expected[view, i].numpy()) <= (
                    0.5 if decoder == "dali" else 0
                )


@pytest.mark.parametrize(("format", "decoder"), [pair for pair in PAIRS if pair[0] != "folder"])
def test_every_loader_makes_the_same_batches(
    stores: dict[str, Store], format: str, decoder: str
) -> None:
    """Over two epochs, on a part that is held out of nothing else than the numbers of the samples."""
    if decoder == "ffcv":
        needed("ffcv")
    batches = []
    for name, kind in (("tfrecord", "torchvision"), (format, decoder)):
        part, _ = hold_out(stores[name], 0.2, seed=3)
        loader = open_loader(
            part,
            barlow_twins(32),
            LoaderOptions(batch_size=8, decoder=kind, threads=2, seed=5, shuffle_block=None),
        )
        with closing(loader.steps(1, 7)) as steps:
            batches.append(list(steps))
    for expected, ours in zip(*batches, strict=True):
        assert np.array_equal(expected.samples, ours.samples)
        assert np.array_equal(expected.labels, ours.labels)
        for one, other in zip(expected.views, ours.views, strict=True):
            apart = (one - other).abs().mean().item()
            assert apart < 0.03 if decoder == "dali" else apart == 0


def test_a_forgotten_tar_beside_class_folders_is_no_data_set(tmp_path: Path) -> None:
    write_photos(tmp_path / "data", 6)
    (tmp_path / "data" / "class0.tar").write_bytes(bytes(1024))
    assert len(open_store(tmp_path / "data")) == 6
