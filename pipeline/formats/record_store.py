"""Encoded images in a few large files, read at random: the store of every record format."""

from __future__ import annotations

import errno
import os
import re
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..order import Samples
from ..stores import Progress
from .index import check_classes, load_index, read_description
from .scanning import Scan, index_files

_FILES_OPEN = 128  # at a time and store: many systems allow a process 1024
# Linux silently cuts a request to the length that it reads ahead, which is at least 128 KiB.
_READ_AHEAD_BYTES = 1 << 17


class RecordStore:
    """Images at the places in `files` that `index` holds. See `Store`.

    A sample that the disk cannot read is b"". A file that is gone or out of reach raises OSError.
    The store is pickled without its open files.

    Args:
        path: The data set: a file, or the folder of `files`.
        files: Its files.
        index: Rows of ROW.
        classes: The names of the classes.
        rejects: name -> reason, of the images left out.
        checksums: Whether `index` holds the checksums of the images.
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
        self.path = path
        self.files = list(files)
        self.index = index
        self.classes = classes
        self.rejects = rejects or {}
        self.checksums = checksums
        self._open = lru_cache(_FILES_OPEN)(_OpenFile)

    def __len__(self) -> int:
        return len(self.index)

    def read_batch(self, samples: Samples) -> list[bytes]:
        return [self._read(row) for row in self.index[samples]]

    def name(self, sample: int) -> str:
        row = self.index[sample]
        return f"{self.files[row['file']]}, byte {row['offset']}"

    def prefetch(self, first: int, last: int) -> None:
        """Ask the system to read the samples first <= sample < last, which are contiguous, ahead.

        It returns once all is requested; if the disk is behind, that takes a while.
        """
        rows = self.index[first:last]
        for number in np.unique(rows["file"]):
            in_file = rows[rows["file"] == number]
            file = self._open(self.files[number])
            start = int(in_file["offset"].min())
            end = int((in_file["offset"] + in_file["bytes"]).max())
            for offset in range(start, end, _READ_AHEAD_BYTES):
                length = min(_READ_AHEAD_BYTES, end - offset)
                os.posix_fadvise(file.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(_FILES_OPEN)(_OpenFile)

    def _read(self, row: Any) -> bytes:
        file = self._open(self.files[row["file"]])
        size = int(row["bytes"])
        try:
            data = os.pread(file.fd, size, int(row["offset"]))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""
        return data if len(data) == size else b""


class _OpenFile:
    """A file descriptor that is closed once nobody uses this object."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.fd).atexit = False


def natural_key(file: Path) -> list[str | int]:
    """A key that sorts the names of files as people do, 9 before 10."""
    parts = re.split("([0-9]+)", file.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def open_files(
    path: Path, files: Sequence[Path], scan: Callable[[Path], Scan], progress: Progress
) -> RecordStore:
    """The store of the files at `path`, by the index that was written with them or by a scan."""
    rows = load_index(path, files)
    classes = read_description(path).get("classes")
    if rows is not None:
        return RecordStore(path, files, rows, check_classes(path, classes, rows), checksums=True)
    scanned = index_files(path, files, scan, progress)
    classes = check_classes(path, classes or scanned.classes, scanned.rows)
    return RecordStore(path, files, scanned.rows, classes, scanned.rejects)
