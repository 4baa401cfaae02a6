"""Encoded images to convert, as whoever converts them sees them; and the spool, for what can be read only once."""

from __future__ import annotations

import hashlib
import operator
import os
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ..formats.index import ROW, class_names, save_index
from ..formats.record_store import RecordStore
from ..images import BadImage
from ..stores import Progress, join_names, split_names
from ..stores.folder import check_folders, check_kind

Label = int | str | None
Item = tuple[str, bytes | str, Label]  # name; the encoded image, or why there is none; label

_MOST_CLASSES = 1 << 20  # without names: larger numbers are no classes, but identifiers


class Source(Protocol):
    """Encoded images in a fixed order. Thread-safe."""

    classes: list[str]  # [] where the images carry no labels
    labels: NDArray[np.int32]  # [n], -1 where there is none
    rejects: dict[str, str]  # what was left out when it was opened, and why
    identity: str  # a digest of names, labels and what more is known unread: it tells whether the source has changed

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """The encoded image; `BadImage` where it cannot be read, OSError where the whole source is out of reach."""

    def name(self, i: int) -> str:
        """What the source calls it, on every machine."""


class Files:
    """Files below `root`. No header is read: whoever converts them reads them whole anyway."""

    def __init__(
        self,
        root: Path,
        paths: list[str],
        classes: list[str],
        labels: NDArray[np.int32],
        rejects: dict[str, str],
    ) -> None:
        self.root, self.paths, self.classes, self.labels, self.rejects = (
            root,
            paths,
            classes,
            labels,
            rejects,
        )
        self.identity = digest(join_names(paths), join_names(classes), labels)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> bytes:
        try:
            check_kind(os.stat(path := os.path.join(self.root, self.paths[i])))
            with open(path, "rb") as file:
                if (size := os.fstat(file.fileno()).st_size) >= 1 << 31:
                    raise BadImage(f"it has {size:,} bytes")
                return file.read()
        except OSError as error:
            check_folders(self.root, self.paths[i], error)
            raise BadImage(error.strerror or str(error)) from error

    def name(self, i: int) -> str:
        return self.paths[i]


class Records:
    """A data set of ours. `names` stands for names that its index does not hold."""

    def __init__(self, store: RecordStore, names: str = "") -> None:
        self.store, self.classes, self.rejects = store, store.classes, store.rejects
        self.labels, *places = (
            store.index[field].copy() for field in ("label", "file", "offset", "bytes")
        )
        self.identity = digest(join_names([names]), join_names(self.classes), self.labels, *places)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> bytes:
        (image,) = self.store.read_batch(np.array([i]))
        if not image:
            raise BadImage("it cannot be read")
        return image

    def name(self, i: int) -> str:
        return os.path.relpath(self.store.name(i), self.store.path.parent)


def digest(*parts: NDArray[Any]) -> str:
    return hashlib.sha256(
        b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)
    ).hexdigest()[:16]


class Spooled(Records):
    """Names and encoded images by turns in the file `spool`; beside it `spool.npz`, written when it is complete."""

    def name(self, i: int) -> str:
        start = sum(self.store.index[i - 1][["offset", "bytes"]].item()) if i else 0
        with open(self.store.path, "rb") as file:
            file.seek(start)
            return os.fsdecode(file.read(int(self.store.index[i]["offset"]) - start))


def spool(
    items: Iterable[Item],
    classes: list[str],
    scratch: Path,
    identity: str,
    progress: Progress,
    total: int = 0,
) -> Source:
    """`items`, copied unless they have been. Whatever makes them may fill `classes` before it gives the first."""
    file, index = scratch / "spool", scratch / "spool.npz"
    with (
        suppress(Exception),
        open(index, "rb") as told,
        np.load(told, allow_pickle=False) as saved,
    ):  # damaged, it is made again
        about, known, rejected, why = (
            split_names(saved[key]) for key in ("about", "classes", "rejects", "reasons")
        )
        if identity and about[0] == identity and saved["sizes"].tolist() == [file.stat().st_size]:
            rejects = dict(zip(rejected, why, strict=True))
            return Spooled(RecordStore(file, [file], saved["rows"], known, rejects), about[1])
    index.unlink(missing_ok=True)
    offsets, sizes, labels, rejects, numbers = (
        array("q"),
        array("i"),
        array("i"),
        {},
        dict[Any, int](),
    )
    names, at, seen = hashlib.sha256(), 0, 0
    with open(file, "wb", buffering=1 << 20) as out:
        for seen, (name, image, label) in enumerate(items, 1):
            if seen % 256 == 0:
                progress(seen, max(seen, total))
            if isinstance(image, str) or not 0 < len(image or b"") < 1 << 31:
                rejects[name.replace("\0", "")] = (
                    image if isinstance(image, str) else "it is empty, or has 2 GiB"
                )
                continue
            labels.append(_number(name, label, classes, numbers))
            called = os.fsencode(name)
            names.update(called + b"\0%d," % google_crc32c.value(image))  # it is all read anyway
            offsets.append(at + out.write(called))
            sizes.append(out.write(image))
            at = offsets[-1] + sizes[-1]
        out.flush()
        os.fsync(out.fileno())
    progress(seen, seen)
    if not sizes:
        first = next((f"; the first, {name}: {reason}" for name, reason in rejects.items()), "")
        raise ValueError(
            f"{identity.partition(chr(10))[0] or 'the source'} holds no image that can be used{first}"
        )
    rows = np.zeros(len(sizes), dtype=ROW)
    rows["label"], rows["offset"], rows["bytes"] = labels, offsets, sizes
    if not classes and (classes := sorted(name for name in numbers if isinstance(name, str))):
        place = {text: number for number, text in enumerate(classes)}
        rows["label"] = np.array([*(place[text] for text in numbers), -1])[
            rows["label"]
        ]  # numbered as they came
    classes = classes or class_names(rows["label"])
    about = [identity, names.hexdigest()]
    texts = {"about": about, "classes": classes, "rejects": rejects, "reasons": rejects.values()}
    save_index(index, [file], rows, **{key: join_names(some) for key, some in texts.items()})
    return Spooled(RecordStore(file, [file], rows, classes, rejects), about[1])


def _number(name: str, label: Any, classes: list[str], numbers: dict[Any, int]) -> int:
    """The number of a label. `numbers` has those of `classes` and their numbers, or of what came so far."""
    if label is None:
        return -1
    if classes and not numbers:
        numbers.update(
            (known, number) for number, text in enumerate(classes) for known in (text, number)
        )
    if (
        isinstance(label, int | np.integer)
        and not classes
        and type(next(iter(numbers), 0)) is not str
    ):
        numbers.setdefault(label, int(label))
    if isinstance(label, str) and not classes and type(next(iter(numbers), "")) is str:
        numbers.setdefault(label, len(numbers))
    number = numbers.get(label, -1) if isinstance(label, str | int | np.integer) else -1
    if not 0 <= number < _MOST_CLASSES:
        known = "known" if classes else "all of them"
        raise ValueError(
            f"{name} has the label {label!r}: labels are {known} numbers from 0 on, or names, or None"
        )
    return number


def spooled(
    images: Iterable[tuple[bytes, Label]],
    classes: Sequence[str],
    scratch: Path,
    identity: str = "",
    progress: Progress = lambda done, total: None,
) -> Source:
    """Encoded images with labels, read once; 50 bytes an image stay in memory.

    Labels are numbers, or names: of `classes`, or, where it is empty, of whatever comes. Where `identity` is given, a
    complete spool of this identity in `scratch` is used again, and `images` not read. ValueError for other labels.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    items = ((f"image {i}", image, label) for i, (image, label) in enumerate(images))
    return spool(items, list(classes), scratch, identity, progress, operator.length_hint(images))
