"""`python -m bench convert`: how fast JPEGs become one file or shards, with FFCV's writer beside ours, in turns."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

import pipeline
from experiment import Console
from pipeline.images import image_size

from . import record, tables
from .photos import draw_photos
from .record import Contender, Rates

SIDE, QUALITY = 400, 90  # of the resized ones; the quality is FFCV's default
_DISTRIBUTIONS = ("ffcv", "simplejpeg", "pillow", "torch", "numpy", "google-crc32c")


@dataclass(frozen=True)
class Options:
    """Measures conversions of a folder of JPEGs, which the system keeps in its memory, on all cores."""

    data: Path | None = None
    """Folder of images [default: drawn photographs of 500 x 375 pixels and 97 kB, as ImageNet's are]."""
    images: int = 2000
    """How many are drawn."""
    turns: int = 5
    """Each writes so often, after each other."""
    json: Path | None = None
    """File for the record of this run."""


class Way(NamedTuple):
    """A way to convert, and the one that it is compared with."""

    name: str
    against: str
    run: Callable[[Path], object]


def main(arguments: list[str], console: Console) -> int:
    options = tyro.cli(Options, args=arguments, prog="python -m bench convert")
    folder = options.data or pipeline.cache_folder() / f"bench-photos-{options.images}"
    if options.data is None:
        with console.progress("drawing photographs, once") as bar:
            draw_photos(folder, options.images, progress=bar)
    sources = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not sources:
        raise ValueError(f"{folder} holds no JPEG")
    encoded = [
        path.read_bytes() for path in sources
    ]  # which also brings them into the system's memory
    sizes = np.array([image_size(data) for data in encoded])
    contenders = contest(folder, sources, options.turns, console)
    result = record.Record(
        command=record.command(["convert", *arguments]),
        commit=record.commit(),
        versions=record.versions(_DISTRIBUTIONS),
        machine=record.machine(torch.device("cpu")),
        data=record.Data(
            name="images" if options.data else "drawn photographs",
            images=len(sources),
            mean_bytes=float(np.mean([len(data) for data in encoded])),
            mean_width=float(sizes[:, 1].mean()),
            mean_height=float(sizes[:, 0].mean()),
        ),
        settings={"turns": options.turns, "side": SIDE, "quality": QUALITY},
        rungs=[],
        contenders=contenders,
        bounds={},
        verdict=[],
    )
    tables.conversions(result, console)
    if options.json:
        result.write(options.json)
        console.print(f"written to {options.json}")
    return 0


def contest(folder: Path, sources: list[Path], turns: int, console: Console) -> list[Contender]:
    """Every way in turn, over all images, from the call to the finished and closed file."""
    seconds: dict[str, list[float]] = {}
    with (
        console.progress("converting") as bar,
        tempfile.TemporaryDirectory(prefix="twinfeed-", dir=folder.parent) as scratch,
        ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as apart,  # FFCV forks, which threads forbid
    ):
        ways = _ways(folder, sources, apart)
        for turn in range(turns + 1):  # the first warms up: it compiles and imports
            for i, way in enumerate(ways):
                bar(turn * len(ways) + i, (turns + 1) * len(ways), way.name)
                target = Path(scratch) / "written"
                target.mkdir()
                began = time.perf_counter()
                way.run(target)
                if turn:
                    seconds.setdefault(way.name, []).append(time.perf_counter() - began)
                shutil.rmtree(target)
    found = []
    for way in ways:
        pairs = zip(seconds[way.against], seconds[way.name], strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        rates = Rates([len(sources) / s for s in seconds[way.name]])
        found.append(
            Contender(way.name, way.against if way.against != way.name else "", {}, rates, ratio)
        )
    return found


def _ways(folder: Path, sources: list[Path], apart: ProcessPoolExecutor) -> list[Way]:
    whole, small = "FFCV's writer", f"FFCV's writer, {SIDE} px"

    def ours(target: Path, name: str = "x.beton", **options: Any) -> None:
        pipeline.write_store(folder, target / name, pipeline.ConversionOptions(**options))

    def theirs(target: Path, side: int | None) -> None:
        apart.submit(
            ffcv_write, [str(path) for path in sources], str(target / "x.beton"), side
        ).result()

    return [
        Way(whole, whole, partial(theirs, side=None)),
        Way("twinfeed, beton", whole, ours),
        Way("twinfeed, WebDataset", whole, partial(ours, name="x", format="webdataset")),
        Way("twinfeed, TFRecord", whole, partial(ours, name="x", format="tfrecord")),
        Way("twinfeed, beton, --no-validate", whole, partial(ours, validate=False)),
        Way(small, small, partial(theirs, side=SIDE)),
        Way(
            f"twinfeed, beton, --max-side {SIDE}",
            small,
            partial(ours, max_side=SIDE, quality=QUALITY),
        ),
    ]


class _Images:
    """What FFCV's documentation gives its writer: images that Pillow opens, and labels."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.open(self.paths[i]).convert("RGB"), 0


def ffcv_write(paths: list[str], target: str, side: int | None) -> None:
    """A beton of JPEGs by FFCV's own writer, on all cores, at its default quality of 90."""
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
    except ImportError as error:
        raise ValueError(
            f"FFCV, to compare with, cannot be imported ({error}): uv sync --extra ffcv"
        ) from None
    image = RGBImageField(
        write_mode="jpg", jpeg_quality=QUALITY, **({} if side is None else {"max_resolution": side})
    )
    fields = {"image": image, "label": IntField()}
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as FFCV has it; here it would start each worker afresh
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # it draws a progress bar
    DatasetWriter(target, fields, num_workers=pipeline.usable_cores()).from_indexed_dataset(
        _Images(paths)
    )
