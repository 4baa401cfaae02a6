"""Where encoded images live: one file a format, all behind the `Store` protocol."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

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
        raise ValueError(f"holding out {fraction:g} of {len(store)} images leaves none to train on: hold out fewer")
    return Subset(store, np.sort(order[count:])), Subset(store, np.sort(order[:count]))


def at_most(count: int, store: Store, seed: int = 0) -> Store:
    """`store`, or `count` of its samples at random."""
    return store if len(store) <= count else Subset(store, np.sort(shuffled(len(store), seed)[:count]))


def shuffled(n: int, seed: int) -> Samples:
    """range(n) in an order that `seed` alone decides."""
    words = philox(seed, np.arange(n), 0, 0, _STREAM << 16)
    return np.argsort(words[0] << np.uint64(32) | words[1], kind="stable")


def fingerprint(store: Store) -> str:
    """A digest of the number, labels and sizes of a store's images. Exchanged pixels of one size it does not see."""
    fields = (np.ascontiguousarray(store.index[name]).tobytes() for name in ("label", "height", "width"))
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
