"""Reads a converted data set again, all of it, and compares it with what it should be."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from ..formats import FORMATS, find_format
from ..formats.index import read_description, sidecar_path
from ..formats.record_store import RecordStore
from ..images import BadImage
from ..machine import single_threaded_workers, usable_cores
from ..order import Samples
from ..stores import Progress, Store
from .jpeg_encoding import check
from .shard_writer import Plan, prepare
from .sources import Source, open_source

_TOGETHER = 32  # images that a thread takes at a time


def verify_store(
    path: str | Path,
    against: str | Path | None = None,
    *,
    threads: int | None = None,
    progress: Progress = lambda done, total: None,
    listing: Progress = lambda done, total: None,
) -> list[str]:
    """What is wrong with the data at `path`, a line each: [] where they are as they were written.

    Files, tables and sidecars are compared with the index, images with their checksums, and each image is decoded.
    against: the source, from which each image is made again and compared, as is what was left out of it. ValueError
    where `path` holds no data set of FORMATS, or does not say how it was made, though `against` is given.
    """
    path = Path(path)
    name = find_format(path)
    if name is None:
        raise ValueError(f"{path} holds none of {', '.join(FORMATS)}")
    store = FORMATS[name].open(path, listing)
    problems = [f"left out: {where}: {why}" for where, why in store.rejects.items()]
    for number, file in enumerate(store.files):
        problems += _compare_file(store, number, file, name)
    with tempfile.TemporaryDirectory(prefix="twinfeed-") as scratch:
        source = None if against is None else open_source(against, listing, Path(scratch))
        made = None if source is None else _made_from(path, store, source, problems)
        if source is not None and made is None:
            return problems
        pool = single_threaded_workers(threads or usable_cores(), "verify")
        try:
            chunks = [
                np.arange(i, min(i + _TOGETHER, len(store)))
                for i in range(0, len(store), _TOGETHER)
            ]
            for done, found in enumerate(
                pool.map(lambda chunk: list(_compare(store, chunk, source, made)), chunks), 1
            ):
                problems += found
                progress(min(done * _TOGETHER, len(store)), len(store))
        finally:
            pool.shutdown(cancel_futures=True)
    return problems


def _compare_file(store: RecordStore, number: int, file: Path, format: str) -> Iterator[str]:
    """The index and DALI's sidecar against what stands in a file."""
    scanned, rows = FORMATS[format].scan(file), store.index[store.index["file"] == number]
    yield from (f"{file}: {name}: {reason}" for name, reason in scanned.rejects.items())
    places = [(image.offset, image.bytes) for image in scanned.found]
    if store.checksums and places != rows[["offset", "bytes"]].tolist():
        yield f"{file} holds {len(places)} images, not the {len(rows)} of its index, or elsewhere"
    elif store.checksums and rows["label"].tolist() != [
        -1 if i.label is None else i.label for i in scanned.found
    ]:
        yield f"{file} has other labels than its index"
    beside = sidecar_path(file)
    if scanned.sidecar and beside.exists() and beside.read_text() != scanned.sidecar:
        yield f"{beside} does not describe {file.name}: delete it, it is made again"


def _compare(
    store: RecordStore, samples: Samples, source: Source | None, made: tuple[Plan, Samples] | None
) -> Iterator[str]:
    """What is wrong with some of the images."""
    for sample, row, data in zip(
        samples, store.index[samples], store.read_batch(samples), strict=True
    ):
        checksum, problem = google_crc32c.value(data), ""
        try:
            check(data, int(row["height"]), int(row["width"]))
        except BadImage as error:
            problem = str(error)
        if store.checksums and checksum != row["checksum"]:
            problem = "it is not what was written: its checksum differs"
        elif source is not None and made is not None:
            plan, numbers = made
            again = prepare(source, int(numbers[sample]), plan)
            name = source.name(int(numbers[sample]))
            if isinstance(again, str):
                problem = f"{name} gave it, which is bad now: {again}"
            elif google_crc32c.value(again.data) != checksum:
                problem = f"{name} gives another image now"
            elif source.labels[numbers[sample]] != row["label"]:
                problem = f"its label is {row['label']}, but that of {name} {source.labels[numbers[sample]]}"
        if problem:
            yield f"{store.name(int(sample))}: {problem}"


def _made_from(
    path: Path, store: Store, source: Source, problems: list[str]
) -> tuple[Plan, Samples] | None:
    """How the data were made, and which image of the source each sample is; None, and a problem, where it is not it."""
    told: dict[str, Any] | None = read_description(path).get("plan")
    if told is None:
        raise ValueError(
            f"{path} does not say how it was made: there is no {path.name}.json of convert.py beside it"
        )
    try:
        plan = Plan(**told)
    except TypeError as error:
        raise ValueError(
            f"{path.name}.json is of another version of convert.py ({error}): convert anew"
        ) from error
    rejects = path.with_name(path.name + ".rejects.jsonl")
    try:
        lines = (
            [json.loads(line) for line in rejects.read_text().splitlines()]
            if rejects.exists()
            else []
        )
        left_out = [int(line["source"]) for line in lines if line["source"] is not None]
        if not all(0 <= number < plan.images for number in left_out):
            raise ValueError("it names what is not in the source")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}.json or {rejects.name} is damaged ({error}): restore it, or convert anew"
        ) from error
    if (source.identity, len(source)) != (plan.identity, plan.images):
        problems.append(
            f"the source holds {len(source)} images that are not the {plan.images} that it was made from"
        )
        return None
    if read_description(path).get("classes") != list(source.classes):
        problems.append(
            f"{path}.json names other classes than the source: {', '.join(source.classes)[:200]}"
        )
    problems += [
        f"{source.name(number)} was left out, but is good now"
        for number in left_out
        if not isinstance(prepare(source, number, plan), str)
    ]
    numbers = plan.order()
    numbers = numbers[~np.isin(numbers, left_out)]
    if len(numbers) != len(store):
        problems.append(
            f"{path} holds {len(store)} images, but {rejects.name} leaves {len(numbers)}"
        )
        return None
    return plan, numbers
