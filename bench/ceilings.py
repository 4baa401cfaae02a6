"""What the machine could do at most where a rung does nothing but its one necessary thing: measured, not looked up."""

from __future__ import annotations

import io
import statistics
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

_BLOCK = 64 << 20  # bytes: beyond what caches hold
_REPEATS = 5


def reading(mean_bytes: float) -> float:
    """Images/s at which one core copies encoded images in memory."""
    source, target = np.ones(_BLOCK, dtype=np.uint8), np.empty(_BLOCK, dtype=np.uint8)
    return _BLOCK / _seconds(lambda: np.copyto(target, source)) / mean_bytes


def decoding(encoded: Sequence[bytes], threads: int) -> float | None:
    """Images/s of libjpeg-turbo's bare call on one core, times the cores; None where not all are JPEGs."""
    if not all(data[:2] == b"\xff\xd8" for data in encoded):
        return None
    try:
        return threads * len(encoded) / _seconds(lambda: [simplejpeg.decode_jpeg(data, "RGB") for data in encoded])
    except ValueError:  # damaged, or CMYK
        return None


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
    blocks = [torch.empty(_BLOCK, dtype=torch.uint8, device=device) for _ in range(threads)]
    if device.type == "cuda":
        return _BLOCK / _seconds(lambda: blocks[0].fill_(1), device) / bytes_per_image
    with ThreadPoolExecutor(threads) as pool:
        fill = [block.numpy().fill for block in blocks]
        seconds = _seconds(lambda: list(pool.map(lambda one: one(1), fill)))
    return threads * _BLOCK / seconds / bytes_per_image


def copying(bytes_per_image: int, device: torch.device) -> float:
    """Images/s that one large pinned copy to the device comes to."""
    block = torch.empty(4 * _BLOCK, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(block, device=device)
    return 4 * _BLOCK / _seconds(lambda: target.copy_(block, non_blocking=True), device) / bytes_per_image


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


def _seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Median time of the work."""
    found = []
    for _ in range(1 + _REPEATS):
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])
