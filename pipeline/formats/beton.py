"""FFCV's beton format, in one file: a header, tables of fields and samples, images, allocations.

Compatible with FFCV 1.0.2 in both directions, without importing it. The entry of an image in the
table of samples holds its address but not its size. The size is in the allocation table at the end
of the file, which has entries for other fields too, in any order.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..images import PPM
from ..order import Samples
from ..stores import Progress
from .format import EncodedSample
from .index import MOST_CLASSES, ROW, check_classes, index_path, load_index, read_description
from .record_store import RecordStore
from .scanning import Scan, ScannedImage

SUFFIX = ".beton"
SHARDED = False

_VERSION = 2
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("fields", "<u2"),
        ("page", "<u4"),
        ("samples", "<u8"),
        ("allocations", "<u8"),
    ]
)
_FIELD = np.dtype([("kind", "u1"), ("name", "S16"), ("arguments", "V1024")])
# The entry of an image takes 13 bytes; it is not aligned.
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("address", "<u8")])
_BYTES = np.dtype([("address", "<u8"), ("size", "<u8")])
# An entry of each kind of field: float, int, image, bytes, array, JSON, tensor. Fields can have
# kinds of their own, which only their writer knows.
_KINDS = [
    np.dtype("<f8"),
    np.dtype("<i8"),
    _IMAGE,
    _BYTES,
    np.dtype("<u8"),
    _BYTES,
    np.dtype("<u8"),
]
_INT_KIND = 1
_IMAGE_KIND = 2
_JPEG_MODE = 0
_RAW_MODE = 1
_ALLOCATION = np.dtype([("sample", "<u8"), ("address", "<u8"), ("size", "<u8")])

_SMALLEST_PAGE = 8 << 20  # bytes, a power of two, as in FFCV's writer
_MOST_IMAGE_BYTES = (1 << 31) - 1  # of `ROW`
_REMEDY = "copy it again, or convert the images anew"


def begin(samples: int) -> bytes:
    entry = _sample_entry([_IMAGE_KIND, _INT_KIND])
    return bytes(_HEADER.itemsize + 2 * _FIELD.itemsize + samples * entry.itemsize)


def frame(offset: int, sample: EncodedSample) -> tuple[bytes, bytes]:
    """Pad, so that no image crosses from one page to the next: FFCV may read a file in pages.

    All pages have the size that the largest image needs (see `finish`). If smaller images do not
    cross the boundaries of smaller pages, they do not cross those of larger ones either, so each
    can be placed before the largest is known.
    """
    size = len(sample.image)
    page = _page_size(size)
    crosses_boundary = offset % page + size > page
    padding = -offset % page if crosses_boundary else 0
    return bytes(padding), b""


def finish(file: BinaryIO, rows: NDArray[Any]) -> None:
    allocations = np.zeros(len(rows), _ALLOCATION)
    allocations["sample"] = np.arange(len(rows))
    allocations["address"] = rows["offset"]
    allocations["size"] = rows["bytes"]

    allocations_offset = file.seek(0, os.SEEK_END)
    file.write(allocations.tobytes())

    header = np.zeros((), _HEADER)
    header["version"] = _VERSION
    header["fields"] = 2
    header["page"] = _page_size(int(rows["bytes"].max(initial=0)))
    header["samples"] = len(rows)
    header["allocations"] = allocations_offset

    fields = np.zeros(2, _FIELD)
    fields["kind"] = (_IMAGE_KIND, _INT_KIND)
    fields["name"] = (b"image", b"label")

    samples = np.zeros(len(rows), _sample_entry([_IMAGE_KIND, _INT_KIND]))
    images = samples["f0"]
    images["mode"] = _JPEG_MODE
    images["width"] = rows["width"]
    images["height"] = rows["height"]
    images["address"] = rows["offset"]
    samples["f1"] = rows["label"]

    file.seek(0)
    file.write(header.tobytes() + fields.tobytes() + samples.tobytes())


def scan(file: Path) -> Scan:
    rows, _ = _read_rows(file)
    images = [
        ScannedImage(f"sample {i}", offset, size, label)
        for i, (offset, size, label) in enumerate(rows[["offset", "bytes", "label"]].tolist())
    ]
    return Scan(images, "")


def files(path: Path) -> list[Path]:
    return [path] if path.suffix == SUFFIX and path.is_file() else []


def open(path: Path, progress: Progress) -> BetonStore:
    """Open a beton by its own tables.

    If an index of ours lies beside it, they must agree, and the index adds the checksums.
    """
    rows, is_raw = _read_rows(path)
    index = load_index(path, [path])
    if index is not None:
        common = [name for name in ROW.names or () if name != "checksum"]
        if not np.array_equal(rows[common], index[common]):
            raise ValueError(
                f"{path} and {index_path(path)} do not agree: restore the file, or delete its index"
            )
        rows = index
    classes = check_classes(path, read_description(path).get("classes"), rows)
    store = BetonStore(path, [path], rows, classes, checksums=index is not None)
    store.is_raw = is_raw
    return store


class BetonStore(RecordStore):
    """The images of a beton. Uncompressed ones, which FFCV can write, are read as binary PPM."""

    is_raw: NDArray[np.bool_]  # [n], whether an image is uncompressed

    def read_batch(self, samples: Samples) -> list[bytes]:
        images = super().read_batch(samples)
        for i in np.flatnonzero(self.is_raw[samples]):
            if images[i]:
                row = self.index[samples[i]]
                images[i] = PPM % (row["width"], row["height"]) + images[i]
        return images


class _Tables(NamedTuple):
    """The tables of a beton, and the part of the file between them, which holds the data."""

    kinds: list[int]  # of the fields
    samples: NDArray[Any]  # [n] with a part for each field, f0, f1, ...
    allocations: NDArray[Any]  # [number of allocations] of _ALLOCATION
    data_start: int
    data_end: int


def _read_rows(path: Path) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The `ROW`s of a beton, without checksums, and which of its images are raw.

    Raises:
        ValueError: The tables are damaged, or have a field of an unknown kind or none of images.
    """
    tables = _read_tables(path)
    images = tables.samples[f"f{tables.kinds.index(_IMAGE_KIND)}"]
    rows = np.zeros(len(images), ROW)
    rows["label"] = _find_labels(path, tables)
    rows["height"] = images["height"]
    rows["width"] = images["width"]
    rows["offset"] = images["address"]
    rows["bytes"] = _find_sizes(path, tables, images)
    return rows, images["mode"] == _RAW_MODE


def _read_tables(path: Path) -> _Tables:
    size = path.stat().st_size
    with path.open("rb") as file:

        def read_table(entry: np.dtype[Any], count: int, end: int, content: str) -> NDArray[Any]:
            if count * entry.itemsize > end - file.tell():
                raise ValueError(f"{path} is too short for {content}: {_REMEDY}")
            return np.fromfile(file, entry, count)

        header = read_table(_HEADER, 1, size, "the header of a beton")[0]
        _check_header(path, header)
        count = int(header["samples"])
        allocations_offset = int(header["allocations"])

        fields = read_table(_FIELD, int(header["fields"]), size, f"{header['fields']} fields")
        kinds = fields["kind"].tolist()
        _check_kinds(path, kinds)

        end = min(size, allocations_offset)
        samples = read_table(_sample_entry(kinds), count, end, f"{count:,} samples")
        data_start = file.tell()

        if allocations_offset > size or (size - allocations_offset) % _ALLOCATION.itemsize:
            raise ValueError(f"{path}: truncated allocation table: {_REMEDY}")
        file.seek(allocations_offset)
        allocations = np.fromfile(file, _ALLOCATION)
    return _Tables(kinds, samples, allocations, data_start, allocations_offset)


def _check_header(path: Path, header: Any) -> None:
    if header["version"] != _VERSION:
        raise ValueError(
            f"{path} is not a beton of version {_VERSION}, but of {header['version']}: {_REMEDY}"
        )
    samples = int(header["samples"])
    page = int(header["page"])
    if samples == 0 or page.bit_count() != 1:
        raise ValueError(
            f"{path}: invalid header: {samples} samples in pages of {page} bytes: {_REMEDY}"
        )


def _check_kinds(path: Path, kinds: list[int]) -> None:
    if _IMAGE_KIND not in kinds:
        raise ValueError(f"{path} has no field of images: write it with an RGBImageField")
    if max(kinds) >= len(_KINDS):
        raise ValueError(
            f"{path} has a field of the unknown FFCV type {max(kinds)}: "
            "write the file again without that field"
        )


def _find_sizes(path: Path, tables: _Tables, images: NDArray[Any]) -> NDArray[np.uint64]:
    """The size in bytes of each image [n], from the allocation with its address.

    Raises:
        ValueError: An image has no allocation, or it is not within the data, or has no pixels.
    """
    # Allocations without bytes have the address of the next one.
    allocations = tables.allocations[tables.allocations["size"] > 0]
    allocations = allocations[np.argsort(allocations["address"])]
    if len(allocations) == 0:
        allocations = np.zeros(1, _ALLOCATION)
    nearest = np.searchsorted(allocations["address"], images["address"])
    own = allocations[np.minimum(nearest, len(allocations) - 1)]

    address = images["address"]
    size = own["size"]
    valid = (own["address"] == address) & (size <= _MOST_IMAGE_BYTES)
    valid &= (address >= tables.data_start) & (address <= tables.data_end)
    valid &= size <= tables.data_end - address  # in this form, it cannot overflow

    pixels = images["height"].astype(np.int64) * images["width"]
    is_raw = images["mode"] == _RAW_MODE
    valid &= (images["mode"] <= _RAW_MODE) & (pixels > 0)
    valid &= ~is_raw | (size == 3 * pixels)
    if not valid.all():
        first = int(np.flatnonzero(~valid)[0])
        raise ValueError(
            f"{path}: the image of sample {first} has an invalid offset, size or mode: {_REMEDY}"
        )
    return size


def _find_labels(path: Path, tables: _Tables) -> NDArray[Any]:
    """The labels [n] from the first integer field; -1 without such a field."""
    count = len(tables.samples)
    if _INT_KIND not in tables.kinds:
        return np.full(count, -1)
    labels = tables.samples[f"f{tables.kinds.index(_INT_KIND)}"]
    lowest = int(labels.min())
    highest = int(labels.max())
    if lowest < -1 or highest >= max(count, MOST_CLASSES):
        wrong = lowest if lowest < -1 else highest
        raise ValueError(
            f"{path} has the label {wrong}: labels must be class numbers from 0, or -1 for none"
        )
    return labels


def _sample_entry(kinds: list[int]) -> np.dtype[Any]:
    """An entry of the table of samples: a part for each field, aligned as a C compiler does it."""
    return np.dtype([("", _KINDS[kind]) for kind in kinds], align=True)


def _page_size(largest: int) -> int:
    """The page size for images of at most `largest` bytes."""
    return max(_SMALLEST_PAGE, 1 << max(0, largest - 1).bit_length())
