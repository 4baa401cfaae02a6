"""Parts of a store: held-out images, random and stratified subsets, listed images, other labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..order import Samples
from ..philox import philox
from .folder import FolderStore
from .store import Store

_LIST_REMEDY = "Give a text file with one image name per line"
_STREAM = 0x7370  # keeps these random numbers apart from those of `epoch_order` and `draw`


class Subset:
    """The given samples of another store, renumbered from 0."""

    def __init__(self, store: Store, samples: Samples) -> None:
        self.store = store
        self.samples = samples
        self.classes = store.classes
        self.index = store.index[samples]
        self.rejects = store.rejects

    def __len__(self) -> int:
        return len(self.samples)

    def read_batch(self, samples: Samples) -> list[bytes]:
        return self.store.read_batch(self.samples[samples])

    def name(self, sample: int) -> str:
        return self.store.name(int(self.samples[sample]))

    def prefetch(self, first: int, last: int) -> None:
        """Prefetch from the store, if it can, including the samples between those of the subset.

        Those are few in the subsets that are read in order: a held-out part is left out.
        """
        if hasattr(self.store, "prefetch"):
            self.store.prefetch(int(self.samples[first]), int(self.samples[last - 1]) + 1)


def hold_out(store: Store, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Split a store at random into (training set, held-out images), by `seed` alone.

    At least one image is held out.

    Raises:
        ValueError: No image is left to train on.
    """
    count = max(1, round(fraction * len(store)))
    if count >= len(store):
        raise ValueError(
            f"holding out {fraction:g} of {len(store)} images leaves none to train on: "
            "use a smaller --hold-out"
        )
    order = shuffled(len(store), seed)
    training = Subset(store, np.sort(order[count:]))
    held_out = Subset(store, np.sort(order[:count]))
    return training, held_out


def random_subset(count: int, store: Store, seed: int = 0) -> Store:
    """`count` samples of `store` at random; `store` itself if it has no more than that."""
    if len(store) <= count:
        return store
    return Subset(store, np.sort(shuffled(len(store), seed)[:count]))


def stratified_subset(store: Store, fraction: float, seed: int = 0) -> Subset:
    """The same fraction of each class, at least one image of each, chosen by `seed` alone.

    With the same seed, a larger fraction includes a smaller one.

    Raises:
        ValueError: An image has no label, or the fraction is not in (0, 1].
    """
    check_labels(store)
    if not 0 < fraction <= 1:
        raise ValueError(
            f"the fraction of labels is {fraction:g}: it must be above 0 and at most 1"
        )
    order = shuffled(len(store), seed)
    by_class = order[np.argsort(store.index["label"][order], kind="stable")]
    _, firsts, counts = np.unique(
        store.index["label"][by_class], return_index=True, return_counts=True
    )
    chosen = []
    for first, count in zip(firsts, counts, strict=True):
        keep = max(1, round(fraction * int(count)))
        chosen.append(by_class[first : first + keep])
    return Subset(store, np.sort(np.concatenate(chosen)))


def with_classes(store: Store, classes: Sequence[str]) -> Subset:
    """`store` with its labels renumbered, by the names of its classes, as in `classes`.

    `store` need not have images of all `classes`.

    Raises:
        ValueError: An image has no label, or its class is not among `classes`.
    """
    check_labels(store)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = store.index["label"]
    unknown = [int(label) for label in np.unique(labels) if store.classes[label] not in numbers]
    if unknown:
        example = store.name(int(np.argmax(labels == unknown[0])))
        names = first_names([store.classes[label] for label in unknown])
        raise ValueError(
            f"{example}: the test set has classes {names} that the training set lacks: "
            "remove them from the test set"
        )
    new_number = np.array([numbers.get(name, -1) for name in store.classes])
    renumbered = Subset(store, np.arange(len(store), dtype=np.int64))
    renumbered.classes = list(classes)
    renumbered.index["label"] = new_number[labels]
    return renumbered


def subset_from_list(store: Store, path: Path) -> Subset:
    """The samples that a list names, one a line.

    A line is a file name, as in SimCLR's lists (`n01440764_123.JPEG`), or a path in the folder.

    Raises:
        ValueError: The list cannot be read or is empty, a name is not in the folder or belongs to
            several images, or the store is not a folder.
    """
    names = _read_list(path)
    folder, positions = _folder_below(store)
    if folder is None:
        raise ValueError(
            f"{path} contains file names, which {store.name(0)} does not have: "
            "use the original image folder, or a fraction such as --labels 0.1"
        )
    sample_of: dict[str, int] = {}
    ambiguous: set[str] = set()
    for sample, position in enumerate(positions):
        own_path = folder.paths[position]
        for name in {own_path, os.path.basename(own_path)}:
            if name in sample_of:
                ambiguous.add(name)
            else:
                sample_of[name] = sample

    missing = [name for name in names if name not in sample_of]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of its {len(names)} names are not in {folder.root}: "
            f"{first_names(missing)}"
        )
    unclear = [name for name in names if name in ambiguous]
    if unclear:
        raise ValueError(
            f"{path}: {len(unclear)} of its {len(names)} names belong to several images in "
            f"{folder.root}; give paths relative to it: {first_names(unclear)}"
        )
    return Subset(store, np.unique([sample_of[name] for name in names]))


def _read_list(path: Path) -> list[str]:
    """The names in a list, each once, in the order of the list."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}. {_LIST_REMEDY}") from None
    text = text.removeprefix(b"\xef\xbb\xbf")  # the byte order mark, which Windows writes
    lines = [line.strip() for line in text.splitlines()]
    names = [os.fsdecode(line).replace("/", os.sep) for line in lines if line]
    if not names:
        raise ValueError(f"{path} is empty. {_LIST_REMEDY}")
    return list(dict.fromkeys(names))


def _folder_below(store: Store) -> tuple[FolderStore | None, Samples]:
    """The folder that `store` is a part of, if any, and the positions of its samples in it."""
    positions = np.arange(len(store), dtype=np.int64)
    while isinstance(store, Subset):
        positions = store.samples[positions]
        store = store.store
    return (store if isinstance(store, FolderStore) else None), positions


def check_labels(store: Store) -> None:
    """Raise ValueError unless every image has a label."""
    unlabeled = np.flatnonzero(store.index["label"] < 0)
    if len(unlabeled) == 0:
        return
    problem = f"{store.name(int(unlabeled[0]))} has no label"
    if len(unlabeled) > 1:
        problem += f" ({len(unlabeled):,} of {len(store):,} images have none)"
    raise ValueError(
        f"{problem}: put the images into one sub-folder per class (at least two classes)"
    )


def first_names(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    text = ", ".join(names[:3])
    if len(names) > 3:
        text += f" and {len(names) - 3} more"
    return text


def shuffled(n: int, seed: int) -> Samples:
    """range(n) in a random order that depends on `seed` alone."""
    words = philox(seed, np.arange(n), 0, 0, _STREAM << 16)
    return np.argsort(words[0] << np.uint64(32) | words[1], kind="stable")
