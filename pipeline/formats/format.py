"""The interface of a record format: how samples are written to a file, found in it and read back.

Each module of this package that implements it (`beton`, `webdataset`, `tfrecord`) has these
functions at module level.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from numpy.typing import NDArray

from ..stores import Progress
from .record_store import RecordStore
from .scanning import Scan


class EncodedSample(NamedTuple):
    """One sample as it is written to a file."""

    key: int  # its position in the whole data set
    name: str  # what the source calls it
    label: int  # -1 for none
    height: int
    width: int
    image: bytes  # encoded
    checksum: int  # CRC-32C of the encoded image


class Format(Protocol):
    """Writes and reads one format.

    A sample in a file is `before` + the encoded image + `after`, with the two parts from `frame`.
    """

    SUFFIX: str  # of a file
    SHARDED: bool  # whether a data set is a folder of files; False for one file

    def begin(self, samples: int) -> bytes:
        """The beginning of a file of at most `samples` samples, e.g. room for a beton's tables."""

    def frame(self, offset: int, sample: EncodedSample) -> tuple[bytes, bytes]:
        """The bytes before and after the image of a sample that is written at byte `offset`."""

    def finish(self, file: BinaryIO, rows: NDArray[Any]) -> None:
        """Complete a file.

        Args:
            file: Open for reading and writing, positioned at its end.
            rows: The `ROW`s of its samples, in order.
        """

    def scan(self, file: Path) -> Scan:
        """List the images in a finished file.

        Raises:
            ValueError: The file is damaged; the message names the file and the place.
        """

    def files(self, path: Path) -> list[Path]:
        """The files of this format at `path`, sorted: the file itself, or those in the folder."""

    def open(self, path: Path, progress: Progress) -> RecordStore:
        """Open the store at `path`; see `RecordStore`.

        Raises:
            ValueError: The data are damaged, incomplete or of another version.
        """
