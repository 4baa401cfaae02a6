"""Where encoded images live: one file a format, all behind the `Store` protocol."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..images import BadImage, image_size
from ..order import Samples
from ..philox import philox

Progress = Callable[[int, int], None]  # done, total

_STREAM = 0x7370  # keeps these random numbers apart from those of `epoch_order` and `draw`


class Store(Protocol):
    """Encoded images by position. Immutable, picklable and thread-safe.

    One whose neighbours lie side by side on a disk can have `prefetch(first, last)` too (see `RecordStore`).
    """

    classes: list[str]  # [] where the images carry no labels
    index: NDArray[Any]  # structured [n]: label (-1 where there is none), height, width
    rejects: dict[str, str]  # what was left out when it was opened, and why

    def __len__(self) -> int: ...

    def read_batch(self, samples: Samples) -> list[bytes]:
        """The encoded images, in order; an empty one where a sample cannot be read (any more)."""

    def name(self, sample: int) -> str:
        """What a person would look for to find this sample: a path, or a file and a position in it."""


class MemoryStore:
    """Encoded images in memory, without labels; `names` (default: their positions) are what a person calls them.

    `BadImage` with the name of one that has no size.
    """

    def __init__(self, images: Sequence[bytes], names: Sequence[str] | None = None) -> None:
        self.images, self.names = (
            list(images),
            list(names or (f"image {i}" for i in range(len(images)))),
        )
        self.classes: list[str] = []
        self.rejects: dict[str, str] = {}
        self.index = np.full(
            len(images), -1, dtype=[("label", "i4"), ("height", "i4"), ("width", "i4")]
        )
        for row, data, name in zip(self.index, self.images, self.names, strict=True):
            try:
                row["height"], row["width"] = image_size(data)
            except BadImage as error:
                raise BadImage(f"{name}: {error}") from error

    def __len__(self) -> int:
        return len(self.images)

    def read_batch(self, samples: Samples) -> list[bytes]:
        return [self.images[sample] for sample in samples]

    def name(self, sample: int) -> str:
        return self.names[sample]


class Subset:
    """Some samples of another store, renumbered from 0."""

    def __init__(self, store: Store, samples: Samples) -> None:
        self.store, self.samples = store, samples
        self.classes, self.index, self.rejects = store.classes, store.index[samples], store.rejects

    def __len__(self) -> int:
        return len(self.samples)

    def read_batch(self, samples: Samples) -> list[bytes]:
        return self.store.read_batch(self.samples[samples])

    def name(self, sample: int) -> str:
        return self.store.name(int(self.samples[sample]))

    def prefetch(self, first: int, last: int) -> None:
        """Of the store, if it has that; with what lies between the samples: few are left out where this is called."""
        if hasattr(self.store, "prefetch"):
            self.store.prefetch(int(self.samples[first]), int(self.samples[last - 1]) + 1)


def hold_out(store: Store, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """`store` as (training, held out), split at random by `seed` alone; at least one sample is held out.

    ValueError where none is left to train on.
    """
    order, count = shuffled(len(store), seed), max(1, round(fraction * len(store)))
    if count >= len(store):
        raise ValueError(
            f"holding out {fraction:g} of {len(store)} images leaves none to train on: hold out fewer"
        )
    return Subset(store, np.sort(order[count:])), Subset(store, np.sort(order[:count]))


def random_subset(count: int, store: Store, seed: int = 0) -> Store:
    """`store`, or `count` of its samples at random."""
    return (
        store if len(store) <= count else Subset(store, np.sort(shuffled(len(store), seed)[:count]))
    )


def stratified_subset(store: Store, fraction: float, seed: int = 0) -> Subset:
    """A fraction of each class, at least one image, chosen by `seed` alone; a larger fraction holds a smaller one.

    ValueError where there are no labels, or for a fraction outside (0, 1].
    """
    check_labels(store)
    if not 0 < fraction <= 1:
        raise ValueError(
            f"a fraction of {fraction:g} of the labels: it must be above 0 and at most 1"
        )
    order = shuffled(len(store), seed)
    order = order[
        np.argsort(store.index["label"][order], kind="stable")
    ]  # by class, within it at random
    labels, firsts, counts = np.unique(
        store.index["label"][order], return_index=True, return_counts=True
    )
    taken = [
        order[first : first + max(1, round(fraction * int(count)))]
        for label, first, count in zip(labels, firsts, counts, strict=True)
    ]
    return Subset(store, np.sort(np.concatenate(taken)))


def with_classes(store: Store, classes: Sequence[str]) -> Subset:
    """`store` with the labels that its classes have, by name, among `classes`, of which it may lack some.

    ValueError where it has no labels, or images of a class that is not among `classes`.
    """
    check_labels(store)
    numbers, labels = {name: i for i, name in enumerate(classes)}, store.index["label"]
    unknown = [int(label) for label in np.unique(labels) if store.classes[label] not in numbers]
    if unknown:
        example = store.name(int(np.argmax(labels == unknown[0])))
        names = first_names([store.classes[label] for label in unknown])
        raise ValueError(
            f"{example}: the training data have no class {names}: take data whose classes they have"
        )
    renumbered = Subset(store, np.arange(len(store), dtype=np.int64))
    renumbered.classes = list(classes)
    renumbered.index["label"] = np.array([numbers.get(name, -1) for name in store.classes])[labels]
    return renumbered


def check_labels(store: Store) -> None:
    """ValueError where not every image has a label."""
    bare = np.flatnonzero(store.index["label"] < 0)
    if len(bare):
        first = (
            f"{store.name(int(bare[0]))} has none"
            + f", as {len(bare):,} of {len(store):,} images" * (len(bare) > 1)
        )
        remedy = "put the images into a sub-folder for each class, of two or more"
        raise ValueError(f"labels are needed, but {first}: {remedy}")


def first_names(names: Sequence[str]) -> str:
    """The first three of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def shuffled(n: int, seed: int) -> Samples:
    """range(n) in an order that `seed` alone decides."""
    words = philox(seed, np.arange(n), 0, 0, _STREAM << 16)
    return np.argsort(words[0] << np.uint64(32) | words[1], kind="stable")


def fingerprint(store: Store) -> str:
    """A digest of the number, labels and sizes of a store's images. Exchanged pixels of one size it does not see."""
    fields = (
        np.ascontiguousarray(store.index[name]).tobytes() for name in ("label", "height", "width")
    )
    return hashlib.sha256(b"".join(fields)).hexdigest()[:16]


def cache_folder() -> Path:
    """Where indexes and the embedded data set are kept between runs; TWINFEED_CACHE overrides it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TWINFEED_CACHE") or Path(base) / "twinfeed")


def join_names(names: Iterable[str]) -> NDArray[np.uint8]:
    """Names as an array that can be saved without pickling; undecodable bytes of file names survive."""
    return np.frombuffer(b"\0".join(os.fsencode(name) for name in names), dtype=np.uint8)


def split_names(joined: NDArray[np.uint8]) -> list[str]:
    """What `join_names` joined."""
    return [os.fsdecode(name) for name in joined.tobytes().split(b"\0")] if len(joined) else []
