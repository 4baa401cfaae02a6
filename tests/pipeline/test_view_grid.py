"""The picture of images and their views."""

from __future__ import annotations

import shutil
from pathlib import Path

import pipeline


def test_the_picture_shows_images_that_decode(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "data")
    store = pipeline.open_store(tmp_path / "data")
    recipe = pipeline.barlow_twins(32)
    cell = 96 + 4  # three times the size of a view, and the gap
    complete = pipeline.view_grid(store, recipe)
    assert complete is not None
    assert complete.size == (8 * cell + 4, 3 * cell + 4)

    for sample in pipeline.loader.epoch_order(len(store), 0, 0)[3:]:
        Path(store.name(int(sample))).write_bytes(b"")
    three = pipeline.view_grid(store, recipe)
    assert three is not None
    assert three.width == 3 * cell + 4

    for sample in range(len(store)):
        Path(store.name(sample)).write_bytes(b"")
    assert pipeline.view_grid(store, recipe) is None
