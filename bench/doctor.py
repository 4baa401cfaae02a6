"""`python -m bench doctor`: what is installed, what is missing and how to get it, and what it would bring."""

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

from experiment import Console, ProgressBar

from . import record

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_GOOD, _MISSING, _WRONG = "ok", "missing", "WRONG"


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: str  # ok, missing (something is slower or absent without it) or WRONG (nothing runs)
    found: str
    remedy: str = ""


class Part(NamedTuple):
    """A library: what it is for, and how to get it."""

    module: str
    distribution: str
    brings: str
    remedy: str
    needed: bool = False


_PARTS = (
    Part("torch", "torch", "the network", "uv sync", needed=True),
    Part("torchvision", "torchvision", "the backbones", "uv sync", needed=True),
    Part("simplejpeg", "simplejpeg", "decodes JPEGs on the CPU", "uv sync", needed=True),
    Part(
        "numba", "numba", "distorts on the CPU, 10 times as fast as torch", "uv sync", needed=True
    ),
    Part("google_crc32c", "google-crc32c", "checksums of records", "uv sync", needed=True),
    Part("sklearn", "scikit-learn", "SVMs of VOC07", "uv sync", needed=True),
    Part(
        "nvidia.dali", "nvidia-dali-cuda130", "decodes on the GPU", "uv sync (Linux on x86-64 only)"
    ),
    Part(
        "ffcv",
        "ffcv",
        "reads beton files through FFCV's loader",
        "apt-get install libopencv-dev libturbojpeg0-dev pkg-config; uv sync --extra ffcv",
    ),
    Part("pyarrow", "pyarrow", "converts Hugging Face's parquet files", "uv sync --extra convert"),
    Part("fsspec", "fsspec", "converts what URLs name", "uv sync --extra convert"),
    Part("distributed", "distributed", "converts on a Dask cluster", "uv sync --extra convert"),
    Part("lightly", "lightly", "a peer to measure against", "uv sync --group bench"),
    Part("kornia", "kornia", "a peer to measure against", "uv sync --group bench"),
    Part("matplotlib", "matplotlib", "draws `bench report`", "uv sync --group bench"),
)


def main(arguments: list[str]) -> int:
    """Prints the findings; 1 where something is wrong without which nothing runs."""
    tyro.cli(_nothing, args=arguments, prog="python -m bench doctor", description=__doc__)
    with Console() as console:
        with console.progress("looking") as bar:
            findings = list(examine(bar))
        wide = max(len(finding.what) for finding in findings)
        for what, state, found, remedy in findings:
            console.print(f"{what:{wide}}  {state:7}  {found}")
            if remedy:
                console.print(f"{'':{wide}}           -> {remedy}")
    return int(any(finding.state == _WRONG for finding in findings))


def _nothing() -> None: ...


def examine(bar: ProgressBar) -> Iterator[Finding]:
    """Looks at the libraries, the GPU, and the machine."""
    yield Finding("python", _GOOD, platform.python_version())
    complete = True
    for done, part in enumerate(_PARTS):
        bar(done, len(_PARTS), part.distribution)
        finding = library(part)
        complete &= finding.state != _WRONG
        yield finding
    if complete:  # which torch knows
        yield gpu()
    yield from machine()


def library(part: Part) -> Finding:
    """Whether a library is there and can be imported: one that is installed may still lack a system library."""
    try:
        version = metadata.version(part.distribution)
    except metadata.PackageNotFoundError:
        state = _WRONG if part.needed else _MISSING
        return Finding(part.distribution, state, f"not installed: {part.brings}", part.remedy)
    try:
        importlib.import_module(part.module)
    except Exception as error:  # whatever a broken installation raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        state = _WRONG if part.needed else _MISSING
        return Finding(
            part.distribution, state, f"{version}, but cannot be imported: {reason}", part.remedy
        )
    return Finding(part.distribution, _GOOD, f"{version}: {part.brings}")


def gpu() -> Finding:
    """The GPU, its driver and power limit, or why torch cannot use it."""
    import torch

    import pipeline

    try:
        device = pipeline.find_device()
    except ValueError as error:
        return Finding(
            "GPU", _WRONG, str(error), "a driver of release 580 or newer, or --device cpu"
        )
    if device.type == "cpu":
        return Finding("GPU", _MISSING, "none: everything runs on the CPU")
    limit, driver = record.gpu_settings(device)
    name, memory = (
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_properties(device).total_memory,
    )
    power = f", {limit:.0f} W" if limit else ""
    count = torch.cuda.device_count()
    found = f"{count} x {name}, {memory / 2**30:.0f} GiB{power}, driver {driver}, CUDA {torch.version.cuda}"
    return Finding("GPU", _GOOD, found)


def machine() -> Iterator[Finding]:
    """Cores, memory, disks, and the settings of the system that matter."""
    cores, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = cpu_quota()
    limited = f", but a container's quota of {quota:.1f}" if quota and quota < cores else ""
    remedy = f"--threads {max(1, int(quota))}" if quota and limited else ""
    yield Finding("cores", _GOOD, f"{cores} of {all_cores} may be used{limited}", remedy)
    memory = record.memory_gib()
    yield Finding(
        "memory",
        _GOOD,
        f"{memory:.0f} GiB: data up to {0.7 * memory:.0f} GiB are read from the disk once",
    )
    cache = Path(
        os.environ.get("TWINFEED_CACHE")
        or os.environ.get("XDG_CACHE_HOME")
        or Path.home() / ".cache"
    )
    for what, folder in (("cache folder", cache), ("this folder", Path.cwd())):
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free / 2**30
        writable = os.access(place, os.W_OK)
        state = _GOOD if writable and free > 1 else _MISSING
        note = "" if writable else ", not writable"
        remedy = "" if state == _GOOD else "TWINFEED_CACHE or --run on another disk"
        yield Finding(what, state, f"{free:.0f} GiB free{note}", remedy)
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    enabled = pages.read_text() if pages.exists() else "[never]"
    if "[never]" in enabled:
        yield Finding(
            "huge pages",
            _MISSING,
            "off: views on the CPU cost more page faults",
            f"echo madvise > {pages}",
        )
    else:
        yield Finding("huge pages", _GOOD, "on: views on the CPU fault a tenth as often")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Finding(
        "open files",
        *((_GOOD, f"{files:,}") if files >= 1024 else (_MISSING, f"{files}", "ulimit -n 4096")),
    )


def cpu_quota() -> float | None:
    """Cores that a control group grants, where it limits them."""
    try:
        quota, period = _CPU_MAX.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None
