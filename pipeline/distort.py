"""uint8 crops and drawn parameters in, normalised views out, on the device of the crops.

The formulas are torchvision's for float images in [0, 1], and the blur is the exact Gaussian with
replicated borders. They are written three times, and tests hold them to each other: as batched
torch operations here, in which each sample has parameters of its own; compiled for the CPU in
`distort_cpu.py`; and for the GPU in `distort_gpu.py`. The compiled ones are used if they can be.
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
from .draw import ViewParams, draw
from .recipe import BRIGHTNESS, CONTRAST, HUE, LUMA, SATURATION, Recipe, barlow_twins

_IMAGES_PER_TASK = 16  # images that a CPU thread takes at a time


def distort(
    crops: Tensor,
    params: ViewParams,
    recipe: Recipe,
    out_dtype: torch.dtype = torch.float32,
    pool: Executor | None = None,
    memory: BufferPool | None = None,
) -> tuple[Tensor, ...]:
    """Distort and normalise the crops of all views.

    Args:
        crops: uint8 [V, B, S, S, 3].
        params: Their parameters, from `draw`.
        recipe: The recipe that they were drawn from.
        out_dtype: Data type of the views.
        pool: Threads that share the work on a CPU. The result is the same to the bit for any
            number of them. Default: the calling thread.
        memory: Where the views lie on a CPU. Default: new memory.

    Returns:
        V views, each [B, 3, S, S], channels_last, on the device of the crops.
    """
    if crops.device.type == "cpu":
        return _distort_on_cpu(crops, params, recipe, out_dtype, pool, memory or BufferPool())
    if out_dtype != torch.float64:
        distort_views = _load_gpu_kernels(crops.device)
        if distort_views is not None:
            return distort_views(crops, params, recipe, out_dtype)
    return tuple(
        distort_batched(view_crops, params.take(v), recipe, out_dtype)
        for v, view_crops in enumerate(crops)
    )


@cache
def _load_gpu_kernels(device: torch.device) -> Callable[..., tuple[Tensor, ...]] | None:
    """`distort_gpu.distort_views`, or None if it does not work here.

    Triton can be missing, or the C compiler that it needs, so one image is tried. It has 16 pixels
    a side because Triton compiles the same machine code for all multiples of 16.
    """
    try:
        from .distort_gpu import distort_views

        recipe = barlow_twins(16)
        one = np.ones(1, dtype=np.int64)
        params = draw(recipe, 0, 0, samples=one, heights=one, widths=one)
        crops = torch.zeros((2, 1, 16, 16, 3), dtype=torch.uint8, device=device)
        distort_views(crops, params, recipe, torch.float32)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            "distortions take several times as long, "
            f"because Triton does not work on this machine: {reason}",
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
    # Imported here because Numba takes a second to import, and is not needed on a GPU.
    from .distort_cpu import distort_view

    count, batch, size = crops.shape[:3]
    compute_dtype = torch.promote_types(out_dtype, torch.float32)
    views = [memory.empty((batch, size, size, 3), compute_dtype) for _ in range(count)]

    def distort_part(part: tuple[int, int]) -> None:
        v, first = part
        rows = slice(first, first + _IMAGES_PER_TASK)
        distort_view(crops[v, rows].numpy(), params.take(v, rows), recipe, views[v][rows].numpy())

    parts = [(v, first) for first in range(0, batch, _IMAGES_PER_TASK) for v in range(count)]
    if pool is None:
        for part in parts:
            distort_part(part)
    else:
        list(pool.map(distort_part, parts))  # the list waits for all of them
    return tuple(view.permute(0, 3, 1, 2).to(out_dtype) for view in views)


def distort_batched(
    crops: Tensor, params: ViewParams, recipe: Recipe, out_dtype: torch.dtype
) -> Tensor:
    """Distort the crops of one view with batched torch operations, on any device.

    Args:
        crops: uint8 [B, S, S, 3].
        params: Their parameters, without the dimension of the views.
        recipe: The recipe that they were drawn from.
        out_dtype: Data type of the view.

    Returns:
        The view [B, 3, S, S], channels_last.
    """
    compute_dtype = torch.promote_types(out_dtype, torch.float32)
    x = crops.permute(0, 3, 1, 2)  # [B, 3, S, S]
    x = x.to(compute_dtype, memory_format=torch.contiguous_format).div_(255)

    _apply(_flip, x, params.flip)
    for place in range(4):
        for number, operation in _JITTER.items():
            factor = params.jitter_factor[:, number]
            chosen = params.jitter & (params.jitter_order[:, place] == number)
            _apply(operation, x, chosen & (factor != _IDENTITY[number]), factor)
    _apply(_grayscale, x, params.gray)
    _apply(_blur, x, params.blur_sigma > 0, params.blur_sigma)
    _apply(_solarize, x, params.solarize)

    mean = torch.tensor(recipe.mean, dtype=compute_dtype, device=x.device)[:, None, None]
    std = torch.tensor(recipe.std, dtype=compute_dtype, device=x.device)[:, None, None]
    return x.sub_(mean).div_(std).to(out_dtype, memory_format=torch.channels_last)


def _apply(
    operation: Callable[..., Tensor],
    x: Tensor,
    chosen: NDArray[np.bool_],
    *values: NDArray[np.float32],
) -> None:
    """Apply `operation` in place to the chosen images of `x` [B, 3, S, S].

    It is called with the n chosen images and, of each of `values` [B], theirs as [n, 1, 1, 1].
    """
    if not chosen.any():
        return
    indices = torch.from_numpy(np.flatnonzero(chosen)).to(x.device)
    arguments = [
        torch.from_numpy(value[chosen]).to(x.device, x.dtype)[:, None, None, None]
        for value in values
    ]
    x[indices] = operation(x[indices], *arguments)


def _flip(x: Tensor) -> Tensor:
    return x.flip(3)


def _luma(x: Tensor) -> Tensor:  # [n, 1, S, S]
    return LUMA[0] * x[:, 0:1] + LUMA[1] * x[:, 1:2] + LUMA[2] * x[:, 2:3]


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Around the mean grey level of the image after the operations before this one."""
    mean = _luma(x).mean((1, 2, 3), keepdim=True)
    return (x * factor + (1 - factor) * mean).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor + (1 - factor) * _luma(x)).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue in HSV by `shift` turns of the colour wheel, with HSV -> RGB in closed form.

    With value v, chroma c and hue h in sixths of a turn, channel k is
    v - c * clamp(min(t, 4 - t), 0, 1), where t = (h + n_k) mod 6 and n = 5, 3, 1 for red, green and
    blue. This needs no tables of sextants and no gathers.
    """
    red, green, blue = x.unbind(1)  # [n, S, S] each
    value = x.amax(1)
    chroma = value - x.amin(1)
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
    """Gaussian blur of the rows, then of the columns, as products with one matrix per image.

    Images of any mixture of sigmas are blurred at once. Row i of the matrix is the normalised
    kernel around pixel i. The weights that would fall outside the image are added to the pixel at
    its edge, which replicates the border. The kernel is cut off at twice the size.
    """
    size = x.shape[-1]
    n = len(x)
    pixel = torch.arange(size, device=x.device)
    distance = torch.arange(2 * size, device=x.device)
    kernel = torch.exp(-0.5 * (distance / sigma[:, 0, 0]) ** 2)  # [n, 2 S], one side of it

    is_beyond = distance > pixel[:, None]  # [S, 2 S]: more than i pixels away
    weight_beyond = (kernel[:, None] * is_beyond).sum(2)  # [n, S]
    matrix = kernel[:, (pixel[:, None] - pixel).abs()]  # [n, S, S]
    matrix[:, :, 0] += weight_beyond
    matrix[:, :, -1] += weight_beyond.flip(1)
    matrix /= matrix.sum(2, keepdim=True)

    rows = x.reshape(n, 3 * size, size) @ matrix.mT
    return (matrix[:, None] @ rows.reshape(n, 3, size, size)).clamp_(0, 1)


def _solarize(x: Tensor) -> Tensor:
    return torch.where(x >= 128 / 255, 1 - x, x)


_JITTER = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
_IDENTITY = {BRIGHTNESS: 1, CONTRAST: 1, SATURATION: 1, HUE: 0}  # factors that change nothing
