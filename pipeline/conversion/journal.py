"""The journal of a shard: a row for each image of the source that it has dealt with.

While a shard is written, its journal says how far it is; afterwards, it gives the rows of the
index.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..formats.index import ROW

_DTYPE = np.dtype(
    [
        *ROW.descr,
        ("end", "<i8"),  # of the record in the file; for a reject, that of the record before it
        ("source", "<i8"),  # number of the image in the source
        ("treatment", "S32"),  # see `StandardJpeg`, or REJECTED
    ]
)
REJECTED = b"rejected"  # treatment of an image that is left out


class JournalRow(NamedTuple):
    """One row of a journal, in the order of its fields."""

    label: int
    height: int
    width: int
    file: int
    offset: int
    size: int  # bytes of the image
    checksum: int
    end: int
    source: int
    treatment: bytes


class ConversionProgress(NamedTuple):
    """How much of a conversion is done."""

    images: int = 0  # of the source, including rejects
    rejects: int = 0
    bytes: int = 0  # of the images that are written

    def plus(self, more: ConversionProgress) -> ConversionProgress:
        return ConversionProgress(
            self.images + more.images, self.rejects + more.rejects, self.bytes + more.bytes
        )


def journal_array(rows: list[JournalRow]) -> NDArray[Any]:
    return np.array(rows, dtype=_DTYPE)


def read_journal(path: Path) -> NDArray[Any]:
    return parse_journal(path.read_bytes())


def parse_journal(data: bytes) -> NDArray[Any]:
    """The complete rows in the bytes of a journal; a kill may have left half a row at its end."""
    complete = len(data) // _DTYPE.itemsize * _DTYPE.itemsize
    return np.frombuffer(data[:complete], dtype=_DTYPE)


def index_rows(journal: NDArray[Any]) -> NDArray[Any]:
    """The rows of the index: those of the images that are not rejected."""
    written = journal[journal["treatment"] != REJECTED]
    rows = np.zeros(len(written), dtype=ROW)
    for name in ROW.names or ():
        rows[name] = written[name]
    return rows


def count_rejects(journal: NDArray[Any]) -> int:
    return int((journal["treatment"] == REJECTED).sum())


def progress_of(journal: NDArray[Any]) -> ConversionProgress:
    """How much is done according to rows of a journal."""
    return ConversionProgress(len(journal), count_rejects(journal), int(journal["bytes"].sum()))
