"""Where each image lies in files of records, and what is said about them.

The index is written beside the data (`<path>.index.npz`); for files of others it is made by reading them once, and kept
in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..files import atomic_write
from ..images import BadImage, image_size
from ..stores import Progress, cache_folder, join_names, split_names

ROW = np.dtype(
    [
        ("label", "<i4"),  # -1 where there is none
        ("height", "<i4"),
        ("width", "<i4"),
        ("file", "<i4"),  # number of the file
        ("offset", "<i8"),  # of the encoded image in it
        ("bytes", "<i4"),
        ("checksum", "<u4"),  # CRC-32C of the encoded image; 0 where `checksums` is False
    ]
)
MOST_CLASSES = 1 << 20  # a name is made for each: a damaged label must not fill the memory
_HEADER_BYTES = 16_384  # enough for the size of most images
_PROBES = 512  # images handed to the threads at a time


class Found(NamedTuple):
    """An encoded image in a file, as a scan of the file finds it."""

    name: str  # what the file calls it
    offset: int
    bytes: int
    label: int | str | None  # a number or a name, as the file has it


class Scan(NamedTuple):
    """What a file holds, in its order, and the text of the index that DALI's reader wants for it."""

    found: list[Found]
    sidecar: str
    rejects: dict[str, str] = {}  # name -> reason, of records that hold no image  # noqa: RUF012


def index_path(path: Path) -> Path:
    """Where the index of the data at `path` is kept: beside them."""
    return path.with_name(path.name + ".index.npz")


def save_index(to: Path, files: Sequence[Path], index: NDArray[Any], **more: Any) -> None:
    """Write the index of `files` atomically."""
    to.parent.mkdir(parents=True, exist_ok=True)
    names: Any = join_names(file.name for file in files)
    with atomic_write(to, concurrent=True) as file:
        np.savez(file, rows=index, files=names, sizes=_sizes(files), **more)


def load_index(path: Path, files: Sequence[Path]) -> NDArray[Any] | None:
    """The index that was written with the data at `path`; None where there is none.

    ValueError where it is damaged, or does not belong to `files`: something is missing, or was exchanged.
    """
    beside = index_path(path)
    if not beside.exists():
        return None
    remedy = f"; restore what is missing, or delete {beside} to use what is there"
    try:
        with open(beside, "rb") as file, np.load(file, allow_pickle=False) as saved:
            rows, names, sizes = saved["rows"], split_names(saved["files"]), saved["sizes"]
    except Exception as error:
        raise ValueError(f"{beside} is damaged ({error}): delete it, it is made again") from error
    present = {file.name: file for file in files}
    for name, size in zip(names, sizes, strict=True):
        if name not in present:
            raise ValueError(f"{path} lacks {name}{remedy}")
        if present[name].stat().st_size != size:
            raise ValueError(
                f"{present[name]} has {present[name].stat().st_size} bytes instead of {size}{remedy}"
            )
    if len(names) != len(files) or [file.name for file in files] != names:
        extra = sorted(present.keys() - set(names))
        raise ValueError(
            f"{path} holds {', '.join(extra[:3])}, which its index does not know{remedy}"
        )
    check_index(rows, sizes, beside)
    return rows


def check_index(rows: NDArray[Any], sizes: NDArray[Any], source: Path) -> None:
    """ValueError where a row of the index points outside of its file: no reader ever sees it then."""
    if rows.dtype != ROW or rows.ndim != 1:
        raise ValueError(f"{source} is no index of ours: delete it, it is made again")
    good = (
        (rows["file"] >= 0)
        & (rows["file"] < len(sizes))
        & (rows["bytes"] > 0)
        & (rows["offset"] >= 0)
    )
    good[good] &= (
        rows["offset"][good] <= np.asarray(sizes)[rows["file"][good]] - rows["bytes"][good]
    )
    good &= (rows["height"] > 0) & (rows["width"] > 0) & (rows["label"] >= -1)
    if not good.all():
        bad = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"{source}: sample {bad} is said to lie outside of its file: the file or its index is damaged"
        )


def index_files(
    path: Path, files: Sequence[Path], scan: Callable[[Path], Scan], progress: Progress
) -> tuple[NDArray[Any], list[str], dict[str, str]]:
    """Rows (of ROW, without checksums), classes and rejects of files that have no index of ours; kept in the cache.

    Each file is read once, and DALI's sidecar written beside it where it lacks one and the folder may be written to.
    ValueError where a sidecar is there and says something else.
    """
    cache = (
        cache_folder()
        / f"records-{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]}.npz"
    )
    stamps = np.array(
        [(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files)],
        dtype=np.int64,
    )
    with (
        suppress(Exception),
        open(cache, "rb") as shortcut,
        np.load(shortcut, allow_pickle=False) as saved,
    ):
        names = split_names(saved["files"])
        if (
            names == [f.name for f in files]
            and np.array_equal(saved["stamps"], stamps)
            and saved["rows"].dtype == ROW
        ):
            rejected = dict(
                zip(split_names(saved["rejects"]), split_names(saved["reasons"]), strict=True)
            )
            return saved["rows"], split_names(saved["classes"]), rejected
    parts: list[NDArray[Any]] = []
    labels: list[int | str | None] = []
    rejects: dict[str, str] = {}
    with ThreadPoolExecutor(
        min(32, 4 * (os.cpu_count() or 1))
    ) as pool:  # waits for the disk, mostly
        for number, file in enumerate(files):
            scanned = scan(file)
            _settle_sidecar(file, scanned.sidecar)
            where = "" if file == path else f"{file.name}: "
            rejects |= {where + name: reason for name, reason in scanned.rejects.items()}
            rows, good = (
                np.zeros(len(scanned.found), dtype=ROW),
                np.ones(len(scanned.found), dtype=bool),
            )
            for i, (found, size) in enumerate(
                zip(scanned.found, _image_sizes(file, scanned.found, pool), strict=True)
            ):
                if isinstance(size, str):
                    rejects[where + found.name] = size
                    good[i] = False
                else:
                    rows[i] = (-1, *size, number, found.offset, found.bytes, 0)
            parts.append(rows[good])
            labels += [found.label for found, kept in zip(scanned.found, good, strict=True) if kept]
            progress(number + 1, len(files))
    index = np.concatenate(parts) if parts else np.zeros(0, dtype=ROW)
    if not len(index):
        first = next((f"; the first, {name}: {reason}" for name, reason in rejects.items()), "")
        raise ValueError(f"{path} holds no image that can be used{first}")
    index["label"], classes = _numbered(labels)
    with suppress(OSError):  # a read-only or full disk costs a new scan the next time, not this run
        more = {
            "classes": join_names(classes),
            "rejects": join_names(rejects),
            "reasons": join_names(rejects.values()),
        }
        save_index(cache, files, index, stamps=stamps, **more)
    return index, classes, rejects


def class_names(labels: NDArray[Any]) -> list[str]:
    """Names for the classes of a file that has numbers only: the numbers."""
    return [str(number) for number in range(int(labels.max(initial=-1)) + 1)]


def _numbered(labels: Sequence[int | str | None]) -> tuple[list[int], list[str]]:
    """Labels as numbers (-1 for none), and the names of the classes."""
    if any(isinstance(label, str) for label in labels):
        classes = sorted({str(label) for label in labels if label is not None})
        numbers = {name: number for number, name in enumerate(classes)}
        return [-1 if label is None else numbers[str(label)] for label in labels], classes
    whole = [-1 if label is None else int(label) for label in labels]
    return whole, class_names(np.array(whole))


def _image_sizes(
    file: Path, found: Sequence[Found], pool: ThreadPoolExecutor
) -> Iterator[tuple[int, int] | str]:
    """Height and width of each, or why it has none."""

    def size(image: Found) -> tuple[int, int] | str:
        label = image.label or 0
        if not (label.isprintable() if isinstance(label, str) else -1 <= label < MOST_CLASSES):
            return f"its label is {label!a:.60}"
        if image.bytes > np.iinfo(ROW["bytes"]).max:
            return f"it has {image.bytes:,} bytes"
        head = os.pread(opened.fileno(), min(image.bytes, _HEADER_BYTES), image.offset)
        try:
            try:
                return image_size(head)
            except BadImage:  # a long EXIF or colour profile stands before the size
                return image_size(os.pread(opened.fileno(), image.bytes, image.offset))
        except (BadImage, OSError) as error:
            return str(error)

    with open(file, "rb", buffering=0) as opened:
        for first in range(0, len(found), _PROBES):
            yield from pool.map(size, found[first : first + _PROBES])


def naturally(file: Path) -> list[Any]:
    """Sorts names as people do, 9 before 10."""
    return [
        int(part) if odd % 2 else part for odd, part in enumerate(re.split("([0-9]+)", file.name))
    ]


def sidecar_path(file: Path) -> Path:
    """Where DALI's index of a file is kept: `a.tar` -> `a.idx`, `a.tfrecord-0-of-2` -> `a.tfrecord-0-of-2.idx`."""
    return file.with_name(f"{file.name}.idx") if "-of-" in file.suffix else file.with_suffix(".idx")


def _settle_sidecar(file: Path, text: str) -> None:
    beside = sidecar_path(file)
    if not text:  # a format that DALI has no reader for
        return
    if not beside.exists():
        with suppress(OSError):  # read-only: DALI's own reader then has none, ours needs none
            with atomic_write(beside, concurrent=True) as sidecar:
                sidecar.write(text.encode())
    elif beside.read_bytes() != text.encode():
        raise ValueError(f"{beside} does not describe {file.name}: delete it, it is made again")


def _sizes(files: Sequence[Path]) -> NDArray[np.int64]:
    return np.array([file.stat().st_size for file in files], dtype=np.int64)


def read_description(path: Path) -> dict[str, Any]:
    """What was written about the data at `path` when they were converted (`<path>.json`); {} where nothing was."""
    beside = path.with_name(path.name + ".json")
    if not beside.exists():
        return {}
    try:
        said = json.loads(beside.read_text())
        if not isinstance(said, dict) or not all(
            isinstance(name, str) for name in said.get("classes", [])
        ):
            raise ValueError("not what convert.py writes")
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{beside} is damaged ({error}): restore or delete it") from error
    return said


def check_classes(path: Path, classes: list[str] | None, rows: NDArray[Any]) -> list[str]:
    """The names of the classes, made from the numbers where there are none; ValueError where a label has no name."""
    numbers = class_names(rows["label"])
    if classes is None or not numbers:
        return numbers
    if len(numbers) > len(classes):
        raise ValueError(
            f"{path} has the label {len(numbers) - 1}, but {path}.json names {len(classes)} classes"
        )
    return classes
