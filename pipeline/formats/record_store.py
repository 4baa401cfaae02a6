"""Encoded images in a few large files, read at random: what beton, WebDataset and TFRecord have in common."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..order import Samples
from ..stores import Progress
from .index import Scan, check_classes, index_files, load_index, read_description

_FILES_OPEN = 128  # at a time and store: many systems allow a process 1024
_AHEAD_BYTES = (
    1 << 17
)  # Linux cuts what it is asked to fetch, without a word, to what it reads ahead: 128 KiB at least


class RecordStore:
    """Images in `files`, where `index` (of ROW) says. Pickled without its open files; see `Store`.

    `checksums` says whether the index has them. OSError where a file is gone or out of reach; a sample that the disk
    will not give is an empty one.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        index: NDArray[Any],
        classes: list[str],
        rejects: dict[str, str] | None = None,
        *,
        checksums: bool = False,
    ) -> None:
        self.path, self.files, self.index, self.classes = path, list(files), index, classes
        self.rejects, self.checksums = rejects or {}, checksums
        self._opened = lru_cache(_FILES_OPEN)(_OpenFile)

    def __len__(self) -> int:
        return len(self.index)

    def read_batch(self, samples: Samples) -> list[bytes]:
        return [self._read(row) for row in self.index[samples]]

    def name(self, sample: int) -> str:
        row = self.index[sample]
        return f"{self.files[row['file']]}, byte {row['offset']}"

    def prefetch(self, first: int, last: int) -> None:
        """Asks the system to fetch the samples first <= sample < last, which lie side by side, ahead of their use.

        It comes back when all is asked for: a disk that is behind makes it wait.
        """
        rows = self.index[first:last]
        for number in np.unique(rows["file"]):
            inside, file = rows[rows["file"] == number], self._opened(self.files[number])
            start, end = (
                int(inside["offset"].min()),
                int((inside["offset"] + inside["bytes"]).max()),
            )
            for at in range(start, end, _AHEAD_BYTES):
                os.posix_fadvise(file.fd, at, min(_AHEAD_BYTES, end - at), os.POSIX_FADV_WILLNEED)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened = lru_cache(_FILES_OPEN)(_OpenFile)

    def _read(self, row: Any) -> bytes:
        size, file = int(row["bytes"]), self._opened(self.files[row["file"]])
        try:
            data = os.pread(file.fd, size, int(row["offset"]))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""
        return data if len(data) == size else b""


class _OpenFile:
    """A descriptor for as long as somebody uses it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.fd).atexit = False


def open_files(
    path: Path, files: Sequence[Path], scan: Callable[[Path], Scan], progress: Progress
) -> RecordStore:
    """The store of `files` at `path`: by the index that was written with them, or else by a scan."""
    rejects: dict[str, str] = {}
    rows, checksums = load_index(path, files), True
    classes = read_description(path).get("classes")
    if rows is None:
        rows, found_classes, rejects = index_files(path, files, scan, progress)
        classes, checksums = classes or found_classes, False
    return RecordStore(
        path, files, rows, check_classes(path, classes, rows), rejects, checksums=checksums
    )
