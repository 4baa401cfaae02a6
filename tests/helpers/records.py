"""Record files of all formats."""

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


LABELS = [3, -1, 0, 1000, 7, 7, -1, 12, 999_999]


def write_records(
    path: Path, format: Any, images: Sequence[bytes] = JPEGS, labels: Sequence[int] = LABELS
) -> Path:
    """What convert.py does: some of JPEGS, in one file."""
    with path.open("wb") as file:
        file.write(format.begin(len(images)))
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            width, height = Image.open(io.BytesIO(image)).size
            sample = EncodedSample(key, f"a/{key}.jpg", label, height, width, image, checksum=0)
            before, after = format.frame(file.tell(), sample)
            file.write(before + image + after)
        format.finish(file, np.zeros(0))
    return path


def opened(path: Path, format: Any) -> Any:
    return format.open(path, lambda done, total: None)


def images_of(store: Any) -> list[bytes]:
    return store.read_batch(np.arange(len(store)))


def check_mutations(file: Path, format: Any, count: int = 100) -> None:
    """Bits turned, cut, and spliced: a ValueError, or samples; and beside the file nothing but its sidecar."""
    rng, good, refused = np.random.default_rng(5), file.read_bytes(), 0
    file.unlink()
    for number in range(count):
        data = bytearray(good)
        a, b, length = (int(x) for x in rng.integers(0, len(good), 3))
        if number % 3 == 0:
            for at in rng.integers(0, len(good), 1 + number // 6):
                data[at] ^= 1 << int(rng.integers(8))
        elif number % 3 == 1:
            del data[a:]
        else:
            data[a : a + length % 2000] = good[b : b + length % 3000]
        bad = file.with_name(f"{number}{file.suffix}")
        bad.write_bytes(data)
        try:
            store = opened(bad, format)
        except ValueError as error:
            assert str(bad) in str(error)  # noqa: PT017
            refused += 1
        else:
            assert all(isinstance(image, bytes) for image in images_of(store))
            assert all(store.name(i) for i in range(len(store)))
    assert count // 4 < refused
    assert {path.suffix for path in file.parent.iterdir()} <= {file.suffix, ".idx"}
