"""Sources of conversions: a few JPEGs, parquet files, and a record format that is easy to make."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import no_progress
from pipeline.conversion.source_types import Source
from pipeline.conversion.sources import open_source
from pipeline.formats.index import ROW
from pipeline.formats.record_store import RecordStore
from tests.helpers.images import encoded, picture

JPEGS = [encoded(picture(12 + i, 9, seed=i), quality=80) for i in range(7)]


def open_quietly(spec: str | Path, scratch: Path) -> Source:
    return open_source(spec, no_progress, scratch)


def contents_of(source: Source) -> list[tuple[str, bytes, str | None]]:
    """Name, image and class of each image; read by two threads, which must not interfere."""
    with ThreadPoolExecutor(2) as pool:
        images = list(pool.map(source.read, range(len(source))))
    classes = [source.classes[label] if label >= 0 else None for label in source.labels]
    assert source.labels.dtype == np.int32
    return [(source.name(i), images[i], classes[i]) for i in range(len(source))]


def fail(*_: Any, **__: Any) -> Any:
    """Takes the place of a function that must not be called."""
    raise AssertionError("this must not be called")


class JpegLines:
    """A format in place of a real one: JPEGs one after the other in `.tar` files.

    A label is the number of the file; `<path>.json` may have names for them.
    """

    SUFFIX = ".tar"

    def files(self, path: Path) -> list[Path]:
        return [path] if path.suffix == ".tar" and path.is_file() else sorted(path.glob("*.tar"))

    def open(self, path: Path, progress: object) -> RecordStore:
        files = self.files(path)
        rows = []
        for number, file in enumerate(files):
            data = file.read_bytes()
            starts = [i for i in range(len(data)) if data[i:].startswith(b"\xff\xd8\xff")]
            ends = [*starts[1:], len(data)]
            for start, end in zip(starts, ends, strict=True):
                rows.append((number, 1, 1, number, start, end - start, 0))
        description = path.with_name(path.name + ".json")
        classes = ["0", "1", "2"]
        if description.exists():
            classes = json.loads(description.read_text())["classes"]
        return RecordStore(path, files, np.array(rows, dtype=ROW), classes)


def write_parquet(
    path: Path, cells: Iterable[Any], labels: Iterable[Any], classes: list[str] | None = None
) -> Path:
    """Write what `datasets.Dataset.to_parquet` writes.

    The images are a struct of bytes and path, and the features are in the metadata.
    """
    cell_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array(cells, cell_type)}
    columns |= {"extra": pa.array(labels), "label": pa.array(labels)}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if classes:
        features["label"] = {"names": classes, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}, "fingerprint": "0"})}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=50, write_page_checksum=True)
    return path


def cells(*numbers: int) -> list[dict[str, Any]]:
    """Cells of a parquet file with these images of JPEGS."""
    return [{"bytes": JPEGS[i], "path": f"{i}.jpg"} for i in numbers]
