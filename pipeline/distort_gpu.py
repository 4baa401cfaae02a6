"""The distortions on a GPU: four Triton kernels over all images of a batch, both views at once.

The formulas are those of `distort.py`. Its batched operations launch about two hundred kernels that
each read and write all their pixels. Here the parameters are copied in one table, and each pixel is
read and written four times at most.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from .draw import ViewParams
from .recipe import BRIGHTNESS, CONTRAST, HUE, LUMA, Recipe

_REACH = 4.5  # standard deviations after which a blur kernel is cut off: 7e-6 of it lie beyond
_BLOCK = 1024  # pixels that a program handles at a time
_IMAGES = 512  # processed at a time: at 224 px their buffers take 0.6 GB
_OPTIONS = {"enable_fp_fusion": True}  # Triton warns that its default will change

# The fields of an image's row in the parameter table.
_FLIP = tl.constexpr(0)
_GRAY = tl.constexpr(1)
_SOLARIZE_THRESHOLD = tl.constexpr(2)
_BLUR_SIGMA = tl.constexpr(3)
_BLUR_RADIUS = tl.constexpr(4)
_CONTRAST_PLACE = tl.constexpr(5)  # of contrast in the order of the operations; -1 for none
_OPERATIONS = tl.constexpr(6)  # four, in the order in which they are applied; -1 for none
_FACTORS = tl.constexpr(10)  # four, in the same order
_SCALE = tl.constexpr(14)  # three, of the normalisation: value * scale + shift
_SHIFT = tl.constexpr(17)  # three
_FIELDS = tl.constexpr(20)

# Operations, as they stand in the table.
_BRIGHTNESS_OP = tl.constexpr(float(BRIGHTNESS))
_CONTRAST_OP = tl.constexpr(float(CONTRAST))
_HUE_OP = tl.constexpr(float(HUE))
_NO_OP = tl.constexpr(-1.0)

_RED_LUMA = tl.constexpr(LUMA[0])
_GREEN_LUMA = tl.constexpr(LUMA[1])
_BLUE_LUMA = tl.constexpr(LUMA[2])


def distort_views(
    crops: Tensor, params: ViewParams, recipe: Recipe, out_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Views [B, 3, S, S] of `out_dtype`, channels_last, of crops uint8 [V, B, S, S, 3] on a GPU."""
    count, batch, size = crops.shape[:3]
    images = crops.reshape(-1, size, size, 3).contiguous()  # [V * B, S, S, 3]
    table = torch.from_numpy(_parameter_table(params, recipe))
    if crops.is_cuda:
        table = table.pin_memory()
    table = table.to(crops.device, non_blocking=True)
    out = torch.empty((count, batch, size, size, 3), dtype=out_dtype, device=crops.device)
    means = torch.empty(_IMAGES, device=crops.device)
    buffers = torch.empty((2, min(_IMAGES, len(images)), 3, size, size), device=crops.device)
    planes, blurred_rows = buffers

    pixels = size * size
    parts = zip(
        images.split(_IMAGES), table.split(_IMAGES), out.flatten(0, 1).split(_IMAGES), strict=True
    )
    for part, rows, views in parts:
        per_image = (len(part),)
        per_block = (len(part), triton.cdiv(pixels, _BLOCK))
        _mean[per_image](part, rows, means, pixels, size, _BLOCK, **_OPTIONS)
        _colour[per_block](part, rows, means, planes, pixels, size, _BLOCK, **_OPTIONS)
        _blur_rows[per_block](planes, rows, blurred_rows, pixels, size, _BLOCK, **_OPTIONS)
        _finish[per_block](planes, blurred_rows, rows, views, pixels, size, _BLOCK, **_OPTIONS)
    return tuple(view.permute(0, 3, 1, 2) for view in out)


def _parameter_table(params: ViewParams, recipe: Recipe) -> NDArray[np.float32]:
    """The parameters of all images, [V * B, _FIELDS]."""
    order = params.jitter_order.astype(np.int64)  # [V, B, 4]
    factors = np.take_along_axis(params.jitter_factor, order, axis=-1)  # by place in the order
    changes_nothing = factors == np.where(order == HUE, 0, 1)
    operations = np.where(~params.jitter[..., None] | changes_nothing, _NO_OP.value, order)
    is_contrast = operations == CONTRAST
    radius = np.minimum(np.ceil(_REACH * params.blur_sigma), 2 * recipe.size)
    mean = np.array(recipe.mean)
    std = np.array(recipe.std)

    table = np.zeros((*params.flip.shape, _FIELDS.value), dtype=np.float32)  # [V, B, _FIELDS]
    table[..., _FLIP.value] = params.flip
    table[..., _GRAY.value] = params.gray
    table[..., _SOLARIZE_THRESHOLD.value] = np.where(params.solarize, 128 / 255, 2)  # 2 for never
    table[..., _BLUR_SIGMA.value] = params.blur_sigma
    table[..., _BLUR_RADIUS.value] = radius
    table[..., _CONTRAST_PLACE.value] = np.where(is_contrast.any(-1), is_contrast.argmax(-1), -1)
    table[..., _OPERATIONS.value : _OPERATIONS.value + 4] = operations
    table[..., _FACTORS.value : _FACTORS.value + 4] = factors
    table[..., _SCALE.value : _SCALE.value + 3] = 1 / std
    table[..., _SHIFT.value : _SHIFT.value + 3] = -mean / std
    return table.reshape(-1, _FIELDS.value)


@triton.jit
def _load(crops, row, image, pixel, inside, pixels, size):
    """The three channels of a crop in [0, 1], mirrored if the image is flipped."""
    x = pixel % size
    x = tl.where(tl.load(row + _FLIP) > 0, size - 1 - x, x)
    at = crops + (image * pixels + pixel // size * size + x) * 3
    red = tl.load(at, mask=inside, other=0).to(tl.float32)
    green = tl.load(at + 1, mask=inside, other=0).to(tl.float32)
    blue = tl.load(at + 2, mask=inside, other=0).to(tl.float32)
    # div_rn is rounded like the division on the CPU; a plain division is not.
    return tl.div_rn(red, 255.0), tl.div_rn(green, 255.0), tl.div_rn(blue, 255.0)


@triton.jit
def _luma(red, green, blue):
    return _RED_LUMA * red + _GREEN_LUMA * green + _BLUE_LUMA * blue


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _ramp(t):
    t = t - 6.0 * tl.floor(t / 6.0)
    return _clamp(tl.minimum(t, 4.0 - t))


@triton.jit
def _jitter(red, green, blue, operation, factor, mean):
    """Apply one operation; see `distort._hue` for the closed form of the hue."""
    if operation == _HUE_OP:
        value = tl.maximum(red, tl.maximum(green, blue))
        chroma = value - tl.minimum(red, tl.minimum(green, blue))
        safe = tl.where(chroma == 0.0, 1.0, chroma)
        hue = tl.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe)
        hue = tl.where(value == red, (green - blue) / safe, hue) + 6.0 * factor
        red = value - chroma * _ramp(hue + 5.0)
        green = value - chroma * _ramp(hue + 3.0)
        blue = value - chroma * _ramp(hue + 1.0)
    elif operation >= 0.0:
        # Brightness, contrast and saturation blend with black, the mean and the grey image.
        other = tl.where(operation == _CONTRAST_OP, mean, _luma(red, green, blue))
        other = tl.where(operation == _BRIGHTNESS_OP, 0.0, other) * (1.0 - factor)
        red = _clamp(red * factor + other)
        green = _clamp(green * factor + other)
        blue = _clamp(blue * factor + other)
    return red, green, blue


@triton.jit
def _mean(crops, table, means, pixels, size, BLOCK: tl.constexpr):
    """The mean grey level of each image at the point where its contrast is changed.

    One program takes a whole image, so that the sum has one order.
    """
    image = tl.program_id(0).to(tl.int64)
    row = table + image * _FIELDS
    contrast_place = tl.load(row + _CONTRAST_PLACE)
    if contrast_place >= 0.0:
        total = 0.0
        for first in range(0, pixels, BLOCK):
            pixel = first + tl.arange(0, BLOCK)
            inside = pixel < pixels
            red, green, blue = _load(crops, row, image, pixel, inside, pixels, size)
            for place in tl.static_range(3):
                operation = tl.load(row + _OPERATIONS + place)
                operation = tl.where(contrast_place > place, operation, _NO_OP)
                factor = tl.load(row + _FACTORS + place)
                red, green, blue = _jitter(red, green, blue, operation, factor, 0.0)
            total += tl.sum(tl.where(inside, _luma(red, green, blue), 0.0))
        tl.store(means + image, total / pixels)


@triton.jit
def _colour(crops, table, means, out, pixels, size, BLOCK: tl.constexpr):
    """Flip, colour jitter and grey, from crops to float32 planes [image, 3, S, S]."""
    image = tl.program_id(0).to(tl.int64)
    row = table + image * _FIELDS
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    red, green, blue = _load(crops, row, image, pixel, inside, pixels, size)
    mean = tl.load(means + image, mask=tl.load(row + _CONTRAST_PLACE) >= 0.0, other=0.0)
    for place in tl.static_range(4):
        operation = tl.load(row + _OPERATIONS + place)
        factor = tl.load(row + _FACTORS + place)
        red, green, blue = _jitter(red, green, blue, operation, factor, mean)
    if tl.load(row + _GRAY) > 0.0:
        gray = _luma(red, green, blue)
        red, green, blue = gray, gray, gray
    at = out + image * 3 * pixels + pixel
    tl.store(at, red, mask=inside)
    tl.store(at + pixels, green, mask=inside)
    tl.store(at + 2 * pixels, blue, mask=inside)


@triton.jit
def _gaussian(plane, along, across, step, radius, sigma, size, inside):
    """The blur in one direction at the coordinate `along`; its neighbours are `step` apart.

    `across` is the offset in the other direction. Beyond the border, the last pixel is repeated.
    """
    total = tl.zeros_like(along).to(tl.float32)
    weights = 0.0
    for k in range(-radius, radius + 1):
        weight = tl.exp(-0.5 * (k / sigma) * (k / sigma))
        at = tl.minimum(tl.maximum(along + k, 0), size - 1)
        total += weight * tl.load(plane + across + at * step, mask=inside, other=0.0)
        weights += weight
    return total / weights


@triton.jit
def _blur_rows(planes, table, out, pixels, size, BLOCK: tl.constexpr):
    """Blur along the rows, for images that are blurred."""
    image = tl.program_id(0).to(tl.int64)
    row = table + image * _FIELDS
    sigma = tl.load(row + _BLUR_SIGMA)
    radius = tl.load(row + _BLUR_RADIUS).to(tl.int32)
    if radius > 0:
        pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < pixels
        x = pixel % size
        y = pixel // size
        for c in tl.static_range(3):
            first = (image * 3 + c) * pixels
            value = _gaussian(planes + first, x, y * size, 1, radius, sigma, size, inside)
            tl.store(out + first + pixel, value, mask=inside)


@triton.jit
def _finish(planes, blurred_rows, table, out, pixels, size, BLOCK: tl.constexpr):
    """Blur along the columns, solarise and normalise: channels last, in the dtype of `out`."""
    image = tl.program_id(0).to(tl.int64)
    row = table + image * _FIELDS
    sigma = tl.load(row + _BLUR_SIGMA)
    radius = tl.load(row + _BLUR_RADIUS).to(tl.int32)
    threshold = tl.load(row + _SOLARIZE_THRESHOLD)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    x = pixel % size
    y = pixel // size
    for c in tl.static_range(3):
        first = (image * 3 + c) * pixels
        if radius > 0:
            value = _gaussian(blurred_rows + first, y, x, size, radius, sigma, size, inside)
        else:
            value = tl.load(planes + first + pixel, mask=inside, other=0.0)
        value = tl.where(value >= threshold, 1.0 - value, value)
        value = value * tl.load(row + _SCALE + c) + tl.load(row + _SHIFT + c)
        at = out + (image * pixels + pixel) * 3 + c
        tl.store(at, value.to(out.dtype.element_ty), mask=inside)
