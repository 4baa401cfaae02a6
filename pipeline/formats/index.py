"""The index of record files, and the description that is written with them.

The index holds the place, size and label of each image. For data that convert.py wrote, it lies
beside them, as `<path>.index.npz`, with the description `<path>.json`. For other data,
`scanning.py` makes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..atomic_write import atomic_write
from ..stores import class_names, join_names, split_names

ROW = np.dtype(
    [
        ("label", "<i4"),  # -1 for none
        ("height", "<i4"),
        ("width", "<i4"),
        ("file", "<i4"),  # number of the file
        ("offset", "<i8"),  # of the encoded image in the file
        ("bytes", "<i4"),
        ("checksum", "<u4"),  # CRC-32C of the encoded image; 0 in an index without checksums
    ]
)
MOST_CLASSES = 1 << 20  # each gets a name: a damaged label must not fill the memory


def index_path(path: Path) -> Path:
    """The index of the data at `path`, which is kept beside them."""
    return path.with_name(path.name + ".index.npz")


def save_index(to: Path, files: Sequence[Path], index: NDArray[Any], **more: Any) -> None:
    """Write the index of `files` atomically; `more` are other arrays to be kept in it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    names: Any = join_names(file.name for file in files)
    sizes = np.array([file.stat().st_size for file in files], dtype=np.int64)
    with atomic_write(to, concurrent=True) as file:
        np.savez(file, rows=index, files=names, sizes=sizes, **more)


def load_index(path: Path, files: Sequence[Path]) -> NDArray[Any] | None:
    """The index that was written with the data at `path`; None if there is none.

    Raises:
        ValueError: The index is damaged, or does not belong to `files`: one of them is missing, or
            was replaced.
    """
    source = index_path(path)
    if not source.exists():
        return None
    try:
        with open(source, "rb") as file, np.load(file, allow_pickle=False) as saved:
            rows = saved["rows"]
            names = split_names(saved["files"])
            sizes = saved["sizes"]
    except Exception as error:
        raise ValueError(
            f"{source} is damaged ({error}): delete it, and the files are indexed again"
        ) from error
    _check_files(path, files, names, sizes)
    _check_rows(rows, sizes, source)
    return rows


def _check_files(
    path: Path, files: Sequence[Path], names: Sequence[str], sizes: NDArray[np.int64]
) -> None:
    """Raise ValueError unless `files` are those of the index, by name and size."""
    remedy = f"restore what is missing, or delete {index_path(path)} to use what is there"
    present = {file.name: file for file in files}
    for name, size in zip(names, sizes, strict=True):
        if name not in present:
            raise ValueError(f"{path} lacks {name}; {remedy}")
        size_now = present[name].stat().st_size
        if size_now != size:
            raise ValueError(f"{present[name]} has {size_now} bytes instead of {size}; {remedy}")
    if [file.name for file in files] != names:
        extra = sorted(present.keys() - set(names))
        raise ValueError(
            f"{path} holds {', '.join(extra[:3])}, which its index does not list; {remedy}"
        )


def _check_rows(rows: NDArray[Any], sizes: NDArray[Any], source: Path) -> None:
    """Raise ValueError if a row points outside of its file, so that no reader has to check it."""
    if rows.dtype != ROW or rows.ndim != 1:
        raise ValueError(
            f"{source} is not an index of this program: delete it, and the files are indexed again"
        )
    valid = (rows["file"] >= 0) & (rows["file"] < len(sizes))
    valid &= (rows["bytes"] > 0) & (rows["offset"] >= 0)
    valid &= (rows["height"] > 0) & (rows["width"] > 0) & (rows["label"] >= -1)
    # In this form the comparison cannot overflow.
    last_offsets = np.asarray(sizes)[rows["file"][valid]] - rows["bytes"][valid]
    valid[valid] = rows["offset"][valid] <= last_offsets
    if not valid.all():
        first = int(np.flatnonzero(~valid)[0])
        raise ValueError(
            f"{source}: sample {first} does not lie within its file: "
            "the file or its index is damaged"
        )


def read_description(path: Path) -> dict[str, Any]:
    """The description of the data at `path` that convert.py wrote (`<path>.json`); {} if none.

    Raises:
        ValueError: The description is damaged.
    """
    source = path.with_name(path.name + ".json")
    if not source.exists():
        return {}
    try:
        description = json.loads(source.read_text())
        if not _is_description(description):
            raise ValueError("not what convert.py writes")
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{source} is damaged ({error}): restore or delete it") from error
    return dict(description)


def _is_description(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) for name in value.get("classes", [])
    )


def check_classes(path: Path, classes: list[str] | None, rows: NDArray[Any]) -> list[str]:
    """The names of the classes: `classes`, or their numbers if it is None; [] without labels.

    Raises:
        ValueError: A label has no name.
    """
    numbers = class_names(rows["label"])
    if classes is None or not numbers:
        return numbers
    if len(numbers) > len(classes):
        raise ValueError(
            f"{path} has the label {len(numbers) - 1}, but {path}.json names {len(classes)} classes"
        )
    return classes


def sidecar_path(file: Path) -> Path:
    """DALI's index of a file: `a.idx` for `a.tar`, but `a.tfrecord-0-of-2.idx` for that shard."""
    if "-of-" in file.suffix:
        return file.with_name(f"{file.name}.idx")
    return file.with_suffix(".idx")
