"""Copies images that can be read only once, or only over a network, to a staging file.

From there they are read at random, in the shuffled order of a conversion. The file is called
`spool`: for each image its name, then its bytes. When it is complete, `spool.npz` is written beside
it, with the places of the images, their labels, and the identity of what was copied, so that a
conversion that is resumed does not copy again.
"""

from __future__ import annotations

import hashlib
import operator
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ..formats.index import ROW, save_index
from ..formats.record_store import RecordStore
from ..formats.scanning import Label
from ..stores import Progress, class_names, join_names, no_progress, split_names
from .source_types import RecordSource, Source, fits_index

_MOST_CLASSES = 1 << 20  # without names: larger numbers are no classes, but identifiers
_IMAGES_BETWEEN_REPORTS = 256
_BUFFER_BYTES = 1 << 20


class Item(NamedTuple):
    """An image as it comes."""

    name: str
    image: bytes | str  # encoded; or, as a str, the reason why there is none
    label: Label


class StagedSource(RecordSource):
    """The images of a staging file."""

    def name(self, i: int) -> str:
        start = 0
        if i > 0:
            offset, size = self.store.index[i - 1][["offset", "bytes"]].item()
            start = offset + size
        end = int(self.store.index[i]["offset"])
        with open(self.store.path, "rb") as file:
            file.seek(start)
            return os.fsdecode(file.read(end - start))


class LabelNumbering:
    """Numbers the labels of a data set, image by image.

    If its classes are known, a label is the name of a class or its number. If not, all labels have
    to be numbers, which are kept, or all have to be names, which are collected.
    """

    def __init__(self, classes: list[str]) -> None:
        """`classes` may be filled until the first label comes."""
        self._classes = classes
        self._known: dict[str, int] = {}  # by name, from `classes`
        self._collected: dict[str, int] = {}  # by name, in the order in which they came
        self._has_numbers = False

    def number(self, image: str, label: object) -> int:
        """The number of a label, -1 for None.

        Raises:
            ValueError: It is no label; the message begins with the name of the image.
        """
        number: int | None = None
        if label is None:
            number = -1
        elif isinstance(label, str):
            number = self._number_of_name(label)
        elif isinstance(label, int | np.integer):
            number = self._check_number(int(label))
        if number is None:
            if self._classes:
                rule = f"be class numbers from 0 to {len(self._classes) - 1}, or class names"
            else:
                rule = f"all be integers from 0 to {_MOST_CLASSES - 1}, or all be names"
            raise ValueError(
                f"{image} has the label {label!r}: labels must {rule}; None means no label"
            )
        return number

    def _number_of_name(self, name: str) -> int | None:
        if self._has_numbers and not self._classes:
            return None
        if self._classes and not self._collected:
            if not self._known:
                self._known = {known: number for number, known in enumerate(self._classes)}
            return self._known.get(name)
        return self._collected.setdefault(name, len(self._collected))

    def _check_number(self, number: int) -> int | None:
        if self._collected:
            return None
        self._has_numbers = True
        most = len(self._classes) or _MOST_CLASSES
        return number if 0 <= number < most else None

    def finish(self, labels: NDArray[np.int32]) -> tuple[list[str], NDArray[np.int32]]:
        """The names of the classes, and all labels with their final numbers.

        Collected names are numbered alphabetically, as those of a folder of images are.
        """
        if not self._collected:
            return self._classes or class_names(labels), labels
        classes = sorted(self._collected)
        final = {name: number for number, name in enumerate(classes)}
        final_by_number = np.array([final[name] for name in self._collected], dtype=np.int32)
        final_labels = labels.copy()
        is_labelled = labels >= 0
        final_labels[is_labelled] = final_by_number[labels[is_labelled]]
        return classes, final_labels


def stage_images(
    images: Iterable[tuple[bytes, Label]],
    classes: Sequence[str],
    scratch: Path,
    identity: str = "",
    progress: Progress = no_progress,
) -> Source:
    """Encoded images with labels, read once; 50 bytes an image stay in memory.

    Args:
        images: Pairs of an encoded image and its label: a number, a name, or None.
        classes: Names of the classes. Empty: the labels are numbers, or any names.
        scratch: Folder of the staging file.
        identity: If given, a complete staging file of this identity in `scratch` is used again,
            and `images` is not read.
        progress: Called with the number of images so far, and of all.

    Raises:
        ValueError: A label is something else, or no image can be used.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    items = (Item(f"image {i}", image, label) for i, (image, label) in enumerate(images))
    total = operator.length_hint(images)
    return stage(items, list(classes), scratch, identity, progress, total)


def stage(
    items: Iterable[Item],
    classes: list[str],
    scratch: Path,
    identity: str,
    progress: Progress,
    total: int = 0,
) -> Source:
    """Images copied to the folder `scratch`, unless a complete copy of `identity` is there.

    The iterator that makes `items` may fill `classes` before it yields the first one.
    """
    file = scratch / "spool"
    index = scratch / "spool.npz"
    staged = _load_staged(file, index, identity)
    if staged is not None:
        return staged

    index.unlink(missing_ok=True)
    numbering = LabelNumbering(classes)
    count = 0
    with open(file, "wb", buffering=_BUFFER_BYTES) as out:
        copy = _Copy(out, numbering)
        for count, item in enumerate(items, 1):
            if count % _IMAGES_BETWEEN_REPORTS == 0:
                progress(count, max(count, total))
            copy.add(item)
        out.flush()
        os.fsync(out.fileno())
    progress(count, count)
    if not len(copy):
        raise ValueError(_describe_empty(identity, copy.rejects))

    rows = copy.rows()
    final_classes, rows["label"] = numbering.finish(rows["label"])
    texts: dict[str, Iterable[str]] = {
        "about": [identity, copy.names_digest()],
        "classes": final_classes,
        "rejects": copy.rejects,
        "reasons": copy.rejects.values(),
    }
    save_index(index, [file], rows, **{key: join_names(text) for key, text in texts.items()})
    store = RecordStore(file, [file], rows, final_classes, copy.rejects)
    return StagedSource(store, copy.names_digest())


def _load_staged(file: Path, index: Path, identity: str) -> StagedSource | None:
    """The images of a complete staging file of this identity; None if there is none."""
    with (
        suppress(Exception),  # of a damaged index: the file is made again
        open(index, "rb") as opened,
        np.load(opened, allow_pickle=False) as saved,
    ):
        saved_identity, names_digest = split_names(saved["about"])
        is_complete = saved["sizes"].tolist() == [file.stat().st_size]
        if identity and saved_identity == identity and is_complete:
            names = split_names(saved["rejects"])
            reasons = split_names(saved["reasons"])
            rejects = dict(zip(names, reasons, strict=True))
            classes = split_names(saved["classes"])
            store = RecordStore(file, [file], saved["rows"], classes, rejects)
            return StagedSource(store, names_digest)
    return None


class _Copy:
    """The part of a staging file that is written: where each image is, and its label."""

    def __init__(self, out: Any, numbering: LabelNumbering) -> None:
        self.rejects: dict[str, str] = {}
        self._out = out
        self._numbering = numbering
        self._end = 0
        self._offsets = array("q")
        self._sizes = array("i")
        self._labels = array("i")
        self._names = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, item: Item) -> None:
        name, image, label = item
        if isinstance(image, str):
            self._reject(name, image)
            return
        if not image or not fits_index(len(image)):
            self._reject(name, "it is empty, or 2 GiB or larger")
            return
        self._labels.append(self._numbering.number(name, label))
        encoded_name = os.fsencode(name)
        # The images are part of the digest since they are all read anyway.
        self._names.update(encoded_name + b"\0%d," % google_crc32c.value(image))
        offset = self._end + len(encoded_name)
        self._out.write(encoded_name)
        self._out.write(image)
        self._offsets.append(offset)
        self._sizes.append(len(image))
        self._end = offset + len(image)

    def names_digest(self) -> str:
        """A digest of all names and checksums."""
        return self._names.hexdigest()

    def rows(self) -> NDArray[Any]:
        """The rows of the index."""
        rows = np.zeros(len(self), dtype=ROW)
        rows["label"] = self._labels
        rows["offset"] = self._offsets
        rows["bytes"] = self._sizes
        return rows

    def _reject(self, name: str, reason: str) -> None:
        self.rejects[name.replace("\0", "")] = reason  # \0 separates names in the index


def _describe_empty(identity: str, rejects: Mapping[str, str]) -> str:
    source = identity.partition("\n")[0] or "the source"
    message = f"{source} holds no image that can be used"
    if not rejects:
        return message
    name, reason = next(iter(rejects.items()))
    return f"{message}; the first, {name}: {reason}"
