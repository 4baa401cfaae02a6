"""Where a run comes from: the code, the libraries and the machine, for its `environment.json`."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent
_MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")  # bytes that the control group grants, or "max"
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


def environment(devices: Sequence[str]) -> dict[str, Any]:
    """Everything needed to judge or repeat this run, but the names of the machine and of whoever uses it.

    devices: the name of each rank's, as `describe_device` gives it. None stands for what cannot be found out.
    """
    import torch

    cpu, granted = (
        re.search(r"model name\s*: (.+)", _text(Path("/proc/cpuinfo"))),
        _text(_MEMORY_MAX).strip(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = torch.cuda.is_available()
    driver = (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None
    )
    return {
        "command": _command(),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": len(devices),
        "devices": sorted(set(devices)),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(
            min(memory, int(granted) if granted.isdecimal() else memory) / 2**30, 1
        ),
        "system": f"{platform.system()} {platform.machine()}",
        "driver": driver and driver.splitlines()[0],  # a line for each GPU
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in _DISTRIBUTIONS},
    }


def _command() -> str:
    """What was typed. The home folder, which tends to be called like its owner, is ~."""
    home = os.path.expanduser("~").rstrip("/")
    typed = shlex.join(sys.argv)
    return re.sub(rf"(?<![^\s='\"]){re.escape(home)}/", "~/", typed) if home else typed


def _commit() -> str | None:
    """Of this checkout, not of a repository that it may lie in; with -dirty where tracked files have been changed."""
    git = ("git", f"--git-dir={_ROOT / '.git'}", f"--work-tree={_ROOT}", "--no-optional-locks")
    return _output(*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _output(*command: str) -> str | None:
    try:
        return (
            subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None
