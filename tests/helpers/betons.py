"""Betons written by us and by FFCV, and the layout of the file as FFCV defines it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google_crc32c import value as crc32c

from pipeline.formats import EncodedSample, beton
from pipeline.formats.index import ROW
from tests.helpers.images import encoded, picture

MIB = 1 << 20

# Sizes of entries in bytes.
HEADER_BYTES = 24
FIELD_BYTES = 1041
SAMPLE_BYTES = 24  # of an image and a label
ALLOCATION_BYTES = 24

# Offsets in the header.
VERSION_OFFSET = 0
FIELDS_OFFSET = 2
PAGE_OFFSET = 4
SAMPLES_OFFSET = 8
TABLE_OFFSET = 16  # holds the offset of the allocation table

# A KeyError of Numba itself, in the finalizer of what FFCV compiled for a loader that is gone.
IGNORE_FINALIZER = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <finalize object:pytest.PytestUnraisableExceptionWarning"
)
# FFCV's writer forks.
IGNORE_FORKS = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

EncodedImage = tuple[bytes, int]  # and its label


def labelled_jpegs(count: int) -> list[EncodedImage]:
    """JPEGs of 40 x 30 pixels with the labels -1, 0 and 1."""
    return [(encoded(picture(40, 30, seed=i), quality=90), i % 3 - 1) for i in range(count)]


def write_beton(
    path: Path, images: Sequence[EncodedImage], unused: int = 0, size: tuple[int, int] = (40, 30)
) -> Path:
    """Write a beton of images with one width and height, with room for `unused` more samples."""
    width, height = size
    with path.open("w+b") as file:
        file.write(beton.begin(len(images) + unused))
        rows = np.zeros(len(images), ROW)
        for i, (image, label) in enumerate(images):
            checksum = crc32c(image)
            sample = EncodedSample(i, f"{i}.jpg", label, height, width, image, checksum)
            before, after = beton.frame(file.tell(), sample)
            assert after == b""
            file.write(before)
            rows[i] = (label, height, width, 0, file.tell(), len(image), checksum)
            file.write(image)
        beton.finish(file, rows)
    return path


class _Dataset:
    """A data set as FFCV's writer takes it: samples are tuples of the values of their fields."""

    def __init__(self, *fields: list[Any]) -> None:
        self._samples = list(zip(*fields, strict=True))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> Any:
        return self._samples[i]


def write_with_ffcv(
    path: Path,
    fields: dict[str, Any],
    values: list[list[Any]],
    workers: int = 2,
    page_mib: int = 8,
) -> Path:
    """Write a beton with FFCV's writer; `values` holds a list for each field."""
    from ffcv import DatasetWriter

    writer = DatasetWriter(str(path), fields, page_size=page_mib * MIB, num_workers=workers)
    writer.from_indexed_dataset(_Dataset(*values), chunksize=1)
    return path


def read_with_ffcv(path: Path, os_cache: bool, batch: int = 5) -> tuple[np.ndarray, list[int]]:
    """The pixels of all images, [n, H, W, 3], and their labels, by FFCV's loader."""
    from ffcv import Loader
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder

    decoders: Any = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(
        str(path), batch, num_workers=2, os_cache=os_cache, pipelines=decoders, drop_last=False
    )
    batches = iter(loader)
    read = [(pixels.copy(), labels.copy()) for pixels, labels in batches]
    batches.close()
    pixels = np.concatenate([pixels for pixels, _ in read])
    labels = np.concatenate([labels for _, labels in read])
    return pixels, labels[:, 0].tolist()
