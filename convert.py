"""Convert images to beton, WebDataset or TFRecord, for fast training and for other tools.

uv run convert.py photos photos.beton                                JPEGs pass through untouched
uv run convert.py photos shards --format webdataset --max-side 400   a folder of .tar files, resized
uv run convert.py hf/train-*.parquet shards --format tfrecord        from the Hugging Face hub
uv run convert.py verify photos.beton --against photos               reads all again, and compares
uv run convert.py --help

The same command resumes a conversion that was stopped. Write ./verify for a source of that name.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, arg

import experiment
from experiment import DEFAULT_IN_HELP, Console, ProgressBar, printable

if TYPE_CHECKING:
    from pipeline import ConversionProgress, ConversionResult

_MOST_PROBLEMS = 10  # that are printed
_CLUSTER_TIMEOUT_S = 10

# How the table at the end names what was done to images, if `<target>.json` has another name.
_TREATMENT_NAMES = {
    "from other formats": "converted to JPEG",
    "encoded with less quality": "re-encoded at lower quality",
    "repaired": "re-encoded (damaged or unusual JPEG)",
}


@dataclass(frozen=True)
class Convert:
    """Convert SOURCE to TARGET, in a random order given by --seed.

    The same command resumes a conversion that was stopped. `convert.py verify` checks a TARGET
    against its checksums or its source (see its --help).
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A folder of images (sub-folders are classes), a .beton file, or a folder of record files.
    Record files are .tar, .tfrecord and Hugging Face .parquet.
    Also a URL of any of these, or torchvision:CIFAR10[:test]."""
    target: Annotated[Positional[Path], arg(metavar="TARGET")]
    """A .beton file, or a folder for shards."""
    format: Annotated[Literal["beton", "webdataset", "tfrecord"] | None, DEFAULT_IN_HELP] = None
    """What to write; not needed if TARGET ends in .beton."""
    shards: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Number of shards; replaces --shard-size."""
    shard_size: int = 5000
    """Images per shard."""
    max_side: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Resize images so that the longer side has at most this many pixels."""
    short_side: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Resize images so that the shorter side has at most this many pixels."""
    quality: Annotated[int | None, DEFAULT_IN_HELP] = None
    """JPEG quality, 1 to 100; JPEGs of a higher quality are re-encoded.
    Without it, images that have to be re-encoded get 96."""
    seed: int = 0
    """Seed of the shuffle."""
    validate: bool = True
    """Check the compressed data of each image.
    If off, only the headers of images that pass through are checked."""
    strict: bool = False
    """Stop at the first bad image instead of leaving it out."""
    threads: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Number of threads; without it, one per core."""
    scheduler: Annotated[str | None, DEFAULT_IN_HELP] = None
    """Address of a Dask scheduler; its workers write the shards.
    SOURCE and TARGET must be on a file system that all workers share.
    Anyone who can reach the scheduler can run code; on a shared network use tls://HOST:PORT."""


@dataclass(frozen=True)
class Verify:
    """Read all of TARGET again, and compare it with its checksums and, if given, with SOURCE."""

    target: Annotated[Positional[Path], arg(metavar="TARGET")]
    """A converted data set."""
    against: Annotated[str | None, arg(metavar="SOURCE", help_behavior_hint="")] = None
    """Convert each source image again and compare."""
    threads: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Number of threads; without it, one per core."""


def main(console: Console) -> int:
    """Run what the command line asks for; return the exit status."""
    command = parse()
    try:
        if isinstance(command, Verify):
            return verify(command, console)
        return convert(command, console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues from there")
        raise


def parse() -> Convert | Verify:
    if sys.argv[1:2] == ["verify"]:
        return tyro.cli(Verify, args=sys.argv[2:], prog="convert.py verify")
    return tyro.cli(Convert, prog="convert.py")


def convert(command: Convert, console: Console) -> int:
    """Convert a data set, and print what was written."""
    with console.progress_bar("loading torch"):
        import pipeline
    started_at = time.monotonic()

    options = pipeline.ConversionOptions(
        format=command.format,
        shards=command.shards,
        shard_size=command.shard_size,
        max_side=command.max_side,
        short_side=command.short_side,
        quality=command.quality,
        seed=command.seed,
        validate=command.validate,
        strict=command.strict,
        threads=command.threads,
    )
    with (
        console.progress_bar(f"listing {command.source}") as listing,
        console.progress_bar("converting") as bar,
        connect_cluster(command.scheduler) as executor,
    ):
        result = pipeline.write_store(
            command.source,
            command.target,
            options,
            executor=executor,
            progress=ConversionBar(bar),
            listing=listing,
        )

    if not result.new:
        console.print(f"{result.path} already exists, from the same conversion: nothing to do")
        return 0
    console.table(summarize(result, time.monotonic() - started_at))
    data = shlex.quote(str(command.target))
    console.print(printable(f"To train on it: uv run train.py --data {data}"))
    return 0


def verify(command: Verify, console: Console) -> int:
    """Verify a data set, and print its problems; the exit status is 1 if there are any."""
    with console.progress_bar("loading torch"):
        import pipeline
    with (
        console.progress_bar(f"listing {command.against or command.target}") as listing,
        console.progress_bar("verifying") as bar,
    ):
        problems = pipeline.verify_store(
            command.target,
            command.against,
            threads=command.threads,
            progress=bar,
            listing=listing,
        )

    for problem in problems[:_MOST_PROBLEMS]:
        console.print(printable(problem))
    if len(problems) > _MOST_PROBLEMS:
        console.print(f"and {len(problems) - _MOST_PROBLEMS} more")
    if not problems:
        verdict = "no problem"
    elif len(problems) == 1:
        verdict = "1 problem"
    else:
        verdict = f"{len(problems)} problems"
    console.print(printable(f"{command.target}: {verdict}"))
    return 1 if problems else 0


class ConversionBar:
    """A progress bar with the throughput since its first call.

    The first call includes what an earlier command has written.
    """

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self._first: ConversionProgress | None = None
        self._started_at = 0.0

    def __call__(self, done: ConversionProgress, images: int) -> None:
        if self._first is None:
            self._first = done
            self._started_at = time.monotonic()
        elapsed_s = max(time.monotonic() - self._started_at, 1e-3)
        images_per_s = (done.images - self._first.images) / elapsed_s
        megabytes_per_s = (done.bytes - self._first.bytes) / elapsed_s / 1e6
        throughput = f"{images_per_s:.0f} images/s, {megabytes_per_s:.0f} MB/s"
        self._bar(done.images, images, f"{throughput}, {done.rejects} left out")


def summarize(result: ConversionResult, elapsed_s: float) -> dict[str, str]:
    """The rows of the table that is printed at the end."""
    rows = {"images": f"{result.images:,}"}
    for treatment, images in result.treatments.items():
        rows[f"  {_TREATMENT_NAMES.get(treatment, treatment)}"] = f"{images:,}"
    if result.rejects:
        rows["left out"] = f"{result.rejects:,}, see {result.path.name}.rejects.jsonl"
    rows["written"] = f"{result.path}, {result.bytes / 1e6:,.1f} MB"
    images_per_s = result.images / elapsed_s
    megabytes_per_s = result.bytes / elapsed_s / 1e6
    rows["time"] = f"{elapsed_s:.1f} s, {images_per_s:,.0f} images/s, {megabytes_per_s:,.0f} MB/s"
    return rows


@contextmanager
def connect_cluster(address: str | None) -> Iterator[Executor | None]:
    """The executor of a Dask cluster to which our modules have been sent; None without an address.

    Raises:
        ValueError: Dask is not installed, or no worker is there.
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError(f"--scheduler needs Dask ({error}): uv sync --extra convert") from None
    with (
        tempfile.TemporaryDirectory() as folder,
        Client(address, timeout=_CLUSTER_TIMEOUT_S, set_as_default=False) as client,
    ):
        try:
            client.wait_for_workers(1, timeout=_CLUSTER_TIMEOUT_S)
        except TimeoutError:
            raise ValueError(
                f"no worker is at {address}: start some with: dask worker {address}"
            ) from None
        modules = Path(folder) / "twinfeed-pipeline.zip"
        zip_pipeline(modules)
        client.upload_file(str(modules))
        yield client.get_executor(pure=False)


def zip_pipeline(to: Path) -> None:
    """Pack the source files of the pipeline, as `import pipeline` finds them."""
    root = Path(__file__).parent
    with zipfile.ZipFile(to, "w") as archive:
        for path in sorted((root / "pipeline").rglob("*.py")):
            archive.write(path, path.relative_to(root))


if __name__ == "__main__":
    sys.exit(experiment.run_command(main))
