"""Record formats: many encoded images in one or a few large files.

Read `format.py` first, for the interface that `beton.py`, `webdataset.py` and `tfrecord.py`
implement. They share `record_store.py` (reading), `index.py` (where the images are) and
`scanning.py` (finding them in files that came without an index).
"""

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
    """The name in FORMATS of the data at `path`; None for a folder of images, or for nothing.

    A folder of images may hold a forgotten .tar beside its sub-folders.
    """
    if path.is_dir() and _has_image_folders(path):
        return None
    return next((name for name, format in FORMATS.items() if format.files(path)), None)


def _has_image_folders(path: Path) -> bool:
    with os.scandir(path) as entries:
        return any(
            _holds_images(entry)
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".")
        )


def _holds_images(folder: os.DirEntry[str]) -> bool:
    """Whether there is an image among the first files of a folder."""
    with suppress(OSError), os.scandir(folder) as files:
        return any(file.name.lower().endswith(SUFFIXES) for file in islice(files, 100))
    return False
