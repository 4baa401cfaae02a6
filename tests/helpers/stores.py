"""Stores and decoders in the plainest form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def as_records(store: Any, folder: Path) -> Any:
    """The images of a store in the plainest record files there could be: one after the other, in two files."""
    from pipeline.stores.index import ROW
    from pipeline.stores.records import RecordStore

    rows, files = np.zeros(len(store), ROW), [folder / "0.records", folder / "1.records"]
    for name in ("label", "height", "width"):
        rows[name] = store.index[name]
    contents = [b"", b""]
    for i, data in enumerate(store.read_batch(np.arange(len(store)))):
        file = i // -(-len(store) // 2)
        rows["file"][i], rows["offset"][i], rows["bytes"][i] = file, len(contents[file]), len(data)
        contents[file] += data
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    return RecordStore(folder, files, rows, store.classes)


def decoder_of(name: str, store: Any, recipe: Any, threads: int = 2) -> Any:
    from pipeline import LoaderOptions
    from pipeline.decoders import open_decoder

    return open_decoder(store, recipe, LoaderOptions(batch_size=1, decoder=name, threads=threads))
