"""Images that the tests make, and a cache folder of their own."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: tests run threads of both kinds at once


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of this test run, for its subprocesses as well."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TWINFEED_CACHE"] = str(folder)
    return folder


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise, as photographs have: neither flat nor pure noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 24) + 1, max(1, width // 24) + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    noisy = smooth + rng.normal(0, 8, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 JPEGs of different sizes in three classes."""
    return write_photos(tmp_path_factory.mktemp("photos"), 60)


def write_photos(root: Path, count: int, classes: int = 3) -> Path:
    rng = np.random.default_rng(count)
    for i in range(count):
        path = root / f"class{i % classes}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(40, 120, 2)
        path.write_bytes(encoded(picture(int(width), int(height), seed=i), quality=90))
    return root
