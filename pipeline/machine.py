"""What this machine offers: its device, its CPU cores, and threads for work on images."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Lock

import torch

_STARTING = Lock()


def find_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device to run on. A GPU also becomes torch's current device.

    Args:
        name: `cpu`, `cuda`, `cuda:N`, or `auto` for a GPU if there is one and else the CPU.
        local_rank: Rank of this process on this machine: which of several GPUs it takes.

    Raises:
        ValueError: If torch cannot use a GPU that was requested, or one that is in the machine:
            training on the CPU by mistake could go unnoticed for hours. Setting
            CUDA_VISIBLE_DEVICES to the empty string hides the GPUs from `auto`.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"auto|cuda(:\d+)?", name):
        raise ValueError(f"device is {name!r}: choose auto, cpu, cuda or cuda:N")

    with warnings.catch_warnings(record=True) as driver_warnings:  # torch's, about the driver
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        return _select_gpu(name, local_rank)
    if name == "auto" and (not _has_gpu() or os.environ.get("CUDA_VISIBLE_DEVICES") == ""):
        return torch.device("cpu")

    reason = ""
    if driver_warnings:
        first_line = str(driver_warnings[0].message).splitlines()[0]
        reason = f" ({first_line})"
    raise ValueError(
        f"torch {torch.__version__} finds no GPU it can use{reason}. Its wheels for CUDA "
        f"{torch.version.cuda} need an NVIDIA driver of release 580 or newer: update the driver, "
        "install a torch built for an older CUDA, run the container with GPU access, "
        "or use --device cpu"
    )


def _select_gpu(name: str, local_rank: int) -> torch.device:
    if local_rank and ":" in name:
        raise ValueError(
            f"--device {name}: all ranks would share {name}: omit --device; "
            "each rank then uses its own GPU"
        )
    device = torch.device(name if ":" in name else f"cuda:{local_rank}")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"there is no device {device}: this machine has {count} GPUs")
    torch.cuda.set_device(device)
    return device


def _has_gpu() -> bool:
    """Whether an NVIDIA GPU is in this machine, even if torch cannot use it."""
    by_driver = Path("/proc/driver/nvidia/gpus").glob("*")
    by_device_file = Path("/dev").glob("nvidia[0-9]*")
    return any(by_driver) or any(by_device_file)


def describe_device(device: torch.device) -> str:
    """The name of a GPU, or the number of CPU cores that may be used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {usable_cores()} cores"


def usable_cores() -> int:
    """CPU cores that this process may run on. On a shared machine that is not all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def single_threaded_workers(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool of threads, each of which runs torch on itself alone: they work on different images.

    torch's own (OpenMP) threads wait for each other by spinning. On a core that something else
    needs as well, each operation then waits for a whole scheduler slice: distorting 48-pixel views
    took 100 times as long (bench/NOTES.md).

    All workers have started when this returns: see `torch_threads_kept`.
    """
    if threads < 1:
        raise ValueError(f"{threads} threads: at least 1 is needed")
    with torch_threads_kept():
        pool = ThreadPoolExecutor(threads, f"twinfeed-{name}", initializer=_use_one_thread)
        all_started = Barrier(threads + 1)
        try:
            for _ in range(threads):
                pool.submit(all_started.wait)
            all_started.wait()
        except BaseException:
            # The system allows no more threads. Those that have started must not wait for the rest.
            all_started.abort()
            pool.shutdown()
            raise
    return pool


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restores torch's number of threads at the end, if anything inside changes it.

    `torch.set_num_threads` sets it for the calling thread, but also for all threads that are made
    later. The lock keeps another caller from taking the temporary number for the usual one.
    """
    with _STARTING:
        usual = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(usual)


def _use_one_thread() -> None:
    torch.get_num_threads()  # a thread's first call adopts the default, even after it has set one
    torch.set_num_threads(1)
