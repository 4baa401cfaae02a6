"""Conversions of small data sets, and what they leave on the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import (
    ConversionOptions,
    ConversionProgress,
    ConversionResult,
    open_store,
    write_store,
)

TARGETS = {"beton": "x.beton", "webdataset": "x", "tfrecord": "x"}
"""The name of the target in each format."""


class Killed(BaseException):
    """Takes the place of SIGKILL: no handler catches it."""


def convert_to(
    source: Any,
    folder: Path,
    format: str,
    *,
    executor: Executor | None = None,
    progress: Callable[[ConversionProgress, int], None] = lambda done, images: None,
    **options: Any,
) -> ConversionResult:
    """Convert a source to `folder / TARGETS[format]`; `options` are those of ConversionOptions."""
    target = folder / TARGETS[format]
    return write_store(
        source,
        target,
        ConversionOptions(format=format, **options),
        executor=executor,
        progress=progress,
    )


def files_in(folder: Path) -> dict[str, bytes]:
    """The contents of all files below a folder, by their relative paths."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def images_of(path: Path) -> list[bytes]:
    """All encoded images of a data set, in its order."""
    store = open_store(path)
    return store.read_batch(np.arange(len(store)))
