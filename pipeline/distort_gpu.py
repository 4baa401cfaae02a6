"""The distortions on a GPU: four Triton kernels over all images of a batch, both views at once.

The same formulas as in `distort.py`, whose batched operations launch some two hundred kernels that each read and write
what they work on. Here the parameters travel in one table, and pixels are read and written four times at most.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from .recipe import CONTRAST, HUE, LUMA, Recipe, ViewParams

_REACH = 4.5  # standard deviations: beyond lie 7e-6 of a blur's kernel
_BLOCK = 1024  # pixels that a program handles at a time
_IMAGES = 512  # that are on their way at a time: at 224 px they take up 0.6 GB
_OPTIONS = {"enable_fp_fusion": True}  # Triton warns that its default will change
_FIELDS = 20  # of an image's row in the table; 4 operations, 4 factors, 3 scales and 3 shifts are the last of them

_R, _G, _B = (tl.constexpr(weight) for weight in LUMA)


def distort_views(
    crops: Tensor, params: ViewParams, recipe: Recipe, out_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Views, each [B, 3, S, S] of `out_dtype`, channels_last, of uint8 crops [V, B, S, S, 3] on a GPU."""
    count, batch, size = crops.shape[:3]
    images = crops.reshape(-1, size, size, 3).contiguous()
    table = torch.from_numpy(_table(params, recipe))
    table = (table.pin_memory() if crops.is_cuda else table).to(crops.device, non_blocking=True)
    out = torch.empty((count, batch, size, size, 3), dtype=out_dtype, device=crops.device)
    means = torch.empty(_IMAGES, device=crops.device)
    planes, rows = torch.empty((2, min(_IMAGES, len(images)), 3, size, size), device=crops.device)
    for part in zip(
        images.split(_IMAGES), table.split(_IMAGES), out.flatten(0, 1).split(_IMAGES), strict=True
    ):
        some, lines, views = part
        grid, shape = (len(some), triton.cdiv(size * size, _BLOCK)), (size * size, size)
        _mean[grid[:1]](some, lines, means, *shape, _BLOCK, **_OPTIONS)
        _colour[grid](some, lines, means, planes, *shape, _BLOCK, **_OPTIONS)
        _blur_rows[grid](planes, lines, rows, *shape, _BLOCK, **_OPTIONS)
        _finish[grid](planes, rows, lines, views, *shape, _BLOCK, **_OPTIONS)
    return tuple(view.permute(0, 3, 1, 2) for view in out)


def _table(params: ViewParams, recipe: Recipe) -> NDArray[np.float32]:
    """A row [_FIELDS] for each image. Operations that change nothing are -1."""
    rows = np.zeros((*params.flip.shape, _FIELDS), dtype=np.float32)  # [V, B, _FIELDS]
    order = params.jitter_order.astype(np.int64)
    factor = np.take_along_axis(params.jitter_factor, order, axis=-1)  # by place
    idle = ~params.jitter[..., None] | (factor == np.where(order == HUE, 0, 1))
    operation = np.where(idle, -1, order)
    contrast = operation == CONTRAST
    radius = np.minimum(np.ceil(_REACH * params.blur_sigma), 2 * recipe.size)
    place = np.where(contrast.any(-1), contrast.argmax(-1), -1)
    threshold = np.where(params.solarize, 128 / 255, 2)  # 2: never reached
    for i, field in enumerate(
        (params.flip, params.gray, threshold, params.blur_sigma, radius, place)
    ):
        rows[..., i] = field
    rows[..., 6:10], rows[..., 10:14] = operation, factor
    mean, std = np.array(recipe.mean), np.array(recipe.std)
    rows[..., 14:17], rows[..., 17:20] = 1 / std, -mean / std
    return rows.reshape(-1, _FIELDS)


@triton.jit
def _load(crops, row, image, pixel, inside, pixels, size):
    """Three channels in [0, 1], mirrored where the image is."""
    x = pixel % size
    x = tl.where(tl.load(row) > 0, size - 1 - x, x)
    at = crops + (image * pixels + pixel // size * size + x) * 3
    red, green, blue = (
        tl.load(at, mask=inside, other=0).to(tl.float32),
        tl.load(at + 1, mask=inside, other=0).to(tl.float32),
        tl.load(at + 2, mask=inside, other=0).to(tl.float32),
    )
    return (
        tl.div_rn(red, 255.0),
        tl.div_rn(green, 255.0),
        tl.div_rn(blue, 255.0),
    )  # rounded as everywhere else


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _ramp(t):
    t = t - 6.0 * tl.floor(t / 6.0)
    return _clamp(tl.minimum(t, 4.0 - t))


@triton.jit
def _jitter(red, green, blue, operation, factor, mean):
    """Brightness 0, contrast 1, saturation 2 or hue 3."""
    if operation == 3.0:
        value = tl.maximum(red, tl.maximum(green, blue))
        chroma = value - tl.minimum(red, tl.minimum(green, blue))
        safe = tl.where(chroma == 0.0, 1.0, chroma)
        hue = tl.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe)
        hue = tl.where(value == red, (green - blue) / safe, hue) + 6.0 * factor
        red = value - chroma * _ramp(hue + 5.0)
        green = value - chroma * _ramp(hue + 3.0)
        blue = value - chroma * _ramp(hue + 1.0)
    elif operation >= 0.0:
        gray = _R * red + _G * green + _B * blue
        other = tl.where(operation == 0.0, 0.0, tl.where(operation == 1.0, mean, gray)) * (
            1.0 - factor
        )
        red, green, blue = (
            _clamp(red * factor + other),
            _clamp(green * factor + other),
            _clamp(blue * factor + other),
        )
    return red, green, blue


@triton.jit
def _mean(crops, table, means, pixels, size, BLOCK: tl.constexpr):
    """Of the grey levels where contrast is about to be changed; one program an image, so that the sum has one order."""
    image = tl.program_id(0).to(tl.int64)
    row = table + image * 20
    place = tl.load(row + 5)
    if place >= 0.0:
        total = 0.0
        for first in range(0, pixels, BLOCK):
            pixel = first + tl.arange(0, BLOCK)
            inside = pixel < pixels
            red, green, blue = _load(crops, row, image, pixel, inside, pixels, size)
            for i in tl.static_range(3):
                operation = tl.where(place > i, tl.load(row + 6 + i), -1.0)
                red, green, blue = _jitter(red, green, blue, operation, tl.load(row + 10 + i), 0.0)
            total += tl.sum(tl.where(inside, _R * red + _G * green + _B * blue, 0.0))
        tl.store(means + image, total / pixels)


@triton.jit
def _colour(crops, table, means, out, pixels, size, BLOCK: tl.constexpr):
    """Mirrored, jittered, and grey where asked for, to float32 planes."""
    image = tl.program_id(0).to(tl.int64)
    row = table + image * 20
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    red, green, blue = _load(crops, row, image, pixel, inside, pixels, size)
    mean = tl.load(means + image, mask=tl.load(row + 5) >= 0.0, other=0.0)
    for i in tl.static_range(4):
        red, green, blue = _jitter(
            red, green, blue, tl.load(row + 6 + i), tl.load(row + 10 + i), mean
        )
    if tl.load(row + 1) > 0.0:
        gray = _R * red + _G * green + _B * blue
        red, green, blue = gray, gray, gray
    at = out + image * 3 * pixels + pixel
    tl.store(at, red, mask=inside)
    tl.store(at + pixels, green, mask=inside)
    tl.store(at + 2 * pixels, blue, mask=inside)


@triton.jit
def _gaussian(plane, along, across, step, reach, sigma, size, inside):
    """The blur at `along` in a direction: elements `step` apart, those beyond the ends replaced by the last within."""
    total = tl.zeros_like(along).to(tl.float32)
    weights = 0.0
    for k in range(-reach, reach + 1):
        weight = tl.exp(-0.5 * (k / sigma) * (k / sigma))
        at = tl.minimum(tl.maximum(along + k, 0), size - 1)
        total += weight * tl.load(plane + across + at * step, mask=inside, other=0.0)
        weights += weight
    return total / weights


@triton.jit
def _blur_rows(planes, table, out, pixels, size, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    row = table + image * 20
    sigma, reach = tl.load(row + 3), tl.load(row + 4).to(tl.int32)
    if reach > 0:
        pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < pixels
        for c in tl.static_range(3):
            first = (image * 3 + c) * pixels
            value = _gaussian(
                planes + first, pixel % size, pixel // size * size, 1, reach, sigma, size, inside
            )
            tl.store(out + first + pixel, value, mask=inside)


@triton.jit
def _finish(planes, rows, table, out, pixels, size, BLOCK: tl.constexpr):
    """Blurred down the columns, solarised and normalised: channels last, in the type of `out`."""
    image = tl.program_id(0).to(tl.int64)
    row = table + image * 20
    sigma, reach = tl.load(row + 3), tl.load(row + 4).to(tl.int32)
    threshold = tl.load(row + 2)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    for c in tl.static_range(3):
        first = (image * 3 + c) * pixels
        if reach > 0:
            value = _gaussian(
                rows + first, pixel // size, pixel % size, size, reach, sigma, size, inside
            )
        else:
            value = tl.load(planes + first + pixel, mask=inside, other=0.0)
        value = tl.where(value >= threshold, 1.0 - value, value)
        value = value * tl.load(row + 14 + c) + tl.load(row + 17 + c)
        tl.store(
            out + (image * pixels + pixel) * 3 + c, value.to(out.dtype.element_ty), mask=inside
        )
