"""What the machine could do at most where a rung does nothing but its one necessary thing: measured, not looked up.

Each is the best of several repeats, on as many threads as the rung has.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model
from experiment.presets import ModelConfig

_BLOCK = 16 << 20  # bytes a thread: beyond what its core's caches hold
_GPU_BLOCK = 256 << 20
_REPEATS, _SECONDS = (
    5,
    0.5,
)  # at least: others on the machine are less likely to be in the way all the time


def reading(mean_bytes: float, threads: int) -> float:
    """Images/s at which encoded images are copied in memory."""
    blocks = [
        (np.ones(_BLOCK, dtype=np.uint8), np.ones(_BLOCK, dtype=np.uint8)) for _ in range(threads)
    ]
    return _BLOCK / mean_bytes * _on_all(threads, lambda thread: np.copyto(*blocks[thread]))


def decoding(encoded: Sequence[bytes], threads: int) -> float | None:
    """Images/s of libjpeg-turbo's bare call; None where not all are JPEGs that it takes."""
    if not encoded or not all(data[:2] == b"\xff\xd8" for data in encoded):
        return None
    try:
        sizes = [simplejpeg.decode_jpeg(data, "RGB").size for data in encoded]
    except ValueError:  # damaged, or CMYK
        return None
    pixels = [
        np.zeros(max(sizes), dtype=np.uint8) for _ in range(threads)
    ]  # written before: no page faults

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
    return (
        _GPU_BLOCK
        / bytes_per_image
        / _seconds(lambda: target.copy_(block, non_blocking=True), device)
    )


def arithmetic(
    network: ModelConfig, size: int, device: torch.device, dtype: torch.dtype | None = None
) -> float:
    """Images/s if the step were nothing but its multiplications, at the speed of a large matrix product.

    dtype: of the product, by default what the step would choose.
    """
    dtype = dtype or model.choose_precision("auto", device)
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    flop_per_s = 2 * side**3 / _seconds(lambda: a @ b, device)
    return flop_per_s / step_flop(network, size)


def step_flop(network: ModelConfig, size: int) -> float:
    """Floating-point operations of network and projector in a training step, for both views of an image."""
    with FlopCounterMode(display=False) as counter:
        images = _count_a_view(network, size)
    return 2 * counter.get_total_flops() / images


def memory_speed(device: torch.device) -> float:
    """Bytes/s that are read and written while a large block is copied within the device's memory."""
    block = (4 if device.type == "cuda" else 1) * _GPU_BLOCK
    source = torch.ones(block, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * block / _seconds(lambda: target.copy_(source), device)


def step_traffic(network: ModelConfig, size: int, dtype: torch.dtype, fused: bool = False) -> float:
    """Bytes that a training step reads and writes at least, for both views of an image, in a batch that is large.

    Each operation of network and projector reads what it is given and writes what it returns. fused: ReLUs cost
    nothing, since what comes before them does them as well.
    """
    with _Traffic(fused) as counter:
        images = _count_a_view(network, size)
    return 2 * counter.elements * dtype.itemsize / images


class _Traffic(TorchDispatchMode):
    """Counts elements of tensors that operations read and write."""

    # So many of their first tensors are read a second time: batch norm needs the moments first, and a convolution's
    # backward pass is two products with the gradient.
    _TWICE: ClassVar = {
        "native_batch_norm": 1,
        "native_batch_norm_backward": 2,
        "convolution_backward": 1,
    }

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.elements = 0
        self._free = {"relu_", "threshold_backward"} if fused else set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, given: Any = (), options: Any = None
    ) -> Any:
        result, name = operation(*given, **(options or {})), operation.overloadpacket.__name__
        if not operation.is_view and name not in self._free:
            moved = tree_leaves((given, result, given[: self._TWICE.get(name, 0)]))
            self.elements += sum(x.numel() for x in moved if isinstance(x, torch.Tensor))
        return result


def _count_a_view(network: ModelConfig, size: int) -> int:
    """A forward and backward pass of one view in which nothing is computed; how many images were in it."""
    batch = 256  # of which what parameters take, once a step, is a small part
    with torch.device("meta"):
        backbone = model.build_backbone(network.backbone, network.width, network.small_stem)
        twins = model.BarlowTwins(backbone, network.projector, network.lambd, network.loss_scale)
        view = torch.empty(batch, 3, size, size)
    twins.projector(twins.backbone(view)).sum().backward()
    return batch


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
