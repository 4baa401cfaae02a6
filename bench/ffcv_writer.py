"""FFCV's own writer, as its documentation has its users call it: the baseline of conversions."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from typing import Any

import pipeline

QUALITY = 90  # FFCV's default


class _LabelledImages:
    """The dataset that FFCV's documentation passes to its writer: Pillow's images, and labels."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.open(self.paths[i]).convert("RGB"), 0


def write_beton(paths: Sequence[str], target: str, side: int | None) -> None:
    """Write a beton of JPEGs on all cores. Call it in a process of its own, without threads.

    Args:
        paths: The images.
        target: The file to write.
        side: Longest side of the images in pixels, or None to keep their size.

    Raises:
        ValueError: FFCV cannot be imported.
    """
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
    except ImportError as error:
        raise ValueError(
            f"FFCV cannot be imported ({error}); the comparison needs it: uv sync --extra ffcv"
        ) from None
    image = RGBImageField(write_mode="jpg", jpeg_quality=QUALITY)
    if side is not None:
        image = RGBImageField(write_mode="jpg", jpeg_quality=QUALITY, max_resolution=side)
    fields = {"image": image, "label": IntField()}
    # FFCV's workers are made to be forked. Otherwise each worker of this process, which was
    # spawned, would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    _silence_standard_error()  # FFCV draws a progress bar
    writer = DatasetWriter(target, fields, num_workers=pipeline.usable_cores())
    writer.from_indexed_dataset(_LabelledImages(paths))


def _silence_standard_error() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
