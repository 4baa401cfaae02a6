"""Which code, libraries and machine produced a result: `environment.json`, the bench's records."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

_CHECKOUT = Path(__file__).parents[1]
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # bytes the control group grants, or "max"
_DISTRIBUTIONS = [
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "ffcv",
    "numpy",
    "numba",
    "pillow",
    "simplejpeg",
    "scikit-learn",
]


class GpuSettings(NamedTuple):
    """Settings of a GPU that limit its speed. None for a value that nvidia-smi does not report."""

    power_limit_w: float | None
    driver: str | None


def environment(devices: Sequence[str]) -> dict[str, Any]:
    """Everything needed to judge or repeat a run, without the names of the machine and its user.

    None stands for a value that cannot be determined.

    Args:
        devices: The name of each rank's device, as `pipeline.describe_device` returns it.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "command": command_line(),
        "commit": git_commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": len(devices),
        "devices": sorted(set(devices)),
        "cpu": cpu_name(),
        "cores": _usable_cores(),
        "memory_gib": round(memory_gib(), 1),
        "system": f"{platform.system()} {platform.machine()}",
        "driver": _driver_version() if has_gpu else None,
        "cuda": torch.version.cuda if has_gpu else None,
        "cudnn": torch.backends.cudnn.version() if has_gpu else None,
        "python": platform.python_version(),
        **library_versions(_DISTRIBUTIONS),
    }


def command_line() -> str:
    """The command as it was typed, with ~ for the home folder (often named after its owner)."""
    typed = shlex.join(sys.argv)
    home = os.path.expanduser("~").rstrip("/")
    if not home:
        return typed
    starts_a_path = r"(?<![^\s='\"])"  # not within another path
    return re.sub(rf"{starts_a_path}{re.escape(home)}/", "~/", typed)


def git_commit(checkout: Path = _CHECKOUT) -> str | None:
    """The commit that is checked out, with `-dirty` if tracked files have been changed since.

    None if `checkout` is not the top folder of a repository, even if it lies within one.
    """
    return _output(
        "git",
        f"--git-dir={checkout / '.git'}",
        f"--work-tree={checkout}",
        "--no-optional-locks",
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    )


def library_versions(distributions: Iterable[str]) -> dict[str, str | None]:
    """The version of each distribution, or None if it is not installed."""
    return {name: _version(name) for name in distributions}


def cpu_name() -> str:
    """The model name of the CPU, or its architecture if the system does not report one."""
    model = re.search(r"model name\s*: (.+)", _read_text(Path("/proc/cpuinfo")))
    return model[1] if model else platform.machine()


def memory_gib(limit_file: Path = _MEMORY_LIMIT) -> float:
    """The physical memory in GiB, or the control group's limit if that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read_text(limit_file).strip()
    usable = min(physical, int(limit)) if limit.isdecimal() else physical
    return usable / 2**30


def gpu_settings(device: torch.device) -> GpuSettings:
    """The power limit and the driver release of a CUDA device, from nvidia-smi."""
    import torch

    # Selected by UUID: nvidia-smi numbers all GPUs of the machine, torch those in
    # CUDA_VISIBLE_DEVICES.
    uuid = torch.cuda.get_device_properties(device).uuid
    line = _output(
        "nvidia-smi",
        "--query-gpu=power.limit,driver_version",
        "--format=csv,noheader,nounits",
        f"--id=GPU-{uuid}",
    )
    if line is None:
        return GpuSettings(None, None)
    power_limit, _, driver = line.partition(", ")
    try:
        return GpuSettings(float(power_limit), driver or None)
    except ValueError:  # some GPUs have no power limit: "[N/A]"
        return GpuSettings(None, driver or None)


def _driver_version() -> str | None:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0] if lines else None  # one line for each GPU


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _output(*command: str) -> str | None:
    """The stripped standard output of a command; None if it is empty or the command fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
