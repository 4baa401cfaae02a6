"""`draw`: the random parameters of views, as a pure function of (seed, epoch, sample, view).

Everything random about a view is decided here, on the host, by counter-based random numbers
(`philox.py`): the crop box, the flip, and the strength of every distortion. The decoders apply the
crop boxes, and `distort.py` the rest.
"""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .order import Samples
from .philox import philox, uniform
from .recipe import RandomResizedCrop, Recipe, WholeImage

Numbers = NDArray[np.float64]

_JITTER_ORDERS = np.array(list(permutations(range(4))), dtype=np.int8)  # [24, 4]
_CROP_TRIES = 10  # random crops tried before the central fallback, as in torchvision
_STREAM = 0x7677  # separates these random numbers from those of `epoch_order`


class ViewParams(NamedTuple):
    """The parameters of V views of B samples, one row per (view, sample). Made by `draw`."""

    # Left, top, right, bottom in pixels of the image; for WholeImage, of the resized image.
    boxes: NDArray[np.float32]  # [V, B, 4]
    flip: NDArray[np.bool_]  # [V, B]
    jitter: NDArray[np.bool_]  # [V, B]
    jitter_order: NDArray[np.int8]  # [V, B, 4] operations (BRIGHTNESS ... HUE), first to last
    # By operation: the factors of brightness, contrast and saturation, and the shift of the hue.
    jitter_factor: NDArray[np.float32]  # [V, B, 4]
    gray: NDArray[np.bool_]  # [V, B]
    blur_sigma: NDArray[np.float32]  # [V, B] in pixels of the crop; 0 for no blur
    solarize: NDArray[np.bool_]  # [V, B]

    def take(self, *index: object) -> ViewParams:
        """The same index of every field: first the view, then the sample.

        Example: `params.take(0, slice(16))` has the parameters of view 0 of the first 16 samples.
        """
        return ViewParams(*(field[index] for field in self))  # type: ignore[arg-type, index]


def draw(
    recipe: Recipe, seed: int, epoch: int, samples: Samples, heights: Samples, widths: Samples
) -> ViewParams:
    """The parameters of all V views of B samples.

    The parameters of a sample do not depend on the other samples that it is drawn with.

    Args:
        recipe: The distributions to draw from.
        seed: The seed of the run.
        epoch: The epoch, from 0.
        samples: Positions in the store, [B].
        heights: Heights of their images in pixels, [B].
        widths: Widths of their images in pixels, [B].
    """
    u = _draw_uniforms(seed, epoch, np.asarray(samples), len(recipe.views))
    h = np.asarray(heights, dtype=np.float64)[None, :]  # [1, B]
    w = np.asarray(widths, dtype=np.float64)[None, :]
    order_index = (u.jitter_order * len(_JITTER_ORDERS)).astype(np.intp)
    sigma_low, sigma_high = np.array([view.blur_sigma for view in recipe.views]).T[:, :, None]
    sigma = sigma_low + u.blur_sigma * (sigma_high - sigma_low)
    return ViewParams(
        boxes=_boxes(recipe, u, h, w).astype(np.float32),
        flip=u.flip < _per_view(recipe, "flip_p"),
        jitter=u.jitter < _per_view(recipe, "jitter_p"),
        jitter_order=_JITTER_ORDERS[order_index],
        jitter_factor=_jitter_factors(recipe, u.jitter_factors).astype(np.float32),
        gray=u.gray < _per_view(recipe, "gray_p"),
        blur_sigma=np.where(u.blur < _per_view(recipe, "blur_p"), sigma, 0).astype(np.float32),
        solarize=u.solarize < _per_view(recipe, "solarize_p"),
    )


class _Uniforms(NamedTuple):
    """Random numbers in (0, 1) of each (view, sample), by the parameter that they decide."""

    crop_area: Numbers  # [tries, V, B]
    crop_ratio: Numbers  # [tries, V, B]
    crop_left: Numbers  # [tries, V, B]
    crop_top: Numbers  # [tries, V, B]
    flip: Numbers  # [V, B]
    jitter: Numbers  # [V, B]
    jitter_factors: Numbers  # [4, V, B] of BRIGHTNESS ... HUE
    jitter_order: Numbers  # [V, B]
    gray: Numbers  # [V, B]
    blur: Numbers  # [V, B]
    blur_sigma: Numbers  # [V, B]
    solarize: Numbers  # [V, B]


def _draw_uniforms(seed: int, epoch: int, samples: Samples, views: int) -> _Uniforms:
    """The random numbers of each (view, sample).

    Their places in the stream must stay as they are: they decide every view of every run.
    """
    crop_numbers = 4 * _CROP_TRIES
    numbers = crop_numbers + 12  # the last one is not used
    blocks = np.arange(numbers // 4)[:, None, None]  # each has 4 random words
    counters = samples[None, None, :], epoch, np.arange(views)[None, :, None]
    words = philox(seed, *counters, _STREAM << 16 | blocks)  # [4, blocks, V, B]
    u = uniform(words).transpose(1, 0, 2, 3).reshape(numbers, views, len(samples))

    crop = u[:crop_numbers].reshape(_CROP_TRIES, 4, views, len(samples))
    rest = u[crop_numbers:]
    return _Uniforms(
        crop_area=crop[:, 0],
        crop_ratio=crop[:, 1],
        crop_left=crop[:, 2],
        crop_top=crop[:, 3],
        flip=rest[0],
        jitter=rest[1],
        jitter_factors=rest[2:6],
        jitter_order=rest[6],
        gray=rest[7],
        blur=rest[8],
        blur_sigma=rest[9],
        solarize=rest[10],
    )


def _per_view(recipe: Recipe, field: str) -> Numbers:
    """A number of each view, [V, 1]."""
    return np.array([[getattr(view, field)] for view in recipe.views])


def _jitter_factors(recipe: Recipe, u: Numbers) -> Numbers:
    """[V, B, 4] from uniforms [4, V, B]: uniform around the value that changes nothing."""
    operations = ("brightness", "contrast", "saturation", "hue")
    strength = np.stack([_per_view(recipe, name) for name in operations])  # [4, V, 1]
    neutral = np.array([1.0, 1.0, 1.0, 0.0])[:, None, None]
    low = np.where(neutral == 1, np.maximum(0, neutral - strength), -strength)
    factor = low + u * (neutral + strength - low)
    return factor.transpose(1, 2, 0)


def _boxes(recipe: Recipe, u: _Uniforms, h: Numbers, w: Numbers) -> Numbers:
    """The crop boxes [V, B, 4] in images of size `h` x `w` [1, B]."""
    if isinstance(recipe.crop, RandomResizedCrop):
        return _random_boxes(recipe.crop, u, h, w)

    # torchvision's Resize makes the short side `resize` pixels, and truncates the long side.
    resize = recipe.crop.resize
    short = np.minimum(h, w)
    resized_h = np.where(h <= w, resize, np.floor(resize * h / short))
    resized_w = np.where(w <= h, resize, np.floor(resize * w / short))
    if isinstance(recipe.crop, WholeImage):
        box = np.stack((0 * w, 0 * h, resized_w, resized_h), axis=-1)  # [1, B, 4]
    else:
        box = _center_boxes(recipe.size, h, w, resized_h, resized_w)
    return np.broadcast_to(box, (*u.flip.shape, 4))


def _random_boxes(crop: RandomResizedCrop, u: _Uniforms, h: Numbers, w: Numbers) -> Numbers:
    """torchvision's RandomResizedCrop.get_params: the first of ten random boxes that fits.

    Returns boxes [V, B, 4].
    """
    min_area, max_area = crop.area
    area = h * w * (min_area + u.crop_area * (max_area - min_area))  # [tries, V, B]
    min_log_ratio, max_log_ratio = np.log(crop.ratio)
    ratio = np.exp(min_log_ratio + u.crop_ratio * (max_log_ratio - min_log_ratio))
    box_w = np.rint(np.sqrt(area * ratio))
    box_h = np.rint(np.sqrt(area / ratio))
    fits = (box_w > 0) & (box_w <= w) & (box_h > 0) & (box_h <= h)
    left = np.floor(u.crop_left * (w - box_w + 1))
    top = np.floor(u.crop_top * (h - box_h + 1))
    tries = np.stack((left, top, left + box_w, top + box_h), axis=-1)  # [tries, V, B, 4]
    first_fit = fits.argmax(axis=0)[None, :, :, None]
    random = np.take_along_axis(tries, first_fit, axis=0)[0]
    any_fits = fits.any(axis=0)[:, :, None]
    return np.where(any_fits, random, _largest_central_boxes(crop, h, w))


def _largest_central_boxes(crop: RandomResizedCrop, h: Numbers, w: Numbers) -> Numbers:
    """torchvision's fallback [1, B, 4] for long, thin images: the largest allowed central box."""
    min_ratio, max_ratio = crop.ratio
    image_ratio = w / h
    box_w = np.where(image_ratio > max_ratio, np.rint(h * max_ratio), w)
    box_h = np.where(image_ratio < min_ratio, np.rint(w / min_ratio), h)
    left = (w - box_w) // 2
    top = (h - box_h) // 2
    return np.stack((left, top, left + box_w, top + box_h), axis=-1)


def _center_boxes(
    size: int, h: Numbers, w: Numbers, resized_h: Numbers, resized_w: Numbers
) -> Numbers:
    """The fractional boxes [1, B, 4] in the image that Resize + CenterCrop amount to.

    Resize truncates the long side, and CenterCrop rounds the corner.
    """
    top = np.rint((resized_h - size) / 2)
    left = np.rint((resized_w - size) / 2)
    scale_y = h / resized_h
    scale_x = w / resized_w
    return np.stack(
        (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y), axis=-1
    )
