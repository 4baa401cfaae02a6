"""The distortions as data, and `draw`: their parameters for given samples.

A view is a pure function of (image, seed, epoch, sample, view). Everything random about it is decided here, on the
host, from counters; the decoders and `distort` only carry it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .order import Samples
from .philox import philox, uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.587, 0.114)  # the weights of a grey level: torchvision's rounding of ITU-R 601

Numbers = NDArray[np.float64]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_ORDERS = np.array(list(permutations(range(4))), dtype=np.int8)  # [24, 4]
_TRIES = 10  # random crops tried before the central fallback, as in torchvision
_STREAM = 0x7677  # keeps these random numbers apart from those of `epoch_order`


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area and shape, resized to a square: torchvision's sampling, Pillow's `crop(box).resize(S)`."""

    area: tuple[float, float] = (0.08, 1.0)  # of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, log-uniform
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class CenterCrop:
    """The short side resized to `resize` pixels, then the central square: torchvision's Resize + CenterCrop."""

    resize: int = 256
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class WholeImage:
    """The short side resized to `resize` pixels, then all of it to a square, whatever its shape: VISSL's for VOC07."""

    resize: int = 256
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class View:
    """What is done to one crop, in this order. The defaults do nothing; see `barlow_twins` for the paper's."""

    flip_p: float = 0.0
    jitter_p: float = 0.0
    brightness: float = 0.0  # factor uniform in [1 - b, 1 + b]; contrast and saturation alike
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # shift uniform in [-h, h], in turns of the colour wheel
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the crop
    solarize_p: float = 0.0  # inverts values of 128 and more


@dataclass(frozen=True)
class Recipe:
    """How an encoded image becomes views: each a square of `size` pixels."""

    size: int
    crop: RandomResizedCrop | CenterCrop | WholeImage
    views: tuple[View, ...]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}: a view needs at least 1 pixel")
        if isinstance(self.crop, CenterCrop) and self.crop.resize < self.size:
            raise ValueError(
                f"resize {self.crop.resize} is below size {self.size}: the crop would leave the image"
            )


def barlow_twins(
    size: int = 224,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    blur_p: tuple[float, float] = (1.0, 0.1),
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    solarize_p: tuple[float, float] = (0.0, 0.2),
) -> Recipe:
    """The two views of Zbontar et al. 2021, appendix A, which differ in blur and solarisation alone."""
    views = tuple(
        View(
            flip_p=0.5,
            jitter_p=0.8,
            brightness=0.4,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            gray_p=0.2,
            blur_p=blur,
            blur_sigma=blur_sigma,
            solarize_p=solarize,
        )
        for blur, solarize in zip(blur_p, solarize_p, strict=True)
    )
    return Recipe(size, RandomResizedCrop(area), views)


def center_view(size: int = 224, resize: int | None = None) -> Recipe:
    """The usual test view: one, undistorted. `resize` defaults to size * 256 / 224."""
    return Recipe(size, CenterCrop(resize or round(size * 256 / 224)), (View(),))


def crop_view(size: int = 224, area: tuple[float, float] = (0.08, 1.0)) -> Recipe:
    """The usual view to train a classifier on: one, of a random box, flipped or not."""
    return Recipe(size, RandomResizedCrop(area, interpolation="bilinear"), (View(flip_p=0.5),))


def whole_view(size: int = 224, resize: int | None = None) -> Recipe:
    """The view of VOC07's pictures, of which nothing is cut off. `resize` defaults to size * 256 / 224."""
    return Recipe(size, WholeImage(resize or round(size * 256 / 224)), (View(),))


class ViewParams(NamedTuple):
    """One row per (view, sample): what `draw` decided. V views, B samples."""

    boxes: NDArray[
        np.float32
    ]  # [V, B, 4] left, top, right, bottom, in pixels; of a WholeImage, after its first resize
    flip: NDArray[np.bool_]  # [V, B]
    jitter: NDArray[np.bool_]  # [V, B]
    jitter_order: NDArray[np.int8]  # [V, B, 4] operations (BRIGHTNESS ... HUE), first to last
    jitter_factor: NDArray[
        np.float32
    ]  # [V, B, 4] by operation: three factors around 1, and the hue shift around 0
    gray: NDArray[np.bool_]  # [V, B]
    blur_sigma: NDArray[np.float32]  # [V, B] in pixels of the crop; 0 where there is no blur
    solarize: NDArray[np.bool_]  # [V, B]

    def take(self, *index: object) -> ViewParams:
        """Every field indexed alike, by view and then by sample."""
        return ViewParams(*(field[index] for field in self))  # type: ignore[arg-type, index]


def draw(
    recipe: Recipe, seed: int, epoch: int, samples: Samples, heights: Samples, widths: Samples
) -> ViewParams:
    """The parameters of every view of `samples` [B], whose images are `heights` x `widths` pixels [B].

    The numbers for one sample do not depend on which others it is drawn with.
    """
    blocks = np.arange((4 * _TRIES + 12) // 4)[:, None, None]  # 4 random words each
    views = np.arange(len(recipe.views))[None, :, None]
    words = philox(seed, np.asarray(samples)[None, None, :], epoch, views, _STREAM << 16 | blocks)
    u = (
        uniform(words).transpose(1, 0, 2, 3).reshape(4 * len(blocks), *words.shape[2:])
    )  # [4 * blocks, V, B]
    crop_u, u = u[: 4 * _TRIES].reshape(_TRIES, 4, *u.shape[1:]), u[4 * _TRIES :]

    def column(field: str) -> Numbers:  # a number of each view, [V, 1]
        return np.array([[getattr(view, field)] for view in recipe.views])

    h, w = (np.asarray(x, dtype=np.float64)[None, :] for x in (heights, widths))  # [1, B]
    if isinstance(recipe.crop, RandomResizedCrop):
        boxes = _random_boxes(recipe.crop, crop_u, h, w)
    else:
        short = np.minimum(
            h, w
        )  # torchvision's Resize makes it `resize` pixels, and truncates the long side
        resized_h = np.where(h <= w, recipe.crop.resize, np.floor(recipe.crop.resize * h / short))
        resized_w = np.where(w <= h, recipe.crop.resize, np.floor(recipe.crop.resize * w / short))
        if isinstance(recipe.crop, WholeImage):
            one_box = np.stack((0 * w, 0 * h, resized_w, resized_h), axis=-1)
        else:
            one_box = _center_boxes(recipe.size, h, w, resized_h, resized_w)
        boxes = np.broadcast_to(one_box, (*u.shape[1:], 4))

    strength = np.stack(
        [column(f) for f in ("brightness", "contrast", "saturation", "hue")]
    )  # [4, V, 1]
    middle = np.array([1.0, 1.0, 1.0, 0.0])[:, None, None]
    low = np.where(middle == 1, np.maximum(0, middle - strength), -strength)
    factor = low + u[2:6] * (middle + strength - low)

    low_sigma, high_sigma = np.array([view.blur_sigma for view in recipe.views]).T[:, :, None]
    sigma = low_sigma + u[9] * (high_sigma - low_sigma)
    return ViewParams(
        boxes=boxes.astype(np.float32),
        flip=u[0] < column("flip_p"),
        jitter=u[1] < column("jitter_p"),
        jitter_order=_ORDERS[(u[6] * len(_ORDERS)).astype(np.intp)],
        jitter_factor=factor.transpose(1, 2, 0).astype(np.float32),
        gray=u[7] < column("gray_p"),
        blur_sigma=np.where(u[8] < column("blur_p"), sigma, 0).astype(np.float32),
        solarize=u[10] < column("solarize_p"),
    )


def _random_boxes(
    crop: RandomResizedCrop, u: NDArray[np.float64], h: Numbers, w: Numbers
) -> NDArray[np.float64]:
    """torchvision's RandomResizedCrop.get_params from uniforms [tries, 4, V, B]; boxes [V, B, 4]."""
    area = h * w * (crop.area[0] + u[:, 0] * (crop.area[1] - crop.area[0]))  # [tries, V, B]
    low, high = np.log(crop.ratio)
    ratio = np.exp(low + u[:, 1] * (high - low))
    box_w, box_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (box_w > 0) & (box_w <= w) & (box_h > 0) & (box_h <= h)
    left = np.floor(u[:, 2] * (w - box_w + 1))
    top = np.floor(u[:, 3] * (h - box_h + 1))
    tries = np.stack((left, top, left + box_w, top + box_h), axis=-1)  # [tries, V, B, 4]
    first = fits.argmax(axis=0)[None, :, :, None]
    chosen = np.take_along_axis(tries, first, axis=0)[0]

    # No try fitted (a long, thin image): the largest central box of an allowed ratio.
    image_ratio = w / h
    box_w = np.where(image_ratio > crop.ratio[1], np.rint(h * crop.ratio[1]), w)
    box_h = np.where(image_ratio < crop.ratio[0], np.rint(w / crop.ratio[0]), h)
    left, top = (w - box_w) // 2, (h - box_h) // 2
    central = np.stack((left, top, left + box_w, top + box_h), axis=-1)  # [1, B, 4]
    return np.where(fits.any(axis=0)[:, :, None], chosen, central)


def _center_boxes(
    size: int, h: Numbers, w: Numbers, resized_h: Numbers, resized_w: Numbers
) -> Numbers:
    """The fractional box [1, B, 4] that Resize's truncated long side and CenterCrop's rounded corner come to."""
    top, left = np.rint((resized_h - size) / 2), np.rint((resized_w - size) / 2)
    scale_y, scale_x = h / resized_h, w / resized_w
    return np.stack(
        (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y), axis=-1
    )
