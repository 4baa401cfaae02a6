"""Encoded images that are already in memory, as a store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..images import BadImage, image_size
from ..order import Samples
from .store import class_names

_ROW = np.dtype([("label", "i4"), ("height", "i4"), ("width", "i4")])


class MemoryStore:
    """Encoded images in memory.

    Args:
        images: Encoded images, e.g. from `encoded_bytes`.
        names: Their names in messages and results; by default their positions.
        labels: Their classes by number, -1 for none; by default no image has a label.

    Raises:
        BadImage: An image has no readable size; the message holds its name.
    """

    def __init__(
        self,
        images: Sequence[bytes],
        names: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.images = list(images)
        self.names = list(names or (f"image {i}" for i in range(len(images))))
        self.rejects: dict[str, str] = {}

        self.index = np.full(len(images), -1, dtype=_ROW)
        if labels is not None:
            self.index["label"] = labels
        self.classes = class_names(self.index["label"])
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
