"""Crops and parameters for tests of the distortions, and torchvision as the reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as T
from torch import Tensor
from torchvision.transforms._functional_tensor import _hsv2rgb, _rgb2hsv

from pipeline.draw import ViewParams
from pipeline.recipe import BRIGHTNESS, CONTRAST, HUE, SATURATION, RandomResizedCrop, Recipe, View
from tests.helpers.images import picture

Distort = Callable[..., tuple[Tensor, ...]]

THRESHOLD = 128 / 255  # of solarisation
IDENTITY = (1.0, 1.0, 1.0, 0.0)  # jitter factors that change nothing


def plain_recipe(size: int) -> Recipe:
    """A recipe of one view without normalisation: values in [0, 1]."""
    zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Recipe(size, RandomResizedCrop(), (View(),), mean=zeros, std=ones)


def adjust_hue(x: Tensor, shift: float) -> Tensor:
    """torchvision's, without its rounding of the input to float32."""
    h, s, v = _rgb2hsv(x).unbind(-3)
    return _hsv2rgb(torch.stack(((h + shift) % 1, s, v), -3))


ADJUST_PILLOW = {
    BRIGHTNESS: T.adjust_brightness,
    CONTRAST: T.adjust_contrast,
    SATURATION: T.adjust_saturation,
    HUE: T.adjust_hue,
}
ADJUST = {**ADJUST_PILLOW, HUE: adjust_hue}


def crops_of(count: int, size: int, views: int = 1) -> Tensor:
    """Pictures uint8 [V, B, S, S, 3], including flat and grey ones, extremes and pure noise."""
    rng = np.random.default_rng(count)
    images = [np.asarray(picture(size, size, seed)) for seed in range(views * count)]
    flat = np.full((size, size, 3), (9, 200, 77), dtype=np.uint8)
    noise = rng.integers(0, 256, (size, size, 3))
    special = [
        flat,
        noise,
        np.repeat(noise[..., :1], 3, 2),
        255 * (noise > 127),
        np.zeros_like(flat),
        flat * 0 + 255,
    ]
    images[: min(len(special), len(images) // 4)] = special[: len(images) // 4]
    return torch.from_numpy(np.stack(images).astype(np.uint8)).reshape(views, count, size, size, 3)


def unchanged(views: int, count: int) -> ViewParams:
    """Parameters that do nothing."""
    shape = views, count
    never = np.zeros(shape, dtype=bool)
    return ViewParams(
        boxes=np.zeros((*shape, 4), dtype=np.float32),
        flip=never,
        jitter=never,
        jitter_order=np.broadcast_to(np.arange(4, dtype=np.int8), (*shape, 4)),
        jitter_factor=np.broadcast_to(np.array(IDENTITY, dtype=np.float32), (*shape, 4)),
        gray=never,
        blur_sigma=np.zeros(shape, dtype=np.float32),
        solarize=never,
    )


def blurred(x: Tensor, sigma: float) -> Tensor:
    """torchvision's blur of rows, then columns, with borders replicated far enough."""
    radius = math.ceil(9 * sigma) + 1
    x = F.pad(x[None], [radius] * 4, mode="replicate")[0]
    # In one pass it takes thirty times as long.
    for kernel in ([2 * radius + 1, 1], [1, 2 * radius + 1]):
        x = T.gaussian_blur(x, kernel, [sigma, sigma])
    return x[..., radius:-radius, radius:-radius]


def before_solarizing(crop: Tensor, row: ViewParams) -> Tensor:
    """A crop uint8 [S, S, 3] distorted by torchvision in float64, except for solarisation.

    Returns [3, S, S] in [0, 1].
    """
    x = crop.permute(2, 0, 1).double() / 255
    if row.flip:
        x = T.hflip(x)
    if row.jitter:
        for operation in row.jitter_order:
            x = ADJUST[int(operation)](x, float(row.jitter_factor[operation]))
    if row.gray:
        x = T.rgb_to_grayscale(x, 3)
    if row.blur_sigma > 0:
        x = blurred(x, float(row.blur_sigma))
    return x


def assert_close_except_at_threshold(
    ours: Tensor, x: Tensor, row: ViewParams, tolerance: float
) -> int:
    """Asserts that `ours` is `x`, solarised if `row` says so.

    Returns the number of pixels at the threshold of solarisation. Whether or not such a pixel is
    inverted, it is only 1/255 off.
    """
    expected = T.solarize(x, THRESHOLD) if row.solarize else x
    at_threshold = (
        (x - THRESHOLD).abs() < tolerance if row.solarize else torch.zeros_like(x, dtype=torch.bool)
    )
    off = (ours.double() - expected).abs()
    assert off.max() <= 1 / 255 + tolerance
    assert off[~at_threshold].max() <= tolerance
    return int(at_threshold.sum())
