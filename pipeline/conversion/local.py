"""Opens what lies on this machine: folders of images, record files, and parquet files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..formats import FORMATS, find_format
from ..images import SUFFIXES
from ..stores import Progress
from ..stores.image_files import class_folders, find_splits, walk_images
from .parquet import open_parquet
from .source_types import FileSource, RecordSource, Source


def open_local(path: Path, progress: Progress, scratch: Path) -> Source:
    """The images at `path`, for `open_source`.

    Raises:
        ValueError: There are none.
    """
    if _is_parquet(path):
        return open_parquet(path, progress, scratch)
    format = find_format(path)
    if format is not None:
        return RecordSource(FORMATS[format].open(path, progress))
    if path.is_dir():
        folder = _open_folder(path)
        if folder is not None:
            return folder
        if any(path.rglob("*.parquet")):
            return open_parquet(path, progress, scratch)
    raise ValueError(
        f"{path} {_describe_unusable(path)}: "
        f"looked for {', '.join(SUFFIXES)}, .parquet and {', '.join(FORMATS)}"
    )


def classes_by_folder(paths: list[str]) -> tuple[list[str], NDArray[np.int32]]:
    """Classes and labels by the first level of folders."""
    classes = class_folders(paths)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers.get(path.partition("/")[0], -1) for path in paths]
    return classes, np.array(labels, dtype=np.int32)


def _is_parquet(path: Path) -> bool:
    """Whether `path` is a parquet file, or a folder of them as the hub has it.

    Only two folders are looked into: there may be a million images.
    """
    if path.suffix == ".parquet" and path.is_file():
        return True
    return any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))


def _open_folder(path: Path) -> FileSource | None:
    """The image files below a folder; None if there are none."""
    root, test = find_splits(path)
    if test is not None:
        raise ValueError(f"{path} holds {root.name}/ and {test.name}/: convert each separately")
    unreadable: dict[str, str] = {}
    paths = sorted(walk_images(root, unreadable))
    if not paths:
        return None
    classes, labels = classes_by_folder(paths)
    return FileSource(root, paths, classes, labels, unreadable)


def _describe_unusable(path: Path) -> str:
    if path.is_dir():
        return "holds no image"
    if path.exists():
        return "is not image data"
    return "does not exist"
