"""The distortions on a CPU: one compiled pass per image, row by row, so that its pixels stay in the core's cache.

The same formulas as in `distort.py`, ten times as fast on one core (bench/NOTES.md), and the same bits for any batch.
Numba compiles it at the first call, which takes seconds, and keeps the result beside this file or in the user's cache.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .numba_cache import CachedKernel
from .recipe import CONTRAST, HUE, LUMA, SATURATION, Recipe, ViewParams

# Values are finite and sums may be taken in any order: what lets the compiler use whole vectors.
_OPTIONS = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nnan", "ninf", "nsz", "reassoc"},
}
_fast = njit(**_OPTIONS)


def distort_view(
    crops: NDArray[np.uint8], params: ViewParams, recipe: Recipe, out: NDArray[np.floating]
) -> None:
    """Writes the views of uint8 crops [n, S, S, 3] into `out` [n, S, S, 3], in whose precision it computes."""
    dtype = out.dtype
    mean, std = np.array(recipe.mean), np.array(recipe.std)
    reach = (
        4.5 if dtype == np.float32 else 7.5
    )  # standard deviations: beyond lie 7e-6 and 6e-14 of the kernel
    levels = np.arange(256, dtype=dtype) / dtype.type(255)
    luma, scale, shift = np.array(LUMA, dtype), (1 / std).astype(dtype), (-mean / std).astype(dtype)
    fields = map(
        np.ascontiguousarray, (crops, *params[1:])
    )  # other strides would be compiled for anew
    _distort(*fields, reach, levels, luma, scale, shift, out)


def _distort_crops(
    crops,
    flip,
    jitter,
    order,
    factor,
    gray,
    sigma,
    solarize,
    reach,
    levels,
    luma,
    scale,
    shift,
    out,
):
    size = crops.shape[1]
    image = np.empty((3, size, size), out.dtype)
    taps = np.empty(4 * size + 5, out.dtype)  # a blur reaches twice the size at most
    padded, blurred = np.zeros(5 * size + 4, out.dtype), np.empty(size, out.dtype)
    for i in range(len(crops)):
        jitters = 4 if jitter[i] else 0
        contrast = jitters  # its place in the order: the operations before it change the mean that it takes
        for place in range(jitters):
            if order[i, place] == CONTRAST:
                contrast = place
        total = 0.0
        for y in range(size):
            red, green, blue = image[0, y], image[1, y], image[2, y]
            _load(crops[i, y], flip[i], levels, red, green, blue)
            _jitter(red, green, blue, order[i, :contrast], factor[i], luma, levels[0])
            if contrast < jitters:
                total += _luma_sum(red, green, blue, luma)
        mean = out.dtype.type(total / size**2)
        for y in range(size):
            red, green, blue = image[0, y], image[1, y], image[2, y]
            _jitter(red, green, blue, order[i, contrast:jitters], factor[i], luma, mean)
            if gray[i]:
                _gray(red, green, blue, luma)
        radius = _gaussian(sigma[i], reach, taps)
        channels = 1 if gray[i] else 3
        for c in range(channels):
            for y in range(size):
                row = image[c, y]
                if radius > 0:
                    _blur(image[c], y, taps, radius, padded, blurred)
                    row = blurred
                if solarize[i]:
                    _solarize(row)
                for target in range(c, 3, channels):
                    _normalize(row, scale[target], shift[target], out[i, y, :, target])


@_fast
def _load(pixels, flip, levels, red, green, blue):
    size = len(pixels)
    for x in range(size):
        at = size - 1 - x if flip else x
        red[at], green[at], blue[at] = (
            levels[pixels[x, 0]],
            levels[pixels[x, 1]],
            levels[pixels[x, 2]],
        )


@_fast
def _jitter(red, green, blue, order, factors, luma, mean):
    zero, one = red.dtype.type(0), red.dtype.type(1)
    for operation in order:
        factor = red.dtype.type(factors[operation])
        if operation == HUE:
            if factor != zero:
                _hue(red, green, blue, factor)
        elif factor == one:
            continue
        elif operation == SATURATION:
            for x in range(len(red)):
                gray = (one - factor) * (luma[0] * red[x] + luma[1] * green[x] + luma[2] * blue[x])
                red[x] = min(max(red[x] * factor + gray, zero), one)
                green[x] = min(max(green[x] * factor + gray, zero), one)
                blue[x] = min(max(blue[x] * factor + gray, zero), one)
        else:
            offset = (one - factor) * mean if operation == CONTRAST else zero
            for plane in (red, green, blue):
                for x in range(len(plane)):
                    plane[x] = min(max(plane[x] * factor + offset, zero), one)


@_fast
def _hue(red, green, blue, shift):
    """The closed form that `distort.py` explains."""
    zero, one, two = red.dtype.type(0), red.dtype.type(1), red.dtype.type(2)
    four, six = two + two, two + two + two
    for x in range(len(red)):
        r, g, b = red[x], green[x], blue[x]
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        per_chroma = one / (one if chroma == zero else chroma)
        if_green = two + (b - r) * per_chroma if value == g else four + (r - g) * per_chroma
        hue = six * shift + ((g - b) * per_chroma if value == r else if_green)
        red[x] = value - chroma * _ramp(hue + four + one, zero, one, four, six)
        green[x] = value - chroma * _ramp(hue + two + one, zero, one, four, six)
        blue[x] = value - chroma * _ramp(hue + one, zero, one, four, six)


@_fast
def _ramp(t, zero, one, four, six):
    t -= six * np.floor(t / six)
    return min(max(min(t, four - t), zero), one)


@_fast
def _luma_sum(red, green, blue, luma):
    total = red.dtype.type(0)
    for x in range(len(red)):
        total += luma[0] * red[x] + luma[1] * green[x] + luma[2] * blue[x]
    return total


@_fast
def _gray(red, green, blue, luma):
    for x in range(len(red)):
        red[x] = luma[0] * red[x] + luma[1] * green[x] + luma[2] * blue[x]


@_fast
def _gaussian(sigma, reach, taps):
    """Fills in the kernel of that standard deviation, and zeros up to a multiple of four; returns its radius."""
    if sigma == 0:
        return 0
    radius = math.ceil(min(reach * sigma, (len(taps) - 4) // 2))
    taps[:] = 0
    total = 0.0
    for k in range(-radius, radius + 1):
        total += math.exp(-0.5 * (k / sigma) ** 2)
    for k in range(-radius, radius + 1):
        taps[k + radius] = math.exp(-0.5 * (k / sigma) ** 2) / total
    return radius


@_fast
def _blur(plane, y, taps, radius, padded, row):
    """Row y of the plane blurred downwards, then along itself; what is outside of the image is the pixel at its edge.

    Four taps at a time, since each turn of the outer loops loads and stores the whole row.
    """
    size, last = len(row), len(row) - 1
    down = padded[radius : radius + size]
    down[:] = 0
    for k in range(0, 2 * radius + 1, 4):
        t0, t1, t2, t3 = taps[k], taps[k + 1], taps[k + 2], taps[k + 3]
        i = y - radius + k
        a, b = plane[min(max(i, 0), last)], plane[min(max(i + 1, 0), last)]
        c, d = plane[min(max(i + 2, 0), last)], plane[min(max(i + 3, 0), last)]
        for x in range(size):
            down[x] += t0 * a[x] + t1 * b[x] + t2 * c[x] + t3 * d[x]
    for k in range(radius):
        padded[k], padded[radius + size + k] = down[0], down[last]
    row[:] = 0
    for k in range(0, 2 * radius + 1, 4):
        t0, t1, t2, t3 = taps[k], taps[k + 1], taps[k + 2], taps[k + 3]
        a = padded[k:]
        for x in range(size):
            row[x] += t0 * a[x] + t1 * a[x + 1] + t2 * a[x + 2] + t3 * a[x + 3]


@_fast
def _solarize(row):
    one, threshold = row.dtype.type(1), row.dtype.type(128 / 255)
    for x in range(len(row)):
        row[x] = one - row[x] if row[x] >= threshold else row[x]


@_fast
def _normalize(row, scale, shift, out):
    for x in range(len(row)):
        out[x] = row[x] * scale + shift


_distort = CachedKernel(_distort_crops, _OPTIONS)
