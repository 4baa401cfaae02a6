"""Reads parquet files of images as the Hugging Face hub has them, through a staging file.

The columns of images and of labels are found by their names and types.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..stores import Progress
from ..stores.image_files import TEST_NAMES, TRAIN_NAMES
from .optional_imports import import_extra
from .source_types import Source
from .staging import Item, stage

_IMAGE_COLUMNS = ("image", "img", "image.bytes", "img.bytes", "image_bytes", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls")  # the best come first
_IMAGE_STRUCT = r"struct<.*\bbytes: (large_)?binary"
_BINARY = r"(large_)?binary$"
_LABEL_TYPES = r"u?int\d+$|(large_)?string$|dictionary<values=string"
_ROWS_IN_MEMORY = 16
_BUFFER_BYTES = 1 << 20


class _Columns(NamedTuple):
    image: str
    label: str | None
    classes: list[str]  # [] if the file does not name them


def open_parquet(path: Path, progress: Progress, scratch: Path) -> Source:
    """The images of a parquet file, or of all parquet files below a folder."""
    if path.is_file():
        files = [path]
        names = [path.name]
    else:
        files = sorted(path.rglob("*.parquet"))
        names = [str(file.relative_to(path)) for file in files]
    check_splits(str(path), names)
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]
    identity = f"{path.absolute()}\n{names} {stats}"
    return stage_parquet(zip(names, files, strict=True), identity, progress, scratch)


def stage_parquet(
    files: Iterable[tuple[str, Path]], identity: str, progress: Progress, scratch: Path
) -> Source:
    """Copy the images of parquet files, given as (name, path), to a staging file."""
    classes: list[str] = []  # filled by the first file
    items = (item for name, file in files for item in _read_items(name, file, classes))
    return stage(items, classes, scratch, identity, progress)


def check_splits(where: str, names: list[str]) -> None:
    """Raise ValueError if files belong to several splits, by their names or folders."""
    words = "|".join((*TRAIN_NAMES, *TEST_NAMES))
    pattern = re.compile(rf"(^|/)({words}|\w+(?=-\d+-of-))(?![a-z])", re.IGNORECASE)
    prefixes: dict[str, str] = {}  # of the names, by split
    for name in names:
        match = pattern.search(name)
        if match:
            prefixes[match[2]] = name[: match.end() + 1]
    if len(prefixes) > 1:
        raise ValueError(
            f"{where} holds the splits {', '.join(prefixes)}: "
            f"name one, '{where}/{min(prefixes.values())}*'"
        )


def _read_items(name: str, file: Path, classes: list[str]) -> Iterator[Item]:
    """The rows of a file, a few in memory at a time; its names of classes go to `classes`."""
    arrow = import_extra("pyarrow")
    parquet = import_extra("pyarrow.parquet")
    row = 0
    try:
        # Without `pre_buffer=False`, the whole file stays in memory.
        opened = parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
        columns = _find_columns(name, opened.schema_arrow)
        if classes and columns.classes != classes:
            raise ValueError(
                f"{name} has different class names than earlier files: convert it separately"
            )
        classes[:] = columns.classes
        read = [columns.image] if columns.label is None else [columns.image, columns.label]
        for batch in opened.iter_batches(_ROWS_IN_MEMORY, columns=read):
            cells = batch.column(columns.image).to_pylist()
            labels = [None] * len(batch)
            if columns.label is not None:
                labels = batch.column(columns.label).to_pylist()
            for cell, label in zip(cells, labels, strict=True):
                yield _make_item(f"{name}, row {row}", cell, label)
                row += 1
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{name} cannot be read from row {row} on ({str(error).strip()}): download it again"
        ) from error


def _make_item(place: str, cell: Any, label: Any) -> Item:
    """The item of a row: a cell is the bytes of an image, or a struct of bytes and path."""
    data = cell
    path = None
    if isinstance(cell, dict):
        data = cell.get("bytes")
        path = cell.get("path")
    return Item(
        name=path or place,
        image=data or "the row holds no image",
        label=None if label == -1 else label,
    )


def _find_columns(name: str, schema: Any) -> _Columns:
    """The columns of images and labels, by their names and types.

    Raises:
        ValueError: There is no column of images.
    """

    def find(columns: Iterable[str], types: str) -> str | None:
        for column in columns:
            if column in schema.names and re.match(types, str(schema.field(column).type)):
                return column
        return None

    image = find(_IMAGE_COLUMNS, f"{_IMAGE_STRUCT}|{_BINARY}") or find(schema.names, _IMAGE_STRUCT)
    if image is None:
        raise ValueError(
            f"{name} has no column of images, such as {_IMAGE_COLUMNS[0]}: "
            f"it has {', '.join(schema.names)}"
        )
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    class_columns = [
        column for column, feature in features.items() if feature.get("_type") == "ClassLabel"
    ]
    label = find((*_LABEL_COLUMNS, *class_columns), _LABEL_TYPES)
    return _Columns(image, label, features.get(label, {}).get("names", []))
