"""Indexing record files that came without an index of ours: each file is read once.

The result is kept in the cache folder. If the folder can be written to, DALI's index ("sidecar") is
put beside each file that lacks one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..atomic_write import atomic_write
from ..images import BadImage, image_size
from ..stores import Progress, cache_folder, class_names, join_names, split_names
from .index import MOST_CLASSES, ROW, save_index, sidecar_path

_HEADER_BYTES = 16_384  # enough for the size of most images
_IMAGES_AT_A_TIME = 512  # handed to the threads
_LABEL_RULE = f"must be an integer from -1 to {MOST_CLASSES - 1}, or printable text"

Label = int | str | None  # a number or a name, as a file has it


class ScannedImage(NamedTuple):
    """An encoded image in a file."""

    name: str  # in the file
    offset: int
    bytes: int
    label: Label


class Scan(NamedTuple):
    """The content of one file."""

    images: list[ScannedImage]  # in the order of the file
    sidecar: str  # the text of DALI's index of the file; "" if DALI needs none
    rejects: dict[str, str] = {}  # name -> reason, of records without an image  # noqa: RUF012


class ScannedIndex(NamedTuple):
    """The index of all files of a data set."""

    rows: NDArray[Any]  # [n] of ROW, without checksums
    classes: list[str]
    rejects: dict[str, str]  # name -> reason


def index_files(
    path: Path, files: Sequence[Path], scan: Callable[[Path], Scan], progress: Progress
) -> ScannedIndex:
    """The index of the files at `path`, from the cache or by scanning each of them.

    Raises:
        ValueError: No image can be used, or a sidecar that exists does not describe its file.
    """
    path_digest = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    cache = cache_folder() / f"records-{path_digest}.npz"
    stamps = np.array(
        [(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files)],
        dtype=np.int64,
    )
    cached = _load(cache, files, stamps)
    if cached is not None:
        return cached

    parts: list[NDArray[Any]] = []
    labels: list[Label] = []
    rejects: dict[str, str] = {}
    # The threads mostly wait for the disk.
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        for number, file in enumerate(files):
            scanned = scan(file)
            _write_or_check_sidecar(file, scanned.sidecar)
            rows, images, bad_images = _usable_images(file, number, scanned, pool)
            parts.append(rows)
            labels += [image.label for image in images]
            prefix = "" if file == path else f"{file.name}: "
            for name, reason in {**scanned.rejects, **bad_images}.items():
                rejects[prefix + name] = reason
            progress(number + 1, len(files))

    index = np.concatenate(parts) if parts else np.zeros(0, dtype=ROW)
    if len(index) == 0:
        example = next((f"; the first, {name}: {reason}" for name, reason in rejects.items()), "")
        raise ValueError(f"{path} holds no image that can be used{example}")
    index["label"], classes = _number_labels(labels)
    result = ScannedIndex(index, classes, rejects)
    _save(cache, files, stamps, result)
    return result


def _load(cache: Path, files: Sequence[Path], stamps: NDArray[np.int64]) -> ScannedIndex | None:
    """The index in the cache; None if it is missing, damaged, or older than one of the files."""
    with suppress(Exception), open(cache, "rb") as file, np.load(file, allow_pickle=False) as saved:
        names = split_names(saved["files"])
        is_current = names == [file.name for file in files] and np.array_equal(
            saved["stamps"], stamps
        )
        if is_current and saved["rows"].dtype == ROW:
            rejects = zip(split_names(saved["rejects"]), split_names(saved["reasons"]), strict=True)
            return ScannedIndex(saved["rows"], split_names(saved["classes"]), dict(rejects))
    return None


def _save(
    cache: Path, files: Sequence[Path], stamps: NDArray[np.int64], index: ScannedIndex
) -> None:
    with suppress(OSError):  # with a read-only or full disk, the next run scans the files again
        save_index(
            cache,
            files,
            index.rows,
            stamps=stamps,
            classes=join_names(index.classes),
            rejects=join_names(index.rejects),
            reasons=join_names(index.rejects.values()),
        )


def _usable_images(
    file: Path, number: int, scanned: Scan, pool: ThreadPoolExecutor
) -> tuple[NDArray[Any], list[ScannedImage], dict[str, str]]:
    """Rows without labels of the images that can be used, those images, and the reasons of others.

    `number` is that of the file.
    """
    rows = np.zeros(len(scanned.images), dtype=ROW)
    usable: list[ScannedImage] = []
    rejects: dict[str, str] = {}
    sizes = _read_sizes(file, scanned.images, pool)
    for image, size in zip(scanned.images, sizes, strict=True):
        if isinstance(size, str):
            rejects[image.name] = size
            continue
        height, width = size
        rows[len(usable)] = (-1, height, width, number, image.offset, image.bytes, 0)
        usable.append(image)
    return rows[: len(usable)], usable, rejects


def _read_sizes(
    file: Path, images: Sequence[ScannedImage], pool: ThreadPoolExecutor
) -> Iterator[tuple[int, int] | str]:
    """The height and width of each image, or the reason why it cannot be used."""
    with open(file, "rb", buffering=0) as opened:

        def read_size(image: ScannedImage) -> tuple[int, int] | str:
            return _read_size(opened.fileno(), image)

        for first in range(0, len(images), _IMAGES_AT_A_TIME):
            yield from pool.map(read_size, images[first : first + _IMAGES_AT_A_TIME])


def _read_size(fd: int, image: ScannedImage) -> tuple[int, int] | str:
    if not _is_valid_label(image.label):
        return f"its label is {image.label!a:.60} ({_LABEL_RULE})"
    if image.bytes > np.iinfo(ROW["bytes"]).max:
        return f"it has {image.bytes:,} bytes (the limit is 2 GiB)"
    try:
        with suppress(BadImage):  # a long EXIF block or colour profile comes before the size
            return image_size(os.pread(fd, min(image.bytes, _HEADER_BYTES), image.offset))
        return image_size(os.pread(fd, image.bytes, image.offset))
    except (BadImage, OSError) as error:
        return str(error)


def _is_valid_label(label: Label) -> bool:
    if label is None:
        return True
    if isinstance(label, str):
        return label.isprintable()
    return -1 <= label < MOST_CLASSES


def _number_labels(labels: Sequence[Label]) -> tuple[list[int], list[str]]:
    """Labels as numbers, -1 for none, and the names of the classes."""
    if any(isinstance(label, str) for label in labels):
        classes = sorted({str(label) for label in labels if label is not None})
        number_of = {name: number for number, name in enumerate(classes)}
        return [-1 if label is None else number_of[str(label)] for label in labels], classes
    numbers = [-1 if label is None else int(label) for label in labels]
    return numbers, class_names(np.array(numbers))


def _write_or_check_sidecar(file: Path, text: str) -> None:
    """Write DALI's index of a file, or raise ValueError if there is one with another text."""
    if not text:  # a format that DALI has no reader for
        return
    sidecar = sidecar_path(file)
    if not sidecar.exists():
        # In a read-only folder, DALI's own reader has no index; ours needs none.
        with suppress(OSError), atomic_write(sidecar, concurrent=True) as opened:
            opened.write(text.encode())
    elif sidecar.read_bytes() != text.encode():
        raise ValueError(
            f"{sidecar} does not describe {file.name}: delete it; it will be recreated"
        )
