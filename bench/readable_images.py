"""Damaged images: which ones the benchmark leaves to the loader, and which ones it leaves out.

A loader replaces images that do not decode, and the stages measure that like any other image. But
rooflines and peers have no such repair, so they get only images that decode.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiment import Console
from pipeline import BadImage, Store, Subset
from pipeline.images import decode, image_size


def without_unreadable(store: Store, console: Console) -> Store:
    """Leave out the images that have become unreadable since they were indexed."""
    reasons: dict[int, str] = {}
    for sample, data in enumerate(store.read_batch(np.arange(len(store)))):
        try:
            image_size(data)
        except BadImage as error:
            reasons[sample] = str(error)
    if not reasons:
        return store
    console.print_rejects("left out", {store.name(i): why for i, why in reasons.items()})
    readable = np.delete(np.arange(len(store)), list(reasons))
    return Subset(store, readable)


def decodable_images(encoded: Sequence[bytes], store: Store) -> list[bytes]:
    """The images that decode, among `encoded`, the first images of `store`."""
    sizes = zip(store.index["height"], store.index["width"], strict=True)
    return [
        data
        for data, (height, width) in zip(encoded, sizes, strict=False)
        if _decodes(data, int(height), int(width))
    ]


def _decodes(data: bytes, height: int, width: int) -> bool:
    try:
        decode(data, height, width)
    except BadImage:
        return False
    return True
