"""A folder of JPEG, PNG, WebP and BMP files as a store; sub-folders are the classes.

Opening it lists the folder and reads the header of each file that is new or has changed since the
last time: the sizes are needed before decoding, to draw crops. The index is kept in the cache
folder.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..atomic_write import atomic_write
from ..images import SUFFIXES, BadImage, image_size
from ..order import Samples
from .cache_paths import cache_folder, join_names, split_names
from .image_files import check_folders, check_is_file, class_folders, walk_images
from .store import Progress, no_progress

_ROW = np.dtype(
    [
        ("label", "i4"),
        ("height", "i4"),  # 0 for an image that cannot be used
        ("width", "i4"),
        ("bytes", "i8"),
        ("modified_ns", "i8"),
    ]
)
# Files handed to the threads at a time: a million at once would take gigabytes of bookkeeping.
_FILES_AT_A_TIME = 512
_HEADER_BYTES = 16_384  # enough for the size of most JPEGs; if it is not, all of the file is read


class FolderStore:
    """The images below `root`, nested to any depth; the first level of sub-folders are the classes.

    `rejects` holds the images left out, with the reason.

    Args:
        root: The folder.
        progress: Called with (done, total) while the files are indexed.

    Raises:
        ValueError: `root` is not a folder, or holds no image that can be used.
    """

    def __init__(self, root: Path, progress: Progress = no_progress) -> None:
        self.root = Path(os.path.abspath(root))
        if not self.root.is_dir():
            problem = "is not a folder" if self.root.exists() else "is not there"
            raise ValueError(f"{root} {problem}: name a folder of images")

        unreadable: dict[str, str] = {}
        paths = sorted(walk_images(self.root, unreadable))
        if not paths:
            raise ValueError(
                f"{root} holds no image: looked for {', '.join(SUFFIXES)} files in it, to any depth"
            )
        indexed = _index_files(self.root, paths, progress)
        self.rejects = {**unreadable, **indexed.rejects}
        usable = np.flatnonzero(indexed.rows["height"] > 0)
        if len(usable) == 0:
            name, reason = next(iter(self.rejects.items()))
            raise ValueError(
                f"{root}: none of its {len(paths)} images can be used; the first, {name}: {reason}"
            )
        self.paths = [paths[i] for i in usable]
        self.index = indexed.rows[usable]
        self.classes = class_folders(self.paths)
        if self.classes:
            numbers = {name: number for number, name in enumerate(self.classes)}
            self.index["label"] = [numbers[path.partition(os.sep)[0]] for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def read_batch(self, samples: Samples) -> list[bytes]:
        return [self._read(self.paths[sample]) for sample in samples]

    def name(self, sample: int) -> str:
        return str(self.root / self.paths[sample])

    def _read(self, path: str) -> bytes:
        try:
            with open(os.path.join(self.root, path), "rb") as file:
                return file.read()
        except OSError as error:
            check_folders(self.root, path, error)
            return b""


class _Index(NamedTuple):
    """The index of the files of a folder."""

    paths: list[str]
    rows: NDArray[Any]  # [n] of _ROW, without labels
    rejects: dict[str, str]  # path -> reason


def _index_files(root: Path, paths: list[str], progress: Progress) -> _Index:
    """Index the files at `paths`. A file that is in the cache and unchanged is not read again."""
    root_digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    cache = cache_folder() / f"index-{root_digest}.npz"
    cached = _load(cache)
    position_in_cache = {path: i for i, path in enumerate(cached.paths)}

    def index_file(path: str) -> tuple[Any, str]:
        i = position_in_cache.get(path)
        cached_row = None if i is None else cached.rows[i]
        return _index_file(os.path.join(root, path), cached_row, cached.rejects.get(path, ""))

    rows = np.empty(len(paths), dtype=_ROW)
    rejects: dict[str, str] = {}
    # The threads mostly wait for the disk.
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        for first in range(0, len(paths), _FILES_AT_A_TIME):
            part = paths[first : first + _FILES_AT_A_TIME]
            for i, (row, reason) in enumerate(pool.map(index_file, part), first):
                rows[i] = row
                if reason:
                    rejects[paths[i]] = reason
            progress(first + len(part), len(paths))

    index = _Index(paths, rows, rejects)
    if cached.paths != paths or not np.array_equal(cached.rows, rows):
        _save(cache, index)
    return index


def _index_file(file: str, cached_row: Any, cached_reason: str) -> tuple[Any, str]:
    """The row of a file, and the reason why it cannot be used, or "". `cached_row` may be None."""
    try:
        status = os.stat(file)
        stamp = (status.st_size, status.st_mtime_ns)
        if cached_row is not None and (cached_row["bytes"], cached_row["modified_ns"]) == stamp:
            return cached_row, cached_reason
        check_is_file(status)
        height, width = _read_size(file)
    except BadImage as error:
        return np.array((-1, 0, 0, *stamp), dtype=_ROW), str(error)
    except OSError as error:
        return np.array((-1, 0, 0, 0, 0), dtype=_ROW), error.strerror or str(error)
    return np.array((-1, height, width, *stamp), dtype=_ROW), ""


def _read_size(file: str) -> tuple[int, int]:
    """Height and width of an image file, from its beginning if possible."""
    with open(file, "rb") as opened:
        head = opened.read(_HEADER_BYTES)
        is_jpeg = head.startswith(b"\xff\xd8")
        if is_jpeg:
            # A long EXIF block or colour profile may come before the size.
            with suppress(BadImage):
                return image_size(head)
        return image_size(head + opened.read())


def _load(cache: Path) -> _Index:
    """The index in the cache; an empty one if it is missing or damaged, as it only saves time."""
    with suppress(Exception), open(cache, "rb") as file, np.load(file, allow_pickle=False) as saved:
        paths = split_names(saved["paths"])
        rows = saved["index"]
        names = split_names(saved["rejects"])
        reasons = split_names(saved["reasons"])
        if rows.dtype == _ROW and len(rows) == len(paths):
            return _Index(paths, rows, dict(zip(names, reasons, strict=True)))
    return _Index([], np.empty(0, dtype=_ROW), {})


def _save(cache: Path, index: _Index) -> None:
    texts = {
        "paths": index.paths,
        "rejects": index.rejects,
        "reasons": index.rejects.values(),
    }
    arrays: dict[str, Any] = {key: join_names(names) for key, names in texts.items()}
    with suppress(OSError):  # with a read-only or full disk, the next run indexes the folder again
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache, concurrent=True) as file:
            np.savez(file, index=index.rows, **arrays)
