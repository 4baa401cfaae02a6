"""What a conversion reads: the `Source` protocol, image files, and record files.

`sources.py` opens a source by its path or URL; `staging.py` has the third kind of source.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..formats.record_store import RecordStore
from ..images import BadImage
from ..stores import join_names
from ..stores.image_files import check_folders, check_is_file

_MOST_BYTES = (1 << 31) - 1  # of an encoded image: the index has 31 bits for its size


class Source(Protocol):
    """Encoded images in a fixed order. Thread-safe."""

    classes: list[str]  # [] if the images have no labels
    labels: NDArray[np.int32]  # [n], -1 for none
    rejects: dict[str, str]  # what was left out when the source was opened, and why
    identity: str
    """A digest of names, labels and all else that is known before an image is read. It shows
    whether the source has changed."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """The encoded image.

        Raises:
            BadImage: It cannot be read.
            OSError: The source as a whole is out of reach.
        """

    def name(self, i: int) -> str:
        """What the source calls the image; the same on every machine."""


class FileSource:
    """Image files below a folder. No header is read: a conversion reads the whole files anyway."""

    def __init__(
        self,
        root: Path,
        paths: list[str],
        classes: list[str],
        labels: NDArray[np.int32],
        rejects: dict[str, str],
    ) -> None:
        self.root = root
        self.paths = paths
        self.classes = classes
        self.labels = labels
        self.rejects = rejects
        self.identity = digest(join_names(paths), join_names(classes), labels)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> bytes:
        path = os.path.join(self.root, self.paths[i])
        try:
            check_is_file(os.stat(path))
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if not fits_index(size):
                    raise BadImage(f"it has {size:,} bytes")
                return file.read()
        except OSError as error:
            check_folders(self.root, self.paths[i], error)
            raise BadImage(error.strerror or str(error)) from error

    def name(self, i: int) -> str:
        return self.paths[i]


class RecordSource:
    """The images of a record store.

    Args:
        store: The store.
        names: A digest of names that are not in the store's index, for the identity.
    """

    def __init__(self, store: RecordStore, names: str = "") -> None:
        self.store = store
        self.classes = store.classes
        self.rejects = store.rejects
        self.labels = store.index["label"].copy()
        places = (store.index[field].copy() for field in ("file", "offset", "bytes"))
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


def fits_index(size: int) -> bool:
    """Whether an encoded image of this many bytes can be entered in an index."""
    return size <= _MOST_BYTES


def digest(*parts: NDArray[Any]) -> str:
    """A digest of arrays, of 16 hexadecimal digits."""
    digests = (hashlib.sha256(part.tobytes()).digest() for part in parts)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]
