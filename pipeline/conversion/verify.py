"""Reads all of a converted data set again, and compares it with its index and with its source."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from ..formats import FORMATS, find_format
from ..formats.index import read_description, sidecar_path
from ..formats.record_store import RecordStore
from ..images import BadImage
from ..machine import single_threaded_workers, usable_cores
from ..order import Samples
from ..stores import Progress, Store, no_progress
from .jpeg_encoding import check_decodes
from .plan import Plan
from .prepare import prepare_image
from .source_types import Source
from .sources import open_source

_CHUNK_IMAGES = 32  # that a thread takes at a time


class _Origin(NamedTuple):
    """Where the samples of a store come from."""

    source: Source
    plan: Plan
    numbers: Samples  # of each sample in the source


def verify_store(
    path: str | Path,
    against: str | Path | None = None,
    *,
    threads: int | None = None,
    progress: Progress = no_progress,
    listing: Progress = no_progress,
) -> list[str]:
    """Read the data at `path` again, and return what is wrong with them, one line for each problem.

    Files, tables and sidecars are compared with the index, images with their checksums, and each
    image is decoded. With `against`, each image is also made again from its source and compared,
    and so is each image that was left out.

    Args:
        path: A data set in one of FORMATS.
        against: The source that it was converted from.
        threads: Threads that read and decode. None: one per core that this process may use.
        progress: Called with (done, total), in images.
        listing: Called with (done, total) while data set and source are indexed.

    Raises:
        ValueError: There is no such data set, or, with `against`, it does not say how it was made.
    """
    path = Path(path)
    format = find_format(path)
    if format is None:
        raise ValueError(f"{path} contains no beton, WebDataset or TFRecord data")
    store = FORMATS[format].open(path, listing)
    problems = [f"left out: {where}: {reason}" for where, reason in store.rejects.items()]
    for number, file in enumerate(store.files):
        problems += _compare_file(store, number, file, format)

    if against is None:
        return problems + _compare_images(store, None, threads, progress)
    with tempfile.TemporaryDirectory(prefix="twinfeed-") as scratch:
        source = open_source(against, listing, Path(scratch))
        origin, source_problems = _find_origin(path, store, source)
        problems += source_problems
        if origin is not None:
            problems += _compare_images(store, origin, threads, progress)
    return problems


def _compare_file(store: RecordStore, number: int, file: Path, format: str) -> Iterator[str]:
    """What differs between a file, the index, and DALI's sidecar."""
    scanned = FORMATS[format].scan(file)
    yield from (f"{file}: {name}: {reason}" for name, reason in scanned.rejects.items())

    if store.checksums:
        rows = store.index[store.index["file"] == number]
        places = [(image.offset, image.bytes) for image in scanned.images]
        labels = [-1 if image.label is None else image.label for image in scanned.images]
        if places != rows[["offset", "bytes"]].tolist():
            yield (
                f"{file} does not match its index: the number or offsets of its images differ "
                f"({len(places)} images in the file, {len(rows)} in the index)"
            )
        elif labels != rows["label"].tolist():
            yield f"{file} has other labels than its index"

    sidecar = sidecar_path(file)
    if scanned.sidecar and sidecar.exists() and sidecar.read_text() != scanned.sidecar:
        yield f"{sidecar} does not describe {file.name}: delete it; it will be recreated"


def _compare_images(
    store: RecordStore, origin: _Origin | None, threads: int | None, progress: Progress
) -> list[str]:
    """What is wrong with the images."""

    def compare(samples: Samples) -> list[str]:
        return list(_compare_chunk(store, samples, origin))

    problems: list[str] = []
    starts = range(0, len(store), _CHUNK_IMAGES)
    chunks = [np.arange(start, min(start + _CHUNK_IMAGES, len(store))) for start in starts]
    pool = single_threaded_workers(threads or usable_cores(), "verify")
    try:
        for chunk, chunk_problems in zip(chunks, pool.map(compare, chunks), strict=True):
            problems += chunk_problems
            progress(int(chunk[-1]) + 1, len(store))
    finally:
        pool.shutdown(cancel_futures=True)
    return problems


def _compare_chunk(store: RecordStore, samples: Samples, origin: _Origin | None) -> Iterator[str]:
    for sample, data in zip(samples.tolist(), store.read_batch(samples), strict=True):
        row = store.index[sample]
        problem = ""
        try:
            check_decodes(data, int(row["height"]), int(row["width"]))
        except BadImage as error:
            problem = str(error)
        if store.checksums and google_crc32c.value(data) != row["checksum"]:
            problem = "it is not what was written: its checksum differs"
        elif origin is not None:
            problem = _compare_with_origin(sample, data, int(row["label"]), origin) or problem
        if problem:
            yield f"{store.name(sample)}: {problem}"


def _compare_with_origin(sample: int, data: bytes, label: int, origin: _Origin) -> str:
    """What differs between a sample and the image of the source that it was made from, or ""."""
    number = int(origin.numbers[sample])
    name = origin.source.name(number)
    image = prepare_image(origin.source, number, origin.plan)
    source_label = origin.source.labels[number]
    if image.jpeg is None:
        return f"it was made from {name}, which can no longer be decoded: {image.reason}"
    if image.checksum != google_crc32c.value(data):
        return f"{name} converts to different bytes now"
    if source_label != label:
        return f"its label is {label}, but that of {name} is {source_label}"
    return ""


def _find_origin(path: Path, store: Store, source: Source) -> tuple[_Origin | None, list[str]]:
    """Which image of the source each sample is, and problems; None if it is another source."""
    description = read_description(path)
    plan = _read_plan(path, description)
    left_out = _read_left_out(path, plan)
    if (source.identity, len(source)) != (plan.identity, plan.images):
        return None, [
            f"the source has changed, or is another one: "
            f"it has {len(source)} images now; {plan.images} were converted"
        ]

    problems: list[str] = []
    if description.get("classes") != list(source.classes):
        classes = ", ".join(source.classes)[:200]
        problems.append(f"{path}.json names other classes than the source: {classes}")
    problems += [
        f"{source.name(number)} was left out, but can be decoded now"
        for number in left_out
        if prepare_image(source, number, plan).jpeg is not None
    ]
    numbers = plan.order()
    numbers = numbers[~np.isin(numbers, left_out)]
    if len(numbers) != len(store):
        problems.append(
            f"{path} holds {len(store)} images, but {len(numbers)} are expected "
            f"from the source and {_rejects_path(path).name}"
        )
        return None, problems
    return _Origin(source, plan, numbers), problems


def _read_plan(path: Path, description: dict[str, Any]) -> Plan:
    recorded = description.get("plan")
    if recorded is None:
        raise ValueError(
            f"{path} does not say how it was made: {path.name}.json from convert.py is missing"
        )
    try:
        return Plan(**recorded)
    except TypeError as error:
        raise ValueError(
            f"{path.name}.json was written by another version of convert.py ({error}): "
            "convert again"
        ) from error


def _read_left_out(path: Path, plan: Plan) -> list[int]:
    """The numbers in the source of the images that were left out."""
    rejects = _rejects_path(path)
    if not rejects.exists():
        return []
    try:
        sources = [json.loads(line)["source"] for line in rejects.read_text().splitlines()]
        left_out = [int(number) for number in sources if number is not None]
        if not all(0 <= number < plan.images for number in left_out):
            raise ValueError("it names images that are not in the source")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}.json or {rejects.name} is damaged ({error}): restore it, or convert again"
        ) from error
    return left_out


def _rejects_path(path: Path) -> Path:
    return path.with_name(path.name + ".rejects.jsonl")
