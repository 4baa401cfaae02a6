"""The distortions on a CPU, compiled by Numba: one pass per image, so its pixels stay in the cache.

The formulas are those of `distort.py`. This is ten times as fast on one core (bench/NOTES.md), and
the result for an image is the same to the bit in any batch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .draw import ViewParams
from .numba_cache import CachedKernel
from .recipe import CONTRAST, HUE, LUMA, SATURATION, Recipe

# All values are finite, and sums may be taken in any order: this lets the compiler use vectors.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nnan", "ninf", "nsz", "reassoc"},
}
_compiled = njit(**_OPTIONS)

# Standard deviations after which a blur kernel is cut off: 7e-6 and 6e-14 of it lie beyond.
_REACH_FLOAT32 = 4.5
_REACH_FLOAT64 = 7.5


def distort_view(
    crops: NDArray[np.uint8], params: ViewParams, recipe: Recipe, out: NDArray[np.floating]
) -> None:
    """Write the views of uint8 crops [n, S, S, 3] into `out` [n, S, S, 3].

    The precision of the computation is that of `out`, float32 or float64.
    """
    dtype = out.dtype
    mean = np.array(recipe.mean)
    std = np.array(recipe.std)
    # For arrays of other strides Numba would compile again, which takes seconds.
    fields = [np.ascontiguousarray(field) for field in (crops, *params[1:])]
    _distort_crops(
        *fields,
        _REACH_FLOAT32 if dtype == np.float32 else _REACH_FLOAT64,
        np.arange(256, dtype=dtype) / dtype.type(255),
        np.array(LUMA, dtype),
        (1 / std).astype(dtype),
        (-mean / std).astype(dtype),
        out,
    )


def _distort_all(  # noqa: PLR0913 - Numba takes arrays, not objects
    crops,
    flip,
    jitter,
    jitter_order,
    jitter_factor,
    gray,
    blur_sigma,
    solarize,
    reach,  # of a blur kernel, in standard deviations
    levels,  # [256] value of each uint8 level
    luma,  # [3]
    scale,  # [3] of the normalisation: value * scale + shift
    shift,  # [3]
    out,
):
    size = crops.shape[1]
    image = np.empty((3, size, size), out.dtype)
    # A blur reaches at most twice the size, and its taps are padded to a multiple of four.
    taps = np.empty(4 * size + 5, out.dtype)
    padded = np.zeros(5 * size + 4, out.dtype)
    blurred = np.empty(size, out.dtype)
    for i in range(len(crops)):
        operations = jitter_order[i] if jitter[i] else jitter_order[i, :0]
        _jitter_image(crops[i], flip[i], operations, jitter_factor[i], gray[i], levels, luma, image)
        radius = _fill_gaussian(blur_sigma[i], reach, taps)
        channels = 1 if gray[i] else 3
        for c in range(channels):
            for y in range(size):
                row = image[c, y]
                if radius > 0:
                    _blur(image[c], y, taps, radius, padded, blurred)
                    row = blurred
                if solarize[i]:
                    _solarize(row)
                for target in range(c, 3, channels):  # all three channels of a grey image
                    _normalize(row, scale[target], shift[target], out[i, y, :, target])


_distort_crops = CachedKernel(_distort_all, _OPTIONS)


@_compiled
def _jitter_image(crop, flip, operations, factors, gray, levels, luma, image):
    """Flip, colour jitter and grey: from a crop [S, S, 3] to planes [3, S, S].

    Contrast needs the mean of the whole image after the operations before it, so the rows are
    visited twice. Of a grey image only the first plane is valid.
    """
    size = len(crop)
    contrast = len(operations)  # the place of contrast in the order
    for place in range(len(operations)):
        if operations[place] == CONTRAST:
            contrast = place

    total = 0.0
    for y in range(size):
        red, green, blue = image[0, y], image[1, y], image[2, y]
        _load(crop[y], flip, levels, red, green, blue)
        _jitter(red, green, blue, operations[:contrast], factors, luma, levels[0])
        if contrast < len(operations):
            total += _luma_sum(red, green, blue, luma)
    mean = image.dtype.type(total / size**2)
    for y in range(size):
        red, green, blue = image[0, y], image[1, y], image[2, y]
        _jitter(red, green, blue, operations[contrast:], factors, luma, mean)
        if gray:
            _gray(red, green, blue, luma)


@_compiled
def _load(pixels, flip, levels, red, green, blue):
    """Split a row of pixels into its channels, in [0, 1]."""
    size = len(pixels)
    for x in range(size):
        at = size - 1 - x if flip else x
        red[at] = levels[pixels[x, 0]]
        green[at] = levels[pixels[x, 1]]
        blue[at] = levels[pixels[x, 2]]


@_compiled
def _jitter(red, green, blue, operations, factors, luma, mean):
    """Apply the operations to a row, in their order."""
    zero = red.dtype.type(0)
    one = red.dtype.type(1)
    for operation in operations:
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
        else:  # brightness or contrast
            offset = (one - factor) * mean if operation == CONTRAST else zero
            for plane in (red, green, blue):
                for x in range(len(plane)):
                    plane[x] = min(max(plane[x] * factor + offset, zero), one)


@_compiled
def _hue(red, green, blue, shift):
    """The closed form that `distort._hue` explains."""
    zero = red.dtype.type(0)
    one = red.dtype.type(1)
    two = red.dtype.type(2)
    four = two + two
    six = two + two + two
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


@_compiled
def _ramp(t, zero, one, four, six):
    t -= six * np.floor(t / six)
    return min(max(min(t, four - t), zero), one)


@_compiled
def _luma_sum(red, green, blue, luma):
    total = red.dtype.type(0)
    for x in range(len(red)):
        total += luma[0] * red[x] + luma[1] * green[x] + luma[2] * blue[x]
    return total


@_compiled
def _gray(red, green, blue, luma):
    for x in range(len(red)):
        red[x] = luma[0] * red[x] + luma[1] * green[x] + luma[2] * blue[x]


@_compiled
def _fill_gaussian(sigma, reach, taps):
    """Fill in the kernel of that standard deviation and zeros behind it; returns its radius."""
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


@_compiled
def _blur(plane, y, taps, radius, padded, row):
    """Blur along the columns at row y of the plane, then along that row, into `row`.

    Pixels outside the image are those at its edge. The taps are taken four at a time, because each
    turn of the outer loops loads and stores the whole row.
    """
    size = len(row)
    last = size - 1
    down = padded[radius : radius + size]
    down[:] = 0
    for k in range(0, 2 * radius + 1, 4):
        t0, t1, t2, t3 = taps[k], taps[k + 1], taps[k + 2], taps[k + 3]
        i = y - radius + k
        a = plane[min(max(i, 0), last)]
        b = plane[min(max(i + 1, 0), last)]
        c = plane[min(max(i + 2, 0), last)]
        d = plane[min(max(i + 3, 0), last)]
        for x in range(size):
            down[x] += t0 * a[x] + t1 * b[x] + t2 * c[x] + t3 * d[x]
    for k in range(radius):
        padded[k] = down[0]
        padded[radius + size + k] = down[last]
    row[:] = 0
    for k in range(0, 2 * radius + 1, 4):
        t0, t1, t2, t3 = taps[k], taps[k + 1], taps[k + 2], taps[k + 3]
        a = padded[k:]
        for x in range(size):
            row[x] += t0 * a[x] + t1 * a[x + 1] + t2 * a[x + 2] + t3 * a[x + 3]


@_compiled
def _solarize(row):
    one = row.dtype.type(1)
    threshold = row.dtype.type(128 / 255)
    for x in range(len(row)):
        row[x] = one - row[x] if row[x] >= threshold else row[x]


@_compiled
def _normalize(row, scale, shift, out):
    for x in range(len(row)):
        out[x] = row[x] * scale + shift
