"""What this machine offers: its device, its cores, and threads that work on images."""

from __future__ import annotations

import math
import os
import re
import warnings
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Barrier, Lock

import torch

_STARTING = Lock()


def find_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """`cpu`, `cuda` or `cuda:N` as asked; `auto` takes a GPU where there is one, and of several that of this rank.

    ValueError, with the remedy, where a GPU was asked for or is in the machine but torch cannot use it: training on
    the CPU by mistake would go unnoticed for hours. An empty CUDA_VISIBLE_DEVICES says that the CPU is meant.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"auto|cuda(:\d+)?", name):
        raise ValueError(f"device is {name!r}: choose auto, cpu, cuda or cuda:N")
    with warnings.catch_warnings(
        record=True
    ) as caught:  # torch says here what it dislikes about the driver
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        if local_rank and ":" in name:
            raise ValueError(
                f"--device {name} is one GPU for several ranks: leave it out, and each takes its own"
            )
        device = torch.device(f"cuda:{local_rank}" if name in ("auto", "cuda") else name)
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"there is no device {device}: this machine has {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(device)
        return device
    present = any(Path("/proc/driver/nvidia/gpus").glob("*")) or any(
        Path("/dev").glob("nvidia[0-9]*")
    )
    if name == "auto" and (not present or os.environ.get("CUDA_VISIBLE_DEVICES") == ""):
        return torch.device("cpu")
    reason = f" ({str(caught[0].message).splitlines()[0]})" if caught else ""
    raise ValueError(
        f"torch {torch.__version__} finds no GPU it can use{reason}. Its wheels for CUDA {torch.version.cuda} need an "
        "NVIDIA driver of release 580 or newer: update the driver, install a torch built for an older CUDA, or give "
        "the container its GPU. `--device cpu` trains without one."
    )


def describe_device(device: torch.device) -> str:
    """The name of a GPU, or how many cores of the CPU may be used."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {usable_cores()} cores"
    )


def usable_cores() -> int:
    """CPU cores that this process may run on: on a shared machine fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BufferPool:
    """Memory for tensors, which is used again when the last tensor that lies in it is gone.

    What the system hands out afresh it clears first, page by page: a twelfth of the time of making views on a CPU
    (bench/NOTES.md). What is too small is given back, so that batches of many sizes do not each keep some.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised, contiguous CPU tensor."""
        count = math.prod(shape) * dtype.itemsize
        if not count:
            return torch.empty(shape, dtype=dtype)
        block = torch.empty(0, dtype=torch.uint8)
        with suppress(IndexError):  # none is left; tensors may come and go in several threads
            while len(block) < count:
                block = self._free.pop()
        if len(block) < count:
            block = torch.empty(count, dtype=torch.uint8)
        lent = block.numpy()[
            :count
        ]  # an object of its own, which the tensors made of it keep alive
        weakref.finalize(lent, self._free.append, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(*shape)


def single_threaded_workers(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool of `threads` threads in each of which torch runs on that thread alone: images are the unit of parallelism.

    torch's own (OpenMP) threads wait for each other by spinning. On a core that something else needs as well, each
    operation then waits for a whole scheduler slice: distorting 48-pixel views took 100 times as long (bench/NOTES.md).

    The workers have all started when they are given out: see `torch_threads_kept`.
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
        except (
            BaseException
        ):  # the system allows no more threads: those that have started must not wait for the rest
            all_started.abort()
            pool.shutdown()
            raise
    return pool


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Undoes `torch.set_num_threads` at the end, by whichever thread it was called.

    It holds for the calling thread, but also becomes the default of threads made later: it is given back before another
    caller can take it for the usual number.
    """
    with _STARTING:
        here = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(here)


def _use_one_thread() -> None:
    torch.get_num_threads()  # a thread's first call takes over the default, even after it has set its own
    torch.set_num_threads(1)
