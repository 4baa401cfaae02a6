"""Convert a data set to something fast to train from, and that other tools read: beton, WebDataset or TFRecord.

uv run convert.py photos photos.beton                                  JPEGs pass through untouched
uv run convert.py photos shards --format webdataset --max-side 400     a folder of .tar files, resized
uv run convert.py hf/train-*.parquet shards --format tfrecord          from the Hugging Face hub
uv run convert.py verify photos.beton --against photos                 reads all again, and compares
uv run convert.py --help

The same command goes on where an earlier one was ended. `./verify` is a source that is called so.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, arg

import experiment
from experiment import Console

if TYPE_CHECKING:
    from pipeline import ConversionProgress

INTERRUPTED = 130  # exit status of what was stopped, and can go on


@dataclass(frozen=True)
class Convert:
    """Write SOURCE to TARGET in a seeded global shuffle, each image decoded once to see that it is good. The same
    command goes on where an earlier one was ended. `convert.py verify --help`: read a TARGET again, and compare."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A folder (its sub-folders are classes), .beton, folder of .tar or .tfrecord, Hugging Face .parquet, a URL of
    any of these, or torchvision:CIFAR10[:test]."""
    target: Annotated[Positional[Path], arg(metavar="TARGET")]
    """x.beton, or a folder of shards."""
    format: Literal["beton", "webdataset", "tfrecord"] | None = None
    """What to write, where the name of TARGET does not say it."""
    shards: int | None = None
    """Number of files, instead of --shard-size."""
    shard_size: int = 5000
    """Images in a file of shards."""
    max_side: int | None = None
    """Pixels: images with a longer side are shrunk to it, and encoded again."""
    short_side: int | None = None
    """Pixels: images whose shorter side is longer are shrunk to it, and encoded again."""
    quality: int | None = None
    """Of what is encoded again, 1 to 100; also encodes again JPEGs of higher quality. Without it 96."""
    seed: int = 0
    """Of the shuffle."""
    validate: bool = True
    """Decode each image; without it, only headers are looked at."""
    strict: bool = False
    """End at the first bad image instead of leaving it out."""
    threads: int | None = None
    """One a core without it."""
    scheduler: str | None = None
    """Address of a Dask scheduler whose workers write the shards; SOURCE and TARGET on a file system that all share.
    Dask's parts trust each other, and pickle what they exchange: over a network that others share, use its TLS
    (tls://..., docs/formats.md)."""


@dataclass(frozen=True)
class Verify:
    """Read all of TARGET again and compare it with its checksums, and with SOURCE where that is given."""

    target: Annotated[Positional[Path], arg(metavar="TARGET")]
    """What was converted."""
    against: Annotated[str | None, arg(metavar="SOURCE")] = None
    """Make each image again from its source, and compare."""
    threads: int | None = None
    """One a core without it."""


def convert(job: Convert, console: Console) -> int:
    """One conversion; the exit status."""
    with console.progress("loading torch"):
        import pipeline
    began, first = time.monotonic(), None

    with (
        console.progress(f"listing {job.source}") as listing,
        console.progress("converting") as bar,
        cluster(job.scheduler) as pool,
    ):

        def progress(written: ConversionProgress, images: int) -> None:
            nonlocal first
            first = first or (time.monotonic(), written)
            elapsed = max(time.monotonic() - first[0], 1e-3)
            rate, size = (
                (written.images - first[1].images) / elapsed,
                (written.bytes - first[1].bytes) / elapsed,
            )
            bar(
                written.images,
                images,
                f"{rate:.0f} images/s, {size / 1e6:.0f} MB/s, {written.rejects} rejects",
            )

        values = asdict(job)
        options = pipeline.ConversionOptions(
            **{f.name: values[f.name] for f in fields(pipeline.ConversionOptions)}
        )
        report = pipeline.write_store(
            job.source, job.target, options, executor=pool, progress=progress, listing=listing
        )
    if not report.new:
        console.print(f"{report.path} is there already, from the same conversion: nothing to do")
        return 0
    elapsed = time.monotonic() - began
    rows = {
        "images": f"{report.images:,}",
        **{f"  {what}": f"{count:,}" for what, count in report.done.items()},
    }
    if report.rejects:
        rows["left out"] = f"{report.rejects:,}, see {report.path.name}.rejects.jsonl"
    rows["written"] = f"{report.path}, {report.bytes / 1e6:,.1f} MB"
    rows["time"] = (
        f"{elapsed:.1f} s, {report.images / elapsed:,.0f} images/s, {report.bytes / elapsed / 1e6:,.0f} MB/s"
    )
    console.table(rows)
    console.print(experiment.printable(f"uv run train.py --data {shlex.quote(str(job.target))}"))
    return 0


def verify(job: Verify, console: Console) -> int:
    """One verification; the exit status."""
    with console.progress("loading torch"):
        import pipeline
    with (
        console.progress(f"listing {job.against or job.target}") as listing,
        console.progress("verifying") as bar,
    ):
        problems = pipeline.verify_store(
            job.target, job.against, threads=job.threads, progress=bar, listing=listing
        )
    for problem in problems[:10]:
        console.print(experiment.printable(problem))
    if len(problems) > 10:
        console.print(f"and {len(problems) - 10} more")
    found = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    said = f"{job.target}: {found}" if problems else f"{job.target} is as it was written"
    console.print(experiment.printable(said))
    return int(bool(problems))


@contextmanager
def cluster(address: str | None) -> Iterator[Executor | None]:
    """The executor of a Dask cluster, whose workers have got our modules; None without an address."""
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError(f"--scheduler needs Dask ({error}): uv sync --extra convert") from None
    here = Path(__file__).parent
    with (
        tempfile.TemporaryDirectory() as folder,
        Client(address, timeout=10, set_as_default=False) as client,
    ):
        try:
            client.wait_for_workers(1, timeout=10)
        except TimeoutError:
            raise ValueError(
                f"no worker is at {address}: start some, dask worker {address}"
            ) from None
        shipped = Path(folder) / "twinfeed-pipeline.zip"
        with zipfile.ZipFile(shipped, "w") as archive:
            for path in sorted((here / "pipeline").rglob("*.py")):
                archive.write(path, path.relative_to(here))
        client.upload_file(str(shipped))
        yield client.get_executor(pure=False)


def parse() -> Callable[[Console], int]:
    """What the command line asks for."""
    if sys.argv[1:2] == ["verify"]:
        checking = tyro.cli(Verify, args=sys.argv[2:], prog="convert.py verify")
        return lambda console: verify(checking, console)
    job = tyro.cli(Convert, prog="convert.py")
    return lambda console: convert(job, console)


if __name__ == "__main__":
    run = parse()
    try:
        with Console() as run_log:
            status = run(run_log)
    except Exception as error:
        if os.environ.get("TWINFEED_TRACEBACK"):
            raise
        sys.exit(f"error: {experiment.printable(experiment.explain(error))}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there")
        sys.exit(INTERRUPTED)
    sys.exit(status)
