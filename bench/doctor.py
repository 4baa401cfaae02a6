"""`python -m bench doctor`: what is installed, what is missing, how to get it, and what it is for.

It looks at the libraries, the GPU and the settings of the system that matter for throughput. It
works without torch, so that it can say that torch is missing.
"""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import tyro

from experiment import Console, ProgressBar, provenance

OK = "ok"
MISSING = "missing"  # something is slower or not available
WRONG = "WRONG"  # nothing runs

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # quota and period in microseconds, or "max"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_DISK_REMEDY = "set TWINFEED_CACHE or --run-folder to another disk"
_FEWEST_FILES = 1024  # open files that a process should be allowed
_CACHED_FRACTION = 0.7  # of the memory, that the file cache is taken to hold


class Finding(NamedTuple):
    """The state of one thing that was examined."""

    name: str
    state: str  # OK, MISSING or WRONG
    description: str
    remedy: str = ""


class Library(NamedTuple):
    """A library: its purpose, and how to get it."""

    module: str
    distribution: str
    purpose: str
    remedy: str
    required: bool = False


LIBRARIES = (
    Library("torch", "torch", "the network", "uv sync", required=True),
    Library("torchvision", "torchvision", "the backbones", "uv sync", required=True),
    Library("simplejpeg", "simplejpeg", "decodes JPEGs on the CPU", "uv sync", required=True),
    Library(
        "numba",
        "numba",
        "distorts on the CPU, 10 times as fast as torch",
        "uv sync",
        required=True,
    ),
    Library("google_crc32c", "google-crc32c", "checksums of records", "uv sync", required=True),
    Library("sklearn", "scikit-learn", "for `evaluate.py svm`", "uv sync", required=True),
    Library(
        "nvidia.dali",
        "nvidia-dali-cuda130",
        "decodes on the GPU",
        "uv sync (Linux on x86-64 only)",
    ),
    Library(
        "ffcv",
        "ffcv",
        "reads beton files through FFCV's loader",
        "apt-get install libopencv-dev libturbojpeg0-dev pkg-config; uv sync --extra ffcv",
    ),
    Library(
        "pyarrow", "pyarrow", "converts Hugging Face's parquet files", "uv sync --extra convert"
    ),
    Library("fsspec", "fsspec", "converts data at URLs", "uv sync --extra convert"),
    Library("distributed", "distributed", "converts on a Dask cluster", "uv sync --extra convert"),
    Library(
        "lightly", "lightly", "a pipeline that the benchmark compares", "uv sync --group bench"
    ),
    Library("kornia", "kornia", "a pipeline that the benchmark compares", "uv sync --group bench"),
    Library("matplotlib", "matplotlib", "for `bench report --plot`", "uv sync --group bench"),
)


def main(arguments: list[str], console: Console) -> int:
    """Print the findings; return 1 if something without which nothing runs is wrong."""
    tyro.cli(_no_options, args=arguments, prog="python -m bench doctor", description=__doc__)
    with console.progress_bar("examining") as bar:
        findings = list(examine(bar))
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        console.print(f"{finding.name:{width}}  {finding.state:7}  {finding.description}")
        if finding.remedy:
            console.print(f"{'':{width}}           -> {finding.remedy}")
    anything_wrong = any(finding.state == WRONG for finding in findings)
    return 1 if anything_wrong else 0


def _no_options() -> None: ...


def examine(bar: ProgressBar) -> Iterator[Finding]:
    """Examine Python, the libraries, the GPU and the machine."""
    yield Finding("python", OK, platform.python_version())
    complete = True
    for done, library in enumerate(LIBRARIES):
        bar(done, len(LIBRARIES), library.distribution)
        finding = examine_library(library)
        if finding.state == WRONG:
            complete = False
        yield finding
    if complete:  # torch is needed to find the GPU
        yield examine_gpu()
    yield from examine_machine()


def examine_library(library: Library) -> Finding:
    """Whether a library is installed and can be imported.

    One that is installed may still lack a system library.
    """
    failed = WRONG if library.required else MISSING
    name = library.distribution
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, failed, f"not installed: {library.purpose}", library.remedy)
    try:
        importlib.import_module(library.module)
    except Exception as error:  # a broken installation may raise anything
        lines = str(error).splitlines() or [type(error).__name__]
        description = f"{version}, but cannot be imported: {lines[0]}"
        return Finding(name, failed, description, library.remedy)
    return Finding(name, OK, f"{version}: {library.purpose}")


def examine_gpu() -> Finding:
    """The GPU, its driver and power limit, or why torch cannot use it."""
    import torch

    import pipeline

    try:
        device = pipeline.find_device()
    except ValueError as error:
        remedy = "a driver of release 580 or newer, or --device cpu"
        return Finding("GPU", WRONG, str(error), remedy)
    if device.type == "cpu":
        return Finding("GPU", MISSING, "none: everything runs on the CPU")
    settings = provenance.gpu_settings(device)
    count = torch.cuda.device_count()
    name = torch.cuda.get_device_name(device)
    memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    power = f", {settings.power_limit_w:.0f} W" if settings.power_limit_w else ""
    description = (
        f"{count} x {name}, {memory_gib:.0f} GiB{power}, driver {settings.driver}, "
        f"CUDA {torch.version.cuda}"
    )
    return Finding("GPU", OK, description)


def examine_machine() -> Iterator[Finding]:
    """Examine cores, memory, disks, and system settings that matter for throughput."""
    yield _examine_cores()
    yield _examine_memory()
    yield _examine_disk("cache folder", _cache_parent())
    yield _examine_disk("this folder", Path.cwd())
    yield _examine_huge_pages()
    yield _examine_open_files()


def _examine_cores() -> Finding:
    usable = len(os.sched_getaffinity(0))
    description = f"{os.cpu_count() or 1} cores, {usable} usable"
    quota = cpu_quota()
    if quota is None or quota >= usable:
        return Finding("cores", OK, description)
    description += f", container quota {quota:.1f}"
    return Finding("cores", OK, description, f"--threads {max(1, int(quota))}")


def cpu_quota() -> float | None:
    """The number of cores that a control group grants, or None if it does not limit them."""
    try:
        quota, period = _CPU_LIMIT.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _examine_memory() -> Finding:
    memory = provenance.memory_gib()
    cached = _CACHED_FRACTION * memory
    description = f"{memory:.0f} GiB: data sets up to {cached:.0f} GiB stay in the file cache"
    return Finding("memory", OK, description)


def _cache_parent() -> Path:
    """The folder that twinfeed's cache is in."""
    folder = os.environ.get("TWINFEED_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(folder) if folder else Path.home() / ".cache"


def _examine_disk(name: str, folder: Path) -> Finding:
    parents = (folder, *folder.absolute().parents)
    existing = next(path for path in parents if path.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    writable = os.access(existing, os.W_OK)
    note = "" if writable else ", not writable"
    description = f"{free_gib:.0f} GiB free{note}"
    if writable and free_gib > 1:
        return Finding(name, OK, description)
    return Finding(name, MISSING, description, _DISK_REMEDY)


def _examine_huge_pages() -> Finding:
    enabled = _HUGE_PAGES.read_text() if _HUGE_PAGES.exists() else "[never]"
    if "[never]" in enabled:
        description = "off: CPU views cause more page faults (slower)"
        remedy = f"as root: echo madvise > {_HUGE_PAGES}"
        return Finding("huge pages", MISSING, description, remedy)
    return Finding("huge pages", OK, "on: CPU views cause a tenth of the page faults")


def _examine_open_files() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit >= _FEWEST_FILES:
        return Finding("open files", OK, f"{limit:,}")
    return Finding("open files", MISSING, f"{limit}", "ulimit -n 4096")
