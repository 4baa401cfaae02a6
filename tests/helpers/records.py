"""Record files of every format, written as convert.py writes them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.formats import EncodedSample
from tests.helpers.images import encoded, picture

JPEGS = [encoded(picture(20 + 3 * i, 40 - 2 * i, seed=i), quality=60 + 3 * i) for i in range(9)]
SIZES = [(20 + 3 * i, 40 - 2 * i) for i in range(9)]  # width, height
LABELS = [3, -1, 0, 1000, 7, 7, -1, 12, 999_999]


def write_records(
    path: Path, format: Any, images: Sequence[bytes] = JPEGS, labels: Sequence[int] = LABELS
) -> Path:
    """Write images into one file of a format."""
    with path.open("wb") as file:
        file.write(format.begin(len(images)))
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            width, height = Image.open(io.BytesIO(image)).size
            sample = EncodedSample(key, f"a/{key}.jpg", label, height, width, image, checksum=0)
            before, after = format.frame(file.tell(), sample)
            file.write(before + image + after)
        format.finish(file, np.zeros(0))
    return path


def open_records(path: Path, format: Any) -> Any:
    """The store at `path`."""
    return format.open(path, lambda done, total: None)


def images_of(store: Any) -> list[bytes]:
    """All encoded images of a store."""
    images: list[bytes] = store.read_batch(np.arange(len(store)))
    return images


def check_damaged_copies(file: Path, format: Any, count: int = 100) -> None:
    """Open `count` damaged copies of a file: each must be refused by name, or give samples.

    Nothing but sidecars may be written beside them.
    """
    rng = np.random.default_rng(5)
    good = file.read_bytes()
    file.unlink()
    refused = 0
    for number in range(count):
        damaged = file.with_name(f"{number}{file.suffix}")
        damaged.write_bytes(_damage(good, number, rng))
        try:
            store = open_records(damaged, format)
        except ValueError as error:
            assert str(damaged) in str(error)  # noqa: PT017
            refused += 1
        else:
            assert all(isinstance(image, bytes) for image in images_of(store))
            assert all(store.name(i) for i in range(len(store)))
    assert refused > count // 4
    assert {path.suffix for path in file.parent.iterdir()} <= {file.suffix, ".idx"}


def _damage(good: bytes, number: int, rng: np.random.Generator) -> bytes:
    """A copy with flipped bits, cut off, or with a part replaced, depending on `number`."""
    data = bytearray(good)
    a, b, length = (int(x) for x in rng.integers(0, len(good), 3))
    if number % 3 == 0:
        for at in rng.integers(0, len(good), 1 + number // 6):
            data[at] ^= 1 << int(rng.integers(8))
    elif number % 3 == 1:
        del data[a:]
    else:
        data[a : a + length % 2000] = good[b : b + length % 3000]
    return bytes(data)
