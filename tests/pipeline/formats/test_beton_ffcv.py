"""Betons and FFCV: it reads what we write, and we read what it writes."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import find_format, open_store
from pipeline.images import decode
from tests.helpers.betons import (
    ALLOCATION_BYTES,
    IGNORE_FINALIZER,
    IGNORE_FORKS,
    MIB,
    TABLE_OFFSET,
    labelled_jpegs,
    read_with_ffcv,
    write_beton,
    write_with_ffcv,
)
from tests.helpers.images import picture
from tests.helpers.records import images_of

pytestmark = [IGNORE_FINALIZER, IGNORE_FORKS, pytest.mark.usefixtures("ffcv")]

# FFCV reads ours


@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_our_beton_as_its_own(tmp_path: Path, os_cache: bool) -> None:
    from ffcv.fields import IntField, RGBImageField

    pixels = [np.asarray(picture(40, 30, seed=i)) for i in range(12)]
    labels = [i % 4 - 1 for i in range(12)]
    fields = {"image": RGBImageField("jpg"), "label": IntField()}
    theirs = write_with_ffcv(tmp_path / "theirs.beton", fields, [pixels, labels])
    images = list(zip(images_of(open_store(theirs)), labels, strict=True))
    ours = write_beton(tmp_path / "ours.beton", images, unused=3)

    expected, expected_labels = read_with_ffcv(theirs, os_cache)
    read, read_labels = read_with_ffcv(ours, os_cache)
    assert read_labels == expected_labels == labels
    assert np.array_equal(read, expected)
    assert np.abs(read.astype(int) - pixels).mean() < 6, "these are the images"


def test_ffcv_reads_images_of_ours_that_fill_pages(tmp_path: Path) -> None:
    """Through its process cache, which cannot read beyond the end of a page."""
    jpegs = labelled_jpegs(6)
    sizes = [3 * MIB, 3 * MIB, 3 * MIB, 9 * MIB, 5 * MIB, 8 * MIB]
    images = [
        (data.ljust(size, b"\0"), label) for (data, label), size in zip(jpegs, sizes, strict=True)
    ]
    path = write_beton(tmp_path / "ours.beton", images)
    pixels, labels = read_with_ffcv(path, os_cache=False, batch=2)
    assert labels == [label for _, label in images]
    expected = np.stack([decode(data, 30, 40).permute(1, 2, 0) for data, _ in jpegs])
    assert np.abs(pixels - expected.astype(int)).mean() < 1.5  # FFCV decodes with the fast DCT


# We read FFCV's


@pytest.mark.parametrize("mode", ["jpg", "raw", "smart", "proportion"])
def test_images_that_ffcv_wrote_are_read_to_the_byte(tmp_path: Path, mode: str) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import encode_jpeg

    sizes = [(40 + i, 30 + 2 * i) for i in range(24)]
    pixels = [np.asarray(picture(*size, seed=i)) for i, size in enumerate(sizes)]
    fields = {"image": RGBImageField(mode, smart_threshold=3 * 50 * 50), "label": IntField()}
    np.random.seed(0)  # noqa: NPY002 (the writer's processes draw from it)
    path = write_with_ffcv(tmp_path / "x.beton", fields, [pixels, list(range(24))], workers=1)

    store = pickle.loads(pickle.dumps(open_store(path)))
    assert find_format(path) == "beton"
    assert list(zip(store.index["width"], store.index["height"], strict=True)) == sizes
    assert store.index["label"].tolist() == list(range(24))
    assert store.classes == [str(i) for i in range(24)]
    images = images_of(store)
    is_raw = [data.startswith(b"P6") for data in images]
    for data, image, raw in zip(images, pixels, is_raw, strict=True):
        if raw:
            assert np.array_equal(decode(data, *image.shape[:2]).permute(1, 2, 0), image)
            assert np.array_equal(Image.open(io.BytesIO(data)), image)
        else:
            assert data == encode_jpeg(image, 90).tobytes()
    kinds = {"jpg": {False}, "raw": {True}, "smart": {True, False}, "proportion": {True, False}}
    assert set(is_raw) == kinds[mode]
    if mode == "smart":
        assert is_raw == [image.nbytes <= 7500 for image in pixels]
    assert store.read_batch(np.array([17, 3, 17])) == [images[17], images[3], images[17]]


@pytest.mark.parametrize(
    "order",
    [
        ["weight", "nothing", "text", "photo", "array", "json", "class", "other", "number"],
        ["number", "other", "class", "json", "array", "photo", "text", "nothing", "weight"],
        ["photo", "text"],
        ["nothing", "photo"],
        ["class", "photo"],
    ],
    ids="-".join,
)
def test_a_beton_can_have_other_fields_in_any_order(tmp_path: Path, order: list[str]) -> None:
    from ffcv import fields
    from ffcv.fields.rgb_image import encode_jpeg

    pixels = [np.asarray(picture(40, 30 + i, seed=i)) for i in range(10)]
    others = [np.asarray(picture(20, 20, seed=i)) for i in range(10)]
    texts = [np.arange(i + 1, dtype=np.uint8) for i in range(10)]
    ones = [np.ones((2, 3), np.float32)] * 10
    contents: dict[str, tuple[Any, list[Any]]] = {
        "weight": (fields.FloatField(), [0.5] * 10),
        "nothing": (fields.BytesField(), [np.zeros(0, np.uint8)] * 10),
        "text": (fields.BytesField(), texts),
        "photo": (fields.RGBImageField("jpg"), pixels),
        "array": (fields.NDArrayField(np.dtype("<f4"), (2, 3)), ones),
        "json": (fields.JSONField(), [{"a": i} for i in range(10)]),
        "class": (fields.IntField(), [i % 2 for i in range(10)]),
        "other": (fields.RGBImageField("raw"), others),
        "number": (fields.IntField(), [7] * 10),
    }
    path = write_with_ffcv(
        tmp_path / "x.beton",
        {name: contents[name][0] for name in order},
        [contents[name][1] for name in order],
    )
    store = open_store(path)
    first_image = next(name for name in order if name in ("photo", "other"))
    if first_image == "photo":
        assert images_of(store) == [encode_jpeg(image, 90).tobytes() for image in pixels]
    else:
        assert [data[-1200:] for data in images_of(store)] == [image.tobytes() for image in others]
    integers = [name for name in order if name in ("class", "number")]
    labels = contents[integers[0]][1] if integers else [-1] * 10
    assert store.index["label"].tolist() == labels
    assert store.classes == [str(i) for i in range(max(labels) + 1)]


def test_the_allocation_table_can_be_in_any_order(tmp_path: Path) -> None:
    """Several workers write their entries in the order in which they finish."""
    from ffcv.fields import RGBImageField

    pixels = [np.asarray(picture(600, 400, seed=i)) for i in range(12)]  # two a page
    fields = {"image": RGBImageField("raw")}
    path = write_with_ffcv(tmp_path / "x.beton", fields, [pixels], workers=3, page_mib=2)
    expected = [b"P6\n600 400\n255\n" + image.tobytes() for image in pixels]
    assert images_of(open_store(path)) == expected

    data = path.read_bytes()
    table_offset = struct.unpack_from("<Q", data, TABLE_OFFSET)[0]
    table = np.frombuffer(data, f"V{ALLOCATION_BYTES}", offset=table_offset)
    shuffled = np.random.default_rng(0).permutation(table)
    path.write_bytes(data[:table_offset] + shuffled.tobytes())
    assert images_of(open_store(path)) == expected
