"""uint8 crops + parameters -> normalised views, on the device of the crops. The same for every decoder.

Formulas are torchvision's for float images in [0, 1]. The blur is the exact Gaussian with replicated borders.
`fused.py` carries them out on a CPU and `fused_gpu.py` on a GPU, each compiled for it. What is here is for where they
cannot be: batched over samples that each have parameters of their own, an operation touching only those that need it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Executor
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .buffer_pool import BufferPool
from .recipe import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    LUMA,
    SATURATION,
    Recipe,
    ViewParams,
    barlow_twins,
    draw,
)

_CHUNK = 16  # images that a CPU thread takes at a time


def distort(
    crops: Tensor,
    params: ViewParams,
    recipe: Recipe,
    out_dtype: torch.dtype = torch.float32,
    pool: Executor | None = None,
    memory: BufferPool | None = None,
) -> tuple[Tensor, ...]:
    """Views, each [B, 3, S, S] of `out_dtype`, channels_last and normalised, from uint8 crops [V, B, S, S, 3].

    On the CPU the threads of `pool`, if there is one, share the work: the bits are the same for any number of them. The
    views lie in `memory` there.
    """
    if crops.device.type == "cpu":
        return _distort_on_cpu(crops, params, recipe, out_dtype, pool, memory or BufferPool())
    if out_dtype != torch.float64 and (kernels := _gpu_kernels(crops.device)):
        return kernels(crops, params, recipe, out_dtype)
    return tuple(
        distort_batched(view, params.take(v), recipe, out_dtype) for v, view in enumerate(crops)
    )


@cache
def _gpu_kernels(device: torch.device) -> Callable[..., tuple[Tensor, ...]] | None:
    """Those of `fused_gpu.py`; None where Triton is missing, or the C compiler that it needs: one image is tried.

    Of 16 pixels a side: the machine code is then that for all multiples of 16.
    """
    try:
        from .distort_gpu import distort_views

        recipe = barlow_twins(16)
        params = draw(recipe, 0, 0, *np.ones((3, 1), dtype=np.int64))
        distort_views(
            torch.zeros((2, 1, 16, 16, 3), dtype=torch.uint8, device=device),
            params,
            recipe,
            torch.float32,
        )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"distortions take several times as long, since Triton fails here: {reason}",
            stacklevel=2,
        )
        return None
    return distort_views


def _distort_on_cpu(
    crops: Tensor,
    params: ViewParams,
    recipe: Recipe,
    out_dtype: torch.dtype,
    pool: Executor | None,
    memory: BufferPool,
) -> tuple[Tensor, ...]:
    from .distort_cpu import (
        distort_view,  # Numba takes a second to import, and a GPU does not need it
    )

    count, batch, size = crops.shape[:3]
    compute = torch.promote_types(out_dtype, torch.float32)
    views = [memory.empty((batch, size, size, 3), compute) for _ in range(count)]

    def distort_chunk(chunk: tuple[int, int]) -> None:
        v, first = chunk
        rows = slice(first, first + _CHUNK)
        distort_view(crops[v, rows].numpy(), params.take(v, rows), recipe, views[v][rows].numpy())

    chunks = [(v, first) for first in range(0, batch, _CHUNK) for v in range(count)]
    list((pool.map if pool else map)(distort_chunk, chunks))
    return tuple(view.permute(0, 3, 1, 2).to(out_dtype) for view in views)


def distort_batched(
    crops: Tensor, params: ViewParams, recipe: Recipe, out_dtype: torch.dtype
) -> Tensor:
    """One view [B, 3, S, S] of uint8 crops [B, S, S, 3], on any device."""
    compute = torch.promote_types(out_dtype, torch.float32)
    x = (
        crops.permute(0, 3, 1, 2).to(compute, memory_format=torch.contiguous_format).div_(255)
    )  # [B, 3, S, S]

    def apply(
        operation: Callable[..., Tensor], chosen: NDArray[np.bool_], *values: NDArray[np.float32]
    ) -> None:
        """x = operation(x, *values) for the chosen samples; `values` [B] arrive as [n, 1, 1, 1]."""
        if not chosen.any():
            return
        at = torch.from_numpy(np.flatnonzero(chosen)).to(x.device)
        columns = (
            torch.from_numpy(v[chosen]).to(x.device, compute)[:, None, None, None] for v in values
        )
        x[at] = operation(x[at], *columns)

    apply(_flip, params.flip)
    for place in range(4):
        for number, operation in _JITTER.items():
            factor = params.jitter_factor[:, number]
            chosen = params.jitter & (params.jitter_order[:, place] == number)
            apply(operation, chosen & (factor != _IDENTITY[number]), factor)
    apply(_grayscale, params.gray)
    apply(_blur, params.blur_sigma > 0, params.blur_sigma)
    apply(_solarize, params.solarize)

    mean, std = (
        torch.tensor(c, dtype=compute, device=x.device)[:, None, None]
        for c in (recipe.mean, recipe.std)
    )
    return x.sub_(mean).div_(std).to(out_dtype, memory_format=torch.channels_last)


def _flip(x: Tensor) -> Tensor:
    return x.flip(3)


def _luma(x: Tensor) -> Tensor:  # [n, 1, S, S]
    return LUMA[0] * x[:, 0:1] + LUMA[1] * x[:, 1:2] + LUMA[2] * x[:, 2:3]


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Around the mean grey level of the image as it is now, after the operations before."""
    return (x * factor + (1 - factor) * _luma(x).mean((1, 2, 3), keepdim=True)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor + (1 - factor) * _luma(x)).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """A shift in HSV by `shift` turns of the colour wheel, through the closed form of HSV -> RGB.

    With value v, chroma c and hue h in sixths of a turn, channel k is v - c * clamp(min(t, 4 - t), 0, 1),
    t = (h + n_k) mod 6, n = 5, 3, 1 for red, green and blue: no sextant tables, no gathers.
    """
    red, green, blue = x.unbind(1)  # [n, S, S] each
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue + 6 * shift[:, 0]
    channels = []
    for n in (5, 3, 1):
        t = torch.remainder(hue + n, 6)
        channels.append(value - chroma * torch.minimum(t, 4 - t).clamp_(0, 1))
    return torch.stack(channels, 1)


def _grayscale(x: Tensor) -> Tensor:
    return _luma(x).expand_as(x)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of rows, then columns, each a product with one matrix per sample: any mixture of sigmas at once.

    Row i of the matrix is the normalised kernel around pixel i. What would fall outside the image is added to the
    pixel at its edge, which is what replicating the border means; the kernel is cut off at twice the size only.
    """
    size, n = x.shape[-1], len(x)
    pixel = torch.arange(size, device=x.device)
    distance = torch.arange(2 * size, device=x.device)
    kernel = torch.exp(-0.5 * (distance / sigma[:, 0, 0]) ** 2)  # [n, 2 S], one side of it
    beyond = (kernel[:, None] * (distance > pixel[:, None])).sum(
        2
    )  # [n, S]: more than i pixels away
    matrix = kernel[:, (pixel[:, None] - pixel).abs()]  # [n, S, S]
    matrix[:, :, 0] += beyond
    matrix[:, :, -1] += beyond.flip(1)
    matrix /= matrix.sum(2, keepdim=True)
    rows = x.reshape(n, 3 * size, size) @ matrix.mT
    return (matrix[:, None] @ rows.reshape(n, 3, size, size)).clamp_(0, 1)


def _solarize(x: Tensor) -> Tensor:
    return torch.where(x >= 128 / 255, 1 - x, x)


_JITTER = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
_IDENTITY = {BRIGHTNESS: 1, CONTRAST: 1, SATURATION: 1, HUE: 0}
