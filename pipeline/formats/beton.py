"""FFCV's format, one file: a header, tables of the fields and of the samples, the encoded images, and where they lie.

Compatible with FFCV 1.0.2 in both directions, without importing it. An image's entry gives its address but not its
size: that stands in the allocation table at the end, which has entries for other fields too, in any order.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..images import PPM
from ..order import Samples
from ..stores import Progress
from .format import EncodedSample
from .index import (
    MOST_CLASSES,
    ROW,
    Found,
    Scan,
    check_classes,
    index_path,
    load_index,
    read_description,
)
from .record_store import RecordStore

SUFFIX, SHARDED = ".beton", False

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
_IMAGE = np.dtype(
    [("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("address", "<u8")]
)  # 13 bytes, not aligned
_BYTES = np.dtype([("address", "<u8"), ("size", "<u8")])
# By kind: float, int, image, bytes, array, JSON, tensor. Any other is known to nobody but who wrote it.
_KINDS = [
    np.dtype("<f8"),
    np.dtype("<i8"),
    _IMAGE,
    _BYTES,
    np.dtype("<u8"),
    _BYTES,
    np.dtype("<u8"),
]
_INT, _RGB = 1, 2
_JPEG, _RAW = 0, 1
_ALLOCATION = np.dtype([("sample", "<u8"), ("address", "<u8"), ("size", "<u8")])

_PAGE = 8 << 20  # bytes, a power of two, as FFCV's writer has it


def begin(samples: int) -> bytes:
    return bytes(_HEADER.itemsize + 2 * _FIELD.itemsize + samples * _samples([_RGB, _INT]).itemsize)


def frame(offset: int, sample: EncodedSample) -> tuple[bytes, bytes]:
    """FFCV may read a file in pages, and cannot see an image that crosses from one to the next.

    The size of all pages is that for the largest image (see `finish`). Where smaller ones do not cross the boundaries
    of smaller pages, they do not cross those either: each can be placed before the largest is known.
    """
    size = len(sample.image)
    page = _page(size)
    crosses_boundary = offset % page + size > page
    padding = -offset % page if crosses_boundary else 0
    return bytes(padding), b""


def finish(file: BinaryIO, rows: NDArray[Any]) -> None:
    header, fields = np.zeros((), _HEADER), np.zeros(2, _FIELD)
    samples, allocations = (
        np.zeros(len(rows), _samples([_RGB, _INT])),
        np.zeros(len(rows), _ALLOCATION),
    )
    allocations["sample"] = np.arange(len(rows))
    allocations["address"], allocations["size"] = rows["offset"], rows["bytes"]
    table_at = file.seek(0, os.SEEK_END)
    file.write(allocations.tobytes())
    header[...] = (
        _VERSION,
        len(fields),
        _page(int(rows["bytes"].max(initial=0))),
        len(rows),
        table_at,
    )
    fields["kind"], fields["name"] = (_RGB, _INT), (b"image", b"label")
    samples["f0"]["mode"], samples["f0"]["address"] = _JPEG, rows["offset"]
    samples["f0"]["width"], samples["f0"]["height"], samples["f1"] = (
        rows["width"],
        rows["height"],
        rows["label"],
    )
    file.seek(0)
    file.write(header.tobytes() + fields.tobytes() + samples.tobytes())


def scan(file: Path) -> Scan:
    rows, _ = _read(file)
    where = zip(*(rows[name].tolist() for name in ("offset", "bytes", "label")), strict=True)
    return Scan([Found(f"sample {i}", *found) for i, found in enumerate(where)], "")


def files(path: Path) -> list[Path]:
    return [path] if path.suffix == SUFFIX and path.is_file() else []


def open(path: Path, progress: Progress) -> BetonStore:
    """Its own tables say all; where an index of ours stands beside it, they must agree, and its checksums are used."""
    (rows, raw), ours = _read(path), load_index(path, [path])
    if ours is not None:
        compared = [name for name in ROW.names or () if name != "checksum"]
        if not np.array_equal(rows[compared], ours[compared]):
            raise ValueError(
                f"{path} and {index_path(path)} do not agree: restore the file, or delete its index"
            )
        rows = ours
    classes = check_classes(path, read_description(path).get("classes"), rows)
    store = BetonStore(path, [path], rows, classes, checksums=ours is not None)
    store.raw = raw
    return store


class BetonStore(RecordStore):
    """Images without compression, which FFCV can keep as well, are given as binary PPM."""

    raw: NDArray[np.bool_]  # [n], which those are

    def read_batch(self, samples: Samples) -> list[bytes]:
        read = super().read_batch(samples)
        for i in np.flatnonzero(self.raw[samples]):
            row = self.index[samples[i]]
            read[i] = read[i] and PPM % (row["width"], row["height"]) + read[i]
        return read


def _read(path: Path) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """`ROW`s without checksums, and which of the samples are raw; ValueError unless all that the tables say can be."""
    size, remedy = path.stat().st_size, "copy it again, or convert the images anew"
    with path.open("rb") as file:

        def table(kind: np.dtype[Any], count: int, end: int, what: str) -> NDArray[Any]:
            if count * kind.itemsize > end - file.tell():
                raise ValueError(f"{path} is too short for {what}: {remedy}")
            return np.fromfile(file, kind, count)

        header = table(_HEADER, 1, size, "the header of a beton")[0]
        if header["version"] != _VERSION:
            raise ValueError(
                f"{path} is no beton of version {_VERSION}, but {header['version']}: {remedy}"
            )
        count, allocations_at, page = (
            int(header[name]) for name in ("samples", "allocations", "page")
        )
        if not count or page.bit_count() != 1:
            raise ValueError(
                f"{path} is said to hold {count} samples in pages of {page} bytes: {remedy}"
            )
        fields = table(_FIELD, int(header["fields"]), size, f"{header['fields']} fields")
        kinds = fields["kind"].tolist()
        if _RGB not in kinds:
            raise ValueError(f"{path} has no field of images: write it with an RGBImageField")
        if max(kinds) >= len(_KINDS):
            raise ValueError(
                f"{path} has a field of the unknown kind {max(kinds)}: write it again without that field"
            )
        entries = table(_samples(kinds), count, min(size, allocations_at), f"{count:,} samples")
        images, data_at = entries[f"f{kinds.index(_RGB)}"], file.tell()
        if allocations_at > size or (size - allocations_at) % _ALLOCATION.itemsize:
            raise ValueError(f"{path}: its allocation table does not end with the file: {remedy}")
        file.seek(allocations_at)
        allocations = np.fromfile(file, _ALLOCATION)

    allocations = allocations[
        allocations["size"] > 0
    ]  # those of nothing have the address of the next
    allocations = allocations[np.argsort(allocations["address"])]
    entry = np.searchsorted(allocations["address"], images["address"])
    found = (
        allocations[np.minimum(entry, len(allocations) - 1)]
        if len(allocations)
        else np.zeros(count, _ALLOCATION)
    )
    pixels = images["height"].astype(np.int64) * images["width"]
    raw = images["mode"] == _RAW
    good = (
        (found["address"] == images["address"])
        & (images["address"] >= data_at)
        & (found["size"] < 1 << 31)
    )
    good &= (images["address"] <= allocations_at) & (
        found["size"] <= allocations_at - images["address"]
    )
    good &= (images["mode"] <= _RAW) & (pixels > 0) & (~raw | (found["size"] == 3 * pixels))
    if not good.all():
        bad = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"{path}: the image of sample {bad} cannot lie where the tables say: {remedy}"
        )
    labels = entries[f"f{kinds.index(_INT)}"] if _INT in kinds else np.full(count, -1)
    if labels.min() < -1 or labels.max() >= max(count, MOST_CLASSES):
        wrong = int(labels.min() if labels.min() < -1 else labels.max())
        raise ValueError(
            f"{path} has the label {wrong}: write it with the numbers of classes, or -1 for none"
        )
    rows = np.zeros(count, ROW)
    rows["label"], rows["height"], rows["width"] = labels, images["height"], images["width"]
    rows["offset"], rows["bytes"] = images["address"], found["size"]
    return rows, raw


def _samples(kinds: list[int]) -> np.dtype[Any]:
    """An entry of the table of samples: a part for each field, aligned as a C compiler does it."""
    return np.dtype([("", _KINDS[kind]) for kind in kinds], align=True)


def _page(largest: int) -> int:
    return max(_PAGE, 1 << max(0, largest - 1).bit_length())
