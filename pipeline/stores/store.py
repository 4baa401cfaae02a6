"""The `Store` protocol: encoded images by position, with their labels and sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..order import Samples

Progress = Callable[[int, int], None]  # done, total


class Store(Protocol):
    """Encoded images by position. Immutable, picklable and thread-safe.

    A store that keeps consecutive samples side by side on a disk can also have
    `prefetch(first, last)`; see `RecordStore`.
    """

    classes: list[str]  # [] if the images carry no labels
    index: NDArray[Any]  # structured [n]: label (-1 for none), height, width
    rejects: dict[str, str]  # name -> reason, of images left out when the store was opened

    def __len__(self) -> int: ...

    def read_batch(self, samples: Samples) -> list[bytes]:
        """Read encoded images, in order; b"" for a sample that cannot be read (any more)."""

    def name(self, sample: int) -> str:
        """The name under which a person finds a sample: a path, or a file and a place in it."""


def no_progress(done: int, total: int) -> None:
    """The `Progress` that reports nothing."""


def class_names(labels: NDArray[Any]) -> list[str]:
    """Names for classes that have only numbers: the numbers. [] if no image has a label."""
    highest = int(labels.max(initial=-1))
    return [str(number) for number in range(highest + 1)]


def fingerprint(store: Store) -> str:
    """A digest of the number, labels and sizes of a store's images.

    It does not cover their pixels: an image that is replaced by one of equal size goes unnoticed.
    """
    digest = hashlib.sha256()
    for field in ("label", "height", "width"):
        digest.update(np.ascontiguousarray(store.index[field]).tobytes())
    return digest.hexdigest()[:16]
