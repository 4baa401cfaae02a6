"""Images that the tests make."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise, as photographs have: neither flat nor pure noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(
        0, 256, (max(1, height // 24) + 1, max(1, width // 24) + 1, 3), dtype=np.uint8
    )
    smooth = np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=float
    )
    noisy = smooth + rng.normal(0, 8, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_photos(root: Path, count: int, classes: int = 3) -> Path:
    rng = np.random.default_rng(count)
    for i in range(count):
        path = root / f"class{i % classes}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(40, 120, 2)
        path.write_bytes(encoded(picture(int(width), int(height), seed=i), quality=90))
    return root
