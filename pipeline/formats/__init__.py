"""The formats that data are converted to, each a module with the same few functions; and which one a path holds."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import islice
from pathlib import Path

from ..images import SUFFIXES
from . import beton, tfrecord, webdataset
from .format import EncodedSample, Format

__all__ = ["FORMATS", "EncodedSample", "Format", "find_format"]


FORMATS: dict[str, Format] = {"beton": beton, "webdataset": webdataset, "tfrecord": tfrecord}


def find_format(path: Path) -> str | None:
    """Which of FORMATS lies at `path`; None for a folder of images (with a forgotten .tar beside them), or nothing."""
    if path.is_dir():
        with os.scandir(path) as entries:
            if any(
                _holds_images(entry)
                for entry in entries
                if entry.is_dir() and not entry.name.startswith(".")
            ):
                return None
    return next((name for name, format in FORMATS.items() if format.files(path)), None)


def _holds_images(folder: os.DirEntry[str]) -> bool:
    """By the first things in it."""
    with suppress(OSError), os.scandir(folder) as inside:
        return any(file.name.lower().endswith(SUFFIXES) for file in islice(inside, 100))
    return False
