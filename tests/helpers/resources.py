"""What this process holds: threads, open files and memory."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import NamedTuple

import pytest

NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


class Resources(NamedTuple):
    threads: int
    files: int
    memory_mb: float  # resident


def resources_in_use() -> Resources:
    gc.collect()
    time.sleep(0.2)  # a thread that has ended is still listed for a moment
    return Resources(
        threads=len(list(Path("/proc/self/task").iterdir())),
        files=len(list(Path("/proc/self/fd").iterdir())),
        memory_mb=int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6,
    )
