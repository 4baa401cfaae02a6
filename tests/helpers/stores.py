"""Stores and decoders in the simplest form."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import LoaderOptions, Recipe, Store
from pipeline.decoders import Boxes, Decoder, open_decoder
from pipeline.formats.index import ROW
from pipeline.formats.record_store import RecordStore
from pipeline.order import Samples


class FixedSizeStore(Store):
    """Images in memory. The index gives all of them the same size, whether or not it is true."""

    def __init__(self, images: list[bytes], height: int = 30, width: int = 41) -> None:
        self.images = images
        self.classes: list[str] = []
        self.rejects: dict[str, str] = {}
        columns = [("label", "i4"), ("height", "i4"), ("width", "i4")]
        self.index = np.zeros(len(images), dtype=columns)
        self.index["height"] = height
        self.index["width"] = width

    def __len__(self) -> int:
        return len(self.images)

    def read_batch(self, samples: Samples) -> list[bytes]:
        return [self.images[sample] for sample in samples]

    def name(self, sample: int) -> str:
        return f"image {sample}"


def as_records(store: Store, folder: Path) -> RecordStore:
    """The images of a store in the simplest record files: one after the other, in two files."""
    rows = np.zeros(len(store), ROW)
    for name in ("label", "height", "width"):
        rows[name] = store.index[name]
    files = [folder / "0.records", folder / "1.records"]
    contents = [b"", b""]
    images_per_file = -(-len(store) // 2)
    for i, data in enumerate(store.read_batch(np.arange(len(store)))):
        file = i // images_per_file
        rows["file"][i] = file
        rows["offset"][i] = len(contents[file])
        rows["bytes"][i] = len(data)
        contents[file] += data
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    return RecordStore(folder, files, rows, store.classes)


def decoder_of(
    name: str, store: Store, recipe: Recipe, threads: int = 2, **options: Any
) -> Decoder:
    """The decoder of that name for the images of a store."""
    return open_decoder(
        store, recipe, LoaderOptions(batch_size=1, decoder=name, threads=threads, **options)
    )


def whole_images(
    samples: Iterable[int], width: int = 41, height: int = 30
) -> tuple[Samples, Boxes]:
    """A batch of a decoder's plan: two views of each sample, both of the whole image."""
    indices = np.array(list(samples), dtype=np.int64)
    box = np.array([0, 0, width, height], np.float32)
    return indices, np.tile(box, (2, len(indices), 1))
