"""`python -m bench convert`: how fast JPEGs become record files, compared with FFCV's writer.

Every conversion runs once a round, over all images, from the call to the finished and closed
file, on all cores. The images are in the system's file cache, so that the disk plays no part in
reading.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro

import pipeline
from experiment import DEFAULT_IN_HELP, Console
from pipeline import ConversionOptions
from pipeline.images import image_size

from . import record, tables
from .ffcv_writer import QUALITY, write_beton
from .options import check_at_least, check_writable
from .photos import draw_photos
from .record import ConversionRate, Data, Rates, Record
from .timing import interleave, median_speedup

SIDE = 400  # pixels: longest side of the images that are reduced
_DISTRIBUTIONS = ("ffcv", "simplejpeg", "pillow", "torch", "numpy", "google-crc32c")


@dataclass(frozen=True)
class ConvertOptions:
    """Measures conversions of a folder of JPEGs that are in the file cache, on all cores."""

    data: Annotated[Path | None, DEFAULT_IN_HELP] = None
    """Folder of images [default: generated photographs of 500 x 375 pixels and 96 kB, about the
    size of ImageNet's]."""
    images: int = 2000
    """Number of photographs to generate, without --data."""
    rounds: Annotated[int, tyro.conf.arg(aliases=["--turns"])] = 5
    """Number of rounds; each round measures every conversion once."""
    json: Annotated[Path | None, DEFAULT_IN_HELP] = None
    """Write the results to this JSON file."""

    def check(self) -> None:
        """Raise ValueError for options that nothing can be measured with."""
        check_at_least("--images", self.images, 1)
        check_at_least("--rounds", self.rounds, 1)
        check_writable("--json", self.json)


class Conversion(NamedTuple):
    """A way to convert the images, and the one that it is compared with."""

    name: str
    against: str
    write: Callable[[Path], object]  # takes an empty folder


def main(arguments: list[str], console: Console) -> int:
    """Measure, print the record, and write it if asked to."""
    options = tyro.cli(ConvertOptions, args=arguments, prog="python -m bench convert")
    options.check()
    folder = find_folder(options, console)
    jpegs = find_jpegs(folder)
    data = describe_data(options, jpegs)
    conversions = compare(folder, jpegs, options.rounds, console)
    result = Record(
        command=record.command(["convert", *arguments]),
        commit=record.commit(),
        versions=record.versions(_DISTRIBUTIONS),
        machine=record.machine(torch.device("cpu")),
        data=data,
        settings={"rounds": options.rounds, "side": SIDE, "quality": QUALITY},
        conversions=conversions,
    )
    tables.print_conversions(result, console)
    if options.json:
        result.write(options.json)
        console.print(f"written to {options.json}")
    return 0


def find_folder(options: ConvertOptions, console: Console) -> Path:
    """The user's folder, or one with generated photographs."""
    if options.data is not None:
        return options.data
    folder = pipeline.cache_folder() / f"bench-photos-{options.images}"
    with console.progress_bar("generating photographs, once") as bar:
        return draw_photos(folder, options.images, progress=bar)


def find_jpegs(folder: Path) -> list[Path]:
    """The JPEGs in a folder and its sub-folders; ValueError if there are none."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    jpegs = sorted(paths)
    if not jpegs:
        raise ValueError(f"{folder} holds no JPEG: name a folder of .jpg or .jpeg files")
    return jpegs


def describe_data(options: ConvertOptions, jpegs: Sequence[Path]) -> Data:
    """The data of the record. Reading the images also brings them into the file cache."""
    encoded = [path.read_bytes() for path in jpegs]
    sizes = np.array([image_size(data) for data in encoded])  # [n, 2]: height, width
    return Data(
        name="images" if options.data else "drawn photographs",
        images=len(jpegs),
        mean_bytes=float(np.mean([len(data) for data in encoded])),
        mean_width=float(sizes[:, 1].mean()),
        mean_height=float(sizes[:, 0].mean()),
    )


def compare(
    folder: Path, jpegs: Sequence[Path], rounds: int, console: Console
) -> list[ConversionRate]:
    """Measure every conversion."""
    # FFCV forks its workers, which is not safe in a process that has threads.
    spawn = multiprocessing.get_context("spawn")
    with console.progress_bar("converting") as bar, ProcessPoolExecutor(1, spawn) as process:
        conversions = list_conversions(folder, jpegs, process)
        seconds: dict[str, list[float]] = {one.name: [] for one in conversions}
        for number, conversion in interleave(conversions, rounds, bar):
            elapsed = time_conversion(conversion, folder.parent)
            if number > 0:  # the warm-up compiles and imports
                seconds[conversion.name].append(elapsed)
    return [
        ConversionRate(
            name=one.name,
            against=one.against,
            rates=Rates.from_seconds(len(jpegs), seconds[one.name]),
            ratio=median_speedup(seconds[one.against], seconds[one.name]),
        )
        for one in conversions
    ]


def time_conversion(conversion: Conversion, parent: Path) -> float:
    """The seconds of one conversion into a temporary folder in `parent`, on the images' disk."""
    target = Path(tempfile.mkdtemp(prefix="twinfeed-", dir=parent))
    try:
        began = time.perf_counter()
        conversion.write(target)
        return time.perf_counter() - began
    finally:
        shutil.rmtree(target)


def list_conversions(
    folder: Path, jpegs: Sequence[Path], process: ProcessPoolExecutor
) -> list[Conversion]:
    """Every conversion: FFCV's first, then those that are compared with it.

    Args:
        folder: The images.
        jpegs: Their paths.
        process: Runs FFCV's writer.
    """
    paths = [str(path) for path in jpegs]

    def ffcv(target: Path, side: int | None = None) -> None:
        process.submit(write_beton, paths, str(target / "x.beton"), side).result()

    def ours(target: Path, name: str, options: ConversionOptions) -> None:
        pipeline.write_store(folder, target / name, options)

    whole = "FFCV's writer"
    small = f"FFCV's writer, {SIDE} px"
    beton = partial(ours, name="x.beton", options=ConversionOptions())
    webdataset = partial(ours, name="x", options=ConversionOptions(format="webdataset"))
    tfrecord = partial(ours, name="x", options=ConversionOptions(format="tfrecord"))
    unvalidated = partial(ours, name="x.beton", options=ConversionOptions(validate=False))
    reduced = partial(
        ours, name="x.beton", options=ConversionOptions(max_side=SIDE, quality=QUALITY)
    )
    return [
        Conversion(whole, whole, ffcv),
        Conversion("twinfeed, beton", whole, beton),
        Conversion("twinfeed, WebDataset", whole, webdataset),
        Conversion("twinfeed, TFRecord", whole, tfrecord),
        Conversion("twinfeed, beton, --no-validate", whole, unvalidated),
        Conversion(small, small, partial(ffcv, side=SIDE)),
        Conversion(f"twinfeed, beton, --max-side {SIDE}", small, reduced),
    ]
