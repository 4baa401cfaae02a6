"""What the machine could do at most where a rung does nothing but its one necessary thing: measured, not looked up.

Each is the best of several repeats, on as many threads as the rung has.
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
from torch.utils.flop_counter import FlopCounterMode

import model as barlow
from presets import ModelConfig

_BLOCK = 16 << 20  # bytes a thread: beyond what its core's caches hold
_GPU_BLOCK = 256 << 20
_REPEATS, _SECONDS = 5, 0.5  # at least: others on the machine are less likely to be in the way all the time


def reading(mean_bytes: float, threads: int) -> float:
    """Images/s at which encoded images are copied in memory."""
    blocks = [(np.ones(_BLOCK, dtype=np.uint8), np.ones(_BLOCK, dtype=np.uint8)) for _ in range(threads)]
    return _BLOCK / mean_bytes * _on_all(threads, lambda thread: np.copyto(*blocks[thread]))


def decoding(encoded: Sequence[bytes], threads: int) -> float | None:
    """Images/s of libjpeg-turbo's bare call; None where not all are JPEGs that it takes."""
    if not encoded or not all(data[:2] == b"\xff\xd8" for data in encoded):
        return None
    try:
        sizes = [simplejpeg.decode_jpeg(data, "RGB").size for data in encoded]
    except ValueError:  # damaged, or CMYK
        return None
    pixels = [np.zeros(max(sizes), dtype=np.uint8) for _ in range(threads)]  # written before: no page faults

    def decode(thread: int) -> None:
        for data in encoded:
            simplejpeg.decode_jpeg(data, "RGB", buffer=pixels[thread])

    return len(encoded) * _on_all(threads, decode)


def smaller(encoded: Sequence[bytes], side: int) -> list[bytes]:
    """The same images as JPEGs of at most `side` pixels a side, quality 90."""
    found = []
    for data in encoded:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def writing(bytes_per_image: int, device: torch.device, threads: int) -> float:
    """Images/s at which the device's memory takes up finished views."""
    if device.type == "cuda":
        block = torch.empty(_GPU_BLOCK, dtype=torch.uint8, device=device)
        return _GPU_BLOCK / bytes_per_image / _seconds(lambda: block.fill_(1), device)
    blocks = [np.ones(_BLOCK, dtype=np.uint8) for _ in range(threads)]
    return _BLOCK / bytes_per_image * _on_all(threads, lambda thread: blocks[thread].fill(1))


def copying(bytes_per_image: int, device: torch.device) -> float:
    """Images/s that one large pinned copy to the device comes to."""
    block = torch.empty(_GPU_BLOCK, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(block, device=device)
    return _GPU_BLOCK / bytes_per_image / _seconds(lambda: target.copy_(block, non_blocking=True), device)


def arithmetic(network: ModelConfig, size: int, device: torch.device) -> float:
    """Images/s if the step were nothing but its multiplications, at the speed of a large matrix product."""
    dtype = barlow.choose_precision("auto", device)
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    flop_per_s = 2 * side**3 / _seconds(lambda: a @ b, device)
    return flop_per_s / step_flop(network, size)


def step_flop(network: ModelConfig, size: int) -> float:
    """Floating-point operations of network and projector in a training step, for both views of an image."""
    batch = 4
    with torch.device("meta"):
        backbone = barlow.build_backbone(network.backbone, network.width, network.small_stem)
        model = barlow.BarlowTwins(backbone, network.projector, network.lambd, network.loss_scale)
        view = torch.empty(batch, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model.projector(model.backbone(view)).sum().backward()
    return 2 * counter.get_total_flops() / batch


def _on_all(threads: int, work: Callable[[int], object]) -> float:
    """How often a second all threads together get the work done, each at its own."""
    with ThreadPoolExecutor(threads) as pool:
        return threads / _seconds(lambda: list(pool.map(work, range(threads))))


def _seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """The shortest time that the work took."""
    found: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(found) <= _REPEATS or time.perf_counter() < end:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])
