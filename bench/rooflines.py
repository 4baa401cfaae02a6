"""Upper bounds for the stages, measured on this machine rather than looked up.

A stage cannot be faster than the one thing that it has to do: reading cannot be faster than
copying memory, decoding not faster than a bare call of libjpeg-turbo, a training step not faster
than its multiplications alone. The throughput of that one thing is the stage's roofline. The
fraction of it that a stage reaches shows how much there is left to gain.

Each roofline is the best of several repeats, on as many threads as the stage has. What a training
step has to multiply and to move is counted in `step_cost.py`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import simplejpeg
import torch
from PIL import Image

import model
from experiment import ModelConfig

from .step_cost import step_flop

_BLOCK = 16 << 20  # bytes per thread: more than the caches of its core hold
_GPU_BLOCK = 256 << 20
# At least so many repeats, and for at least so long: other load on the machine is less likely to
# slow down all of them.
_REPEATS = 5
_SECONDS = 0.5


def read_rate(mean_bytes: float, threads: int) -> float:
    """Images/s at which encoded images are copied in memory."""
    sources = [np.ones(_BLOCK, dtype=np.uint8) for _ in range(threads)]
    targets = [np.ones(_BLOCK, dtype=np.uint8) for _ in range(threads)]

    def copy_block(thread: int) -> None:
        np.copyto(targets[thread], sources[thread])

    return _BLOCK / mean_bytes * _calls_per_second(copy_block, threads)


def decode_rate(encoded: Sequence[bytes], threads: int) -> float | None:
    """Images/s of bare calls of libjpeg-turbo.

    None if not all of `encoded` are JPEGs that it accepts.
    """
    are_jpegs = all(data[:2] == b"\xff\xd8" for data in encoded)
    if not encoded or not are_jpegs:
        return None
    try:
        sizes = [simplejpeg.decode_jpeg(data, "RGB").size for data in encoded]
    except ValueError:  # damaged, or CMYK
        return None
    # Filled with zeros here, so that no page faults are timed.
    buffers = [np.zeros(max(sizes), dtype=np.uint8) for _ in range(threads)]

    def decode_all(thread: int) -> None:
        for data in encoded:
            simplejpeg.decode_jpeg(data, "RGB", buffer=buffers[thread])

    return len(encoded) * _calls_per_second(decode_all, threads)


def small_decode_speedup(encoded: Sequence[bytes], side: int) -> float | None:
    """How many times as fast JPEGs decode if they are reduced to at most `side` pixels a side.

    None if not all of `encoded` are JPEGs that libjpeg-turbo accepts.
    """
    whole = decode_rate(encoded, 1)
    small = decode_rate(reduced(encoded, side), 1)
    if whole is None or small is None:
        return None
    return small / whole


def reduced(encoded: Sequence[bytes], side: int) -> list[bytes]:
    """The same images as JPEGs of at most `side` pixels a side, quality 90."""
    images = []
    for data in encoded:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images


def write_rate(bytes_per_image: int, device: torch.device, threads: int) -> float:
    """Images/s at which finished views are written to the device's memory."""
    if device.type == "cuda":
        block = torch.empty(_GPU_BLOCK, dtype=torch.uint8, device=device)
        return _GPU_BLOCK / bytes_per_image / _shortest_time(lambda: block.fill_(1), device)
    blocks = [np.ones(_BLOCK, dtype=np.uint8) for _ in range(threads)]

    def fill_block(thread: int) -> None:
        blocks[thread].fill(1)

    return _BLOCK / bytes_per_image * _calls_per_second(fill_block, threads)


def transfer_rate(bytes_per_image: int, device: torch.device) -> float:
    """Images/s of one large copy from pinned memory to the GPU."""
    source = torch.empty(_GPU_BLOCK, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    seconds = _shortest_time(lambda: target.copy_(source, non_blocking=True), device)
    return _GPU_BLOCK / bytes_per_image / seconds


def multiply_rate(
    network: ModelConfig, size: int, device: torch.device, dtype: torch.dtype | None = None
) -> float:
    """Images/s of a training step that is nothing but its multiplications.

    They are taken to be as fast as one large matrix product in `dtype`, by default the precision
    that training would choose.
    """
    dtype = dtype or model.choose_precision("auto", device)
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    flop_per_s = 2 * side**3 / _shortest_time(lambda: a @ b, device)
    return flop_per_s / step_flop(network, size)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes/s that are read and written while a large block is copied within device memory."""
    block_bytes = (4 if device.type == "cuda" else 1) * _GPU_BLOCK
    source = torch.ones(block_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * block_bytes / _shortest_time(lambda: target.copy_(source), device)


def _calls_per_second(work: Callable[[int], object], threads: int) -> float:
    """Calls of `work` per second, of all threads together; each passes its own number."""
    with ThreadPoolExecutor(threads) as pool:
        return threads / _shortest_time(lambda: list(pool.map(work, range(threads))))


def _shortest_time(work: Callable[[], object], device: torch.device | None = None) -> float:
    """The shortest time of a call, in seconds; the first call is a warm-up."""
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(seconds) <= _REPEATS or time.perf_counter() < end:
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
