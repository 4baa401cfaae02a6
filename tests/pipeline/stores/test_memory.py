"""Images in memory: files, PIL images and arrays as encoded images, and a store of them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import (
    BadImage,
    LoaderOptions,
    MemoryStore,
    Store,
    center_view,
    encoded_bytes,
    open_loader,
    open_store,
)
from pipeline.images import decode
from tests.helpers.images import EXAMPLE_IMAGES, decoded_by_pillow, mean_difference, picture
from tests.helpers.libraries import import_or_skip
from tests.helpers.stores import decoder_of

JPEG = EXAMPLE_IMAGES["jpeg"]

# Files, PIL images and arrays


@pytest.mark.parametrize("name", EXAMPLE_IMAGES)
def test_a_file_and_a_pil_image_keep_their_pixels(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(EXAMPLE_IMAGES[name])
    image = Image.open(path)
    info = dict(image.info)
    expected = decoded_by_pillow(EXAMPLE_IMAGES[name])
    for source in (path, str(path), image):
        pixels = decode(encoded_bytes(source), 30, 41).permute(1, 2, 0)
        assert np.array_equal(pixels, expected)
    assert info.items() <= image.info.items(), "the caller's image is unchanged"


def test_an_array_keeps_its_pixels_for_any_strides() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    every_second_column = np.repeat(pixels, 2, axis=1)[:, ::2]
    for array in (pixels, np.asfortranarray(pixels), every_second_column, pixels[::-1][::-1]):
        assert np.array_equal(Image.open(io.BytesIO(encoded_bytes(array))), pixels)


def test_a_grey_array_has_equal_channels() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)[:, :, 1]
    image = Image.open(io.BytesIO(encoded_bytes(grey)))
    assert np.array_equal(image, np.stack([grey] * 3, axis=2))


def test_16_bit_pil_images_are_scaled() -> None:
    levels = np.arange(0, 65536, 7, dtype=np.uint16)[: 96 * 97].reshape(96, 97)
    expected = np.repeat(np.rint(levels / 257.0)[:, :, None], 3, axis=2)
    image = Image.open(io.BytesIO(encoded_bytes(Image.fromarray(levels))))
    assert np.array_equal(image, expected)


NOT_IMAGES: dict[str, tuple[Any, str]] = {
    "float32": (
        np.zeros((4, 5, 3), dtype=np.float32),
        r"an array \[4, 5, 3\] of float32 is not an image: give uint8",
    ),
    "channels first": (
        np.zeros((3, 4, 5), dtype=np.uint8),
        r"\[3, 4, 5\] of uint8 is not an image.*\[height, width, 3\]",
    ),
    "four channels": (np.zeros((4, 5, 4), dtype=np.uint8), r"\[4, 5, 4\]"),
    "one axis": (np.zeros(5, dtype=np.uint8), r"\[5\]"),
    "none": (None, "object"),
    "mode F": (Image.new("F", (4, 5)), "mode F.*convert it to RGB"),
    "no file": ("nowhere/a.jpg", "nowhere/a.jpg: No such file.*Name the file"),
    "a folder": (Path(__file__).parent, "stores: Is a directory"),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_other_things_are_refused_with_the_remedy(name: str) -> None:
    source, message = NOT_IMAGES[name]
    with pytest.raises(ValueError, match=message):
        encoded_bytes(source)


def test_a_damaged_file_of_a_pil_image_is_a_bad_image_with_its_name(tmp_path: Path) -> None:
    png = EXAMPLE_IMAGES["png"]
    (tmp_path / "half.png").write_bytes(png[: len(png) // 2])
    with (
        Image.open(tmp_path / "half.png") as image,
        pytest.raises(BadImage, match=r"half\.png: .*truncated"),
    ):
        encoded_bytes(image)


# The store


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"text", "b: it is not a JPEG"),
        (b"", "b: "),
        (encoded_bytes(np.zeros((0, 4, 3), dtype=np.uint8)), "b: "),
    ],
    ids=["text", "nothing", "no pixels"],
)
def test_images_without_a_size_are_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(BadImage, match=message):
        MemoryStore([JPEG, data], ["a", "b"])


def test_names_are_positions_unless_they_are_given() -> None:
    assert MemoryStore([JPEG]).name(0) == "image 0"
    assert MemoryStore([JPEG], ["a"]).name(0) == "a"


def test_labels_are_optional_and_their_classes_are_numbers() -> None:
    store = MemoryStore([JPEG] * 3, labels=[2, -1, 0])
    assert store.index["label"].tolist() == [2, -1, 0]
    assert store.classes == ["0", "1", "2"]
    assert store.index["width"].tolist() == [41] * 3
    unlabeled = MemoryStore([JPEG] * 3)
    assert unlabeled.index["label"].tolist() == [-1] * 3
    assert unlabeled.classes == []


def test_batches_are_those_of_a_folder_with_the_same_images(photos: Path) -> None:
    folder = open_store(photos)
    paths = [folder.name(i) for i in range(60)]
    images: list[Any] = [path if i % 3 else Image.open(path) for i, path in enumerate(paths)]
    store: Store = pickle.loads(
        pickle.dumps(MemoryStore([encoded_bytes(image) for image in images], paths))
    )
    assert [store.name(i) for i in range(60)] == paths
    options = LoaderOptions(batch_size=16, shuffle=False)
    ours = open_loader(store, center_view(32), options).epoch(0)
    expected = open_loader(folder, center_view(32), options).epoch(0)
    for batch, expected_batch in zip(ours, expected, strict=True):
        assert torch.equal(batch.views[0], expected_batch.views[0])
        assert (batch.labels == -1).all()


def test_dali_reads_images_in_memory() -> None:
    import_or_skip("nvidia.dali")
    images = [picture(41, 30, seed=i) for i in range(4)]
    store = MemoryStore([encoded_bytes(image) for image in images])
    boxes = np.tile(np.array([0, 0, 41, 30], np.float32), (1, 4, 1))
    plan = [(np.arange(4), boxes)]
    ((crops, good),) = decoder_of("dali", store, center_view(24)).stream(plan)
    assert good.all()
    for i, image in enumerate(images):
        expected = image.resize((24, 24), Image.Resampling.BILINEAR)
        assert mean_difference(crops[0, i], expected) <= 0.5
