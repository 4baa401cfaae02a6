"""The formats that data are converted to, each a module with the same few functions; and which one a path holds."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from numpy.typing import NDArray

from ..images import SUFFIXES
from ..stores import Progress
from . import beton, tfrecord, webdataset
from .index import Scan
from .record_store import RecordStore


class Format(Protocol):
    """Writes and reads one format. A sample in a file is `before` + the encoded image + `after` (see `frame`)."""

    SUFFIX: str  # of a file
    SHARDED: bool  # a folder of files, or one file

    def begin(self, samples: int) -> bytes:
        """What stands at the beginning of a file of at most `samples` samples: room for a beton's tables."""

    def frame(
        self,
        at: int,
        key: int,
        name: str,
        label: int,
        height: int,
        width: int,
        image: bytes,
        checksum: int,
    ) -> tuple[bytes, bytes]:
        """What stands before and after an encoded image whose record begins at byte `at` of the file.

        key: the position in the whole data set; name: what the source calls it; label: -1 for none; checksum: CRC-32C.
        """

    def finish(self, file: BinaryIO, rows: NDArray[Any]) -> None:
        """Completes a file that is open for reading and writing at its end; rows: `ROW`s of its samples, in order."""

    def scan(self, file: Path) -> Scan:
        """What a finished file holds; raises ValueError where it is damaged, naming the file and the place."""

    def files(self, path: Path) -> list[Path]:
        """The files of this format at `path`, sorted: the file itself, or those in the folder; none of another kind."""

    def open(self, path: Path, progress: Progress) -> RecordStore:
        """The store at `path`; see `RecordStore`. ValueError for what is damaged, missing or of another version."""


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
